"""A synapse that an axon serves: from a verified body to the bytes of its answer."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import inspect
import time
from asyncio import FIRST_COMPLETED
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from hiveminer.errors import Refused
from hiveminer.protocol import InvalidBody, Synapse, Terminal
from hiveminer.rpc.queue import WorkQueue
from hiveminer.rpc.request import Disconnected, Request


@dataclass(frozen=True)
class Route:
    """How `POST /<synapse>` is served.

    forward: synapse -> synapse; may raise `Refused` (its status) and `TrainingError` (422).
    blacklist: synapse -> (refused, reason); gets a synapse of which only `dendrite` is filled,
        before the body is read and the signature is checked.
    priority: of the parsed synapse.
    check: called with the parsed one, before the queue; raises `Refused`.
    queue: whose worker runs `forward` (an `async def` in a loop of its own), after waiting at
        most `wait_seconds`; without one it runs on the event loop and must be quick.
    """

    synapse: type[Synapse]
    forward: Callable[[Any], Any]
    blacklist: Callable[[Any], tuple[bool, str]]
    priority: Callable[[Any], float]
    check: Callable[[Any], None] = lambda synapse: None
    queue: WorkQueue | None = None
    wait_seconds: float = 900.0

    def check_caller(self, terminal: Terminal) -> None:
        """Apply the blacklist to a claimed hotkey. Raises `Refused`."""
        claim = self.synapse.model_construct()
        claim._dendrite = terminal
        refused, reason = self.blacklist(claim)
        if refused:
            raise Refused(403, reason, kind="blacklist")

    def parse(self, body: bytes, terminal: Terminal) -> Synapse:
        """The synapse in a verified body. Raises `Refused`."""
        try:
            synapse = self.synapse.from_json(body)
        except InvalidBody as error:
            kind, status = ("fields", 422) if error.is_json else ("json", 400)
            raise Refused(status, str(error), kind=kind) from None
        synapse._dendrite = terminal
        self.check(synapse)
        return synapse

    async def answer(self, synapse: Synapse, request: Request) -> bytes:
        """Run `forward`. Raises `Refused`, or `Disconnected` when the caller hangs up before the
        queue's worker has ended it."""
        queue = self.queue
        if queue is None:
            answer = self.forward(synapse)
            return self._dump(await answer if inspect.isawaitable(answer) else answer)
        # Never before the nonce's time, so that a restarted process can reject replays.
        await asyncio.sleep(max(0.0, (int(request.nonce) - time.time_ns()) / 1e9))
        content = f"{request.path} {synapse.model_dump_json()}"
        future = queue.submit(
            functools.partial(self._work, synapse),
            caller=synapse.dendrite.hotkey,
            key=getattr(synapse, "request_id", "") or f"{request.path} {request.nonce}",
            priority=float(self.priority(synapse)),
            content=hashlib.sha256(content.encode()).hexdigest(),
        )
        done = asyncio.wrap_future(future)
        # asyncio reports an exception that nobody asks for.
        done.add_done_callback(lambda done: done.cancelled() or done.exception())
        gone = asyncio.ensure_future(request.until_disconnected())
        either = functools.partial(asyncio.wait, [done, gone], return_when=FIRST_COMPLETED)
        try:
            await either(timeout=self.wait_seconds)
            if future.running():
                await either()
            if future.done():
                return cast(bytes, future.result())
            raise Disconnected if gone.done() else Refused(503, "waited too long for its turn")
        finally:
            gone.cancel()
            queue.leave(future)

    def _work(self, synapse: Synapse) -> bytes:
        answer = self.forward(synapse)
        return self._dump(asyncio.run(answer) if inspect.iscoroutine(answer) else answer)

    def _dump(self, answer: Any) -> bytes:
        assert isinstance(answer, self.synapse), f"forward must return a {self.synapse.name()}"
        body = answer.model_dump_json().encode()
        assert len(body) <= self.synapse.max_response_bytes, "the answer is larger than its cap"
        return body
