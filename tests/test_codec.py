"""An update becomes a small blob and comes back; no other bytes are accepted for it."""

from __future__ import annotations

import math
import random
import struct
import tracemalloc
from collections.abc import Callable, Mapping
from dataclasses import astuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hiveminer.strategies.sparseloco import codec
from hiveminer.strategies.sparseloco.bits import pack, write_integers
from hiveminer.strategies.sparseloco.codec import (
    BlobError,
    Compression,
    Header,
    Update,
    decode,
    encode,
)
from hiveminer.strategies.sparseloco.tensor import RAW_BELOW

HEADER = Header(hotkey=b"h" * 32, run=b"r" * 8, round=7, parent=b"p" * 32)
HEAD_BYTES = 91


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def encoded_again(update: Update) -> bytes:
    """The blob of a decoded update without its header, written from the content."""
    return b"".join(part.to_bytes() for part in update.parts.values())


def round_trip(tensors: Mapping[str, Tensor], compression: Compression) -> Update:
    """The update after a round trip, which all properties of a valid blob were checked on."""
    blob = encode(tensors, header=HEADER, compression=compression)
    update = decode(blob, shapes=shapes_of(tensors), compression=compression)
    assert update.header == HEADER
    assert encoded_again(update) == blob[HEAD_BYTES:]
    for name, tensor in tensors.items():
        values = update.dense(name)
        assert values.shape == tensor.shape
        exact = math.fsum(value * value for value in values.flatten().tolist())
        assert update.squared_norm(name) == exact
        total, counts = torch.full_like(values, 0.25), torch.zeros(tensor.shape, dtype=torch.int64)
        update.add_to(name, total, counts, factor=0.3)
        assert torch.equal(counts, (values != 0).long())
        assert torch.equal(total, torch.full_like(values, 0.25).add(values.mul(0.3)))
        assert not torch.signbit(values[values == 0]).any()
    return update


def draw(seed: int, *shape: int, spread: float = 1.0) -> Tensor:
    """Heavy-tailed values, over about `spread` octaves of scale from value to value."""
    numbers = np.random.default_rng(seed)
    scale = np.exp2(spread * numbers.standard_normal(shape))
    return torch.from_numpy(np.asarray(numbers.standard_normal(shape) * scale, np.float32))


@st.composite
def updates(draw_from: st.DrawFn) -> tuple[dict[str, Tensor], Compression]:
    chunk = draw_from(st.sampled_from([1, 2, 7, 32, 64, 100, 1024]))
    kept = draw_from(st.integers(1, chunk))
    compression = Compression(kept / chunk, draw_from(st.integers(1, 4)), chunk)
    tensors = {}
    for name in draw_from(st.sets(st.sampled_from("abcd"))):
        shape = draw_from(st.lists(st.integers(1, 40), max_size=2))
        tensor = draw(draw_from(st.integers(0, 2**32 - 1)), *shape)
        tensor = tensor * 2.0 ** draw_from(st.sampled_from([-126, -30, 0, 0, 120]))
        zeros = draw_from(st.sampled_from([0.0, 0.0, 0.5, 0.98, 1.0]))
        mask = torch.rand(tensor.shape, generator=torch.Generator().manual_seed(1))
        tensors[name] = torch.where(mask < zeros, 0.0, tensor)
    return tensors, compression


@settings(max_examples=100)
@given(updates())
def test_any_update_comes_back(drawn: tuple[dict[str, Tensor], Compression]) -> None:
    tensors, compression = drawn
    update = round_trip(tensors, compression)
    for name, tensor in tensors.items():
        values = update.dense(name)
        if tensor.numel() < RAW_BELOW:
            assert torch.equal(values, tensor)
            continue
        assert not (values * tensor < 0).any()
        assert not values[tensor == 0].any()
        assert np.count_nonzero(values) <= compression.kept_of_tensor(tensor.numel())
        left = (tensor.double() - values.double()).norm()
        assert left <= tensor.double().norm()


