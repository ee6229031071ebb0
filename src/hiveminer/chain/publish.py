"""Keeps a neuron's entries on chain: publishes them, and again whenever they are missing."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from bittensor import Metagraph

from hiveminer.chain.client import Chain
from hiveminer.errors import ChainError

logger = logging.getLogger(__name__)

RETRY_SECONDS, EMBEDDED_RETRY_SECONDS = 60.0, 2.0
"""Seconds before an entry that is still missing is published again."""


@dataclass
class _Entry:
    """next_at is a monotonic time."""

    what: str
    is_there: Callable[[Metagraph], bool]
    put: Callable[[], None]
    next_at: float = 0.0


class Publisher:
    """Keeps entries on chain through outages, rate limits and reorganizations."""

    def __init__(self, chain: Chain):
        self.chain = chain
        self._entries: list[_Entry] = []

    def add(
        self,
        what: str,
        metagraph: Metagraph,
        *,
        is_there: Callable[[Metagraph], bool],
        put: Callable[[], None],
    ) -> None:
        """Publish an entry now, unless it is in the metagraph, and again in later `sync`s.

        Raises OperatorError for one that the chain would never accept.
        """
        entry = _Entry(what, is_there, put)
        self._publish(entry, metagraph)
        self._entries.append(entry)

    def sync(self, metagraph: Metagraph) -> None:
        """Publish the entries that are missing in this metagraph."""
        for entry in self._entries:
            self._publish(entry, metagraph)

    def _publish(self, entry: _Entry, metagraph: Metagraph) -> None:
        if entry.is_there(metagraph) or time.monotonic() < entry.next_at:
            return
        pause = EMBEDDED_RETRY_SECONDS if self.chain.embedded else RETRY_SECONDS
        entry.next_at = time.monotonic() + pause
        try:
            entry.put()
        except ChainError as error:
            logger.warning("our %s is not on the chain yet: %s", entry.what, error)
