"""One peer's replica: its position, the states it holds, its own blobs, and its pending move.

The rounds are followed in one thread and the model is trained in another. What a decision does
to the local weights is therefore collected as a move, one tensor for each parameter, that the
training thread adds at the end of a step: settling, voiding and taking another state are all
additions, since local = state - u before and after.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hiveminer.strategies.sparseloco import rounds, update
from hiveminer.strategies.sparseloco.apply import State
from hiveminer.strategies.sparseloco.codec import Header, decode, encode
from hiveminer.strategies.sparseloco.plan import Plan
from hiveminer.strategies.sparseloco.records import Record
from hiveminer.strategies.sparseloco.replay import Replayed, contributions_apply
from hiveminer.strategies.sparseloco.rounds import Action, Decision, Position, Transfer

TOLERANCE = 1e-5
"""Two states are equal within rounding if no weight differs by more than this share of the
largest one of its tensor."""


@dataclass(frozen=True)
class OwnCut:
    """An own blob whose round is not confirmed yet, its record, and what it took off."""

    record: Record
    blob: bytes
    cut: update.Cut


class Replica:
    """Follows the decisions with the weights of one peer.

    start: the state from which the run starts, and the model too. hotkey: 32 bytes; one that
    never cuts may be any. Methods that change the position are called in one thread;
    `apply_move` and `snapshot` in another.
    """

    def __init__(self, plan: Plan, *, hotkey: bytes, start: State):
        self.plan = plan
        self.position = Position(hotkey)
        self.decision: Decision | None = None
        """The last one that was not empty."""
        self.states: dict[bytes, State] = {}
        """The states of the position, as far as they are held."""
        self.cuts: dict[bytes, OwnCut] = {}
        """The own blobs of the position, by their hash."""
        self.names = list(plan.shapes)
        self.lock = threading.Lock()
        self.moves = 0
        """Counts the moves that were made; weights copied before one do not fit after it."""
        self._stand = start
        self._move: list[Tensor] | None = None

    @property
    def is_ready(self) -> bool:
        """Whether this peer stands on a state of the run, so that it can cut."""
        return self.position.base is not None

    @property
    def state(self) -> State:
        """The state that the local weights stand on, once the pending move is made."""
        return self._stand

    # The thread that trains ---------------------------------------------------------

    @torch.no_grad()
    def apply_move(self, parameters: Sequence[Tensor]) -> int:
        """Add the pending move to the local weights, if there is one; how many moves they
        have by now."""
        with self.lock:
            move, self._move = self._move, None
            for own, step in zip(parameters, move or (), strict=move is not None):
                own.add_(step.to(own.device, own.dtype))
            return self.moves

    def snapshot(
        self, parameters: Sequence[Tensor]
    ) -> tuple[Position, dict[bytes, OwnCut], list[Tensor]]:
        """The position, the own blobs and u of this moment."""
        with self.lock:
            learned = update.learned(self._weights(self._stand), parameters)
            for u, step in zip(learned, self._move or (), strict=self._move is not None):
                u.sub_(step)
            return self.position, dict(self.cuts), learned

    # The thread that follows the rounds ----------------------------------------------

    def start_at(self, number: int, state: State) -> None:
        """Stand on the state from which the run starts; round `number` is the newest settled."""
        with self.lock:
            digest = state.hash()
            self.position = rounds.start(self.position.hotkey, digest, settled=number)
            self.states = {digest: state}
            self._go_to(state)

    def resume(
        self, position: Position, *, cuts: Mapping[bytes, OwnCut], states: Iterable[State]
    ) -> None:
        """Resume at a checkpoint's position with the states that are left. Afterwards the local
        weights are to be set to `state` - u."""
        held = {state.hash(): state for state in states}
        with self.lock:
            self.position = rounds.restart(position, held.keys())
            self.states = held
            self.cuts = dict(cuts)
            self._move = None
            if self.position.held is not None:
                self._stand = held[self.position.held]

    @property
    def record(self) -> Record:
        """The record of the blob that waits for its round's decision."""
        assert self.position.cut is not None
        return self.cuts[self.position.cut.blob_hash].record

    def cut(self, number: int, local: Sequence[Tensor]) -> OwnCut:
        """Cut the blob of a round. local: a copy of the weights since the last move.

        Raises ValueError where `rounds.cut_blob` does, and if a weight is not finite.
        """
        base = self.position.base
        if base is None:
            raise ValueError(f"no cut in round {number}: the state is missing")
        rules = self.plan.rules
        header = Header(self.position.hotkey, rules.run, number, base)
        blob = b""

        def compress(learned: list[Tensor]) -> list[Tensor]:
            nonlocal blob
            named = dict(zip(self.names, learned, strict=True))
            blob = encode(named, header=header, compression=self.plan.compression)
            sent = decode(blob, shapes=self.plan.shapes)
            return [sent.dense(name) for name in self.names]

        made = update.cut(self._weights(self._stand), local, compress=compress)
        digest = hashlib.sha256(blob).digest()
        own = OwnCut(Record(rules.run, number, base, len(blob), digest), blob, made)
        with self.lock:
            self.position = rounds.cut_blob(self.position, number, digest)
            self.cuts[digest] = own
        return own

    def settle(self, decision: Decision) -> Action:
        """Take a decision over. Afterwards `take_state` and `make_newest`, if they are due."""
        with self.lock:
            before = self.position
            position, action = rounds.settle(before, decision)
            if isinstance(action, rounds.VoidAndApply):
                if before.held != position.held:
                    self._go_to(self.states[action.parent])
                if action.returned is not None:
                    update.give_back(self._pending(), self.cuts[action.returned.blob_hash].cut)
            if decision.parent is not None:
                self.decision = decision
            self.position = position
            self._forget()
            return action

    def take_state(self, state: State) -> None:
        """Stand on the confirmed state, which another peer gave or the log."""
        with self.lock:
            position, transfer = rounds.take_state(self.position)
            self.states[state.hash()] = state
            self._go_to(state)
            self._take_off(transfer)
            for blob in transfer.back:
                update.give_back(self._pending(), self.cuts[blob.blob_hash].cut)
            self.position = position
            self._forget()

    def make_newest(self, blobs: Mapping[bytes, bytes]) -> Replayed:
        """Apply the missing blobs, by their hash, to the confirmed state."""
        decision, confirmed = self.decision, self.position.confirmed
        assert decision is not None
        assert confirmed is not None
        older = self.states[confirmed]
        done = contributions_apply(self.plan, older, decision, dict(blobs))
        assert done.state is not None
        assert done.hash is not None
        with self.lock:
            position, transfer = rounds.make_newest(self.position, done.hash)
            self.states[done.hash] = done.state
            self._go_to(done.state)
            self._take_off(transfer)
            self.position = position
            self._forget()
        return done

    def skip(self, number: int) -> None:
        """Pass a round over without its decision, which this peer does not accept."""
        with self.lock:
            self.position = replace(self.position, round=number, cut=None)
            self._forget()

    def restart_as_joiner(self) -> None:
        """Begin anew after rounds that can no longer be read. What was learned and is in u
        stays there; whether own blobs of these rounds counted is not known."""
        with self.lock:
            self.position = Position(self.position.hotkey)
            self.decision = None
            self._forget()

    def differs_from(self, state: State) -> bool:
        """Whether the newest state is another one than this, beyond rounding."""
        newest = self.states.get(self.position.newest or b"")
        return newest is None or any(
            float((value - newest.weights[name]).abs().max())
            > TOLERANCE * float(newest.weights[name].abs().max())
            for name, value in state.weights.items()
            if value.numel()
        )

    # Both, with the lock --------------------------------------------------------------

    def _weights(self, state: State) -> list[Tensor]:
        return [state.weights[name] for name in self.names]

    def _pending(self) -> list[Tensor]:
        self.moves += 1
        if self._move is None:
            self._move = [torch.zeros(self.plan.shapes[name]) for name in self.names]
        return self._move

    def _go_to(self, state: State) -> None:
        update.settle(self._pending(), self._weights(self._stand), self._weights(state))
        self._stand = state

    def _take_off(self, transfer: Transfer) -> None:
        """Take q of own blobs off u, and (1 - rho) e unless that was forgotten before."""
        for blob in transfer.off:
            keep = 1.0 if blob.forgotten else self.plan.keep
            update.take_off(self._pending(), self.cuts[blob.blob_hash].cut, keep=keep)

    def _forget(self) -> None:
        """Drop the states and blobs that the position no longer needs."""
        kept = self.position.states_to_keep
        self.states = {digest: each for digest, each in self.states.items() if digest in kept}
        own = {blob.blob_hash: blob for blob in self.position.own_blobs}
        self.cuts = {
            digest: replace(each, cut=each.cut.settled()) if own[digest].forgotten else each
            for digest, each in self.cuts.items()
            if digest in own
        }
