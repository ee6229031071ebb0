"""The equations of a round: nothing that a peer learns is lost or counted twice."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hiveminer.strategies.sparseloco.update import (
    Cut,
    cut,
    give_back,
    learned,
    rebase,
    settle,
    take_off,
)

SHAPES = ((3, 4), (5,))


def values(*numbers: float) -> list[Tensor]:
    return [torch.tensor(numbers, dtype=torch.float32)]


def largest(update: list[Tensor], *, count: int = 1) -> list[Tensor]:
    """Keep the `count` largest values of each tensor: a codec without rounding."""
    kept = []
    for tensor in update:
        flat = tensor.flatten()
        indices = flat.abs().topk(min(count, flat.numel())).indices
        kept.append(torch.zeros_like(flat).index_copy(0, indices, flat[indices]).view_as(tensor))
    return kept


def close(actual: list[Tensor], *numbers: float) -> None:
    torch.testing.assert_close(
        actual[0], torch.tensor(numbers, dtype=torch.float32), rtol=0, atol=1e-6
    )


def void(
    local: list[Tensor], new: list[Tensor], old: list[Tensor], mine: Cut | None = None
) -> None:
    """Undo `settle`."""
    settle(local, new, old)
    if mine is not None:
        give_back(local, mine.settled())


def test_the_worked_example_when_the_blob_counts() -> None:
    state, local = values(0, 0), values(-3, -1)
    made = cut(state, local, compress=largest)
    assert (made.sent[0].tolist(), made.left[0].tolist()) == ([3, 0], [0, 1])
    close(local, -3, -1)

    local[0].copy_(torch.tensor([-3.5, -1.0]))
    new = values(-3, 0)
    settle(local, state, new, counted=made, keep=0.8)
    close(local, -3.5, -0.8)
    close(learned(new, local), 0.5, 0.8)  # the new step and 0.8 of e

    void(local, new, state, made)
    close(learned(state, local), 3.5, 0.8)  # all but the 0.2 that was forgotten


def test_the_worked_example_when_another_blob_counts() -> None:
    state, local = values(0, 0), values(-3.5, -1)
    new = values(0, -0.4)
    settle(local, state, new)
    close(local, -3.5, -1.4)
    close(learned(new, local), 3.5, 1)
    void(local, new, state)
    close(local, -3.5, -1)


def test_a_peer_takes_another_state_with_all_it_has_learned() -> None:
    state, local = values(1, 2), values(0.5, 2.5)
    update = learned(state, local)
    other = values(-7, 4)
    rebase(local, other, update=update)
    close(local, -7.5, 4.5)
    close(learned(other, local), 0.5, -0.5)


def test_lists_of_different_lengths_are_a_mistake() -> None:
    with pytest.raises(ValueError, match="zip"):
        learned(values(1), [])


@dataclass
class Peer:
    """A peer with the bookkeeping of the invariant, in double precision."""

    local: list[Tensor]
    own_steps: list[Tensor]
    counted: list[Tensor]
    forgotten: list[Tensor]

    def train(self, random: torch.Generator) -> None:
        for own, steps in zip(self.local, self.own_steps, strict=True):
            step = torch.randn(own.shape, generator=random)
            own.add_(step)
            steps.add_(step)

    def settle(self, old: list[Tensor], new: list[Tensor], mine: Cut | None, keep: float) -> None:
        settle(self.local, old, new, counted=mine, keep=keep)
        self._count(mine, keep)

    def void(self, old: list[Tensor], new: list[Tensor], mine: Cut | None) -> None:
        void(self.local, new, old, mine)
        add(self.counted, mine.sent if mine else [], factor=-1)

    def restart(self, old: list[Tensor], new: list[Tensor], mine: Cut | None, keep: float) -> None:
        """Come back in another process, with nothing but u and the cut."""
        update = learned(old, self.local)
        self.local = zeros(torch.float32)
        rebase(self.local, new, update=update)
        if mine is not None:
            take_off(self.local, mine, keep=keep)
        self._count(mine, keep)

    def return_void(self, old: list[Tensor], new: list[Tensor], mine: Cut | None) -> None:
        """The same as `void` for a peer that comes back in another process."""
        update = learned(new, self.local)
        self.local = zeros(torch.float32)
        rebase(self.local, old, update=update)
        if mine is not None:
            give_back(self.local, mine.settled())
        add(self.counted, mine.sent if mine else [], factor=-1)

    def _count(self, mine: Cut | None, keep: float) -> None:
        add(self.counted, mine.sent if mine else [])
        add(self.forgotten, mine.left if mine else [], factor=1 - keep)

    def off_by(self, state: list[Tensor]) -> float:
        """How far the invariant is off; rounding apart, 0."""
        terms = (learned(state, self.local), self.counted, self.forgotten, self.own_steps)
        return max(
            float(sum(part.double() for part in parts).abs().max())
            for parts in zip(*terms, strict=True)
        )


def zeros(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.zeros(shape, dtype=dtype) for shape in SHAPES]


def add(into: list[Tensor], what: list[Tensor], *, factor: float = 1.0) -> None:
    for total, tensor in zip(into, what, strict=bool(what)):
        total.add_(tensor.double() * factor)


def mean_of(cuts: list[Cut], state: list[Tensor]) -> list[Tensor]:
    """The global state after these cuts."""
    new = [tensor.clone() for tensor in state]
    for made in cuts:
        for tensor, q in zip(new, made.sent, strict=True):
            tensor.sub_(q / len(cuts))
    return new


ROUNDS = st.lists(
    st.tuples(
        st.lists(st.sampled_from(["no cut", "not counted", "counted"]), min_size=3, max_size=3),
        st.sampled_from(["lands", "void", "empty"]),
        st.sampled_from([None, 0, 1, 2]),  # the peer that restarts
        st.integers(0, 3),
    ),
    min_size=1,
    max_size=25,
)


@settings(max_examples=150)
@given(
    rounds=ROUNDS,
    keep=st.sampled_from([1.0, 0.8, 0.5]),
    seed=st.integers(min_value=0, max_value=99),
)
def test_nothing_is_lost_or_counted_twice_in_any_schedule(
    rounds: list[tuple[list[str], str, int | None, int]], keep: float, seed: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    state = zeros(torch.float32)
    peers = [Peer(zeros(torch.float32), zeros(), zeros(), zeros()) for _ in range(3)]

    def check(at: list[Tensor]) -> None:
        assert max(peer.off_by(at) for peer in peers) < 1e-3

    for fates, outcome, restarts, steps in rounds:
        for peer in peers * steps:
            peer.train(random)
        cuts = {
            index: cut(state, peer.local, compress=partial(largest, count=3))
            for index, peer in enumerate(peers)
            if fates[index] != "no cut"
        }
        for peer in peers:
            peer.train(random)  # between the cut and its settling
        check(state)
        counted = {i: c for i, c in cuts.items() if fates[i] == "counted" and outcome != "empty"}
        new = mean_of(list(counted.values()), state)
        for index, peer in enumerate(peers):
            move = peer.restart if index == restarts else peer.settle
            move(state, new, counted.get(index), keep)
        check(new)
        if outcome == "void":
            for index, peer in enumerate(peers):
                peer.train(random)
                undo = peer.return_void if index == restarts else peer.void
                undo(state, new, counted.get(index))
            check(state)
        else:
            state = new


def test_the_invariant_notices_a_rule_that_loses_what_was_left_out() -> None:
    """The control: the same bookkeeping, for a peer that starts each round from the state."""
    random = torch.Generator().manual_seed(1)
    state = zeros(torch.float32)
    peer = Peer(zeros(torch.float32), zeros(), zeros(), zeros())
    peer.train(random)
    made = cut(state, peer.local, compress=largest)
    new = mean_of([made], state)
    peer.local = [tensor.clone() for tensor in new]
    add(peer.counted, made.sent)
    assert math.isclose(peer.off_by(new), max(float(e.abs().max()) for e in made.left))
