"""When the chain is asked again: every policy there is, in one place.

- A read that met a broken connection is repeated a few times within its own deadline.
- A write is sent once. Whether one that got no answer has arrived nobody knows, so whoever
  sent it looks at the chain before it is sent again (`weights`, `publish`).
- What must get through in the end (weights) is tried across an outage, ever more slowly.

What the chain refuses it will refuse again; that is never repeated blindly.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import Event
from typing import TypeVar

import bittensor as bt
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    Retrying,
    retry_if_exception,
    retry_if_exception_type,
    stop_after_attempt,
    stop_after_delay,
    stop_any,
    stop_when_event_set,
    wait_exponential,
    wait_random,
)
from tenacity.nap import sleep_using_event

from hiveminer.errors import ChainError

READ_ATTEMPTS = 3

OUTAGE_SECONDS = 3600.0
"""So long one attempt to get through lasts; whoever needs it then begins another."""

FIRST_PAUSE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 60.0

TRANSIENT = (bt.RpcConnectionError, ConnectionError, OSError)
"""What the SDK raises when the way is broken, and not the request."""

T = TypeVar("T")


def of_reads(attempts: int) -> AsyncRetrying:
    """For one call on the event loop; its caller sets the deadline."""
    return AsyncRetrying(
        stop=stop_after_attempt(attempts),
        wait=wait_exponential(multiplier=0.2, max=5.0) + wait_random(0.0, 0.2),
        retry=retry_if_exception_type(TRANSIENT),
        reraise=True,
    )


def across_outage(
    act: Callable[[], T],
    *,
    stopping: Event,
    on_failure: Callable[[ChainError], None] = lambda error: None,
    first_pause_seconds: float = FIRST_PAUSE_SECONDS,
) -> T:
    """Do it until the chain answers; the pauses grow to a minute, each a little by chance.

    `on_failure` is told of each failed attempt. Ends early when `stopping` is set. Raises
    the last ChainError, and at once one in which the chain did answer.
    """

    def told(state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome is not None else None
        if isinstance(error, ChainError):
            on_failure(error)

    retrying = Retrying(
        sleep=sleep_using_event(stopping),
        stop=stop_any(stop_when_event_set(stopping), stop_after_delay(OUTAGE_SECONDS)),
        wait=wait_exponential(multiplier=first_pause_seconds, max=LONGEST_PAUSE_SECONDS)
        + wait_random(0.0, first_pause_seconds),
        retry=retry_if_exception(_no_answer),
        before_sleep=told,
        reraise=True,
    )
    return retrying(act)


def _no_answer(error: BaseException) -> bool:
    return isinstance(error, ChainError) and not error.refused
