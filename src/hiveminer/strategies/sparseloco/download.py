"""A state's download, in a thread: it may outlast a round."""

from __future__ import annotations

import threading
from collections.abc import Mapping

import torch

from hiveminer.strategies.sparseloco.apply import State
from hiveminer.strategies.sparseloco.parts import Fetcher


class StateDownload:
    """Downloads the parent state of a round.

    number: of the round, if it is known. The other arguments are those of `Fetcher.fetch_state`.
    """

    def __init__(
        self,
        exchange: Fetcher,
        digest: bytes,
        shapes: Mapping[str, torch.Size],
        *,
        number: int | None,
        timeout_seconds: float,
        idle_seconds: float,
    ):
        self.digest = digest
        self.number = number
        self.state: State | None = None
        """What was downloaded; None if that did not succeed."""

        def fetch() -> None:
            self.state = exchange.fetch_state(
                digest, shapes, timeout_seconds=timeout_seconds, idle_seconds=idle_seconds
            )

        self._thread = threading.Thread(target=fetch, name="state", daemon=True)
        self._thread.start()

    def has_ended(self, *, within_seconds: float) -> bool:
        """Wait this long for the end, and say whether it has come."""
        self._thread.join(within_seconds)
        return not self._thread.is_alive()
