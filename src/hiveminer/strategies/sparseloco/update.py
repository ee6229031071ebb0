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

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Cut:
    """One cut, from the moment it is made until its round is confirmed.

    sent: q, which everybody decodes from this peer's blob. left: e = u - q, which is needed until
    the cut settles, and empty afterwards.
    """

    sent: Tensors
    left: Tensors

    @classmethod
    def of(cls, learned: Tensors, sent: Tensors) -> Cut:
        """The cut of u, `learned`, from whose blob q, `sent`, was decoded."""
        return cls(sent, {name: u.sub(sent[name]) for name, u in learned.items()})


@torch.no_grad()
def learned(state: Tensors, local: Tensors) -> dict[str, Tensor]:
    """u = state - local, float32 on the CPU."""
    return {name: state[name].sub(own.to("cpu", torch.float32)) for name, own in local.items()}


@torch.no_grad()
def settle(local: Tensors, old: Tensors, new: Tensors) -> None:
    """Move `local` in place from the global state `old` to `new`. u does not change: what leaves
    it when an own blob counts is up to `take_off`."""
    for name, own in local.items():
        own.add_(new[name].sub(old[name]).to(own.device))


@torch.no_grad()
def rebase(local: Tensors, state: Tensors, *, update: Tensors) -> None:
    """Set `local` to state - u in place: after a repair, a restart or a late start.

    update: u, as `learned` returned it for the state on which the peer stood.
    """
    for name, own in local.items():
        own.copy_(state[name].sub(update[name]))


@torch.no_grad()
def take_off(local: Tensors, counted: Cut, *, keep: float) -> None:
    """Take q + (1 - keep) e of a cut that counts off u, by moving `local` in place.

    keep: the share of e that is sent later; the rest is forgotten.
    """
    for name, own in local.items():
        sent = counted.sent[name]
        taken = sent if keep == 1 else counted.left[name].mul(1 - keep).add_(sent)
        own.add_(taken.to(own.device))


@torch.no_grad()
def give_back(local: Tensors, counted: Cut) -> None:
    """Add q of a cut that no longer counts to u, by moving `local` in place. What was forgotten
    stays forgotten, so the cut need not hold e."""
    for name, own in local.items():
        own.sub_(counted.sent[name].to(own.device))
