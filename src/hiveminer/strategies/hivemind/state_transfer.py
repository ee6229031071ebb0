"""Downloading a peer's state: what is taken, within which limits, and who vouches for it.

Each peer vouches for its own state with the epoch and a sketch of the weights. A donor's state
is compared with what the other peers vouch for while it comes in.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from hivemind.averaging import DecentralizedAverager
from hivemind.averaging.allreduce import AllreduceException
from hivemind.compression import deserialize_torch_tensor
from hivemind.optim.state_averager import dump_optimizer_state
from hivemind.p2p import PeerID
from hivemind.proto import averaging_pb2
from hivemind.utils.serializer import MSGPackSerializer
from hivemind.utils.streaming import combine_from_streaming
from torch import Tensor
from torch.optim import Optimizer

from hiveminer.runtime.events import tell
from hiveminer.strategies.hivemind.records import (
    MAX_COUNT,
    averager_prefix,
    donors_in,
    donors_key,
    is_count,
    progress_key,
    reporters_in,
)
from hiveminer.strategies.hivemind.sketch import Sketch, Vouch, agree, contradiction, read_vouch

logger = logging.getLogger(__name__)

OPEN_SECONDS = 10.0
"""Timeout for the first bytes of a donor's state."""

SLOWEST_BYTES = 125_000.0
"""Bytes per second; a slower donor is given up for the next one."""

METADATA_BYTES = 2**16
METADATA_BYTES_PER_TENSOR = 2**9
"""The size of a state's metadata: hivemind describes each tensor of the optimizer."""

VOUCH_SECONDS = 3.0
MAX_VOUCH_BYTES = 1024
VOUCH_ATTEMPTS = 5
MAX_VOUCHES = 16
"""Peers that are asked to vouch for a state."""


class StateDownload(DecentralizedAverager):  # type: ignore[misc]
    """The part of the averager that downloads a state, in the program's own process."""

    loaded_epoch: int | None = None

    def __init__(self, *args: Any, **kwargs: Any):
        # The optimizer exists, and the process is not forked yet.
        self.state_bytes = sum(tensor.nbytes for tensor in self._state_tensors())
        super().__init__(*args, **kwargs)

    @property
    def loaded(self) -> bool:
        """Whether the last download was sound, and not behind what this peer already had."""
        return self.loaded_epoch is not None and self.loaded_epoch >= self.local_epoch

    def _state_tensors(self) -> list[Tensor]:
        """What a joiner is sent, in order."""
        moments = dump_optimizer_state(self.optimizer)[1]
        return [*self.main_parameters, *self.extra_tensors, *moments]

    def load_state_from_peers(self, *, timeout: float) -> tuple[Any, Any] | None:
        """As in the base class, but with a deadline, and refused unless it is sound."""
        self.loaded_epoch = None
        try:
            download = super().load_state_from_peers(wait=False, timeout=timeout)
            state = self._wait_for(download, timeout)
        except Exception as error:  # noqa: BLE001 - whatever a peer's bytes may cause
            tell(logger, "state_download", f"no state came within {timeout} s ({error!r})")
            return None
        if state is None:
            tell(logger, "state_download", "no peer gave its state")
            return None
        metadata, tensors = state  # which the inspector has checked, but for the shapes
        shapes = [tensor.shape for tensor in self._state_tensors()]
        if [tensor.shape for tensor in tensors] != shapes:
            problem = "its tensors have other shapes than ours"
            tell(logger, "state_download", f"a peer's state is refused: {problem}")
            return None
        self.loaded_epoch = metadata["epoch"]
        # What is no tensor, such as the learning rate, follows from the run, not from a peer.
        own = dump_optimizer_state(self.optimizer)[0]
        return {"epoch": self.loaded_epoch, "optimizer_metadata": own}, tensors

    def _wait_for(self, future: Any, timeout: float) -> Any:
        """The future's result; fails early when the averager's process has ended."""
        deadline = time.monotonic() + timeout
        while not future.done() and (left := deadline - time.monotonic()) > 0:
            if not self.is_alive():
                raise ConnectionError("the averager's process has ended")
            with contextlib.suppress(TimeoutError):
                future.result(timeout=min(0.5, left))
        return future.result(timeout=0)


