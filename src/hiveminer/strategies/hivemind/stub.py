"""Client stub that authenticates the remote peer and validates its responses. Hivemind uses it
for every call to group members and donors."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from hivemind.averaging.allreduce import AllreduceException
from hivemind.compression import deserialize_torch_tensor
from hivemind.p2p import P2PHandlerError, PeerID
from hivemind.proto import averaging_pb2

from hiveminer.strategies.hivemind.admission import Admission
from hiveminer.strategies.hivemind.bounds import Bounds
from hiveminer.strategies.hivemind.state_transfer import OPEN_SECONDS, StateInspector

T = TypeVar("T")

ANSWER_SECONDS = 15.0
"""Timeout for a group member's next averaged part, plus the time that it waits for the others."""


@dataclass(frozen=True, kw_only=True)
class CheckedStub:
    """Calls another averager if it is a registered peer's, and checks its responses."""

    stub: Any
    peer: PeerID
    admission: Admission
    bounds: Bounds
    inspector: StateInspector
    patience_seconds: Callable[[], float]

    async def rpc_join_group(self, request: averaging_pb2.JoinRequest) -> Any:
        await self._check()
        return await self.stub.rpc_join_group(request)

    async def rpc_aggregate_part(self, parts: AsyncIterator[averaging_pb2.AveragingData]) -> Any:
        await self._check()
        sent = _Sent(parts)
        return self._results(await self._unless_gone(self.stub.rpc_aggregate_part(sent)), sent)

    async def rpc_download_state(self, request: averaging_pb2.DownloadRequest) -> Any:
        await self._check()
        stream = await asyncio.wait_for(self.stub.rpc_download_state(request), OPEN_SECONDS)
        return self.inspector.inspected(stream, self.peer)

    async def rpc_vouch(self, request: averaging_pb2.DownloadRequest) -> Any:
        await self._check()
        return await self.stub.rpc_vouch(request)

    async def _check(self) -> None:
        if not await self.admission.admits(self.peer):
            raise P2PHandlerError(f"peer {self.peer} has not proved a registered hotkey")

    async def _results(
        self, stream: Any, sent: _Sent
    ) -> AsyncIterator[averaging_pb2.AveragingData]:
        """A group member's averaged parts, as long as it is there and they are valid."""
        loop = asyncio.get_running_loop()
        async with contextlib.aclosing(stream) as messages:
            while (message := await self._next_answer(messages)) is not None:
                if sent.waiting and message.code == averaging_pb2.AVERAGED_PART:
                    part = sent.waiting.popleft()
                    check = partial(_problem_with_result, message, part, self.bounds)
                    problem = await loop.run_in_executor(None, check)
                    if problem is not None:
                        self.admission.shun(self.peer, problem)
                        raise AllreduceException(problem)
                yield message
                if await sent.is_answered():
                    return

    async def _next_answer(
        self, messages: AsyncIterator[averaging_pb2.AveragingData]
    ) -> averaging_pb2.AveragingData | None:
        seconds = ANSWER_SECONDS + self.patience_seconds()
        try:
            return await asyncio.wait_for(self._unless_gone(anext(messages, None)), seconds)
        except TimeoutError:
            problem = f"it sent no average within {seconds:.0f} s"
            self.admission.note_silence(self.peer, problem)
            raise AllreduceException(problem) from None

    async def _unless_gone(self, call: Awaitable[T]) -> T:
        """The result of a call; raises AllreduceException once its peer is left out."""
        gone = asyncio.ensure_future(self.admission.gone(str(self.peer)).wait())
        task = asyncio.ensure_future(call)
        try:
            await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            raise AllreduceException(f"peer {self.peer} is gone")
        finally:
            gone.cancel()
            task.cancel()


class _Sent:
    """The parts that we send, and which of them are not answered yet."""

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
        """Whether everything was sent and answered."""
        if self.waiting:
            return False
        # The last answer may arrive before the end of the stream is noticed.
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._ended.wait(), 0.01)
        return self._ended.is_set() and not self.waiting


def _problem_with_result(
    message: averaging_pb2.AveragingData, sent: averaging_pb2.AveragingData, bounds: Bounds
) -> str | None:
    """An averaged part is the difference of the average and what we sent."""
    change = deserialize_torch_tensor(message.tensor_part)
    return bounds.problem_with(change, deserialize_torch_tensor(sent.tensor_part))
