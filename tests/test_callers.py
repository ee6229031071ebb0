"""What is remembered of verified callers, and within what bounds."""

from __future__ import annotations

import time

import pytest

from hiveminer.errors import Refused
from hiveminer.rpc.callers import Callers
from hiveminer.rpc.connections import Limits


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
