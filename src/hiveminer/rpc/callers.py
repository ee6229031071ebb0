"""Per verified caller: its nonces, against replay, and its budget of requests."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from bittensor import http_auth

from hiveminer.errors import Refused
from hiveminer.rpc.connections import Limits

MAX_BUDGETS = 10_000
"""Only reached by an axon that serves unregistered hotkeys."""

RETENTION_SECONDS = http_auth.DEFAULT_MAX_AGE + http_auth.DEFAULT_ALLOWED_SKEW + 1.0


class Callers:
    """A nonce store for `http_auth.verify` that also charges the caller's budget.

    Bounded: nonces are dropped once they are too old to be accepted, and a caller over its budget
    adds none. is_validator: whether a hotkey holds a permit.
    """

    def __init__(self, limits: Limits, *, is_validator: Callable[[str], bool]) -> None:
        self._seconds_per_request = 1 / limits.requests_per_second
        self._burst_seconds = limits.burst / limits.requests_per_second
        self._max_nonces = limits.max_nonces
        self._is_validator = is_validator
        self._seen: set[tuple[str, int]] = set()
        self._expiry: deque[tuple[float, tuple[str, int]]] = deque()
        self._full_at: dict[str, float] = {}
        # What was signed before now, an earlier process may have served.
        self._started_ns = time.time_ns()

    def check_and_store(self, hotkey_ss58: str, nonce_ns: int) -> bool:
        """False for a replay. Called by `http_auth.verify` once the signature is proved.

        Raises `StaleRequest` for what was signed before the start, `Refused` over budget.
        """
        if nonce_ns < self._started_ns:
            raise http_auth.StaleRequest("signed before this neuron started; sign it anew")
        now = time.monotonic()
        while self._expiry and self._expiry[0][0] <= now:
            self._seen.discard(self._expiry.popleft()[1])
        nonce = (hotkey_ss58, nonce_ns)
        if nonce in self._seen:
            return False
        if len(self._seen) >= self._max_nonces and not self._is_validator(hotkey_ss58):
            raise Refused(503, "too many callers at once", kind="nonces", retry_after_seconds=1.0)
        self._charge(hotkey_ss58, now)
        self._seen.add(nonce)
        self._expiry.append((now + RETENTION_SECONDS, nonce))
        return True

    def _charge(self, hotkey: str, now: float) -> None:
        """A budget is stored as the time at which it will be full again."""
        if len(self._full_at) >= MAX_BUDGETS:
            self._full_at = {name: at for name, at in self._full_at.items() if at > now}
        full_at = max(now, self._full_at.get(hotkey, now)) + self._seconds_per_request
        wait = full_at - now - self._burst_seconds
        if wait > 0:
            reason = f"more than {1 / self._seconds_per_request:g} requests per second"
            raise Refused(429, reason, kind="budget", retry_after_seconds=wait)
        self._full_at[hotkey] = full_at
