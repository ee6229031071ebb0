"""A miner's part in a round: cuts what it has learned, and commits a record."""

from __future__ import annotations

import logging
from collections.abc import Callable

from hiveminer.strategies.sparseloco.apply import State
from hiveminer.strategies.sparseloco.checkpoint import write_journal
from hiveminer.strategies.sparseloco.follower import Follower
from hiveminer.strategies.sparseloco.parts import Parts
from hiveminer.strategies.sparseloco.records import decode_record
from hiveminer.strategies.sparseloco.rounds import Facts
from hiveminer.strategies.sparseloco.update import Tensors

logger = logging.getLogger(__name__)


class CuttingFollower(Follower):
    """Cuts what a miner has learned, and commits a record.

    weights: called with the round; a copy of the local weights since the last move, or why there
    is none yet, "" if there is nothing to cut.
    """

    def __init__(self, parts: Parts, *, start: State, weights: Callable[[int], Tensors | str]):
        super().__init__(parts, start=start)
        self._weights = weights

    def before_records(self, number: int) -> None:
        if self.committed == number:
            return
        position = self.replica.position
        self.why = number, self.problem or "the run's state has not arrived yet"
        if self.problem or position.base is None or position.round != number - 1:
            return
        if position.cut is not None:  # not committed so far, or before a restart
            own = self.replica.cuts[position.cut.blob_hash]
        else:
            copied = self._weights(number)
            if isinstance(copied, str):
                self.why = number, copied
                return
            try:
                own = self.replica.cut(number, copied)
            except ValueError as error:  # a weight is not finite: the trainer recovers from that
                self.why = number, str(error)
                return
            self.log.add_blob(own.blob)
            write_journal(self.log.folder, self.replica.position, self.replica.cuts)
        self.commit(number, own.record.encode())
        logger.info("round %d: committed an update of %d bytes", number, own.record.blob_bytes)

    def after_records(self, facts: Facts, head: int) -> None:
        """Serve our blob from now on: it is too late to copy it for this round."""
        cut = self.replica.position.cut
        for neuron in facts.neurons:
            if cut is not None and neuron.hotkey == self.replica.position.hotkey:
                self.shelf.serve(facts.round, neuron.uid, cut.blob_hash)

    def after_settling(self, facts: Facts) -> None:
        """Log why this peer missed a round, unless it has just started or had nothing to send."""
        record = decode_record(facts.records.get(self.replica.position.hotkey))
        known, why = self.why
        if known == -1 or (record is not None and record.round == facts.round):
            return
        if self.committed == facts.round:
            why = "the record came too late"
        elif known != facts.round:
            why = "the chain was not read while the cut was due"
        if why:
            logger.warning("round %d was missed: %s", facts.round, why)
