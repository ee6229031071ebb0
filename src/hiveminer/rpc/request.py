"""One HTTP request to the axon: its header within limits, its body within a cap and a deadline."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

from bittensor import http_auth

from hiveminer.errors import Refused
from hiveminer.protocol import Terminal
from hiveminer.rpc.connections import Connection
from hiveminer.rpc.signatures import check_size

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Header = tuple[str, str]

MAX_HEADER_BYTES = 8192
MAX_HEADERS = 64
DRAIN_BYTES = 4 * 2**20
DRAIN_SECONDS = 1.0
"""How much of a refused body is still read, so that the caller sees the refusal."""


class Disconnected(Exception):
    """The caller has hung up."""


@dataclass(frozen=True)
class Answer:
    """An answer; `headers`: besides those that every answer has."""

    status: int
    body: bytes
    headers: Sequence[Header] = ()


class Request:
    """One HTTP request.

    target: path and query as sent. headers: with lower-case names. caller: the hotkey, once its
    signature is verified.
    """

    def __init__(self, scope: MutableMapping[str, Any], receive: Receive) -> None:
        query = scope["query_string"].decode("ascii")
        self.method: str = scope["method"]
        self.path: str = scope["raw_path"].decode("ascii")
        self.target = f"{self.path}?{query}" if query else self.path
        self.headers: dict[str, str] = {}
        size = 0
        for name, value in scope["headers"]:
            size += len(name) + len(value)
            text = name.decode("latin-1")
            # With two values for one name, verification and blacklist could see different ones.
            self.headers[text] = "" if text in self.headers else value.decode("latin-1")
        self.oversized = size > MAX_HEADER_BYTES or len(scope["headers"]) > MAX_HEADERS
        self.connection: Connection = scope["state"]["connection"]
        self.caller: str | None = None
        self._receive = receive
        self._complete = False

    @property
    def claimed_hotkey(self) -> str:
        """The hotkey in the header, not verified yet."""
        return self.headers.get(http_auth.HEADER_HOTKEY.lower(), "")

    @property
    def nonce(self) -> str:
        return self.headers.get(http_auth.HEADER_NONCE.lower(), "")

    @property
    def terminal(self) -> Terminal:
        """The caller as a synapse has it."""
        return Terminal(hotkey=self.claimed_hotkey, ip=self.connection.ip)

    def check_header(self) -> None:
        """Raise `Refused` for a header that is too large or names no possible hotkey."""
        if self.oversized:
            raise Refused(431, "the header is too large", kind="header_size")
        if not self.claimed_hotkey:
            raise Refused(401, f"missing {http_auth.HEADER_HOTKEY}", kind="credentials")
        try:
            check_size(self.claimed_hotkey, self.nonce)
        except http_auth.MalformedAuth as error:
            raise Refused(401, str(error), kind="credentials") from None

    async def receive(self) -> bytes:
        """The next part of the body. Raises `Disconnected`."""
        message = await self._receive()
        if message["type"] == "http.disconnect":
            raise Disconnected
        self._complete = not message.get("more_body", False)
        return bytes(message.get("body", b""))

    async def read(self, *, cap: int, deadline_seconds: float) -> bytes:
        """The whole body, of at most `cap` bytes. Raises `Refused` or `Disconnected`."""
        too_large = Refused(413, f"the body is larger than {cap} bytes", kind="body_size")
        length = self.headers.get("content-length") or "0"
        if len(length) > 12 or int(length) > cap:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(deadline_seconds):
                while not self._complete:
                    body += await self.receive()
                    if len(body) > cap:
                        raise too_large
                    self.connection.gate.hold_body(self.connection, len(body))
        except TimeoutError:
            raise Refused(408, "the body took too long", kind="body_deadline") from None
        return bytes(body)

    async def until_disconnected(self) -> None:
        """Wait until the caller has hung up."""
        with contextlib.suppress(Disconnected):
            while True:
                await self.receive()

    async def respond(self, send: Send, answer: Answer, headers: Sequence[Header]) -> None:
        """Send the answer, then read a little of a body that was refused unread: otherwise the
        connection is reset, and the caller may never see the refusal."""
        length = ("content-length", str(len(answer.body)))
        lines = [("content-type", "application/json"), length, *answer.headers, *headers]
        raw = [(name.lower().encode("ascii"), value.encode("ascii")) for name, value in lines]
        await send({"type": "http.response.start", "status": answer.status, "headers": raw})
        if self._complete:
            await send({"type": "http.response.body", "body": answer.body})
            return
        # Complete for the caller by its length, and for the server after the drain.
        await send({"type": "http.response.body", "body": answer.body, "more_body": True})
        await self._drain()
        await send({"type": "http.response.body", "body": b""})

    async def _drain(self) -> None:
        size = 0
        with contextlib.suppress(TimeoutError, Disconnected):
            async with asyncio.timeout(DRAIN_SECONDS):
                while not self._complete and size < DRAIN_BYTES:
                    size += len(await self.receive())
