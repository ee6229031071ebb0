"""The global state and the outer step, with the same bits on every machine.

All peers apply the same blobs to the same state and must get the same hash, whatever the
processor, the number of threads, and the order in which blobs arrived. So everything is float32 on
the CPU, in the order of the uids, with operations that IEEE 754 rounds in only one way:
elementwise multiply, add and subtract, each in a separate pass, since fused forms (`alpha=`,
`addcmul`, `lerp`) round once or twice depending on the instruction set. Sums, roots and divisions
are computed from a few Python floats, and enter a tensor as one float32 factor. `torch.sum` depends
on the number of threads and `pow` on the math library; neither is used.

The outer step has no momentum: it made short rounds worse in every setting tried, and would
double the state. Its rate may follow the number of the round, and nothing else.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from hiveminer.strategies.sparseloco.codec import BlobError, Compression, Header, Update, decode

PIECE_BYTES = 16 * 2**20
"""Size of the pieces in which a tensor is hashed and served."""

GROWTH = 2.0
"""The largest factor by which a tensor's clip norm rises from one counted round to the next."""

MANIFEST = b"hiveminer state 1\n"


@dataclass(frozen=True)
class State:
    """The global state, which the chain names by its hash. Never changed in place.

    weights: the trained parameters by name, float32 on the CPU; tied ones once.
    clip_norms: by the same names, the norm to which the last counted round clipped a tensor,
        in float32's precision; 0 before the first one. It bounds the next round's, so a
        peer that downloads a state needs it too, and it is part of the hash.
    """

    weights: Mapping[str, Tensor]
    clip_norms: Mapping[str, float]

    @classmethod
    def of(cls, model: nn.Module) -> State:
        """The initial state of a run: a copy of the model's trainable parameters."""
        weights = {
            name: value.detach().to("cpu", torch.float32, copy=True).contiguous()
            for name, value in model.named_parameters()
            if value.requires_grad
        }
        return cls(weights, dict.fromkeys(weights, 0.0))

    @cached_property
    def manifest(self) -> bytes:
        """Name, shape, clip norm and the pieces' hashes of each tensor, in name order.

        Whoever downloads a state checks the manifest against the state's hash, and then each
        piece against the manifest.
        """
        return MANIFEST + b"".join(
            _entry(name, self.weights[name], self.clip_norms[name]) for name in sorted(self.weights)
        )

    def hash(self) -> bytes:
        """SHA-256 of the manifest."""
        return hashlib.sha256(self.manifest).digest()


@dataclass(frozen=True)
class OuterStep:
    """How the blobs of a round become one step.

    rate: the outer learning rate: state - rate x average.
    contributor_power: a in sum / (count^a x blobs^(1 - a)), where count is the number of
        blobs that hold a value for the coordinate. 1 is the mean over a coordinate's
        contributors, 0 the mean over all blobs, which takes up to that many times smaller
        steps where blobs are sparse. In quarters, so that square roots suffice. Best at
        1/64 density is 0.85, at 1/32 0.7, at 1/16 0.4 to 0.7; dense blobs do not feel it.
    """

    rate: float = 1.0
    contributor_power: float = 0.75

    def __post_init__(self) -> None:
        if self.contributor_power not in (0, 0.25, 0.5, 0.75, 1):
            raise ValueError("contributor_power must be 0, 0.25, 0.5, 0.75 or 1")

    def factor(self, count: int, *, blobs: int) -> float:
        """The factor on the sum of a coordinate that `count` of `blobs` blobs hold."""
        a = self.contributor_power
        return self.rate / (_power(max(count, 1), a) * _power(blobs, 1 - a))


@dataclass(frozen=True)
class CountedBlob:
    """A blob that counts in a round.

    header: what the blob's own header must be, according to the author's record.
    """

    uid: int
    header: Header
    blob: bytes


@dataclass(frozen=True)
class Applied:
    """A state after a round, and why blobs were left out, by uid."""

    state: State
    left_out: dict[int, str]


