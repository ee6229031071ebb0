"""The averager: hivemind's process that finds a group, averages with it, and hands out state.

What is changed against the stock one, each by overriding one of its hooks, and why: the
group is complete when all live peers are in it, so nobody waits out the matchmaking time;
peers count by the rows they trained; what is handed out are the weights that the epoch
began with; a state that is not finite, or of another shape, is never loaded, and loading
has a deadline.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from hivemind.averaging import DecentralizedAverager
from hivemind.averaging.control import StepControl
from hivemind.compression import CompressionBase, Float16Compression, NoCompression
from hivemind.optim.state_averager import TrainingStateAverager

from hiveminer.run import SwarmSection
from hiveminer.swarm.peer import START_SECONDS
from hiveminer.swarm.processes import settle

logger = logging.getLogger(__name__)

CHUNK_SECONDS = 30.0
"""How long a peer waits for the next part of a tensor: hivemind's default is shorter than
some rounds take to begin."""

IDLE_WEIGHT = 1e-3
"""An idle peer's weight in rows. Not zero: a group of idle peers would divide by it."""


class _Guard(DecentralizedAverager):  # type: ignore[misc]
    """Stands between TrainingStateAverager and its base in the order of inheritance."""

    rows_weight: float = IDLE_WEIGHT
    last_control: StepControl | None = None
    loaded_epoch: int | None = None

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """Begin a round; this peer weighs as much as the rows it trained in the epoch."""
        kwargs["weight"] = self.rows_weight
        control = super().step(*args, **kwargs)
        if isinstance(control, StepControl):
            self.last_control = control
        return control

    def load_state_from_peers(
        self, wait: bool = True, timeout: float | None = None
    ) -> tuple[Any, Any] | None:
        """The base's download, within a deadline, and refused unless it is sound."""
        self.loaded_epoch = None
        try:
            state = super().load_state_from_peers(wait=wait, timeout=timeout)
        except Exception as error:  # noqa: BLE001 - whatever a peer's bytes may cause
            logger.warning("no state could be had from peers: %r", error)
            return None
        if state is None:
            return None
        problem = self._problem_with(state)
        if problem:
            logger.error("a peer's state is refused: %s", problem)
            return None
        self.loaded_epoch = state[0]["epoch"]
        return state  # type: ignore[no-any-return]

    def _problem_with(self, state: tuple[Any, Any]) -> str | None:
        metadata, tensors = state
        if not isinstance(metadata, dict) or not isinstance(metadata.get("epoch"), int):
            return "it does not say its epoch"
        if not isinstance(metadata.get("optimizer_metadata"), list):
            return "it does not describe its optimizer"
        expected = self.get_current_state()[1]
        shapes = [tuple(tensor.shape) for tensor in expected]
        if [tuple(tensor.shape) for tensor in tensors] != shapes:
            return "its tensors have other shapes than ours"
        if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
            return "it holds numbers that are not finite"
        return None


class SwarmAverager(TrainingStateAverager, _Guard):  # type: ignore[misc]
    """The stock state averager, but: its group size can follow the number of live peers;
    it hands out the weights that the epoch began with, which are the same for all peers,
    and not its own of this moment; its process ends with its parent."""

    def run(self) -> None:
        settle(self._parent_pid)
        super().run()

    def run_in_background(self, await_ready: bool = True, timeout: float | None = None) -> None:
        """As the stock one, but SIGINT is ignored in the new process only, so that a Ctrl-C
        while a program starts is not lost."""
        self.start()
        if await_ready:
            self.wait_until_ready(timeout if timeout is not None else START_SECONDS)

    def get_current_state(self) -> tuple[Any, Any, Any]:
        """What a peer that asks is given: the averaging buffers still hold the epoch's start."""
        metadata, tensors, infos = super().get_current_state()
        with self.get_tensors() as averaged:
            start = [tensor.clone() for tensor in averaged[: len(self.main_parameters)]]
        return metadata, start + tensors[len(start) :], infos

    def begin_epoch(self) -> None:
        """Take the weights of this moment for the epoch's start: there was no averaging."""
        self._load_local_tensors_into_averager_()

    @property
    def loaded(self) -> bool:
        """Whether the last download was sound, and not behind what this peer already had."""
        return self.loaded_epoch is not None and self.loaded_epoch >= self.local_epoch

    def set_target_group_size(self, size: int) -> None:
        """A group of this many peers is complete and need not wait for more."""
        self._outer_pipe.send(("_set_target_group_size", [size], {}))

    async def _set_target_group_size(self, size: int) -> None:
        """Runs in the averager's process. The key manager's own target stays unset: it
        takes it for a bound, and fails on a group that has outgrown it."""
        self._matchmaking.target_group_size = size
        self._matchmaking.potential_leaders.target_group_size = size


def averager_prefix(run_id: str) -> str:
    return f"{run_id}_state_averager"


def compression(section: SwarmSection) -> CompressionBase:
    return Float16Compression() if section.compression == "float16" else NoCompression()
