"""What a peer has learned beyond the global state, and how rounds change it.

It is u = θ - local, where θ is the global state that the peer's own weights, `local`, are based
on. Training changes `local`, and with it u, so there is no separate error-feedback buffer that
could lose learning or count it twice. Tensors of `local` may be on any device; the global state
and everything else is float32 on the CPU. Only the global state must be the same bits on all
peers: rounding errors here stay in the peer's own u.

A cut sends q and leaves out e = u - q. For each peer, at any time and up to rounding:

    u + (its own q that count) + (what was forgotten) = -(the sum of its own training steps)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Tensors = Sequence[Tensor]


@dataclass(frozen=True)
class Cut:
    """One cut, from the moment it is made until its round is confirmed.

    sent: q, which everybody decodes from this peer's blob. left: e = u - q, which is needed until
    the cut settles; see `settled`.
    """

    sent: list[Tensor]
    left: list[Tensor]

    def settled(self) -> Cut:
        """Without e, which `give_back` does not need."""
        return Cut(self.sent, [])

    def taken(self, index: int, *, keep: float) -> Tensor:
        """What leaves tensor `index` of u when the cut counts: q + (1 - keep) e."""
        sent = self.sent[index]
        return sent if keep == 1 else self.left[index].mul(1 - keep).add_(sent)


@torch.no_grad()
def learned(state: Tensors, local: Tensors) -> list[Tensor]:
    """u = state - local, float32 on the CPU."""
    return [
        theirs.sub(own.to("cpu", torch.float32)) for theirs, own in zip(state, local, strict=True)
    ]


def cut(state: Tensors, local: Tensors, *, compress: Callable[[list[Tensor]], list[Tensor]]) -> Cut:
    """Cut what was learned so far, without changing `local`.

    compress: u to q, the values that are decoded from the blob of u.
    """
    update = learned(state, local)
    sent = compress(update)
    with torch.no_grad():
        return Cut(sent, [u.sub(q) for u, q in zip(update, sent, strict=True)])


@torch.no_grad()
def settle(
    local: Tensors, old: Tensors, new: Tensors, *, counted: Cut | None = None, keep: float = 1.0
) -> None:
    """Move `local` in place from the global state `old` to `new`: when a round is decided, and
    back again, with `give_back`, when it is void.

    counted: the peer's own cut, if its blob counts in `new`. Otherwise (no mark, no record,
        another parent, no cut) u does not change, and nothing is lost.
    keep: the share of e that is sent later; the rest is forgotten. Nothing is forgotten of a cut
        that does not count.
    """
    for index, (own, before, after) in enumerate(zip(local, old, new, strict=True)):
        move = after.sub(before)
        if counted is not None:
            move.add_(counted.taken(index, keep=keep))
        own.add_(move.to(own.device))


@torch.no_grad()
def rebase(local: Tensors, state: Tensors, *, update: Tensors) -> None:
    """Set `local` to state - u in place: after a repair, a restart or a late start.

    update: u, as `learned` returned it for the state on which the peer stood.
    """
    for own, theirs, u in zip(local, state, update, strict=True):
        own.copy_(theirs.sub(u))


@torch.no_grad()
def take_off(local: Tensors, counted: Cut, *, keep: float) -> None:
    """Take q + (1 - keep) e of a cut that counts off u, by moving `local` in place."""
    for index, own in enumerate(local):
        own.add_(counted.taken(index, keep=keep).to(own.device))


@torch.no_grad()
def give_back(local: Tensors, counted: Cut) -> None:
    """Add q of a cut that no longer counts to u, by moving `local` in place. What was forgotten
    stays forgotten, so the cut need not hold e."""
    for own, sent in zip(local, counted.sent, strict=True):
        own.sub_(sent.to(own.device))
