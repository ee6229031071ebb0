"""A miner's part in a round: cuts what it has learned, and commits a record."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

from hiveminer.strategies.sparseloco.apply import State
from hiveminer.strategies.sparseloco.follower import Follower
from hiveminer.strategies.sparseloco.parts import Parts
from hiveminer.strategies.sparseloco.replica import Replica
from hiveminer.strategies.sparseloco.rounds import Facts
from hiveminer.strategies.sparseloco.update import Tensors

logger = logging.getLogger(__name__)


class CuttingFollower(Follower):
    """Cuts what a miner has learned, and commits a record.

    weights: called with the round; a copy of the local weights since the last move, as (number of
    moves, tensors), or None, which requests one at the end of the running step. has_trained:
    whether there is anything to cut. save_cut: called before the record is committed.
    """

    def __init__(
        self,
        replica: Replica,
        parts: Parts,
        *,
        start_state: State,
        weights: Callable[[int], tuple[int, Tensors] | None],
        has_trained: Callable[[], bool],
        save_cut: Callable[[], None],
    ):
        super().__init__(replica, parts, start_state=start_state)
        self._weights = weights
        self._has_trained = has_trained
        self._save_cut = save_cut
        self._looked_back = -1

    def before_records(self, number: int) -> None:
        position = self.replica.position
        self.why = number, self.problem or "the run's state has not arrived yet"
        if self.problem or position.base is None or position.round != number - 1:
            return
        if position.cut is None:
            copied = self._weights(number)
            if copied is None or copied[0] != self.replica.moves:
                late = "no training step ended after the cut was due"
                self.why = number, late if self._has_trained() else ""
                return
            try:
                blob = self.replica.cut(number, copied[1]).blob
            except ValueError as error:  # a weight is not finite: the trainer recovers from that
                self.why = number, str(error)
                return
            self.log.add_blob(blob)
            self._save_cut()
        if self.committed == number:
            return
        record = self.replica.record
        self.commit(number, record.encode())
        logger.info("round %d: committed an update of %d bytes", number, record.blob_bytes)

    def after_records(self, facts: Facts, head: int) -> None:
        """Serve our blob from now on: it is too late to copy it for this round."""
        cut = self.replica.position.cut
        if self._looked_back < facts.round:
            self._looked_back = facts.round
            self._look_back(facts.round, facts.records)
        for neuron in facts.neurons:
            if cut is not None and neuron.hotkey == self.replica.position.hotkey:
                self.shelf.serve(facts.round, neuron.uid, cut.blob_hash)

    def _look_back(self, number: int, records: Mapping[bytes, bytes]) -> None:
        """Log why this peer missed a round, unless it had nothing to send."""
        cut = self.replica.position.cut
        if cut is not None and cut.round == number:
            if records.get(self.replica.position.hotkey) == self.replica.record.encode():
                return
            if self.committed == number:
                logger.warning("round %d was missed: the record came too late", number)
                return
        known, why = self.why
        if known == -1 or (known == number and not why):
            return  # this peer has just started, or had nothing to send
        why = why if known == number else "the chain was not read while the cut was due"
        logger.warning("round %d was missed: %s", number, why)
