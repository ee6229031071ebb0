"""A validator's part in a round: fetches blobs, checks them, and commits a mark."""

from __future__ import annotations

import logging

from hiveminer.errors import ChainError
from hiveminer.strategies.sparseloco.apply import CountedBlob, read_blob
from hiveminer.strategies.sparseloco.codec import BlobError, Header
from hiveminer.strategies.sparseloco.follower import Follower, Reading
from hiveminer.strategies.sparseloco.records import Mark, decode_mark, decode_record, witness
from hiveminer.strategies.sparseloco.rounds import (
    Block,
    Contribution,
    Facts,
    candidates,
    first_places,
)

logger = logging.getLogger(__name__)

MARGIN_BLOCKS = 2
"""A mark is committed this many blocks before its deadline, with what has been fetched by then."""


class MarkingFollower(Follower):
    """Fetches the blobs of a round, checks them, and commits a mark."""

    _marked = -1
    _why = (-1, "")

    def before_records(self, number: int, head: int) -> None:
        """There is nothing to check yet."""

    def after_records(self, reading: Reading, head: int) -> None:
        base = self.replica.position.base
        deadline = self.plan.rules.schedule.marks_block(reading.number)
        if self._marked == reading.number or head >= deadline:
            return
        if base is None or self.problem:
            self._why = reading.number, self.problem or "the run's state has not arrived yet"
            return
        if self.replica.position.hotkey not in {n.hotkey for n in reading.neurons if n.permit}:
            return  # a mark would not count
        blobs = self._check(reading, base, deadline)
        mark = Mark(
            self.plan.rules.run, reading.number, base, frozenset(blobs),
            witness(self.replica.position.hotkey, blobs),
        )  # fmt: skip
        try:
            self.chain.commit(mark.encode())
        except ChainError as error:
            self._why = reading.number, str(error)
            raise
        self._marked = reading.number
        logger.info("round %d: marked %d updates", reading.number, len(blobs))

    def after_settling(self, facts: Facts) -> None:
        """Log why our mark is missing in a round in which it would have counted."""
        own = self.replica.position.hotkey
        mark = decode_mark(facts.marks.get(own))
        if mark is not None and mark.round == facts.round:
            return
        if own in {n.hotkey for n in facts.neurons if n.permit}:
            known, why = self._why
            late = "it came too late" if self._marked == facts.round else "there was no time for it"
            why = why if known == facts.round else late
            logger.warning("round %d: our mark is missing: %s", facts.round, why)

    def _check(self, reading: Reading, base: bytes, deadline: int) -> dict[int, bytes]:
        """The valid blobs that arrived in time, by uid."""
        rules = self.plan.rules
        assert reading.first_block is not None
        assert reading.records_block is not None
        assert reading.records is not None
        facts = Facts(
            reading.number, reading.first_block, reading.records_block,
            Block(rules.schedule.marks_block(reading.number), b""),
            reading.neurons, reading.records, {},
        )  # fmt: skip
        left = list(candidates(rules, facts, base))
        good: dict[int, bytes] = {}
        until = deadline - MARGIN_BLOCKS
        while len(good) < rules.max_contributors:
            seconds = (until - self.chain.head()) * self.chain.block_seconds
            chosen = first_places(
                left, places=rules.max_contributors, records_hash=reading.records_block.hash
            )
            todo = [neuron for neuron in chosen if neuron.uid not in good]
            if not todo or seconds <= 0 or self.stopping.is_set():
                break
            wanted = []
            for neuron in todo:
                record = decode_record(reading.records[neuron.hotkey])
                assert record is not None  # or the neuron is not a candidate
                wanted.append(
                    Contribution(neuron.uid, neuron.hotkey, record.blob_bytes, record.blob_hash)
                )
            self.downloads.blobs(reading.number, wanted, seconds=seconds)
            bad = set()
            for each in wanted:
                blob = self.log.blob(each.blob_hash)
                if blob is None:
                    continue
                header = Header(each.hotkey, rules.run, reading.number, base)
                try:
                    if len(blob) != each.blob_bytes:
                        raise BlobError("its length differs from its record")
                    counted = CountedBlob(each.uid, header, blob)
                    read_blob(counted, shapes=self.plan.shapes, compression=self.plan.compression)
                    good[each.uid] = blob
                except BlobError as error:
                    logger.info("the blob of uid %d is not marked: %s", each.uid, error)
                    bad.add(each.uid)
            if not bad:
                break
            left = [neuron for neuron in left if neuron.uid not in bad]
        return good
