"""Who does not work earns next to nothing: an honest miner beside three that are not."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from talk import hotkey_of

from programs import Network

SCRIPT = Path(__file__).resolve().parent / "dishonest.py"
REPLAYS = {"honest": 3, "forwardonly": 2, "inventor": 2, "copycat": 2}
KINDS = tuple(REPLAYS)

RUN = """
[model]
sequence_length = 256
[swarm]
epoch_samples = 128
"""


@pytest.mark.slow
@pytest.mark.timeout(420)
def test_the_idle_and_the_lying_earn_under_a_fifth_of_the_honest(tmp_path: Path) -> None:
    with Network(tmp_path, run=RUN) as network:
        board = str(tmp_path / "board.json")
        miners = {
            kind: network.start(
                f"miner-{kind}", kind, board, "--wallet.hotkey", kind, script=SCRIPT
            )
            for kind in KINDS
        }
        network.start(
            "validator",
            *("--validator.rows", "40", "--validator.batch_size", "4"),
            *("--validator.sample_rate", "1", "--validator.weights_seconds", "5"),
        )
        for program in miners.values():
            program.says("serving on", seconds=90)
        by_key = {kind: hotkey_of(program) for kind, program in miners.items()}

        def judged(lines: list[dict[str, Any]]) -> bool:
            # The honest one is paid in full for rows that tell nothing; the others have to be seen.
            honest = by_key["honest"]
            counts = Counter(x["hotkey"] for x in lines if x["judged"] or x["hotkey"] == honest)
            return all(counts[key] >= REPLAYS[kind] for kind, key in by_key.items())

        evidence = network.wait_for_numbers("evidence", judged, seconds=260)
        after = evidence[-1]["time"]
        weights = network.wait_for_numbers(
            "weights", lambda lines: any(line["time"] > after for line in lines), seconds=60
        )[-1]["weights"]
        uids = {kind: _uid(program.words) for kind, program in miners.items()}
        earned = {kind: weights.get(uid, 0.0) for kind, uid in uids.items()}
        seen = "\n".join(
            f"{line['hotkey'][:6]} epoch {line['epoch']} fit {line['fit']} "
            f"learning {line['learning']} score {line['score']:.2f}"
            for line in evidence
        )
        told = f"{earned}\n{by_key}\n{seen}"
        assert earned["honest"] > 0, told
        for kind in KINDS[1:]:
            assert earned[kind] < 0.2 * earned["honest"], told
        print(told)


def _uid(words: str) -> str:
    found = re.search(r": uid (\d+) on subnet", words)
    assert found is not None, words
    return found[1]
