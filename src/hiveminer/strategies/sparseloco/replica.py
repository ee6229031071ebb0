"""One peer's replica: its position, the states it holds, its own blobs, and its pending move.

One thread follows the rounds and another trains the model. The effect of decisions on the local
weights is therefore collected as a move, one tensor per parameter, that the training thread adds
at the end of a step. Settling, voiding and taking another state are all additions, since
local = state - u holds before and after.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hiveminer.strategies.sparseloco import rounds, update
from hiveminer.strategies.sparseloco.apply import State
from hiveminer.strategies.sparseloco.codec import Header, decode, encode
from hiveminer.strategies.sparseloco.plan import Plan
from hiveminer.strategies.sparseloco.records import Record
from hiveminer.strategies.sparseloco.rounds import Decision, Position, Transfer
from hiveminer.strategies.sparseloco.update import Tensors

TOLERANCE = 1e-5
"""Two states are equal within rounding if no weight differs by more than this share of the
largest one of its tensor."""


@dataclass(frozen=True)
class OwnCut:
    """An own blob whose round is not confirmed yet, its record, and its cut."""

    record: Record
    blob: bytes
    cut: update.Cut


class Replica:
    """Follows the decisions with the weights of one peer.

    start: the run's initial state, which the model has too. hotkey: 32 bytes. Methods that change
    the position are called in one thread, `apply_move` and `snapshot` in another.
    """

    def __init__(self, plan: Plan, *, hotkey: bytes, start: State):
        self.plan, self.start = plan, start
        self.position = Position(hotkey)
        self.decision: Decision | None = None
        """The last decision that was not empty."""
        self.states: dict[bytes, State] = {}
        """The position's states that this peer holds, by hash."""
        self.cuts: dict[bytes, OwnCut] = {}
        """The position's own blobs, by hash."""
        self.lock = threading.Lock()
        self.moves = 0
        """Number of moves so far. Weights that were copied before a move cannot be cut after it."""
        self.state = start
        """The state that the local weights are based on, once the pending move is applied."""
        self._move: dict[str, Tensor] | None = None

    @property
    def is_ready(self) -> bool:
        """Whether this peer holds a current state of the run, so that it can cut."""
        return self.position.base is not None

    # The thread that trains ---------------------------------------------------------

    @torch.no_grad()
    def apply_move(self, parameters: Tensors) -> int:
        """Add the pending move, if any, to the local weights; returns the number of moves so
        far."""
        with self.lock:
            move, self._move = self._move, None
            for name, step in (move or {}).items():
                own = parameters[name]
                own.add_(step.to(own.device, own.dtype))
            return self.moves

    def snapshot(
        self, parameters: Tensors
    ) -> tuple[Position, dict[bytes, OwnCut], dict[str, Tensor]]:
        """The position, the own blobs and u, all of the same moment."""
        with self.lock:
            learned = update.learned(self.state.weights, parameters)
            for name, step in (self._move or {}).items():
                learned[name].sub_(step)
            return self.position, dict(self.cuts), learned

    # The thread that follows the rounds ----------------------------------------------

    def start_at(self, number: int) -> None:
        """Start from the run's initial state; round `number` is the newest settled one."""
        with self.lock:
            digest = self.start.hash()
            self.position = rounds.start(self.position.hotkey, digest, settled=number)
            self.states = {digest: self.start}
            self._go_to(self.start)

    def resume(
        self, position: Position, *, cuts: Mapping[bytes, OwnCut], states: Iterable[State]
    ) -> None:
        """Resume at a checkpoint's position with the states that are still available. The caller
        then sets the local weights to `state` - u."""
        held = {state.hash(): state for state in states}
        with self.lock:
            self.position = rounds.restart(position, held.keys())
            self.states = held
            self.cuts = dict(cuts)
            self._move = None
            if self.position.held is not None:
                self.state = held[self.position.held]

    def cut(self, number: int, local: Tensors) -> OwnCut:
        """Cut a round's blob. local: a copy of the weights since the last move.

        Raises ValueError where `rounds.cut_blob` does, and if a weight is not finite.
        """
        base = self.position.base
        if base is None:
            raise ValueError(f"no cut in round {number}: the state is missing")
        rules = self.plan.rules
        header = Header(self.position.hotkey, rules.run, number, base)
        shapes, compression = self.plan.shapes, self.plan.compression
        learned = update.learned(self.state.weights, local)
        blob = encode(learned, header=header, compression=compression)
        sent = decode(blob, shapes=shapes, compression=compression)
        made = update.Cut.of(learned, {name: sent.dense(name) for name in shapes})
        digest = hashlib.sha256(blob).digest()
        own = OwnCut(Record(rules.run, number, base, len(blob), digest), blob, made)
        with self.lock:
            self.position = rounds.cut_blob(self.position, number, digest)
            self.cuts[digest] = own
        return own

    def settle(self, decision: Decision) -> None:
        """Follow a decision. Call `take_state` and `make_newest` afterwards if they are due."""
        with self.lock:
            before = self.position
            position, action = rounds.settle(before, decision)
            if position.held is not None and position.held != before.held:
                self._go_to(self.states[position.held])
            if action.returned is not None:
                update.give_back(self._pending(), self.cuts[action.returned.blob_hash].cut)
            if decision.parent is not None:
                self.decision = decision
            self.position = position
            self._forget()

    def take_state(self, state: State) -> None:
        """Switch to the confirmed state, from the log or another peer."""
        with self.lock:
            self._stand_on(state, *rounds.take_state(self.position))

    def make_newest(self, state: State) -> None:
        """Switch to the state that the missing blobs make of the confirmed one."""
        digest = state.hash()  # slow the first time
        with self.lock:
            self._stand_on(state, *rounds.make_newest(self.position, digest))

    def skip(self, number: int) -> None:
        """Skip a round whose decision this peer does not accept."""
        with self.lock:
            self.position = replace(self.position, round=number, cut=None)
            self._forget()

    def restart_as_joiner(self) -> None:
        """Start over after rounds that can no longer be read. u stays as it is, although own
        blobs of these rounds may have counted."""
        with self.lock:
            self.position = Position(self.position.hotkey)
            self.decision = None
            self._forget()

    def differs_from(self, state: State) -> bool:
        """Whether this state differs from the newest one by more than rounding."""
        newest = self.states.get(self.position.newest or b"")
        return newest is None or any(
            float((value - newest.weights[name]).abs().max())
            > TOLERANCE * float(newest.weights[name].abs().max())
            for name, value in state.weights.items()
            if value.numel()
        )

    # Both, with the lock --------------------------------------------------------------

    def _pending(self) -> dict[str, Tensor]:
        self.moves += 1
        if self._move is None:
            self._move = {name: torch.zeros(shape) for name, shape in self.plan.shapes.items()}
        return self._move

    def _go_to(self, state: State) -> None:
        update.settle(self._pending(), self.state.weights, state.weights)
        self.state = state

    def _stand_on(self, state: State, position: Position, transfer: Transfer) -> None:
        self.states[state.hash()] = state
        self._go_to(state)
        for blob in transfer.off:
            keep = 1.0 if blob.forgotten else self.plan.keep
            update.take_off(self._pending(), self.cuts[blob.blob_hash].cut, keep=keep)
        for blob in transfer.back:
            update.give_back(self._pending(), self.cuts[blob.blob_hash].cut)
        self.position = position
        self._forget()

    def _forget(self) -> None:
        """Drop the states and blobs that the position no longer needs."""
        kept = self.position.states_to_keep
        self.states = {digest: each for digest, each in self.states.items() if digest in kept}
        own = {blob.blob_hash: blob for blob in self.position.own_blobs}
        self.cuts = {
            digest: replace(each, cut=replace(each.cut, left={})) if own[digest].forgotten else each
            for digest, each in self.cuts.items()
            if digest in own
        }