@torch.no_grad()
def apply_blobs(
    state: State,
    blobs: Iterable[CountedBlob],
    *,
    step: OuterStep,
    compression: Compression,
) -> Applied:
    """The state after a round in which these blobs count; in any order, one per uid.

    A blob that `read_blob` refuses is left out, by everybody alike. If no blob remains, the state
    is returned unchanged.
    """
    shapes = {name: weight.shape for name, weight in state.weights.items()}
    updates: list[Update] = []
    left_out: dict[int, str] = {}
    for counted in sorted(blobs, key=lambda each: each.uid):
        try:
            updates.append(read_blob(counted, shapes=shapes, compression=compression))
        except BlobError as error:
            left_out[counted.uid] = str(error)
    if not updates:
        return Applied(state, left_out)
    weights: dict[str, Tensor] = {}
    clip_norms: dict[str, float] = {}
    for name, weight in state.weights.items():
        norms = [math.sqrt(update.squared_norm(name)) for update in updates]
        limit = clip_limit(norms, last=state.clip_norms[name])
        factors = [limit / norm if norm > limit else 1.0 for norm in norms]
        weights[name] = _stepped(weight, name, updates, factors, step)
        clip_norms[name] = next_clip_norm(limit, last=state.clip_norms[name])
    return Applied(State(weights, clip_norms), left_out)


def clip_limit(norms: Iterable[float], *, last: float) -> float:
    """The norm to which a tensor is clipped in each blob of a round; 0 if all are empty.

    The lower median of the blobs' norms, at most twice the last counted round's limit. A blob
    without a value in this tensor does not count, so that empty blobs cannot suppress it.
    """
    sizes = sorted(norm for norm in norms if norm > 0)
    if not sizes:
        return 0.0
    median = sizes[(len(sizes) - 1) // 2]
    return min(median, GROWTH * last) if last else median


def next_clip_norm(limit: float, *, last: float) -> float:
    """The clip norm for the next round's limit, in float32's precision.

    It follows `limit`, but falls by at most half, so that one round of tiny updates does not
    throttle the rounds after it.
    """
    largest = float(np.finfo(np.float32).max)
    return float(np.float32(min(max(limit, last / GROWTH), largest)))


def read_blob(
    counted: CountedBlob, *, shapes: Mapping[str, torch.Size], compression: Compression
) -> Update:
    """Decode a blob. Raises BlobError if it is not valid, holds more than the run's compression
    allows, or has a header that is not its author's."""
    update = decode(counted.blob, shapes=shapes, compression=compression)
    if update.header != counted.header:
        raise BlobError("the blob's header is not its author's for this round and state")
    return update


def _stepped(
    weight: Tensor, name: str, updates: list[Update], factors: list[float], step: OuterStep
) -> Tensor:
    total, counts = torch.zeros_like(weight), torch.zeros(weight.shape, dtype=torch.int32)
    for update, factor in zip(updates, factors, strict=True):
        update.add_to(name, total, counts, factor=factor)
    table = [step.factor(count, blobs=len(updates)) for count in range(len(updates) + 1)]
    by_count = torch.tensor(table, dtype=torch.float32)
    total.mul_(by_count.index_select(0, counts.flatten()).view_as(total))
    stepped = weight.sub(total)
    # Huge values overflow on all peers alike; one such tensor would end the run.
    return stepped if bool(torch.isfinite(stepped).all()) else weight


def _power(number: int, exponent: float) -> float:
    """number^exponent for an exponent in quarters, the same bits everywhere: IEEE 754 defines
    how a square root is rounded, and leaves `pow` to the math library."""
    root = math.sqrt(number)
    fourth = math.sqrt(root)
    return {0: 1.0, 0.25: fourth, 0.5: root, 0.75: root * fourth, 1: float(number)}[exponent]


def manifest_head(name: str, shape: torch.Size) -> bytes:
    """What a manifest says of a tensor before its clip norm."""
    encoded = name.encode()
    head = struct.pack("<I", len(encoded)) + encoded + struct.pack("<I", len(shape))
    return head + b"".join(struct.pack("<Q", size) for size in shape)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """A tensor as little-endian float32; a view of it where the machine is little-endian."""
    numbers = tensor.detach().contiguous().numpy().astype("<f4", copy=False)
    return numbers.reshape(-1).view(np.uint8).data


def _entry(name: str, tensor: Tensor, clip_norm: float) -> bytes:
    data = tensor_bytes(tensor)
    pieces = (data[start : start + PIECE_BYTES] for start in range(0, len(data), PIECE_BYTES))
    hashes = b"".join(hashlib.sha256(piece).digest() for piece in pieces)
    return manifest_head(name, tensor.shape) + struct.pack("<f", clip_norm) + hashes
