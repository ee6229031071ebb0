"""What is remembered of verified callers, and within what bounds."""

from __future__ import annotations

import pytest

from hiveminer.rpc.callers import Callers
from hiveminer.rpc.request import Declined


def test_many_callers_without_a_permit_do_not_shut_out_a_validator() -> None:
    callers = Callers(
        requests_per_second=1,
        burst=10,
        is_validator=lambda hotkey: hotkey == "validator",
        max_nonces=5,
    )
    for number in range(5):
        assert callers.check_and_store(f"plain{number}", 1)
    with pytest.raises(Declined, match="too many callers") as refused:
        callers.check_and_store("plain5", 1)
    assert refused.value.status == 503
    assert callers.check_and_store("validator", 1)
    assert not callers.check_and_store("validator", 1)
