"""When calls to the chain are retried.

- A read whose connection breaks is retried a few times within its deadline.
- A write is sent once. One without an answer may have arrived, so its sender checks the chain
  before sending it again (`weights`, `publish`).
- Weights, which must get through in the end, are retried across an outage, at growing intervals.

What the chain refuses is not retried.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import Event
from typing import TypeVar

import bittensor as bt
from tenacity import (
    AsyncRetrying,
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

TRANSIENT = (bt.RpcConnectionError, OSError)
"""What the SDK raises for a broken connection, as opposed to a bad request."""

T = TypeVar("T")


def of_reads(attempts: int) -> AsyncRetrying:
    """Retries of a read on the event loop; the caller sets the deadline."""
    return AsyncRetrying(
        stop=stop_after_attempt(attempts),
        wait=wait_exponential(multiplier=0.2, max=5.0) + wait_random(0.0, 0.2),
        retry=retry_if_exception_type(TRANSIENT),
        reraise=True,
    )


def across_outage(act: Callable[[], T], *, stopping: Event, first_pause_seconds: float) -> T:
    """Call `act` until the chain answers, for up to an hour, with jittered pauses that grow to a
    minute.

    Ends early when `stopping` is set. Raises the last ChainError; a refusal by the chain is raised
    at once.
    """
    retrying = Retrying(
        sleep=sleep_using_event(stopping),
        stop=stop_any(stop_when_event_set(stopping), stop_after_delay(3600.0)),
        wait=wait_exponential(multiplier=first_pause_seconds, max=60.0)
        + wait_random(0.0, first_pause_seconds),
        retry=retry_if_exception(lambda e: isinstance(e, ChainError) and not e.refused),
        reraise=True,
    )
    return retrying(act)
