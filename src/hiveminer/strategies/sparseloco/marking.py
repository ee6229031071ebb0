"""A validator's part in a round: fetches blobs, checks them, and commits a mark."""

from __future__ import annotations

import logging

from hiveminer.strategies.sparseloco.apply import CountedBlob, read_blob
from hiveminer.strategies.sparseloco.codec import BlobError, Header
from hiveminer.strategies.sparseloco.follower import Follower
from hiveminer.strategies.sparseloco.records import Mark, decode_mark, witness
from hiveminer.strategies.sparseloco.rounds import Facts, candidates, first_places

logger = logging.getLogger(__name__)

MARGIN_BLOCKS = 2
"""A mark is committed this many blocks before its deadline, with what has been fetched by then."""


class MarkingFollower(Follower):
    """Fetches the blobs of a round, checks them, and commits a mark."""

    def after_records(self, facts: Facts, head: int) -> None:
        base = self.replica.position.base
        deadline = self.plan.rules.schedule.marks_block(facts.round)
        if self.committed == facts.round or head >= deadline:
            return
        if base is None or self.problem:
            self.why = facts.round, self.problem or "the run's state has not arrived yet"
            return
        if self.replica.position.hotkey not in {n.hotkey for n in facts.neurons if n.permit}:
            return  # a mark would not count
        blobs = self._check(facts, base, deadline)
        mark = Mark(
            self.plan.rules.run, facts.round, base, frozenset(blobs),
            witness(self.replica.position.hotkey, blobs),
        )  # fmt: skip
        self.commit(facts.round, mark.encode())
        logger.info("round %d: marked %d updates", facts.round, len(blobs))

    def after_settling(self, facts: Facts) -> None:
        """Log why our mark is missing in a round in which it would have counted."""
        own = self.replica.position.hotkey
        mark = decode_mark(facts.marks.get(own))
        if mark is not None and mark.round == facts.round:
            return
        if own in {n.hotkey for n in facts.neurons if n.permit}:
            is_late = self.committed == facts.round
            why = "it came too late" if is_late else "there was no time for it"
            if self.why[0] == facts.round:
                why = self.why[1]
            logger.warning("round %d: our mark is missing: %s", facts.round, why)

    def _check(self, facts: Facts, base: bytes, deadline: int) -> dict[int, bytes]:
        """The valid blobs that arrived in time, by uid."""
        rules = self.plan.rules
        left = candidates(rules, facts, base)
        good: dict[int, bytes] = {}
        until = deadline - MARGIN_BLOCKS
        while len(good) < rules.max_contributors:
            seconds = (until - self.chain.head()) * self.chain.block_seconds
            chosen = first_places(
                left, places=rules.max_contributors, records_hash=facts.records_block.hash
            )
            todo = [neuron for neuron in chosen if neuron.uid not in good]
            if not todo or seconds <= 0 or self.stopping.is_set():
                break
            self.downloads.blobs(facts.round, [left[each] for each in todo], seconds=seconds)
            before = len(left)
            for neuron in todo:
                blob = self.log.blob(left[neuron].blob_hash)
                if blob is None:
                    continue
                header = Header(neuron.hotkey, rules.run, facts.round, base)
                try:
                    if len(blob) != left[neuron].blob_bytes:
                        raise BlobError("its length differs from its record")
                    counted = CountedBlob(neuron.uid, header, blob)
                    read_blob(counted, shapes=self.plan.shapes, compression=self.plan.compression)
                    good[neuron.uid] = blob
                except BlobError as error:
                    logger.info("the blob of uid %d is not marked: %s", neuron.uid, error)
                    del left[neuron]
            if len(left) == before:
                break
        return good
