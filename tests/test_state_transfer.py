"""A state is checked as it comes in: its size, its speed, its numbers, and its epoch."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hivemind.averaging.allreduce import AllreduceException
from hivemind.compression import serialize_torch_tensor
from hivemind.p2p import PeerID
from hivemind.proto import averaging_pb2
from hivemind.utils.serializer import MSGPackSerializer
from hivemind.utils.streaming import split_for_streaming
from hivemind.utils.timed_storage import ValueWithExpiration

from hiveminer.strategies.hivemind import state_transfer
from hiveminer.strategies.hivemind.sketch import sketch_of
from hiveminer.strategies.hivemind.state_transfer import IncomingState, StateInspector, tame_moments

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


def taken(sent: list[Any], **limits: float) -> IncomingState:
    state = IncomingState(weights=len(WEIGHTS), all_bytes=ALL_BYTES, **limits)
    for message in sent:
        state.add(message)
    state.end_tensor()
    return state


def test_a_state_is_sketched_by_its_weights_alone() -> None:
    state = taken(messages(WEIGHTS + MOMENTS))
    assert state.is_complete
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
    huge = averaging_pb2.DownloadData(metadata=b"x" * 2 * state_transfer.METADATA_BYTES)
    with pytest.raises(AllreduceException, match="larger than a state can be"):
        taken([huge])


def test_a_donor_that_trickles_is_given_up() -> None:
    with pytest.raises(AllreduceException, match="too slow"):
        taken(messages(WEIGHTS), open_seconds=-1.0)


@pytest.mark.parametrize(
    "metadata",
    [[], 1, "x", {"epoch": "5"}, {"epoch": -1}, {"epoch": 2**60}, {"epoch": True}, {}],
)
def test_a_state_that_does_not_say_its_epoch_has_none(metadata: object) -> None:
    assert taken(messages(WEIGHTS + MOMENTS, metadata=metadata)).epoch is None


class Donors:
    """A DHT in which these records lie, and stubs of peers that vouch."""

    def __init__(self, donors: Any, *, reports: Any = None, vouches: dict[str, Any]):
        self.records = {"run_state_averager.all_averagers": donors, "run_progress": reports}
        self.vouches = vouches
        self.asked: list[str] = []

    async def get(self, key: str, **_: Any) -> Any:
        value = self.records[key]
        return None if value is None else ValueWithExpiration(value, 1e12)

    def stub_of(self, peer: PeerID) -> Any:
        async def rpc_vouch(_request: Any) -> Any:
            self.asked.append(str(peer))
            said = MSGPackSerializer.dumps(self.vouches[str(peer)])
            return averaging_pb2.DownloadData(metadata=said)

        return SimpleNamespace(rpc_vouch=rpc_vouch)

    def inspector(self) -> StateInspector:
        return StateInspector(
            dht=self, run_id="run", own_id=US, stub_of=self.stub_of,
            weights=len(WEIGHTS), all_bytes=ALL_BYTES, attempts=1,
        )  # fmt: skip

    def download(self, donor: PeerID, sent: list[Any]) -> int:
        """How many messages of a donor's state come through."""

        async def stream() -> AsyncIterator[Any]:
            for message in sent:
                yield message

        async def run() -> int:
            inspector = self.inspector()
            await inspector.prepare()
            return len([one async for one in inspector.inspected(stream(), donor)])

        return asyncio.run(run())


def peer(number: int) -> PeerID:
    return PeerID(b"\x12\x20" + bytes([number]) * 32)


US, A, B, LIAR = map(peer, range(4))
TRUE, FALSE = (5, sketch_of(WEIGHTS)), (5, sketch_of([tensor + 1 for tensor in WEIGHTS]))
STATE = messages(WEIGHTS + MOMENTS)


def donors(*peers: PeerID) -> dict[Any, Any]:
    return {one.to_bytes(): ValueWithExpiration(5.0, 1e12) for one in peers}


def test_a_state_is_taken_when_another_peer_vouches_for_it() -> None:
    network = Donors(donors(A, B, US), vouches={str(A): TRUE, str(B): TRUE})
    assert network.download(A, STATE) == len(STATE)
    assert set(network.asked) == {str(A), str(B)}


@pytest.mark.parametrize(
    "junk",
    [
        {"x": 1, b"": 2, 3: None, b"\xff" * 40: ValueWithExpiration("x", 1e12)},
        {peer(9).to_bytes(): ValueWithExpiration(math.nan, 1e12)},
    ],
)
def test_junk_among_the_donors_is_skipped_and_no_reason_to_trust(junk: dict[Any, Any]) -> None:
    vouches = {str(A): TRUE, str(B): TRUE, str(LIAR): FALSE}
    network = Donors({**donors(A, B, LIAR), **junk}, vouches=vouches)
    lie = messages([tensor + 1 for tensor in WEIGHTS] + MOMENTS)
    with pytest.raises(AllreduceException, match="peers hold other weights in epoch 5"):
        network.download(LIAR, lie)
    assert network.download(B, STATE) == len(STATE)


@pytest.mark.parametrize("record", ["x", 1, None, []])
def test_peers_that_report_are_asked_when_the_donors_cannot_be_read(record: object) -> None:
    report = {
        "peer_id": A.to_bytes(), "epoch": 5, "time": 1.0, "samples_accumulated": 0,
        "samples_per_second": 1.0, "client_mode": False,
    }  # fmt: skip
    reports = {b"key": ValueWithExpiration(report, 1e12), b"junk": ValueWithExpiration(1, 1e12)}
    network = Donors(record, reports=reports, vouches={str(A): TRUE, str(LIAR): FALSE})
    with pytest.raises(AllreduceException, match="none of 1 peers vouches for it"):
        network.download(LIAR, messages([tensor + 1 for tensor in WEIGHTS] + MOMENTS))


def test_a_donor_vouches_for_what_it_hands_out() -> None:
    assert Donors(donors(A), vouches={str(A): TRUE}).download(A, STATE) == len(STATE)
    for other in ((6, TRUE[1]), FALSE, "x"):
        with pytest.raises(AllreduceException, match="does not vouch for it"):
            Donors(donors(A), vouches={str(A): other}).download(A, STATE)


def test_moments_that_no_gradient_can_have_made_are_tamed() -> None:
    weights = torch.nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.AdamW([weights], lr=1e-3)
    weights.grad = torch.ones(4)
    optimizer.step()
    before = {key: value.clone() for key, value in optimizer.state[weights].items()}
    tame_moments(optimizer)
    assert all(torch.equal(value, before[key]) for key, value in optimizer.state[weights].items())
    state = optimizer.state[weights]
    state["exp_avg"][0], state["exp_avg_sq"][1], state["step"][...] = 1e30, -1.0, -5.0
    tame_moments(optimizer)
    optimizer.step()
    assert bool(torch.isfinite(weights).all())
    assert float(weights.detach().abs().max()) < 1.0
