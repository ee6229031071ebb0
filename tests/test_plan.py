"""What a run's section comes to: the exact quorum, and a bound on the length of blobs."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from tiny import tiny_model

from hiveminer.config.run import SparselocoSection
from hiveminer.strategies.sparseloco.codec import Compression, Header, encode
from hiveminer.strategies.sparseloco.plan import Plan, max_blob_bytes

SHAPES = {
    "matrix": torch.Size([130, 70]),
    "long": torch.Size([40_000]),
    "chunk": torch.Size([64, 64]),
    "vector": torch.Size([33]),
    "short": torch.Size([31]),
    "scalar": torch.Size([]),
}
HEADER = Header(bytes(32), bytes(8), 0, bytes(32))


def test_a_plan_follows_the_section() -> None:
    section = SparselocoSection(round_blocks=15, mark_blocks=7, cut_blocks=2, quorum=0.6, bits=3)
    model = tiny_model("llama")
    frozen = next(iter(dict(model.named_parameters())))
    model.get_parameter(frozen).requires_grad_(requires_grad=False)
    plan = Plan.of(section, run_id="run-a-b-c", model=model)
    assert plan.rules.quorum == Fraction(3, 5)
    assert plan.rules.schedule.marks_block(2) == 45
    assert plan.compression.bits == 3
    assert frozen not in plan.shapes
    other = Plan.of(section, run_id="run-a-b-d", model=model)
    assert other.rules.run != plan.rules.run


@pytest.mark.parametrize("density", [1 / 4096, 1 / 64, 0.3, 0.5, 0.51, 0.9, 1.0])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", ["normal", "clustered", "wild", "holes"])
def test_no_blob_is_longer_than_the_bound(density: float, bits: int, kind: str) -> None:
    compression = Compression(density, bits)
    random = torch.Generator().manual_seed(bits)
    tensors = {}
    for name, shape in SHAPES.items():
        values = torch.randn(shape, generator=random)
        if kind == "clustered":
            values = values * (torch.arange(values.numel()).view(shape) < 500) + 1e-30 * values
        if kind == "wild":  # levels that jump from chunk to chunk
            values = values * torch.exp((20 * torch.randn(shape, generator=random)).clamp(-60, 60))
        if kind == "holes":
            values = values * (torch.rand(shape, generator=random) > 0.5)
        tensors[name] = values
    blob = encode(tensors, header=HEADER, compression=compression)
    bound = max_blob_bytes(SHAPES, compression)
    assert len(blob) <= bound
    if kind == "normal":  # and the bound is worth something
        assert bound < 8 * len(blob) + 500
