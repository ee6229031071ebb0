"""What other averagers send is looked at as it comes: parts, groups, states; and who they are."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hivemind.averaging.allreduce import AllreduceException
from hivemind.averaging.matchmaking import Matchmaking
from hivemind.compression import serialize_torch_tensor
from hivemind.p2p import PeerID
from hivemind.proto import averaging_pb2
from hivemind.utils.serializer import MSGPackSerializer
from hivemind.utils.streaming import split_for_streaming

from hiveminer.strategies.hivemind import stub
from hiveminer.strategies.hivemind.averager import (
    SwarmAverager,
    _epoch_in,
    _problem_with_part,
    end_look,
)
from hiveminer.strategies.hivemind.bounds import Bounds
from hiveminer.strategies.hivemind.sketch import sketch_of
from hiveminer.strategies.hivemind.stub import Incoming

BOUNDS = Bounds(most_rows=256.0, learning_rate=3e-3)
WEIGHTS = [0.02 * torch.randn(30, 7), torch.zeros(9)]
MOMENTS = [torch.ones(3)]
ALL_BYTES = 4 * sum(tensor.numel() for tensor in WEIGHTS + MOMENTS)


def messages(tensors: list[torch.Tensor], *, metadata: Any = None) -> list[Any]:
    said = MSGPackSerializer.dumps({"epoch": 5} if metadata is None else metadata)
    found = []
    for tensor in tensors:
        for part in split_for_streaming(serialize_torch_tensor(tensor), chunk_size_bytes=64):
            found.append(averaging_pb2.DownloadData(tensor_part=part, metadata=said))
            said = b""
    return found


def taken(sent: list[Any]) -> Incoming:
    state = Incoming(weights=len(WEIGHTS), all_bytes=ALL_BYTES)
    for message in sent:
        state.take(message)
    state.end()
    return state


def test_a_state_is_sketched_by_its_weights_alone() -> None:
    state = taken(messages(WEIGHTS + MOMENTS))
    assert state.is_whole
    assert state.epoch == 5
    assert state.sketch.numbers == sketch_of(WEIGHTS)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_state_that_is_not_finite_is_not_taken(poison: float) -> None:
    bad = WEIGHTS[0].clone()
    bad[3, 3] = poison
    with pytest.raises(AllreduceException, match="not finite"):
        taken(messages([bad, *WEIGHTS[1:], *MOMENTS]))


def test_a_state_ends_where_ours_would() -> None:
    with pytest.raises(AllreduceException, match="larger than a state can be"):
        taken(messages([*WEIGHTS, *MOMENTS, torch.zeros(1)]))
    huge = averaging_pb2.DownloadData(metadata=b"x" * (stub.MAX_METADATA_BYTES + 1))
    with pytest.raises(AllreduceException, match="larger than a state can be"):
        taken([huge])


def test_a_donor_that_trickles_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stub, "OPEN_SECONDS", 0.0)
    monkeypatch.setattr(stub, "SLOWEST_BYTES", 1e12)
    with pytest.raises(AllreduceException, match="too slow"):
        taken(messages(WEIGHTS))


@pytest.mark.parametrize("metadata", [[], 1, "x", {"epoch": "5"}, {}])
def test_a_state_that_does_not_say_its_epoch_has_none(metadata: object) -> None:
    assert taken(messages(WEIGHTS + MOMENTS, metadata=metadata)).epoch is None


def gather(bandwidth: object = None, mode: object = 0, said: object = 7) -> bytes:
    return bytes(MSGPackSerializer.dumps([bandwidth, mode, MSGPackSerializer.dumps(said)]))


def test_a_group_is_of_one_epoch() -> None:
    assert _epoch_in(gather()) == 7
    assert _epoch_in(gather(bandwidth=1e6)) == 7


@pytest.mark.parametrize(
    "said",
    [
        b"", b"x", b"\xc1", gather()[:-1], gather(bandwidth=-1.0), gather(bandwidth=math.nan),
        gather(bandwidth="much"), gather(mode=9), gather(said="7"), gather(said=b"x" * 2000),
        bytes(MSGPackSerializer.dumps([None, 0])),
        bytes(MSGPackSerializer.dumps([None, 0, 7])),
    ],
)  # fmt: skip
def test_what_a_group_could_not_read_is_refused_at_the_door(said: bytes) -> None:
    assert _epoch_in(said) is None


def part(tensor: torch.Tensor, *, weight: float = 8.0, code: int | None = None) -> Any:
    code = averaging_pb2.PART_FOR_AVERAGING if code is None else code
    return averaging_pb2.AveragingData(
        code=code, weight=weight, tensor_part=serialize_torch_tensor(tensor)
    )


def test_parts_are_looked_at_whatever_they_are_called() -> None:
    own, bad = WEIGHTS[0], torch.full_like(WEIGHTS[0], math.nan)
    assert _problem_with_part(part(own), 0, own, BOUNDS) is None
    assert _problem_with_part(part(bad), 0, own, BOUNDS) is not None
    # hivemind reads no code of later parts, so neither must the look at them.
    for code in (averaging_pb2.NO_CODE, averaging_pb2.CANCELLED):
        assert _problem_with_part(part(bad, code=code), 1, own, BOUNDS) is not None
    for weight in (-1.0, 1e9, math.nan):
        assert _problem_with_part(part(own, weight=weight), 1, own, BOUNDS) is not None
    assert _problem_with_part(part(own[:1, :1]), 1, own, BOUNDS) is not None


def in_hiveminds_process(**known: Any) -> Any:
    """What an averager holds there, without the process."""
    self = SimpleNamespace(
        _gone={}, _running_groups={}, _shunned_until={}, _known=known, _identifying=0, sent=[]
    )
    self._shunned_there = SimpleNamespace(send_bytes=self.sent.append)
    for name in ("is_gone", "_leave_out", "shun", "_is_shunned", "admits", "_is_registered"):
        setattr(self, name, functools.partial(getattr(SwarmAverager, name), self))
    return self


def test_a_call_that_runs_hears_of_a_second_peer_that_is_gone() -> None:
    async def run() -> None:
        averager = in_hiveminds_process()
        running = averager.is_gone("second")  # what a call to it waits for
        await averager._leave_out(["first"])
        assert not running.is_set()
        await averager._leave_out(["first", "second"])
        assert running.is_set()
        await averager._leave_out([])
        assert not averager.is_gone("first").is_set()
        assert not averager.is_gone("second").is_set()

    asyncio.run(run())


def test_who_sent_poison_stays_out_whatever_else_is_known_of_it() -> None:
    peer = PeerID(b"\x12\x20" + b"7" * 32)

    async def run() -> None:
        averager = in_hiveminds_process()
        averager._known[str(peer)] = (time.monotonic() + 60, True)
        assert await averager.admits(peer)
        averager.shun(peer, "it holds numbers that are not finite")
        averager.shun(peer, "it holds numbers that are not finite")
        assert averager.sent == [str(peer).encode()]
        # Its proof, which was asked for before, comes in after that.
        averager._known[str(peer)] = (time.monotonic() + 60, True)
        assert not await averager.admits(peer)

    asyncio.run(run())


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


def test_a_look_that_lost_its_cancellation_ends_with_its_step() -> None:
    """As `wait_for` of Python 3.11 loses one that comes together with the leader's answer."""

    async def run() -> None:
        ours = PeerID(b"\x12\x20" + b"o" * 32)
        asked = asyncio.Event()

        async def lose_cancellation(_leader: PeerID) -> None:
            asked.set()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(60)

        matchmaking = Matchmaking(
            SimpleNamespace(peer_id=ours), b"schema", OneLeader(ours), servicer_type=SwarmAverager,
            prefix="run", target_group_size=2, min_group_size=2, min_matchmaking_time=100.0,
            request_timeout=1.0, client_mode=False, initial_group_bits="",
        )  # fmt: skip
        matchmaking._request_join_group = lose_cancellation
        step = SimpleNamespace(
            scheduled_time=time.time(), deadline=time.time() + 300, get_timeout=lambda: 300.0
        )
        look = asyncio.create_task(matchmaking.look_for_group(step))
        await asyncio.wait_for(asked.wait(), 10)
        look.cancel()
        await asyncio.wait({look}, timeout=0.3)
        assert not look.done()  # it looks on, and the next look would wait for it
        await end_look(matchmaking, step)
        await asyncio.wait({look}, timeout=5)
        assert look.cancelled()
        assert not matchmaking.is_looking_for_group

    asyncio.run(run())
