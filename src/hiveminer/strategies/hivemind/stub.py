"""What calls another averager: it looks at whom it calls, and at what comes back.

Hivemind gets such a stub from its averager class for every call (`get_stub`), so what it asks of
groupmates and donors goes through here.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator, Coroutine
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from hivemind.averaging.allreduce import AllreduceException
from hivemind.compression import deserialize_torch_tensor
from hivemind.p2p import P2PHandlerError, PeerID
from hivemind.proto import averaging_pb2
from hivemind.utils.serializer import MSGPackSerializer
from hivemind.utils.streaming import combine_from_streaming

from hiveminer.strategies.hivemind.bounds import Bounds
from hiveminer.strategies.hivemind.sketch import Sketch

if TYPE_CHECKING:
    from hiveminer.strategies.hivemind.averager import SwarmAverager

T = TypeVar("T")

OPEN_SECONDS = 10.0
"""Within this a donor sends the first of its state."""

SLOWEST_BYTES = 125_000.0
"""Bytes a second; a donor that is slower is given up for the next one."""

MAX_METADATA_BYTES = 16 * 2**20


class CheckedStub:
    """What calls another averager, if it is a registered peer's, and looks at its answers."""

    def __init__(self, stub: Any, averager: SwarmAverager, peer: PeerID):
        self._stub = stub
        self._averager = averager
        self._peer = peer

    async def rpc_join_group(self, request: averaging_pb2.JoinRequest) -> Any:
        await self._check()
        return await self._stub.rpc_join_group(request)

    async def rpc_aggregate_part(self, parts: AsyncIterator[averaging_pb2.AveragingData]) -> Any:
        await self._check()
        sent = _Sent(parts)
        return self._results(await self._unless_gone(self._stub.rpc_aggregate_part(sent)), sent)

    async def rpc_download_state(self, request: averaging_pb2.DownloadRequest) -> Any:
        await self._check()
        stream = await asyncio.wait_for(self._stub.rpc_download_state(request), OPEN_SECONDS)
        return self._averager.inspected(stream, self._peer)

    async def rpc_vouch(self, request: averaging_pb2.DownloadRequest) -> Any:
        await self._check()
        return await self._stub.rpc_vouch(request)

    async def _check(self) -> None:
        if not await self._averager.admits(self._peer):
            raise P2PHandlerError(f"peer {self._peer} has not proved a registered hotkey")

    async def _results(
        self, stream: Any, sent: _Sent
    ) -> AsyncIterator[averaging_pb2.AveragingData]:
        """What a groupmate has averaged for us, until it is gone, or it cannot be an average."""
        loop, bounds = asyncio.get_running_loop(), self._averager.bounds
        async with contextlib.aclosing(stream) as messages:
            while (message := await self._unless_gone(next_of(messages))) is not None:
                if sent.waiting and message.code == averaging_pb2.AVERAGED_PART:
                    look = partial(_problem_with_result, message, sent.waiting.popleft(), bounds)
                    problem = await loop.run_in_executor(None, look)
                    if problem is not None:
                        self._averager.shun(self._peer, problem)
                        raise AllreduceException(problem)
                yield message
                if await sent.is_answered():
                    return

    async def _unless_gone(self, call: Coroutine[Any, Any, T]) -> T:
        """What a call comes to; raises AllreduceException once its peer is left out."""
        gone = asyncio.ensure_future(self._averager.is_gone(str(self._peer)).wait())
        task = asyncio.ensure_future(call)
        try:
            await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            raise AllreduceException(f"peer {self._peer} is gone")
        finally:
            gone.cancel()
            task.cancel()


class _Sent:
    """The parts that we send, with those that are not answered yet."""

    def __init__(self, parts: AsyncIterator[averaging_pb2.AveragingData]):
        self.waiting: deque[averaging_pb2.AveragingData] = deque()
        self._parts = parts
        self._ended = asyncio.Event()

    async def __aiter__(self) -> AsyncIterator[averaging_pb2.AveragingData]:
        async for part in self._parts:
            self.waiting.append(part)
            yield part
        self._ended.set()

    async def is_answered(self) -> bool:
        """Whether all that there is to send was sent and answered."""
        if self.waiting:
            return False
        # The last answer may overtake the end of the stream by a moment.
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._ended.wait(), 0.01)
        return self._ended.is_set() and not self.waiting


async def next_of(messages: AsyncIterator[T]) -> T | None:
    """The next message; None at the end."""
    try:
        return await messages.__anext__()
    except StopAsyncIteration:
        return None


class Incoming:
    """A state on its way in: how much of it, how fast, and what is in it."""

    def __init__(self, *, weights: int, all_bytes: int):
        self.sketch = Sketch()
        self.epoch: int | None = None
        self._weights = weights
        self._all_bytes = all_bytes
        self._bytes = 0
        self._tensors = 0
        self._parts: list[Any] = []
        self._began = time.monotonic()

    @property
    def is_whole(self) -> bool:
        return self._bytes == self._all_bytes

    def take(self, message: averaging_pb2.DownloadData) -> None:
        """One message of it; raises AllreduceException when it is not to be taken."""
        self._bytes += len(message.tensor_part.buffer)
        if self._bytes > self._all_bytes or len(message.metadata) > MAX_METADATA_BYTES:
            raise AllreduceException("it is larger than a state can be")
        allowed = OPEN_SECONDS + self._bytes / SLOWEST_BYTES
        if time.monotonic() - self._began > allowed:
            raise AllreduceException(f"it is too slow, {self._bytes} bytes in {allowed:.0f} s")
        if message.metadata:
            said = MSGPackSerializer.loads(message.metadata)
            epoch = said.get("epoch") if isinstance(said, dict) else None
            self.epoch = epoch if isinstance(epoch, int) else None
        if message.tensor_part.dtype and self._parts:
            self.end()
        self._parts.append(message.tensor_part)

    def end(self) -> None:
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


def _problem_with_result(
    message: averaging_pb2.AveragingData, sent: averaging_pb2.AveragingData, bounds: Bounds
) -> str | None:
    """An averaged part is how far the average is from what we sent."""
    change = deserialize_torch_tensor(message.tensor_part)
    return bounds.problem_with(change, deserialize_torch_tensor(sent.tensor_part))
