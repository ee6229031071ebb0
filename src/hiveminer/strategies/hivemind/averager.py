"""The averager: Hivemind's process that finds a group, averages with it, and serves the state.

It differs from the stock one in these points, by overriding its hooks:

- Only peers that have proved a registered hotkey can join a group, send parts, or download the
  state; and we join, send to and load from nobody else.
- A group consists of peers that end the same epoch. It is complete when all live ones are in it,
  so nobody waits for the matchmaking timeout; a peer that dies is left out of the round.
- Peers are weighted by the rows that they trained. What is not finite, or far too large, is not
  sent, averaged or applied.
- Joiners get the weights that the epoch began with, which are the same on all peers; each peer
  vouches for its own with a sketch.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import threading
from collections.abc import Iterator
from typing import Any

import torch
from hivemind.averaging.averager import _background_thread_fetch_current_state
from hivemind.averaging.control import StepControl
from hivemind.compression import Float16Compression
from hivemind.optim.state_averager import TrainingStateAverager
from hivemind.utils.serializer import MSGPackSerializer
from torch import Tensor

from hiveminer.runtime.events import tell
from hiveminer.strategies.hivemind.bounds import Bounds
from hiveminer.strategies.hivemind.failure_detector import Group
from hiveminer.strategies.hivemind.records import averager_prefix
from hiveminer.strategies.hivemind.round_server import (
    CHUNK_SECONDS,
    DONOR,
    IDLE_WEIGHT,
    SHUNNED,
    RoundServer,
)
from hiveminer.strategies.hivemind.sketch import sketch_of
from hiveminer.strategies.hivemind.state_transfer import tame_moments
from hiveminer.swarm.peer import START_SECONDS
from hiveminer.swarm.processes import before_fork

logger = logging.getLogger(__name__)

TURN_SECONDS = 30.0
"""How long a download in the middle of a round waits for its end."""

LONGEST_STEP_SECONDS = 15.0

MAX_NEWS_BYTES = 2**20


class SwarmAverager(TrainingStateAverager, RoundServer):  # type: ignore[misc]
    """The stock state averager, with the differences that the module's docstring lists.

    bounds: of what a peer may send.

    After an epoch, `members` are the peers that averaged, only this one if it was alone or the
    round failed; `is_whole` is False when a part of the average was lost.
    """

    members: frozenset[str] = frozenset()
    is_whole = True

    def __init__(self, *, run_id: str, bounds: Bounds, **kwargs: Any):
        self.run_id = run_id
        self.bounds = bounds
        self._turning = threading.RLock()
        self._averaged = self._in_round = False
        self._sends_float16 = isinstance(kwargs.get("compression"), Float16Compression)
        self._news_here, self._news_there = multiprocessing.Pipe(duplex=False)
        self._news_lock = threading.Lock()
        self._shunned: set[str] = set()
        self._group = Group()
        self._donor = ""
        self._step_seconds = multiprocessing.Value("d", 0.0)
        before = set(threading.enumerate())
        super().__init__(prefix=averager_prefix(run_id), next_chunk_timeout=CHUNK_SECONDS, **kwargs)
        self.threads = [
            thread
            for thread in set(threading.enumerate()) - before
            if _background_thread_fetch_current_state.__name__ in thread.name
        ]
        self._outer_pipe.send(("_guard_tasks", [], {}))
        self.vouch()

    def run_in_background(self, **_: Any) -> None:
        """As in the base class, but SIGINT is ignored in the new process only."""
        before_fork()
        self.start()
        self.wait_until_ready(START_SECONDS)

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """As in the base class, with checks of what is sent and applied at the end of an epoch."""
        if not kwargs.get("increment_epoch"):
            return super().step(*args, **kwargs)
        with self._turning:
            self._averaged = False
            self.last_control = kwargs.get("averaging_control")
            if not self.is_sound():
                self.rollback()
                self.set_weight(0, self.last_control)
            self._in_round = True
            try:
                result = super().step(*args, **kwargs)
            finally:
                self._in_round = False
            control, self.last_control = self.last_control, None
            self.members = self._members_of(control) if self._averaged else self._alone
            self.is_whole = self.members == self._alone or bool(control and control.result().whole)
            if self.members == self._alone:  # the present weights are the epoch's first
                self._load_local_tensors_into_averager_()
            self.vouch()
            return result

    def _load_local_tensors_into_averager_(self) -> None:
        """As in the base class; if a round sends 16 bits, the weights are rounded first.

        Each peer adds the difference between the average and what it has sent to its own weights,
        so that the rounding error would stay in them.
        """
        super()._load_local_tensors_into_averager_()
        if self._sends_float16 and self._in_round:
            with torch.no_grad(), self.get_tensors() as averaged:
                for tensor in averaged:
                    tensor.copy_(tensor.half())

    def _apply_averaging_results_(self) -> None:
        """As in the base class, if there was an average within the bounds."""
        if self._members_of(self.last_control) == self._alone:
            return
        with self.get_tensors() as averaged:
            problems = map(self.bounds.problem_with, averaged, self._local_tensors())
            problem = next(filter(None, problems), None)
        if problem is not None:
            tell(logger, "poison", f"epoch {self.local_epoch}: the average is refused: {problem}")
            return
        super()._apply_averaging_results_()
        self._averaged = True

    def is_sound(self) -> bool:
        """Whether our weights are close enough to the epoch's start to be sent."""
        with torch.no_grad(), self.get_tensors() as start:
            return not self.bounds.ran_away(list(self._local_tensors()), start)

    @torch.no_grad()
    def rollback(self) -> None:
        """Restore the weights that the epoch began with; drop moments that are not finite."""
        cause = f"epoch {self.local_epoch}: our weights are not finite, or far too large"
        tell(logger, "diverged", f"{cause}; the epoch's first weights are restored")
        with self.get_tensors() as start:
            for local, before in zip(self._local_tensors(), start, strict=True):
                local.copy_(before)
        for state in self.optimizer.state.values():
            for moment in state.values():
                if isinstance(moment, Tensor) and not bool(torch.isfinite(moment).all()):
                    moment.zero_()

    def get_current_state(self) -> tuple[Any, Any, Any]:
        """The state for a joiner: outside of a round, for whose end this waits, the averaging
        buffers hold the epoch's first weights."""
        if not self._turning.acquire(timeout=TURN_SECONDS):
            raise TimeoutError("the round does not end")
        try:
            metadata, tensors, infos = super().get_current_state()
            with self.get_tensors() as averaged:
                start = [tensor.clone() for tensor in averaged[: len(self.main_parameters)]]
        finally:
            self._turning.release()
        return metadata, start + tensors[len(start) :], infos

    def load_state_from_peers(self, **kwargs: Any) -> None:
        super().load_state_from_peers(**kwargs)
        if self.loaded:
            tame_moments(self.optimizer)
            self.vouch()

    def _update_scheduler(self) -> None:
        """As in the base class, but in one step, however large the epoch."""
        if self.scheduler and self.scheduler._step_count <= self.local_epoch:
            self.scheduler._step_count = self.local_epoch
            self.scheduler.last_epoch = self.local_epoch - 1
            self.scheduler.step()

    def set_target_group_size(self, size: int) -> None:
        """A group of this many peers is complete and does not wait for more."""
        self._outer_pipe.send(("_set_target_group_size", [size], {}))

    def leave_out(self, peers: set[str]) -> None:
        """These peers are gone: a running round goes on without them."""
        self._outer_pipe.send(("_leave_out", [sorted(peers)], {}))

    def shunned(self) -> set[str]:
        """Peers that were shunned since this was last asked."""
        with self._read_news():
            shunned, self._shunned = self._shunned, set()
            return shunned

    def group(self) -> Group:
        """The running round, and its other members."""
        with self._read_news():
            return self._group

    def donor(self) -> str:
        """The peer whose state was last downloaded; "" before."""
        with self._read_news():
            return self._donor

    @contextlib.contextmanager
    def _read_news(self) -> Iterator[None]:
        with self._news_lock:
            while self._news_here.poll():
                kind, *rest = MSGPackSerializer.loads(self._news_here.recv_bytes(MAX_NEWS_BYTES))
                if kind == SHUNNED:
                    self._shunned.update(rest)
                elif kind == DONOR:
                    self._donor = rest[0]
                else:
                    self._group = Group(rest[0], frozenset(rest[1:]))
            yield

    def set_step_seconds(self, seconds: float) -> None:
        """How long a step of ours takes: members of a group may be that late."""
        self._step_seconds.value = min(seconds, LONGEST_STEP_SECONDS)

    @property
    def _alone(self) -> frozenset[str]:
        return frozenset([str(self.peer_id)])

    def _members_of(self, control: StepControl | None) -> frozenset[str]:
        """The peers that were in a round that has ended; only this one if it failed."""
        if control is None or not control.done() or control.cancelled() or control.exception():
            return self._alone
        return self._alone | {str(peer) for peer in control.result() or ()}

    def set_weight(self, rows: float, control: StepControl | None) -> None:
        """Count for this many rows in the next round, even if it is arranged already."""
        self.rows_weight = min(rows, self.bounds.most_rows) if rows else IDLE_WEIGHT
        if control is not None and not control.triggered and not control.done():
            control.weight = self.rows_weight

    def vouch(self) -> None:
        """Publish the epoch and the sketch of the state that we would hand out."""
        with self.get_tensors() as averaged:
            numbers = sketch_of(averaged[: len(self.main_parameters)])
        self._outer_pipe.send(("_set_vouch", [int(self.local_epoch), numbers], {}))
