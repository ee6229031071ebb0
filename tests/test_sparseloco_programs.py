"""Strategy `sparseloco` with real programs on the embedded network."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_neurons import small_run

from hiveminer.commands.demo_rounds import rounds_summary
from programs import Network

RUN = """
strategy = "sparseloco"
{base}
[sparseloco]
round_blocks = 15
mark_blocks = 7
cut_blocks = 2
density = 1.0
"""


@pytest.mark.timeout(300)
def test_two_miners_and_a_validator_hold_the_same_states(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    base = small_run(tmp_path / "run").read_text()
    with Network(tmp_path / "net", run=RUN.format(base=base)) as network:
        blocks = ("--subtensor.block_seconds", "0.5")
        validator = network.start("validator", "--validator.weights_seconds", "5", *blocks)
        miners = [network.start(f"miner-{number}", *blocks) for number in range(2)]
        validator.says(": 2 updates count", seconds=200)
        network.wait_for_numbers("weights", lambda lines: len(lines) > 0, seconds=60)
        weights = network.numbers("weights")[-1]["weights"]
        for program in (validator, *miners):
            assert program.interrupt(seconds=30) == 0, program.words
    summary = rounds_summary(tmp_path / "net" / "state")
    assert summary["rounds"] >= 1
    assert summary["hashes_equal"], summary
    assert summary["log_verified"], summary
    assert sum(weights.values()) == pytest.approx(1.0)
