"""A state is checked as it comes in: its size, its speed, its numbers, and its epoch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hivemind.averaging.allreduce import AllreduceException
from hivemind.compression import serialize_torch_tensor
from hivemind.proto import averaging_pb2
from hivemind.utils.serializer import MSGPackSerializer
from hivemind.utils.streaming import split_for_streaming

from hiveminer.strategies.hivemind import state_transfer
from hiveminer.strategies.hivemind.sketch import sketch_of
from hiveminer.strategies.hivemind.state_transfer import IncomingState

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


def taken(sent: list[Any]) -> IncomingState:
    state = IncomingState(weights=len(WEIGHTS), all_bytes=ALL_BYTES)
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
    huge = averaging_pb2.DownloadData(metadata=b"x" * (state_transfer.MAX_METADATA_BYTES + 1))
    with pytest.raises(AllreduceException, match="larger than a state can be"):
        taken([huge])


def test_a_donor_that_trickles_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_transfer, "OPEN_SECONDS", 0.0)
    monkeypatch.setattr(state_transfer, "SLOWEST_BYTES", 1e12)
    with pytest.raises(AllreduceException, match="too slow"):
        taken(messages(WEIGHTS))


@pytest.mark.parametrize("metadata", [[], 1, "x", {"epoch": "5"}, {}])
def test_a_state_that_does_not_say_its_epoch_has_none(metadata: object) -> None:
    assert taken(messages(WEIGHTS + MOMENTS, metadata=metadata)).epoch is None
