"""What the replicas of a cell tell each other at the end of a round, and its bytes."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks._frontier.cell import EXACT, Cell, ring_bytes
from benchmarks._frontier.model import Weights
from hiveminer.strategies.sparseloco import update
from hiveminer.strategies.sparseloco.apply import CountedBlob, OuterStep, State, apply_blobs
from hiveminer.strategies.sparseloco.codec import Compression, Header, decode, encode

RUN = bytes(8)


def peer_weights(weights: Weights, peer: int) -> Weights:
    """One replica's weights, sharing memory."""
    return {name: weight[peer] for name, weight in weights.items()}


class Exchange:
    """No exchange at all, and the interface of the others.

    sent: bytes that left all peers' interfaces together, so far. blobs: bytes of all blobs
    once, however many peers each goes to.
    """

    def __init__(self, cell: Cell, weights: Weights):
        self.cell = cell
        self.weights = weights
        self.sent = 0.0
        self.blobs = 0

    def cut(self, number: int, *, last: bool) -> None:
        """The end of round `number`; what is learned leaves the peers."""

    def settle(self) -> Weights | None:
        """Apply the round that was cut; returns the move that all peers made, by name."""
        return None

    def result(self) -> Weights:
        """The weights that are evaluated."""
        return peer_weights(self.weights, 0)

    def state_dict(self) -> dict[str, Any]:
        return {"sent": self.sent, "blobs": self.blobs}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sent, self.blobs = state["sent"], state["blobs"]


class Float16(Exchange):
    """Weights are rounded to 16 bits and averaged."""

    @torch.no_grad()
    def cut(self, number: int, *, last: bool) -> None:
        for weight in self.weights.values():
            weight.copy_(weight.half().float().mean(0).expand_as(weight))
        self.sent += self.cell.replicas * ring_bytes(self.cell, bytes_per_value=2)


class DiLoCo(Exchange):
    """An outer Nesterov step on the mean update; few bits go through the project's codec.

    Source: arXiv:2311.08105; with Muon inside, few bits and error feedback, MuLoCo,
    arXiv:2505.23725.
    """

    def __init__(self, cell: Cell, weights: Weights):
        super().__init__(cell, weights)
        self.anchor = {name: weight[0].clone() for name, weight in weights.items()}
        self.velocity = {name: torch.zeros_like(weight) for name, weight in self.anchor.items()}
        self.error = {name: torch.zeros_like(weight) for name, weight in weights.items()}

    @torch.no_grad()
    def cut(self, number: int, *, last: bool) -> None:
        found = {name: self.anchor[name] - weight for name, weight in self.weights.items()}
        if self.cell.bits == EXACT:
            self.sent += self.cell.replicas * ring_bytes(self.cell, bytes_per_value=4)
        else:
            for name, error in self.error.items():
                found[name] += self.cell.keep * error
            for peer in range(self.cell.replicas):
                self._encode(peer, peer_weights(found, peer), number)
        for name, anchor in self.anchor.items():
            mean, velocity = found[name].mean(0), self.velocity[name]
            velocity.mul_(self.cell.outer_momentum).add_(mean)
            move = mean + self.cell.outer_momentum * velocity
            anchor.sub_(move, alpha=self.cell.outer_rate)
            self.weights[name].copy_(anchor.expand_as(self.weights[name]))

    def _encode(self, peer: int, found: Weights, number: int) -> None:
        """Replace an update in place by what its blob says; the rest is the next error."""
        compression = Compression(self.cell.density, self.cell.bits)
        blob = encode(found, header=_header(peer, number), compression=compression)
        shapes = {name: value.shape for name, value in found.items()}
        read = decode(blob, shapes=shapes, compression=compression)
        self.blobs += len(blob)
        self.sent += (self.cell.replicas - 1) * len(blob)
        for name, value in found.items():
            sent = read.dense(name)
            self.error[name][peer] = value - sent
            value.copy_(sent)

    def state_dict(self) -> dict[str, Any]:
        mine = {"anchor": self.anchor, "velocity": self.velocity, "error": self.error}
        return super().state_dict() | mine

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.anchor, self.velocity = state["anchor"], state["velocity"]
        self.error = state["error"]


