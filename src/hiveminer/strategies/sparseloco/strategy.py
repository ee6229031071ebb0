"""The strategy `sparseloco`: local steps and small updates, of which the chain decides which count.

The training thread does little besides training: at the end of a step it adds the move of a settled
round to its weights, and copies them when a cut is due. The rest happens in the threads of the
follower and the exchange. The protocol is in docs/sparseloco.md.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hiveminer.runtime.events import tell
from hiveminer.strategies.base import RoundResult, Strategy, between_steps
from hiveminer.strategies.sparseloco import checkpoint, update
from hiveminer.strategies.sparseloco.apply import State
from hiveminer.strategies.sparseloco.cutting import CuttingFollower
from hiveminer.strategies.sparseloco.log import as_json, from_json
from hiveminer.strategies.sparseloco.parts import Parts
from hiveminer.strategies.sparseloco.replay import rebuild
from hiveminer.strategies.sparseloco.replica import OwnCut
from hiveminer.strategies.sparseloco.rounds import Position
from hiveminer.strategies.sparseloco.update import Tensors
from hiveminer.training.optimizer import inner_optimizer

logger = logging.getLogger(__name__)

JOIN_SECONDS = 60.0
"""How long a start waits for the run's state. Training begins without it after that, and what is
trained before it arrives is dropped."""


class SparselocoStrategy(Strategy):
    """A model that trains locally and applies the updates that count.

    on_round: called in the training thread when a settled round has reached the weights.
    """

    def __init__(
        self,
        model: nn.Module,
        parts: Parts,
        *,
        on_round: Callable[[RoundResult], None] = lambda _: None,
    ):
        self.model = model
        self.plan, self.log, self.membership = parts.plan, parts.log, parts.membership
        self.on_round = on_round
        self.optimizer = inner_optimizer(model, parts.section)
        self.follower = CuttingFollower(parts, start=State.of(model), weights=self._copied_weights)
        self.replica = self.follower.replica
        self._lock = threading.Lock()
        self._wanted: int | None = None
        self._copy: tuple[int, int, dict[str, Tensor]] | None = None
        self._steps = 0
        self._cut_at = 0
        self._moves = 0

    @property
    def epoch(self) -> int:
        """The current round."""
        return self.follower.decided + 1

    @property
    def peers(self) -> int:
        """Peers whose updates counted in the last round that was not empty."""
        return max(1, self.follower.contributors)

    @property
    def address(self) -> str:
        return self.membership.peer.commitment

    def step(self, *, batch_size: int) -> bool:
        """False until the run's state has arrived: what is trained before that is lost."""
        with self._lock:
            self.optimizer.step()
            self._steps += 1
            is_ready = self.replica.is_ready
            self._at_boundary()
            return is_ready

    def zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def idle(self) -> None:
        with self._lock:
            self._at_boundary()

    def catch_up(self) -> bool:
        self.idle()
        return self.replica.is_ready

    def recover(self) -> bool:
        """Replace weights that are not finite by the global state; what was learned since is
        lost."""
        with self._lock:
            if all(bool(torch.isfinite(each).all()) for each in self._parameters().values()):
                return True
            self.replica.apply_move(self._parameters())
            for name, own in self._parameters().items():
                own.copy_(self.replica.state.weights[name])
            self.zero_grad()
            self.optimizer.state.clear()
            tell(
                logger, "poison", "weights were not finite: training resumes from the global state"
            )
            return False

    def state_dict(
        self, *, timeout_seconds: float = 60.0
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        with between_steps(self._lock, timeout_seconds=timeout_seconds):
            position, cuts, learned = self.replica.snapshot(self._parameters())
            tensors = {f"u.{name}": each for name, each in learned.items()}
            weights = self.replica.state.weights
            counts = position.held is not None and position.held != self.replica.start.hash()
            if not counts:  # the local weights are worth more
                weights = {name: weights[name] - u for name, u in learned.items()}
            tensors |= {f"weights.{name}": value for name, value in weights.items()}
            tensors |= checkpoint.cuts_to_tensors(cuts)
            tensors |= checkpoint.optimizer_to_tensors(self.optimizer)
        content = as_json(vars(position))
        return tensors, {"epoch": self.epoch, "rows": 0, "counts": counts, "position": content}

    def load_state_dict(self, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        position: Position = from_json(Position, metadata["position"])
        if position.hotkey != self.replica.position.hotkey:
            raise ValueError("it belongs to another hotkey")
        learned = {name: tensors[f"u.{name}"] for name in self.plan.shapes}
        if any(each.shape != self.plan.shapes[name] for name, each in learned.items()):
            raise ValueError("it is of another model")
        cuts = checkpoint.cuts_from_tensors(tensors, self.plan)
        inner = checkpoint.optimizer_state(tensors, self.optimizer)
        self._resume(position, cuts, learned)
        self.optimizer.load_state_dict(inner)

    def move_to(self, device: torch.device) -> None:
        self.model.to(device)
        for values in self.optimizer.state.values():
            for key, value in values.items():
                if isinstance(value, Tensor):
                    values[key] = value.to(device)

    def join(self) -> None:
        self._resume_cut()
        self.follower.begin()
        deadline = time.monotonic() + JOIN_SECONDS
        while not self.replica.is_ready and time.monotonic() < deadline:
            self.membership.sync()
            if self.follower.stopping.wait(0.1):
                break
        self.idle()

    def sync(self) -> None:
        self.membership.sync()

    def close(self) -> None:
        self.follower.close()

    # The training thread ---------------------------------------------------------------

    def _parameters(self) -> dict[str, Tensor]:
        named = dict(self.model.named_parameters())
        return {name: named[name].detach() for name in self.plan.shapes}

    def _at_boundary(self) -> None:
        """Between two steps: apply the pending move, and copy the weights if a cut is due."""
        began = time.monotonic()
        moves = self.replica.apply_move(self._parameters())
        number, self._wanted = self._wanted, None
        if number is not None:
            weights = self._parameters().items()
            copy = {name: each.to("cpu", torch.float32, copy=True) for name, each in weights}
            self._copy = number, moves, copy
        if moves != self._moves:
            self._moves = moves
            self.on_round(RoundResult(self.epoch, self.peers, time.monotonic() - began))

    # The follower's thread ---------------------------------------------------------------

    def _copied_weights(self, number: int) -> Tensors | str:
        """Called by the follower: the copy for this round, or why there is none; one is requested
        if there is something that was not sent yet."""
        copy, self._copy = self._copy, None
        if copy is not None and copy[:2] == (number, self.replica.moves):
            self._cut_at = self._steps
            return copy[2]
        is_sent = self._steps == self._cut_at and self.replica.position.counted is not None
        if self._steps == 0 or is_sent:
            return ""
        self._wanted = number
        return "no training step ended after the cut was due"

    # Resuming ----------------------------------------------------------------------------

    def _resume(
        self, position: Position, cuts: Mapping[bytes, OwnCut], learned: Mapping[str, Tensor]
    ) -> None:
        found = [rebuild(self.log, self.plan, digest) for digest in position.states_to_keep]
        states = [state for state in found if state is not None]
        with self._lock:
            self.replica.resume(position, cuts=cuts, states=states)
            update.rebase(self._parameters(), self.replica.state.weights, update=learned)
            self.follower.decided = -1 if position.round is None else position.round
            self._steps += 1  # what was learned may not have been sent yet

    def _resume_cut(self) -> None:
        """Resume from the last cut, if no checkpoint was taken after it: its blob may be known
        to the chain, so a second one of that round must not be made."""
        journal = checkpoint.read_journal(self.log.folder, self.plan)
        if journal is None:
            return
        position, cuts = journal
        cut, known = position.cut, self.replica.position
        if cut is None or cut.blob_hash not in cuts or position.hotkey != known.hotkey:
            return
        newest = known.round if known.cut is None else known.cut.round
        if newest is not None and newest >= cut.round:
            return
        own = cuts[cut.blob_hash].cut
        learned = {name: q.add(own.left[name]) for name, q in own.sent.items()}
        self._resume(position, cuts, learned)
