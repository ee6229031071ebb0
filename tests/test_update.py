"""The equations of a round: nothing that a peer learns is lost or counted twice."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hiveminer.strategies.sparseloco.update import (
    Cut,
    give_back,
    learned,
    rebase,
    settle,
    take_off,
)

SHAPES = {"a": (3, 4), "b": (5,)}
Tensors = dict[str, Tensor]


def values(*numbers: float) -> Tensors:
    return {"w": torch.tensor(numbers, dtype=torch.float32)}


def cut_largest(state: Tensors, local: Tensors, *, count: int = 1) -> Cut:
    """Sends the `count` largest values of each tensor: a codec without rounding."""
    update = learned(state, local)
    sent = {}
    for name, tensor in update.items():
        flat = tensor.flatten()
        indices = flat.abs().topk(count).indices
        sent[name] = torch.zeros_like(flat).index_copy(0, indices, flat[indices]).view_as(tensor)
    return Cut.of(update, sent)


def close(actual: Tensors, *numbers: float) -> None:
    torch.testing.assert_close(actual, values(*numbers), rtol=0, atol=1e-6)


def test_the_worked_example_when_the_blob_counts() -> None:
    state, local = values(0, 0), values(-3, -1)
    made = cut_largest(state, local)
    assert (made.sent["w"].tolist(), made.left["w"].tolist()) == ([3, 0], [0, 1])
    close(local, -3, -1)

    local["w"].copy_(torch.tensor([-3.5, -1.0]))
    new = values(-3, 0)
    settle(local, state, new)
    take_off(local, made, keep=0.8)
    close(local, -3.5, -0.8)
    close(learned(new, local), 0.5, 0.8)  # the new step and 0.8 of e

    settle(local, new, state)
    give_back(local, Cut(made.sent, {}))
    close(learned(state, local), 3.5, 0.8)  # all but the 0.2 that was forgotten


def test_the_worked_example_when_another_blob_counts() -> None:
    state, local = values(0, 0), values(-3.5, -1)
    new = values(0, -0.4)
    settle(local, state, new)
    close(local, -3.5, -1.4)
    close(learned(new, local), 3.5, 1)
    settle(local, new, state)
    close(local, -3.5, -1)


def zeros(dtype: torch.dtype = torch.float64) -> Tensors:
    return {name: torch.zeros(shape, dtype=dtype) for name, shape in SHAPES.items()}


def add(into: Tensors, what: Tensors, *, factor: float = 1.0) -> None:
    for name, total in into.items():
        total.add_(what[name].double() * factor)


@dataclass
class Peer:
    """A peer with the bookkeeping of the invariant, in double precision."""

    local: Tensors
    own_steps: Tensors
    counted: Tensors
    forgotten: Tensors

    def train(self, random: torch.Generator) -> None:
        for name, own in self.local.items():
            step = torch.randn(own.shape, generator=random)
            own.add_(step)
            self.own_steps[name].add_(step)

    def move(self, old: Tensors, new: Tensors, *, restarts: bool) -> None:
        """To another state; a restarted process has nothing but u."""
        if restarts:
            update = learned(old, self.local)
            self.local = zeros(torch.float32)
            rebase(self.local, new, update=update)
        else:
            settle(self.local, old, new)

    def count(self, mine: Cut, *, keep: float) -> None:
        take_off(self.local, mine, keep=keep)
        add(self.counted, mine.sent)
        add(self.forgotten, mine.left, factor=1 - keep)

    def void(self, mine: Cut) -> None:
        give_back(self.local, Cut(mine.sent, {}))
        add(self.counted, mine.sent, factor=-1)

    def off_by(self, state: Tensors) -> float:
        """How far the invariant is off; rounding apart, 0."""
        terms = (learned(state, self.local), self.counted, self.forgotten, self.own_steps)
        return max(float(sum(each[name].double() for each in terms).abs().max()) for name in SHAPES)


def new_peer() -> Peer:
    return Peer(zeros(torch.float32), zeros(), zeros(), zeros())


def mean_of(cuts: list[Cut], state: Tensors) -> Tensors:
    """The global state after these cuts."""
    new = {name: tensor.clone() for name, tensor in state.items()}
    for made in cuts:
        for name, tensor in new.items():
            tensor.sub_(made.sent[name] / len(cuts))
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
    peers = [new_peer() for _ in range(3)]

    def check(at: Tensors) -> None:
        assert max(peer.off_by(at) for peer in peers) < 1e-3

    for fates, outcome, restarts, steps in rounds:
        for peer in peers * steps:
            peer.train(random)
        cuts = {
            index: cut_largest(state, peer.local, count=3)
            for index, peer in enumerate(peers)
            if fates[index] != "no cut"
        }
        for peer in peers:
            peer.train(random)  # between the cut and its settling
        check(state)
        counted = {i: c for i, c in cuts.items() if fates[i] == "counted" and outcome != "empty"}
        new = mean_of(list(counted.values()), state)
        for index, peer in enumerate(peers):
            peer.move(state, new, restarts=index == restarts)
            if index in counted:
                peer.count(counted[index], keep=keep)
        check(new)
        if outcome == "void":
            for index, peer in enumerate(peers):
                peer.train(random)
                peer.move(new, state, restarts=index == restarts)
                if index in counted:
                    peer.void(counted[index])
            check(state)
        else:
            state = new


def test_the_invariant_notices_a_rule_that_loses_what_was_left_out() -> None:
    """The control: the same bookkeeping, for a peer that starts each round from the state."""
    state = zeros(torch.float32)
    peer = new_peer()
    peer.train(torch.Generator().manual_seed(1))
    made = cut_largest(state, peer.local)
    new = mean_of([made], state)
    peer.local = {name: tensor.clone() for name, tensor in new.items()}
    add(peer.counted, made.sent)
    assert math.isclose(peer.off_by(new), max(float(e.abs().max()) for e in made.left.values()))
