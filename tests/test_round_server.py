"""What a group's members send is checked, and a search for a group ends with its step."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from types import SimpleNamespace
from typing import Any

import torch
from hivemind.averaging.matchmaking import Matchmaking
from hivemind.compression import serialize_torch_tensor
from hivemind.p2p import PeerID
from hivemind.proto import averaging_pb2

from hiveminer.strategies.hivemind.bounds import Bounds
from hiveminer.strategies.hivemind.round_server import (
    RoundServer,
    end_search,
    problem_with_part,
    silent_members,
)

BOUNDS = Bounds(most_rows=256.0, learning_rate=3e-3)
OWN = 0.02 * torch.randn(30, 7)


def part(tensor: torch.Tensor, *, weight: float = 8.0, code: int | None = None) -> Any:
    code = averaging_pb2.PART_FOR_AVERAGING if code is None else code
    return averaging_pb2.AveragingData(
        code=code, weight=weight, tensor_part=serialize_torch_tensor(tensor)
    )


def test_parts_are_checked_whatever_their_code_is() -> None:
    own, bad = OWN, torch.full_like(OWN, math.nan)
    assert problem_with_part(part(own), 0, own, BOUNDS) is None
    assert problem_with_part(part(bad), 0, own, BOUNDS) is not None
    # hivemind reads no code of later parts, so neither may the check.
    for code in (averaging_pb2.NO_CODE, averaging_pb2.CANCELLED):
        assert problem_with_part(part(bad, code=code), 1, own, BOUNDS) is not None
    for weight in (-1.0, 1e9, math.nan):
        assert problem_with_part(part(own, weight=weight), 1, own, BOUNDS) is not None
    assert problem_with_part(part(own[:1, :1]), 1, own, BOUNDS) is not None


class OneLeader:
    """A DHT in which one other peer looks for a group, and will for a while."""

    def __init__(self, peer: PeerID):
        self.peer_id = peer
        self._expires = time.time() + 60

    async def get(self, _key: str, **_: Any) -> Any:
        said = SimpleNamespace(value=True, expiration_time=self._expires)
        return SimpleNamespace(value={PeerID(b"\x12\x20" + b"l" * 32).to_bytes(): said})

    async def store(self, **_: Any) -> bool:
        return True


def test_a_search_that_lost_its_cancellation_ends_with_its_step() -> None:
    """As `wait_for` of Python 3.11 loses one that comes together with the leader's answer."""

    async def run() -> None:
        ours = PeerID(b"\x12\x20" + b"o" * 32)
        asked = asyncio.Event()

        async def lose_cancellation(_leader: PeerID) -> None:
            asked.set()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(600)

        matchmaking = Matchmaking(
            SimpleNamespace(peer_id=ours), b"schema", OneLeader(ours), servicer_type=RoundServer,
            prefix="run", target_group_size=2, min_group_size=2, min_matchmaking_time=100.0,
            request_timeout=1.0, client_mode=False, initial_group_bits="",
        )  # fmt: skip
        matchmaking._request_join_group = lose_cancellation
        step = SimpleNamespace(
            scheduled_time=time.time(), deadline=time.time() + 300, get_timeout=lambda: 300.0
        )
        look = asyncio.create_task(matchmaking.look_for_group(step))
        await asyncio.wait_for(asked.wait(), 60)
        look.cancel()
        await asyncio.wait({look}, timeout=0.3)
        assert not look.done()  # it goes on, and the next one would wait for it
        await end_search(matchmaking, step)
        await asyncio.wait({look}, timeout=60)
        assert look.cancelled()
        assert not matchmaking.is_looking_for_group

    asyncio.run(run())


def test_a_member_that_has_not_begun_is_silent_unless_it_is_left_out_already() -> None:
    runner = SimpleNamespace(
        sender_peer_ids=["us", "honest", "dead", "silent"],
        active_senders={"us", "honest"},
        banned_senders={"dead"},
    )
    assert silent_members(runner) == ["silent"]
