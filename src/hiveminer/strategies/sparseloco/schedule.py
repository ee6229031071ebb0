"""The deadlines of a round in blocks, and whether a schedule works on a subnet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from hiveminer.config.run import SparselocoSection

CALL_BYTES = 100
"""The space that the chain charges for a commitment of up to this size; ours are shorter."""

SPACE_BYTES = 3100
"""The space that a hotkey has in one epoch of the subnet, unless the chain says otherwise."""

MAX_ROUND_BLOCKS = 200
"""A pruned node keeps the state of about 256 blocks, and a round's first block must still be among
them when the round is decided."""


@dataclass(frozen=True)
class Latency:
    """Blocks from a cut to its settling, stage by stage, on one kind of network."""

    encode: int = 1
    inclusion: int = 2
    finality: int = 3
    fetch: int = 4
    apply: int = 2

    @property
    def blocks(self) -> int:
        """All stages; a record and a mark each have to be included and become final."""
        return self.encode + 2 * (self.inclusion + self.finality) + self.fetch + self.apply


CHAIN_LATENCY = Latency()
"""Blocks of 12 seconds."""

EMBEDDED_LATENCY = Latency(inclusion=1, finality=2)
"""Blocks of 1 second, final two blocks behind the head."""


def latency_of(*, embedded: bool) -> Latency:
    return EMBEDDED_LATENCY if embedded else CHAIN_LATENCY


@dataclass(frozen=True)
class Schedule:
    """Deadlines in blocks. "At a block" means after all of its calls.

    round_blocks: length of a round. mark_blocks: from the records' deadline to the marks'.
    cut_blocks: from the earliest cut to the records' deadline.
    """

    round_blocks: int = 50
    mark_blocks: int = 10
    cut_blocks: int = 4

    @classmethod
    def of(cls, section: SparselocoSection) -> Self:
        return cls(section.round_blocks, section.mark_blocks, section.cut_blocks)

    def round_at(self, block: int) -> int:
        """The round of a block."""
        return block // self.round_blocks

    def first_block(self, number: int) -> int:
        """The block of the round's snapshot of hotkeys, permits, stakes and incentives."""
        return number * self.round_blocks

    def cut_block(self, number: int) -> int:
        """The cut happens after the first step that ends at this block or later."""
        return self.records_block(number) - self.cut_blocks

    def records_block(self, number: int) -> int:
        """D: records are read at this block, and blobs are served once it is final."""
        return self.marks_block(number) - self.mark_blocks

    def marks_block(self, number: int) -> int:
        """M: marks are read at this block; the round is decided once it is final."""
        return (number + 1) * self.round_blocks

    def newest_final_round(self, final_block: int) -> int:
        """The newest round that can be decided; -1 if there is none yet."""
        return final_block // self.round_blocks - 1


def schedule_problems(
    schedule: Schedule,
    *,
    tempo: int,
    roles: int,
    latency: Latency = CHAIN_LATENCY,
    space_bytes: int | None = None,
) -> list[str]:
    """Why this schedule does not work on this subnet, one line per problem.

    tempo: the subnet's, in blocks; an epoch is one block longer. roles: 1 for a hotkey
    that mines or validates, 2 for one that does both. space_bytes: what a hotkey may commit in
    one epoch.
    """
    space = space_bytes or SPACE_BYTES
    length, marks, cut = schedule.round_blocks, schedule.mark_blocks, schedule.cut_blocks
    problems = []
    if tempo < 1:
        problems.append("the subnet's tempo is 0: its space for commitments is never renewed")
    elif space * length < CALL_BYTES * roles * (tempo + 1):
        least = -(-CALL_BYTES * roles * (tempo + 1) // space)
        problems.append(
            f"round_blocks {length} needs more space for commitments than the chain grants in "
            f"{tempo + 1} blocks: at least {least} with {roles} commitments per round"
        )
    if length <= latency.blocks:
        problems.append(
            f"round_blocks {length} is too short: {latency.blocks} blocks pass from a cut to "
            "its settling"
        )
    if length > MAX_ROUND_BLOCKS:
        problems.append(
            f"round_blocks {length} is too long: a pruned node no longer has a round's first "
            f"block when it is decided; at most {MAX_ROUND_BLOCKS}"
        )
    if cut < latency.encode + latency.inclusion:
        problems.append(
            f"cut_blocks {cut} is too short to encode and commit a blob: at least "
            f"{latency.encode + latency.inclusion}"
        )
    if marks < latency.finality + latency.fetch + latency.inclusion:
        problems.append(
            f"mark_blocks {marks} is too short to fetch, check and mark the blobs: at least "
            f"{latency.finality + latency.fetch + latency.inclusion}"
        )
    if length - marks - cut < latency.finality + latency.apply:
        problems.append(
            f"the cut is {length - marks - cut} blocks into the round, before the previous "
            f"round has settled: at least {latency.finality + latency.apply}"
        )
    return problems
