"""The rounds' view of a subnet: final blocks, snapshots and raw commitments, through `Chain`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import bittensor as bt

from hiveminer.chain import Chain
from hiveminer.chain.client import committed_bytes
from hiveminer.errors import ChainError
from hiveminer.strategies.sparseloco.rounds import Block, Facts, Neuron
from hiveminer.strategies.sparseloco.schedule import Schedule

VALID_BLOCKS = 8
"""A record or a mark expires after this many blocks: it would be too late anyway."""

BLOCK_SECONDS = 12.0
"""Block time to assume while the chain does not answer."""

T = TypeVar("T")


class SubnetRounds:
    """A subnet of a real or an embedded chain, as the rounds need it; all methods raise ChainError.

    `snapshot` and `commitments` read the state after a block, which must be final, and whose hash
    must be the same before and after. Hotkeys are 32 bytes.
    """

    def __init__(self, chain: Chain):
        self.chain = chain
        try:
            self.block_seconds = chain.block_seconds()
        except ChainError:
            self.block_seconds = BLOCK_SECONDS

    def head(self) -> int:
        """The newest block."""
        return self.chain.block()

    def final_head(self) -> int:
        """The newest final block."""
        return self.chain.final_block()

    def snapshot(self, number: int) -> tuple[Block, tuple[Neuron, ...]]:
        """The subnet's neurons at a block."""
        method, netuid = ("SubnetInfoRuntimeApi", "get_metagraph"), self.chain.netuid
        block, graph = self._read(
            number, lambda client: client.runtime(method, [netuid], block=number)
        )
        if graph is None:
            return block, ()
        names = ("hotkeys", "validator_permit", "total_stake", "incentives")
        rows = zip(*(graph[name] for name in names), strict=True)
        return block, tuple(
            Neuron(uid, public_key(hotkey), bool(permit), int(stake), int(incentive))
            for uid, (hotkey, permit, stake, incentive) in enumerate(rows)
        )

    def commitments(self, number: int) -> tuple[Block, Mapping[bytes, bytes]]:
        """The raw commitments at a block, by hotkey."""
        item, netuid = ("Commitments", "CommitmentOf"), self.chain.netuid
        block, found = self._read(
            number, lambda client: client.query_map(item, [netuid], block=number)
        )
        raw = {public_key(who): committed_bytes(each["info"]["fields"]) for who, each in found}
        return block, {hotkey: data for hotkey, data in raw.items() if data is not None}

    def commit(self, data: bytes) -> None:
        """Replace this hotkey's commitment within the next few blocks, or never, before other
        waiting calls of this hotkey."""
        self.chain.commit(data, valid_blocks=VALID_BLOCKS, urgent=True)

    def _read(self, number: int, ask: Callable[[bt.Client], Awaitable[T]]) -> tuple[Block, T]:
        doing = f"reading block {number}"

        async def read(client: bt.Client) -> tuple[Block, T]:
            if number > await client.finalized_block():
                raise ChainError(f"{doing}: it is not final yet")
            before = await _hash(client, number)
            found = await ask(client)
            if before != await _hash(client, number):
                raise ChainError(f"{doing}: its hash changed meanwhile")
            return Block(number, before), found

        return self.chain.read(doing, read)


def read_records(chain: SubnetRounds, schedule: Schedule, number: int) -> Facts:
    """What is known of a round once its records are final: its facts, without marks."""
    first_block, neurons = chain.snapshot(schedule.first_block(number))
    records_block, records = chain.commitments(schedule.records_block(number))
    marks_block = Block(schedule.marks_block(number), b"")
    return Facts(number, first_block, records_block, marks_block, neurons, records, {})


def read_marks(chain: SubnetRounds, facts: Facts) -> Facts:
    """These facts with the marks, once they are final."""
    block, marks = chain.commitments(facts.marks_block.number)
    return replace(facts, marks_block=block, marks=marks)


async def _hash(client: bt.Client, number: int) -> bytes:
    """The hash of a block that has a successor."""
    found = await client.query(("System", "BlockHash"), [number], block=number + 1)
    raw = bytes.fromhex(str(found).removeprefix("0x"))
    if len(raw) != 32 or not any(raw):
        raise ChainError(f"the hash of block {number} is not known")
    return raw


def public_key(address: Any) -> bytes:
    """The 32 bytes of an ss58 address."""
    return bytes(bt.sp_core.ss58_decode(str(address)))
