"""Per verified caller: its nonces, against replay, and its budget of requests."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from bittensor import http_auth

from hiveminer.rpc.request import Declined
from hiveminer.rpc.signatures import ALLOWED_SKEW_SECONDS, MAX_AGE_SECONDS

MAX_NONCES = 200_000
"""Limit for callers without a validator permit. Validators are few, and each is bounded by its
budget."""

MAX_BUDGETS = 10_000
"""Only reached by an axon that serves unregistered hotkeys."""

RETENTION_SECONDS = MAX_AGE_SECONDS + ALLOWED_SKEW_SECONDS + 1.0


class Callers:
    """A nonce store for `http_auth.verify` that also charges the caller's budget.

    Bounded: nonces are dropped once they are too old to be accepted, and a caller over its budget
    adds none. is_validator: whether a hotkey holds a permit.
    """

    def __init__(
        self,
        *,
        requests_per_second: float,
        burst: int,
        is_validator: Callable[[str], bool],
        max_nonces: int = MAX_NONCES,
    ) -> None:
        self._rate = requests_per_second
        self._burst = float(burst)
        self._is_validator = is_validator
        self._max_nonces = max_nonces
        self._seen: set[tuple[str, int]] = set()
        self._expiry: deque[tuple[float, tuple[str, int]]] = deque()
        self._budgets: dict[str, tuple[float, float]] = {}
        self._started_ns = 0

    def start(self, now_ns: int) -> None:
        """Refuse what was signed before now: an earlier process may have served it."""
        self._started_ns = now_ns

    @property
    def remembered(self) -> int:
        """Number of requests remembered."""
        return len(self._seen)

    def check_and_store(self, hotkey_ss58: str, nonce_ns: int) -> bool:
        """False for a replay. Called by `http_auth.verify` once the signature is proved.

        Raises `StaleRequest` for what was signed before the start, `Declined` over budget.
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
            raise Declined("nonces", 503, "too many callers at once", retry_after_seconds=1.0)
        self._charge(hotkey_ss58, now)
        self._seen.add(nonce)
        self._expiry.append((now + RETENTION_SECONDS, nonce))
        return True

    def _charge(self, hotkey: str, now: float) -> None:
        if len(self._budgets) >= MAX_BUDGETS:
            self._budgets = {
                name: budget
                for name, budget in self._budgets.items()
                if self._left(budget, now) < self._burst
            }
        left = self._left(self._budgets.get(hotkey, (self._burst, now)), now)
        if left < 1.0:
            wait = (1.0 - left) / self._rate
            reason = f"more than {self._rate:g} requests per second"
            raise Declined("budget", 429, reason, retry_after_seconds=wait)
        self._budgets[hotkey] = (left - 1.0, now)

    def _left(self, budget: tuple[float, float], now: float) -> float:
        left, since = budget
        return min(self._burst, left + (now - since) * self._rate)
