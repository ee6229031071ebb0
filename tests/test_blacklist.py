"""Who may call, and what is remembered of verified callers."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from small_neurons import SmallMiner, miner_settings

from hiveminer.chain import join_embedded
from hiveminer.config.settings import BlacklistSettings as Policy
from hiveminer.errors import Refused
from hiveminer.protocol import Train
from hiveminer.rpc.blacklist import STRANGER, Standing, refusal
from hiveminer.rpc.callers import Callers
from hiveminer.rpc.connections import Limits

VALIDATOR = Standing(registered=True, validator_permit=True, stake=10.0)
MINER = Standing(registered=True, validator_permit=False, stake=0.0)


@pytest.mark.parametrize(
    ("standing", "policy", "needs_permit", "reason"),
    [
        (VALIDATOR, Policy(), True, None),
        (VALIDATOR, Policy(), False, None),
        (MINER, Policy(), False, None),
        (MINER, Policy(), True, "permit"),
        (MINER, Policy(force_validator_permit=False), True, None),
        (STRANGER, Policy(), False, "not registered"),
        (STRANGER, Policy(), True, "not registered"),
        (STRANGER, Policy(allow_non_registered=True), False, None),
        (STRANGER, Policy(allow_non_registered=True), True, "permit"),
        (STRANGER, Policy(allow_non_registered=True, force_validator_permit=False), True, None),
        (VALIDATOR, Policy(min_stake=10.0), True, None),
        (VALIDATOR, Policy(min_stake=10.5), True, "stake of 10 TAO is below 10.5"),
        (VALIDATOR, Policy(min_stake=10.5), False, None),
    ],
)
def test_refusal(
    standing: Standing, policy: Policy, needs_permit: bool, reason: str | None
) -> None:
    said = refusal(standing, policy, needs_permit=needs_permit)
    assert (said is None) == (reason is None)
    assert reason is None or (said is not None and reason in said)


def test_a_miner_judges_by_its_settings_and_the_last_metagraph(tmp_path: Path) -> None:
    settings = miner_settings(tmp_path, blacklist={"force_validator_permit": False, "min_stake": 9})
    with SmallMiner(settings) as miner:
        request = Train.model_construct()
        request.dendrite.hotkey = miner.neuron.hotkey
        assert miner.blacklist(request) == (True, "this hotkey's stake of 0 TAO is below 9")
        join_embedded(miner.neuron.chain, stake_tao=10.0)
        miner.neuron.read_metagraph()
        assert miner.blacklist(request) == (False, "")
        assert miner.priority(request) == 10.0


def test_many_callers_without_a_permit_do_not_shut_out_a_validator() -> None:
    callers = Callers(Limits(max_nonces=5), is_validator=lambda hotkey: hotkey == "validator")
    now = time.time_ns()
    for number in range(5):
        assert callers.check_and_store(f"plain{number}", now)
    with pytest.raises(Refused, match="too many callers") as refused:
        callers.check_and_store("plain5", now)
    assert refused.value.status == 503
    assert callers.check_and_store("validator", now)
    assert not callers.check_and_store("validator", now)
