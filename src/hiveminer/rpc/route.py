"""A synapse that an axon serves: from a verified body to the bytes of its answer."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import inspect
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, cast

from hiveminer.protocol import InvalidBody, Synapse, Terminal
from hiveminer.rpc.queue import WorkQueue
from hiveminer.rpc.request import Declined, Disconnected, Request


@dataclass(frozen=True)
class Route:
    """How a synapse is served."""

    synapse: type[Synapse]
    forward: Callable[[Any], Any]
    blacklist: Callable[[Any], tuple[bool, str]]
    priority: Callable[[Any], float]
    check: Callable[[Any], None]
    queue: WorkQueue | None
    wait_seconds: float

    def check_caller(self, terminal: Terminal) -> None:
        """Apply the blacklist to a claimed hotkey. Raises `Declined`."""
        claim = self.synapse.model_construct()
        claim._dendrite = terminal
        refused, reason = self.blacklist(claim)
        if refused:
            raise Declined("blacklist", 403, reason)

    def parse(self, body: bytes, terminal: Terminal) -> Synapse:
        """The synapse in a verified body. Raises `Refused`."""
        try:
            synapse = self.synapse.from_json(body)
        except InvalidBody as error:
            kind, status = ("fields", 422) if error.is_json else ("json", 400)
            raise Declined(kind, status, str(error)) from None
        synapse._dendrite = terminal
        self.check(synapse)
        return synapse

    async def answer_at_once(self, synapse: Synapse) -> bytes:
        """Run `forward` here, on the event loop."""
        answer = self.forward(synapse)
        return self._dump(await answer if inspect.isawaitable(answer) else answer)

    async def answer_from_worker(
        self, queue: WorkQueue, synapse: Synapse, request: Request
    ) -> bytes:
        """Run `forward` in the queue's worker. Raises `Refused`, or `Disconnected` when the caller
        hangs up before the end."""
        content = f"{request.path} {synapse.model_dump_json()}"
        future = queue.submit(
            functools.partial(self._work, synapse),
            caller=synapse.dendrite.hotkey,
            key=getattr(synapse, "request_id", "") or f"{request.path} {request.nonce}",
            priority=float(self.priority(synapse)),
            expires_seconds=self.wait_seconds,
            content=hashlib.sha256(content.encode()).hexdigest(),
        )
        try:
            await _first(future, request)
        finally:
            gone = not future.done()
            if gone:
                queue.leave(future)
        if gone:
            raise Disconnected
        if future.cancelled():
            raise Declined("cancelled", 503, "the request was dropped")
        return cast(bytes, future.result())

    def _work(self, synapse: Synapse) -> bytes:
        answer = self.forward(synapse)
        return self._dump(asyncio.run(answer) if inspect.iscoroutine(answer) else answer)

    def _dump(self, answer: Any) -> bytes:
        assert isinstance(answer, self.synapse), f"forward must return a {self.synapse.name()}"
        body = answer.model_dump_json().encode()
        assert len(body) <= self.synapse.max_response_bytes, "the answer is larger than its cap"
        return body


async def wait_until_signed_time(nonce_ns: int) -> None:
    """Never start before the nonce's time, so that a restarted process can reject replays."""
    ahead = (nonce_ns - time.time_ns()) / 1e9
    if ahead > 0:
        await asyncio.sleep(ahead)


async def _first(future: Future[bytes], request: Request) -> None:
    """Wait until the future is done or the caller has hung up."""
    loop = asyncio.get_running_loop()
    done = asyncio.Event()

    def wake(_: Future[bytes]) -> None:
        # The loop may be closed by then.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(done.set)

    future.add_done_callback(wake)
    waits = [
        asyncio.ensure_future(done.wait()),
        asyncio.ensure_future(request.until_disconnected()),
    ]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