@dataclass(kw_only=True)
class StateInspector:
    """Checks donors' states as they come in, in hivemind's averager process.

    dht, run_id: where the peers of the run declare themselves. own_id: is not asked.
    stub_of: how to call a peer's averager.
    weights: the number of weight tensors; all_bytes: the size of a whole state.
    on_state: called with the donor of each state that passed. attempts: how often the peers are
        asked, once per second.
    """

    dht: Any
    run_id: str
    own_id: PeerID
    stub_of: Callable[[PeerID], Any]
    weights: int
    all_bytes: int
    on_state: Callable[[str], None] = lambda _: None
    attempts: int = VOUCH_ATTEMPTS
    _vouches: dict[str, Vouch] = field(default_factory=dict)
    _reporting: set[str] = field(default_factory=set)

    async def prepare(self) -> None:
        """Ask the peers what they vouch for; to be called before a download."""
        self._vouches = await self._ask_for_vouches()

    async def inspected(
        self, stream: Any, donor: PeerID
    ) -> AsyncIterator[averaging_pb2.DownloadData]:
        """A donor's state as it comes in.

        Raises AllreduceException when there is none, or it is too slow, too large, not finite,
        or not what the other peers hold.
        """
        state = IncomingState(weights=self.weights, all_bytes=self.all_bytes)
        loop = asyncio.get_running_loop()
        try:
            async with contextlib.aclosing(stream) as messages:
                async for message in messages:
                    await loop.run_in_executor(None, state.add, message)
                    yield message
                    if state.is_complete:
                        break
            await loop.run_in_executor(None, state.end_tensor)
            if state.epoch is None:
                raise AllreduceException("it has none to hand out")
            problem = await self._problem_with(state.epoch, state.sketch.numbers, str(donor))
            if problem is not None:
                raise AllreduceException(problem)
            self.on_state(str(donor))
        except AllreduceException as error:
            tell(logger, "state_download", f"the state of peer {donor} is refused: {error}")
            raise

    async def _problem_with(self, epoch: int, seen: list[float], donor: str) -> str | None:
        """Why this is not the swarm's state; None if it may be.

        The peers are asked again while the donor or all others are in another epoch: this one
        may have begun, or ended, during the download.
        """
        problem: str | None = None
        for attempt in range(self.attempts):
            if attempt:
                await asyncio.sleep(1.0)
                await self.prepare()
            others = [
                vouch
                for peer, vouch in self._vouches.items()
                # Idle peers stay at the epoch of their last work; they say nothing of later ones.
                if peer != donor and (vouch[0] >= epoch or peer in self._reporting)
            ]
            own = self._vouches.get(donor)
            problem = contradiction(epoch, seen, others)
            if problem is None and (own is None or own[0] != epoch or not agree(seen, own[1])):
                problem = f"it is of epoch {epoch}, and the donor itself does not vouch for it"
            elif any(other == epoch for other, _ in others):
                break
            if problem is None:
                break
        return problem

    async def _ask_for_vouches(self) -> dict[str, Vouch]:
        donors, reporting = await asyncio.gather(
            self._read(donors_key(averager_prefix(self.run_id))),
            self._read(progress_key(self.run_id)),
        )
        reporters = reporters_in(reporting)
        self._reporting = {str(peer) for peer in reporters}
        peers = donors_in(donors) | reporters
        peers.discard(self.own_id)
        asked = random.sample(sorted(peers), min(len(peers), MAX_VOUCHES))
        vouches = await asyncio.gather(*map(self._vouch_of, asked))
        return {str(peer): vouch for peer, vouch in zip(asked, vouches, strict=True) if vouch}

    async def _read(self, key: str) -> Mapping[Any, Any]:
        try:
            future = self.dht.get(key, latest=True, return_future=True)
            entries = (await asyncio.wait_for(future, VOUCH_SECONDS)).value
        except Exception as error:  # noqa: BLE001 - then nobody is in it
            logger.debug("%s could not be read: %r", key, error)
            return {}
        return entries if isinstance(entries, Mapping) else {}

    async def _vouch_of(self, peer: PeerID) -> Vouch | None:
        try:
            call = self.stub_of(peer).rpc_vouch(averaging_pb2.DownloadRequest())
            answer = await asyncio.wait_for(call, VOUCH_SECONDS)
            if len(answer.metadata) > MAX_VOUCH_BYTES:
                return None
            return read_vouch(MSGPackSerializer.loads(answer.metadata))
        except Exception as error:  # noqa: BLE001 - dead, a stranger, or too old to know it
            logger.debug("peer %s does not vouch: %r", peer, error)
            return None


class IncomingState:
    """A state that is being received: its size, its speed, and what is in it."""

    def __init__(self, *, weights: int, all_bytes: int, open_seconds: float = OPEN_SECONDS):
        self.sketch = Sketch()
        self.epoch: int | None = None
        self._weights = weights
        self._all_bytes = all_bytes
        self._open_seconds = open_seconds
        self._bytes = 0
        self._tensors = 0
        self._parts: list[Any] = []
        self._began = time.monotonic()

    @property
    def is_complete(self) -> bool:
        return self._bytes == self._all_bytes

    def add(self, message: averaging_pb2.DownloadData) -> None:
        """Take one message; raises AllreduceException when it is refused."""
        self._bytes += len(message.tensor_part.buffer)
        longest = METADATA_BYTES + METADATA_BYTES_PER_TENSOR * self._weights
        if self._bytes > self._all_bytes or len(message.metadata) > longest:
            raise AllreduceException("it is larger than a state can be")
        allowed = self._open_seconds + self._bytes / SLOWEST_BYTES
        if time.monotonic() - self._began > allowed:
            raise AllreduceException(f"it is too slow, {self._bytes} bytes in {allowed:.0f} s")
        if message.metadata:
            metadata = MSGPackSerializer.loads(message.metadata)
            epoch = metadata.get("epoch") if isinstance(metadata, dict) else None
            self.epoch = epoch if is_count(epoch) else None
        if message.tensor_part.dtype and self._parts:
            self.end_tensor()
        self._parts.append(message.tensor_part)

    def end_tensor(self) -> None:
        """The last part of a tensor has come."""
        if not self._parts:
            return
        tensor = deserialize_torch_tensor(combine_from_streaming(self._parts))
        self._parts = []
        if not bool(torch.isfinite(tensor).all()):
            raise AllreduceException("it holds numbers that are not finite")
        if self._tensors < self._weights:
            self.sketch.add(tensor)
        self._tensors += 1


def tame_moments(optimizer: Optimizer) -> None:
    """Bring moments that a peer sent into what gradients can have made of them.

    Nobody vouches for them. With AdamW's usual betas a first moment is below ten times the
    square root of the second, which is never negative.
    """
    with torch.no_grad():
        for moments in optimizer.state.values():
            if not {"exp_avg", "exp_avg_sq", "step"} <= moments.keys():
                continue
            moments["step"].clamp_(0, MAX_COUNT)
            most = moments["exp_avg_sq"].clamp_(min=0).sqrt().mul_(10)
            moments["exp_avg"].clamp_(-most, most)
