"""The rules, compression and outer step of a run, from `[sparseloco]` and its model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import nn

from hiveminer.config.run import SparselocoSection
from hiveminer.strategies.sparseloco.apply import OuterStep
from hiveminer.strategies.sparseloco.codec import HEADER_BYTES
from hiveminer.strategies.sparseloco.records import MAX_BLOB_BYTES, run_prefix
from hiveminer.strategies.sparseloco.rounds import Rules
from hiveminer.strategies.sparseloco.schedule import Schedule
from hiveminer.strategies.sparseloco.tensor import RAW_BELOW, Compression

LIST_BYTES = 16
"""Fixed part of a coded tensor: the count, and the headers of its three lists of integers."""

LEVEL_BITS = 20
"""Limit for a level of a chunk: a Rice code of 17 bits, and three of its unary part."""


@dataclass(frozen=True)
class Plan:
    """Everything that turns final blocks and blobs into weights, the same for all peers of a run.

    shapes: of the trainable parameters, by name. keep: rho, the share of the compression error
    that its author keeps.
    """

    rules: Rules
    compression: Compression
    step: OuterStep
    keep: float
    shapes: Mapping[str, torch.Size]

    @classmethod
    def of(cls, section: SparselocoSection, *, run_id: str, model: nn.Module) -> Plan:
        """The plan of a run; `model` has the shapes."""
        shapes = {
            name: value.shape for name, value in model.named_parameters() if value.requires_grad
        }
        compression = Compression(section.density, section.bits)
        rules = Rules(
            run_prefix(run_id),
            Schedule.of(section),
            max_blob_bytes=max_blob_bytes(shapes, compression),
            # `repr` is the shortest decimal text of a float: the one in run.toml.
            quorum=Fraction(repr(section.quorum)),
            max_contributors=section.max_contributors,
        )
        step = OuterStep(section.outer_rate, section.contributor_power)
        return cls(rules, compression, step, section.rho, shapes)


def max_blob_bytes(shapes: Mapping[str, torch.Size], compression: Compression) -> int:
    """Length of the longest valid blob: no update of these shapes is encoded in more bytes."""
    longest = HEADER_BYTES + sum(
        _tensor_bytes(math.prod(shape), compression) for shape in shapes.values()
    )
    return min(longest, MAX_BLOB_BYTES)


def _tensor_bytes(size: int, compression: Compression) -> int:
    if size < RAW_BELOW:
        return 4 * size
    kept = compression.kept_of_tensor(size)
    marked = min(kept, size // 2 + 1)
    # A Rice code spends at most three unary bits per integer, and a remainder of the bits of
    # the mean, rounded up.
    gaps = marked * (4 + math.ceil(math.log2(size / marked)))
    chunks = -(-size // compression.chunk)
    levels = chunks * LEVEL_BITS * (1 << (compression.bits - 1))
    return LIST_BYTES + (gaps + levels + compression.bits * kept) // 8 + 3 * 8