@pytest.mark.parametrize("kept", [1, 2, 3, 31, 63, 64, 65, 100, 127, 128])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_the_largest_of_each_chunk_are_kept(kept: int, bits: int) -> None:
    tensor = draw(kept, 5, 128)
    update = round_trip({"w": tensor}, Compression(kept / 128, bits, 128))
    values = update.dense("w")
    assert ((values != 0).sum(1) == kept).all()
    for row, sent in zip(tensor.abs(), values != 0, strict=True):
        assert set(row.topk(kept).indices.tolist()) == set(sent.nonzero().flatten().tolist())


def test_of_a_rest_its_share_is_kept() -> None:
    compression = Compression(0.25, 2, 64)
    update = round_trip({"w": draw(0, 64 * 3 + 10)}, compression)
    sent = update.dense("w") != 0
    assert [int(part.sum()) for part in sent.split(64)] == [16, 16, 16, 2]


def test_equal_magnitudes_keep_the_first() -> None:
    values = round_trip({"w": -torch.ones(4, 64)}, Compression(0.125, 2, 64)).dense("w")
    expected = torch.zeros(4, 64)
    expected[:, :8] = -1
    assert torch.equal(values, expected)


def test_more_bits_lose_less() -> None:
    tensor = draw(3, 64, 512)
    error = [
        float((tensor - round_trip({"w": tensor}, Compression(1.0, bits, 512)).dense("w")).norm())
        for bits in (1, 2, 3, 4)
    ]
    assert error[1] < 0.8 * error[0]
    assert error[2] < 0.7 * error[1]
    assert error[3] < 0.7 * error[2]


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_one_magnitude_for_each_chunk_is_sent_exactly(bits: int) -> None:
    """A level is a float32 with four bits of mantissa; such magnitudes lose nothing."""
    magnitudes = torch.tensor([1.0, 1.5, 0.0, 2.0**-126, 2.0**100])
    tensor = magnitudes[:, None] * draw(1, 5, 64).sign()
    values = round_trip({"w": tensor}, Compression(1.0, bits, 64)).dense("w")
    assert torch.equal(values, tensor)


def test_one_chunk_may_span_the_whole_range() -> None:
    tensor = torch.logspace(-37, 38, 4096).float() * (1 - 2 * (torch.arange(4096) % 2))
    update = round_trip({"w": tensor}, Compression(1.0, 4))
    assert torch.isfinite(update.dense("w")).all()
    largest = round_trip({"w": torch.full((64,), 3.4e38)}, Compression(1.0, 1, 64)).dense("w")
    assert torch.isfinite(largest).all()
    assert largest.min() > 3.2e38


def test_zeros_cost_four_bytes_and_are_not_touched() -> None:
    tensors = {"w": torch.zeros(100, 100), "v": torch.full((100, 100), -0.0)}
    blob = encode(tensors, header=HEADER, compression=Compression(1 / 64, 2))
    assert len(blob) == HEAD_BYTES + 8
    round_trip(tensors, Compression(1 / 64, 2))


def test_tensors_of_all_kinds_in_one_blob() -> None:
    tensors = {
        "none": torch.zeros(0),
        "scalar": torch.tensor(-0.0),
        "one": torch.tensor([3.1]),
        "norm": draw(1, 100),
        "half": draw(2, 64, 64).half(),
        "weight": draw(4, 30, 300).bfloat16(),
        "other": draw(4, 300, 30).double().T,
    }
    update = round_trip(tensors, Compression(1 / 16, 2, 1024))
    assert np.count_nonzero(update.dense("norm")) == 100  # smaller than a chunk: dense
    assert float(update.dense("one")) == float(tensors["one"])
    round_trip({}, Compression(1 / 64, 2))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("shape", [(3,), (100,), (50, 100)])
@pytest.mark.parametrize("density", [1.0, 0.01])
def test_what_is_not_finite_is_not_encoded(
    bad: float, shape: tuple[int, ...], density: float
) -> None:
    tensor = torch.ones(shape)
    tensor.view(-1)[-1] = bad
    with pytest.raises(ValueError, match="w: a value is not finite"):
        encode({"w": tensor}, header=HEADER, compression=Compression(density, 2, 64))


