"""A state as bytes and back, and what is refused."""

from __future__ import annotations

import pytest
import torch

from hiveminer.strategies.sparseloco.apply import PIECE_BYTES, State
from hiveminer.strategies.sparseloco.pieces import (
    StateBuilder,
    StateError,
    manifest_length,
    piece_bytes,
    read_manifest,
)


def a_state() -> State:
    random = torch.Generator().manual_seed(1)
    weights = {
        "b.weight": torch.randn((2, PIECE_BYTES // 4 + 3), generator=random),
        "a.bias": torch.randn((7,), generator=random),
        "scale": torch.tensor(2.5),
        "empty": torch.zeros((0, 3)),
    }
    return State(weights, {"b.weight": 0.125, "a.bias": 0.0, "scale": 3.0, "empty": 0.0})


STATE = a_state()
SHAPES = {name: value.shape for name, value in STATE.weights.items()}
RAW = STATE.manifest


def test_a_state_comes_back_from_its_pieces_in_any_order() -> None:
    assert len(RAW) == manifest_length(SHAPES)
    manifest = read_manifest(RAW, SHAPES)
    assert len(manifest.pieces) == 5
    assert max(piece.length for piece in manifest.pieces) == PIECE_BYTES
    builder = StateBuilder(manifest, SHAPES)
    for piece in reversed(manifest.pieces):
        with pytest.raises(StateError, match="missing"):
            builder.build()
        builder.add(piece, piece_bytes(STATE, piece))
    state = builder.build()
    assert state.hash() == STATE.hash()
    assert all(torch.equal(state.weights[name], value) for name, value in STATE.weights.items())
    assert state.clip_norms == STATE.clip_norms


def test_a_piece_that_is_not_right_is_refused() -> None:
    manifest = read_manifest(RAW, SHAPES)
    builder = StateBuilder(manifest, SHAPES)
    piece = manifest.pieces[0]
    data = bytearray(piece_bytes(STATE, piece))
    data[3] ^= 1
    for wrong in (bytes(data), bytes(data[:-1]), b""):
        with pytest.raises(StateError, match="hash"):
            builder.add(piece, wrong)


@pytest.mark.parametrize("at", range(0, len(RAW), 7))
def test_a_manifest_of_another_model_is_refused(at: int) -> None:
    changed = bytearray(RAW)
    changed[at] ^= 0x80
    try:
        manifest = read_manifest(bytes(changed), SHAPES)
    except StateError:
        return
    # Only hashes and clip norms are left, which the state's own hash protects.
    original = read_manifest(RAW, SHAPES)
    assert (manifest.pieces, manifest.clip_norms) != (original.pieces, original.clip_norms)


@pytest.mark.parametrize("raw", [b"", RAW[:-1], RAW + b"0", bytes(len(RAW))])
def test_what_is_no_manifest_is_refused(raw: bytes) -> None:
    with pytest.raises(StateError):
        read_manifest(raw, SHAPES)


def test_a_manifest_with_another_shape_is_refused() -> None:
    other = SHAPES | {"b.weight": torch.Size([PIECE_BYTES // 4 + 3, 2])}
    with pytest.raises(StateError, match=r"b\.weight"):
        read_manifest(RAW, other)
