"""Who may call."""

from __future__ import annotations

import pytest

from hiveminer.config.settings import BlacklistSettings as Policy
from hiveminer.rpc.blacklist import STRANGER, Standing, refusal

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