def test_sizes_are_those_that_are_promised() -> None:
    """Within 3% of the entropy of the coordinates, 2 bits a value and two levels a chunk."""
    tensor = draw(5, 200, 4096)
    blob = encode({"w": tensor}, header=HEADER, compression=Compression(64 / 4096, 2))
    assert tensor.numel() * 4 / len(blob) > 200
    index = (8 * len(blob) / 200 - 64 * 2 - 2 * 7) / 64
    bound = math.log2(math.comb(4096, 64)) / 64
    assert bound < index < 1.03 * bound
    dense = encode({"w": tensor}, header=HEADER, compression=Compression(1.0, 2))
    assert tensor.numel() * 4 / len(dense) > 15.9


# Valid bytes of one tensor `w` of 100 elements in chunks of 64, by hand. -------------------------

SHAPES = {"w": torch.Size([100])}


def integers(*values: int) -> bytes:
    return write_integers(np.array(values, np.int64))


def flags(*values: int) -> bytes:
    return pack(np.array(values, np.uint8))


def blob_of(*parts: bytes, bits: int = 2, shapes: Mapping[str, torch.Size] = SHAPES) -> bytes:
    schema = codec._schema_hash(shapes)
    head = codec._HEAD.pack(b"HMU1", bits, 64 - 1, *astuple(HEADER), schema)
    return b"".join([head, *parts])


def read(blob: bytes, *, bits: int = 2, shapes: Mapping[str, torch.Size] = SHAPES) -> Update:
    return decode(blob, shapes=shapes, compression=Compression(1.0, bits, 64))


ONE = 127 << 4
"""The code of the level 1.0; the next is 1.0625."""
COUNT = struct.pack("<I", 3)
GAPS = integers(5, 0, 60)  # coordinates 5, 6 and 67, in two chunks
STEPS = integers(2 * ONE, 1)  # 1.0, then one code less: 0.96875
RISES = integers(16, 0)  # 1.0 and 2.0 in the first chunk, one level in the second
SIGNS = flags(1, 0, 0)
NUMBERS = flags(0, 1, 0)


def test_bytes_by_hand() -> None:
    blob = blob_of(COUNT, GAPS, STEPS, RISES, SIGNS, NUMBERS)
    update = read(blob)
    expected = torch.zeros(100)
    expected[[5, 6, 67]] = torch.tensor([-1.0, 2.0, 0.96875])
    assert torch.equal(update.dense("w"), expected)
    assert encoded_again(update) == blob[HEAD_BYTES:]


def padded(part: bytes) -> bytes:
    return part[:-1] + bytes([part[-1] | 0x80])


@pytest.mark.parametrize(
    ("parts", "why"),
    [
        ((COUNT, GAPS, STEPS, RISES, SIGNS, NUMBERS, b"\0"), "1 bytes follow"),
        ((COUNT, GAPS, STEPS, RISES, SIGNS), "truncated"),
        ((COUNT, GAPS, STEPS, RISES, padded(SIGNS), NUMBERS), "padding"),
        ((COUNT, GAPS, STEPS, RISES, SIGNS, padded(NUMBERS)), "padding"),
        ((COUNT, padded(GAPS), STEPS, RISES, SIGNS, NUMBERS), "padding"),
        ((COUNT, integers(5, 0, 93), STEPS, RISES, SIGNS, NUMBERS), "past the end"),
        ((COUNT, integers(5, 0, 98), STEPS, RISES, SIGNS, NUMBERS), "above 97"),
        ((COUNT, GAPS, STEPS, integers(0, 0), SIGNS, NUMBERS), "level"),
        ((COUNT, GAPS, STEPS, integers(16, 16), SIGNS, NUMBERS), "level"),
        ((COUNT, GAPS, STEPS, RISES, SIGNS, flags(0, 0, 0)), "level"),
        ((COUNT, GAPS, STEPS, RISES, SIGNS, flags(1, 1, 0)), "level"),
        ((COUNT, GAPS, STEPS, RISES, SIGNS, flags(0, 1, 1)), "level"),
        ((COUNT, GAPS, integers(0, 2), RISES, SIGNS, NUMBERS), "out of range"),
        ((COUNT, GAPS, integers(2 * 15, 0), RISES, SIGNS, NUMBERS), "out of range"),
        ((COUNT, GAPS, integers(2 * 4079, 0), RISES, SIGNS, NUMBERS), "out of range"),
        ((struct.pack("<I", 101), GAPS, STEPS, RISES, SIGNS, NUMBERS), "101 values"),
        ((struct.pack("<I", 2**32 - 1), GAPS), "values"),
        ((struct.pack("<I", 0), b"\0"), "follow"),
        ((b"\0\0",), "truncated"),
        ((COUNT, b"\0" + struct.pack("<I", 9), bytes(8), b"\1"), "unary"),
        ((COUNT, b"\0" + struct.pack("<I", 2), b"\7\0" + bytes(20)), "unary"),
        ((COUNT, b"\0" + struct.pack("<I", 1), b"\3" + bytes(20)), "unary"),
        ((COUNT, b"\x21" + struct.pack("<I", 1), b"\7" + bytes(90)), "out of range"),
    ],
)
def test_other_bytes_are_refused(parts: tuple[bytes, ...], why: str) -> None:
    with pytest.raises(BlobError, match=why):
        read(blob_of(*parts))


