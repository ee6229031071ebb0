"""A sketch of a model's weights: a few numbers that tell how far two models are apart.

Peers that were averaged hold nearly the same weights, never the same bits, so no hash can
vouch for a state. Each number of a sketch is the sum of all weights with pseudo-random
signs; the mean square of the differences of two sketches estimates the squared distance of
the weights (Alon, Matias, Szegedy: The space complexity of approximating the frequency
moments, 1996). With 32 numbers the estimate is within about a quarter.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from hiveminer.strategies.hivemind.records import is_count

NUMBERS = 32
"""Numbers in a sketch."""

WIDTH = 4096
"""Weights that are summed in one go."""

TOLERANCE = 0.02
"""States that differ by less than this share of their norm are the same: Float16 averaging
leaves about a thousandth."""

Vouch = tuple[int, list[float]]
"""What a peer says of its state: the epoch, and the sketch of its weights."""


class Sketch:
    """Takes tensors one by one, in the model's order; `numbers` is what came of them."""

    def __init__(self) -> None:
        self._sums = torch.zeros(NUMBERS, dtype=torch.float64)
        self._rows = 0

    def add(self, tensor: Tensor) -> None:
        signs = _signs()
        flat = tensor.detach().reshape(-1).to(device="cpu", dtype=torch.float32)
        rows = torch.nn.functional.pad(flat, (0, -len(flat) % WIDTH)).view(-1, WIDTH)
        # Each row of a tensor has its own sign beside those of its columns.
        numbers = (torch.arange(self._rows, self._rows + len(rows)) * 769 + 1) % WIDTH
        self._sums += ((rows @ signs) * signs[numbers]).sum(dim=0, dtype=torch.float64)
        self._rows += len(rows)

    @property
    def numbers(self) -> list[float]:
        return [float(number) for number in self._sums]


def sketch_of(tensors: Iterable[Tensor]) -> list[float]:
    """The sketch of a model's weights, in their order."""
    sketch = Sketch()
    for tensor in tensors:
        sketch.add(tensor)
    return sketch.numbers


def agree(ours: Sequence[float], theirs: Sequence[float]) -> bool:
    """Whether two sketches are of the same weights, within TOLERANCE."""
    distance = math.dist(ours, theirs)
    return distance <= TOLERANCE * max(math.hypot(*ours), math.hypot(*theirs), 1e-12)


def contradiction(epoch: int, seen: Sequence[float], vouches: Sequence[Vouch]) -> str | None:
    """Why a donor's state is not the swarm's; None if it may be.

    epoch, seen: the epoch that the donor names, and the sketch of the weights that it sent.
    vouches: what the other peers say of their own. If any is in this epoch or a later one, one
    has to agree, and not be outvoted; the donor's own word counts for one. Peers that are behind,
    such as those that join too, cannot know this state: they count once two of them agree.
    """
    same = [vouch for vouch in vouches if vouch[0] == epoch]
    others = [vouch for vouch in same if not agree(seen, vouch[1])]
    # Peers whose round failed hold their own weights each: only who agrees is a majority.
    against = _together(others)
    if against > len(same) - len(others) + 1:
        return f"{against} of {len(same)} peers hold other weights in epoch {epoch}"
    if len(same) > len(others):
        return None
    informed = sum(other >= epoch for other, _ in vouches)
    if informed:
        return f"it is of epoch {epoch}, and none of {informed} peers vouches for it"
    # Whoever has just started holds the run's published start, in epoch 0.
    together = _together([vouch for vouch in vouches if vouch[0] > 0])
    if together > 1:
        return f"it is of epoch {epoch}, and {together} peers hold another state together"
    return None


def _together(vouches: Sequence[Vouch]) -> int:
    """How many of these at most are of one state."""
    agreeing = [sum(a == b and agree(one, two) for b, two in vouches) for a, one in vouches]
    return max(agreeing, default=0)


def read_vouch(said: object) -> Vouch | None:
    """A vouch as it came off the network; None when it is not one."""
    if not isinstance(said, list | tuple) or len(said) != 2:
        return None
    epoch, numbers = said
    if not is_count(epoch) or not isinstance(numbers, list | tuple) or len(numbers) != NUMBERS:
        return None
    if not all(isinstance(number, float) and math.isfinite(number) for number in numbers):
        return None
    return epoch, list(numbers)


@functools.cache
def _signs() -> Tensor:
    """[WIDTH, NUMBERS] of 1 and -1, out of SHA-256: the same on every machine."""
    bits = b"".join(
        hashlib.sha256(f"hiveminer sketch {number}".encode()).digest()
        for number in range(WIDTH * NUMBERS // 256)
    )
    ones = torch.tensor(list(bits), dtype=torch.uint8)[:, None] >> torch.arange(8) & 1
    return (ones.to(torch.float32) * 2 - 1).view(WIDTH, NUMBERS)
