"""A miner's part in a round: it cuts what was learned, and commits a record."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from hiveminer.strategies.sparseloco.follower import Follower, Reading
from hiveminer.strategies.sparseloco.replica import Replica

logger = logging.getLogger(__name__)


class CuttingFollower(Follower):
    """A miner's: cuts what was learned, and commits a record.

    weights: a copy of the local weights since the last move, as (count of moves, tensors);
    None when there is none yet, which asks for one at the end of the running step.
    """

    def __init__(
        self,
        replica: Replica,
        *,
        weights: Callable[[int], tuple[int, list[torch.Tensor]] | None],
        saved: Callable[[], None] = lambda: None,
        **options: object,
    ):
        super().__init__(replica, **options)  # type: ignore[arg-type]
        self._weights = weights
        self._saved = saved
        self._committed = -1

    def before_records(self, number: int, head: int) -> None:
        position = self.replica.position
        if self.problem or position.base is None or position.round != number - 1:
            return
        if position.cut is None:
            copied = self._weights(number)
            if copied is None or copied[0] != self.replica.moves:
                return
            self.log.add_blob(self.replica.cut(number, copied[1]).blob)
            self._saved()
        if self._committed == number:
            return
        record = self.replica.record
        self.chain.commit(record.encode())
        self._committed = number
        logger.info("round %d: an update of %d bytes committed", number, record.blob_bytes)

    def after_records(self, reading: Reading, head: int) -> None:
        """Serve the own blob from now on: nobody can copy it for this round any more."""
        cut = self.replica.position.cut
        assert reading.records is not None
        for neuron in reading.neurons:
            if cut is not None and neuron.hotkey == self.replica.position.hotkey:
                self.shelf.serve(reading.number, neuron.uid, cut.blob_hash)
