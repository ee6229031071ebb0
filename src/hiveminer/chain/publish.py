"""Keeps a neuron's entries on chain: publishes them, and again whenever they are missing."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from bittensor import Metagraph

from hiveminer.chain.client import Chain
from hiveminer.errors import ChainError

logger = logging.getLogger(__name__)


class Publisher:
    """Keeps entries on chain through outages, rate limits and reorganizations."""

    def __init__(self, chain: Chain):
        # Before an entry that is still missing is published again.
        self._pause_seconds = 2.0 if chain.embedded else 60.0
        self._entries: list[Callable[[Metagraph], None]] = []

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
        next_at = 0.0

        def publish(graph: Metagraph) -> None:
            nonlocal next_at
            if is_there(graph) or time.monotonic() < next_at:
                return
            next_at = time.monotonic() + self._pause_seconds
            try:
                put()
            except ChainError as error:
                logger.warning("our %s is not on the chain yet: %s", what, error)

        publish(metagraph)
        self._entries.append(publish)

    def sync(self, metagraph: Metagraph) -> None:
        """Publish the entries that are missing in this metagraph."""
        for publish in self._entries:
            publish(metagraph)