class Sparseloco(Exchange):
    """The project's own codec, update and apply.

    `groups` are the tensors by how they are compressed: each group is a blob and a state of
    its own, so that the embeddings can have another density than the matrices.
    """

    def __init__(self, cell: Cell, weights: Weights):
        super().__init__(cell, weights)
        self.groups = _groups(cell, weights)
        one = peer_weights(weights, 0)
        self.states = [
            State({name: one[name].clone() for name in names}, dict.fromkeys(names, 0.0))
            for names, _ in self.groups
        ]
        self.step = OuterStep(cell.outer_rate, cell.power)
        self.waiting: dict[str, Any] | None = None

    def cut(self, number: int, *, last: bool) -> None:
        dense_last = last and self.cell.last_bits
        new: list[State] = []
        cuts: list[list[update.Cut]] = []
        for (names, given), state in zip(self.groups, self.states, strict=True):
            compression = Compression(1.0, self.cell.last_bits) if dense_last else given
            made = [
                self._cut(peer, names, state, compression, number)
                for peer in range(self.cell.replicas)
            ]
            cuts.append([cut for cut, _ in made])
            if compression is None:
                new.append(self._exact_mean(state, cuts[-1]))
            else:
                counted = [
                    CountedBlob(peer, _header(peer, number), blob)
                    for peer, (_, blob) in enumerate(made)
                ]
                applied = apply_blobs(state, counted, step=self.step, compression=compression)
                assert not applied.left_out, applied.left_out
                new.append(applied.state)
        self.waiting = {"new": new, "cuts": cuts}

    def _cut(
        self, peer: int, names: list[str], state: State, compression: Compression | None,
        number: int,
    ) -> tuple[update.Cut, bytes]:  # fmt: skip
        learned = update.learned(state.weights, self._local(peer, names))
        if compression is None:
            return update.Cut.of(learned, self._exact(learned)), b""
        blob = encode(learned, header=_header(peer, number), compression=compression)
        shapes = {name: value.shape for name, value in learned.items()}
        read = decode(blob, shapes=shapes, compression=compression)
        self.blobs += len(blob)
        self.sent += (self.cell.replicas - 1) * len(blob)
        return update.Cut.of(learned, {name: read.dense(name) for name in names}), blob

    def _local(self, peer: int, names: list[str]) -> Weights:
        return {name: self.weights[name][peer] for name in names}

    def _exact(self, found: Weights) -> Weights:
        """The largest values in full precision: what sparsity costs without quantization.

        Bytes are computed: a ring if dense, else 4 bytes per value and its index's entropy."""
        if self.cell.density == 1:
            self.sent += ring_bytes(self.cell, bytes_per_value=4)
            return {name: value.clone() for name, value in found.items()}
        kept = round(self.cell.density * 4096)
        sent = {}
        for name, value in found.items():
            rows = value.reshape(-1, 4096)
            where = rows.abs().topk(kept, dim=1).indices
            largest = torch.zeros_like(rows).scatter(1, where, rows.gather(1, where))
            sent[name] = largest.view_as(value)
            index_bits = Compression(self.cell.density, 1).kept(4096) * 7.36
            self.sent += (self.cell.replicas - 1) * len(rows) * (4 * kept + index_bits / 8)
        return sent

    def _exact_mean(self, state: State, cuts: list[update.Cut]) -> State:
        weights = {}
        for name, weight in state.weights.items():
            sent = torch.stack([cut.sent[name] for cut in cuts])
            count = sent.ne(0).sum(0).clamp_min(1)
            a = self.cell.power if self.cell.density < 1 else 0.0
            divisor = count**a * self.cell.replicas ** (1 - a)
            weights[name] = weight - self.cell.outer_rate * sent.sum(0) / divisor
        return State(weights, state.clip_norms)

    def settle(self) -> Weights | None:
        waiting, self.waiting = self.waiting, None
        if waiting is None:
            return None
        moves: Weights = {}
        for (names, _), old, new, cuts in zip(
            self.groups, self.states, waiting["new"], waiting["cuts"], strict=True
        ):
            for peer, cut in enumerate(cuts):
                local = self._local(peer, names)
                update.settle(local, old.weights, new.weights)
                update.take_off(local, cut, keep=self.cell.keep)
            moves |= {name: old.weights[name] - new.weights[name] for name in names}
        self.states = waiting["new"]
        return moves

    def result(self) -> Weights:
        return {name: weight for state in self.states for name, weight in state.weights.items()}

    def state_dict(self) -> dict[str, Any]:
        def plain(state: State) -> dict[str, Any]:
            return {"weights": dict(state.weights), "clip_norms": dict(state.clip_norms)}

        waiting = self.waiting and {
            "new": [plain(state) for state in self.waiting["new"]],
            "cuts": [[(cut.sent, cut.left) for cut in cuts] for cuts in self.waiting["cuts"]],
        }
        states = [plain(state) for state in self.states]
        return super().state_dict() | {"states": states, "waiting": waiting}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.states = [State(**each) for each in state["states"]]
        waiting = state["waiting"]
        self.waiting = waiting and {
            "new": [State(**each) for each in waiting["new"]],
            "cuts": [[update.Cut(*cut) for cut in cuts] for cuts in waiting["cuts"]],
        }


def make_exchange(cell: Cell, weights: Weights) -> Exchange:
    kinds = {"float16": Float16, "diloco": DiLoCo, "sparseloco": Sparseloco}
    return kinds.get(cell.method, Exchange)(cell, weights)


def _groups(cell: Cell, weights: Weights) -> list[tuple[list[str], Compression | None]]:
    inside = sorted(name for name in weights if name.startswith("layers."))
    tables = sorted(name for name in weights if not name.startswith("layers."))
    if cell.bits == EXACT:
        return [(tables + inside, None)]
    given = Compression(cell.density, cell.bits)
    if not cell.embedding_density:
        return [(sorted(weights), given)]
    return [(tables, Compression(cell.embedding_density, cell.bits)), (inside, given)]


def _header(peer: int, number: int) -> Header:
    return Header(hotkey=bytes([peer]) * 32, run=RUN, round=number, parent=bytes(32))