def test_only_the_shortest_rice_parameter_is_accepted() -> None:
    """5, 0 and 60 take the parameter 4: 3, 5 and others are longer or as long."""
    assert GAPS[0] == 4
    for parameter in (3, 5):
        unary = [flag for value in (5, 0, 60) for flag in [0] * (value >> parameter) + [1]]
        planes = [flags(*(v >> bit & 1 for v in (5, 0, 60))) for bit in range(parameter)]
        size = struct.pack("<BI", parameter, (len(unary) + 7) // 8)
        gaps = b"".join([size, flags(*unary), *planes])
        with pytest.raises(BlobError, match=r"shortest|unary"):
            read(blob_of(COUNT, gaps, STEPS, RISES, SIGNS, NUMBERS))


def test_a_gap_in_the_levels_of_a_chunk_is_refused() -> None:
    rises = integers(0, 16, 0)
    parts = (struct.pack("<I", 2), integers(5, 0), integers(2 * ONE), rises)
    with pytest.raises(BlobError, match="a level follows"):
        read(blob_of(*parts, flags(0, 0), flags(0, 0), flags(0, 1), bits=3), bits=3)


@pytest.mark.parametrize("value", [b"\0\0\0\x80", b"\0\0\xc0\x7f", b"\0\0\x80\xff"])
def test_raw_values_are_finite_and_zero_has_no_sign(value: bytes) -> None:
    shapes = {"w": torch.Size([1])}
    assert read(blob_of(b"\0\0\x80\x3f", shapes=shapes), shapes=shapes).squared_norm("w") == 1
    with pytest.raises(BlobError, match=r"w: a (value|zero)"):
        read(blob_of(value, shapes=shapes), shapes=shapes)


def test_a_blob_of_something_else_is_refused() -> None:
    compression = Compression(1 / 16, 2, 64)
    tensors = {"w": draw(1, 100, 10)}
    blob = encode(tensors, header=HEADER, compression=compression)
    shapes = shapes_of(tensors)
    for other in ({"v": shapes["w"]}, {"w": torch.Size([10, 100])}, {}):
        with pytest.raises(BlobError, match="other names or shapes"):
            read(blob, shapes=other)
    with pytest.raises(BlobError, match="version"):
        read(b"HMU2" + blob[4:], shapes=shapes)
    with pytest.raises(BlobError, match="5 bits"):
        read(blob[:4] + b"\5" + blob[5:], shapes=shapes)
    for stricter in (Compression(1 / 32, 2, 64), Compression(1, 1, 64), Compression(1, 2, 65)):
        with pytest.raises(BlobError, match=r"are sent|not this run's"):
            decode(blob, shapes=shapes, compression=stricter)
    for length in range(len(blob)):
        with pytest.raises(BlobError):
            read(blob[:length], shapes=shapes)


def peak_bytes(work: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def refused(blob: bytes, shapes: Mapping[str, torch.Size]) -> None:
    with pytest.raises(BlobError):
        read(blob, shapes=shapes)


BILLION = {"w": torch.Size([1_000_000_000])}
ZEROS = bytes(1 << 16)


@pytest.mark.parametrize(
    "body",
    [
        struct.pack("<I", 10**9),
        struct.pack("<I", 10**9) + ZEROS,
        struct.pack("<I", 5 * 10**8) + ZEROS,
        struct.pack("<IBI", 1 << 17, 0, 2**32 - 1) + ZEROS,
        struct.pack("<IBI", 1 << 17, 0, 1 << 15) + ZEROS,  # unary code that never ends
        struct.pack("<IBI", 1 << 17, 0, 1 << 14) + b"\xff" * (1 << 16),
        struct.pack("<IBI", 1 << 17, 29, 1 << 14) + b"\xff" * (1 << 16),
        struct.pack("<IBI", 1 << 10, 255, 1 << 7) + b"\xff" * (1 << 16),
        struct.pack("<I", 0) + ZEROS,
    ],
)
def test_a_bomb_takes_no_more_memory_than_its_bytes_pay_for(body: bytes) -> None:
    blob = blob_of(body, shapes=BILLION)
    assert peak_bytes(lambda: refused(blob, BILLION)) < 1_000_000 + 64 * len(blob)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("density", [1 / 4096, 1 / 64, 1 / 4, 0.49, 0.9, 1.0])
@pytest.mark.parametrize("order", ["spread", "together"])
def test_memory_is_linear_in_the_bytes(bits: int, density: float, order: str) -> None:
    """Also for the blobs that pack the most values in a byte: all in a row, equal in size."""
    size = 4096 * 250
    tensor = torch.ones(size) if order == "together" else draw(1, size)
    compression = Compression(density, bits)
    blob = encode({"w": tensor}, header=HEADER, compression=compression)
    shapes = {"w": torch.Size([size])}
    # Pieces of 2**18 values are expanded at a time, whatever the blob's length.
    peak = peak_bytes(lambda: decode(blob, shapes=shapes, compression=compression))
    assert peak < 20_000_000 + 64 * len(blob)


def mutate(blob: bytes, numbers: random.Random) -> bytes:
    """One to three changes, most of them past the header."""
    data = bytearray(blob)
    for _ in range(numbers.choice((1, 1, 2, 3))):
        start = 0 if numbers.random() < 0.1 else HEAD_BYTES
        at = numbers.randrange(start, len(data)) if len(data) > start else 0
        match numbers.randrange(7):
            case 0 | 1 | 2:
                data[at : at + 1] = bytes([data[at] ^ 1 << numbers.randrange(8)])
            case 3:
                data[at : at + 1] = bytes([numbers.choice((0, 1, 127, 128, 255))])
            case 4:
                data[at:at] = numbers.randbytes(numbers.randrange(1, 5))
            case 5:
                del data[at : at + numbers.randrange(1, 5)]
            case 6:
                other = numbers.randrange(start, len(data))
                data[at : at + 8] = data[other : other + 8]
    return bytes(data)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("count", [3_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_mutated_blobs_are_refused_or_mean_something_else(count: int) -> None:
    """Whatever decodes is finite, and is written with exactly these bytes."""
    numbers = random.Random(0)
    blobs = []
    for bits, density in ((1, 0.3), (2, 1 / 16), (3, 0.8), (4, 1.0)):
        tensors = {"a": draw(bits, 3, 60), "b": draw(bits, 3)}
        blob = encode(tensors, header=HEADER, compression=Compression(density, bits, 64))
        blobs.append((blob, bits))
    shapes = shapes_of(tensors)
    accepted = 0
    for number in range(count):
        original, bits = blobs[number % len(blobs)]
        blob = mutate(original, numbers)
        try:
            update = read(blob, bits=bits, shapes=shapes)
        except BlobError:
            continue
        assert encoded_again(update) == blob[HEAD_BYTES:]
        if number % 10 == 0:
            assert all(torch.isfinite(update.dense(name)).all() for name in shapes)
        accepted += 1
    assert count / 100 < accepted < count / 2
