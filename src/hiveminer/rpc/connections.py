"""The axon's connections and port, with deadlines and limits that uvicorn lacks.

A header and an unread answer have a few seconds. When there are too many connections, a
stranger's is cut first, and a validator's last. The parser is stricter than h11: what two
programs could read differently is refused.
"""

from __future__ import annotations

import asyncio
import enum
import errno
import functools
import ipaddress
import logging
import os
import re
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, cast

import h11
import uvicorn
from h11._receivebuffer import ReceiveBuffer
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from hiveminer.errors import OperatorError

WRITE_SECONDS = 10.0
"""How long an answer may stay unread."""

IDLE_SECONDS = 30
"""How long a connection is kept open between requests."""

BACKLOG = 128
"""Connections that asyncio accepts before it serves the open ones again."""

_BAD_REQUEST = (
    b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\n"
    b"content-length: 28\r\nconnection: close\r\n\r\n"
    b'{"detail": "malformed HTTP"}'
)

_LOOSE_LINE = re.compile(rb"(?<!\r)\n|\n[ \t]|\r(?!\n)")
"""A line that does not end with CR and LF, or that continues the one before it."""

_LENGTH = re.compile(rb"^content-length:(.*)\r$", re.IGNORECASE | re.MULTILINE)
_ONE_LENGTH = re.compile(rb"[ \t]*[0-9]+[ \t]*")
_CHUNK_SIZE = re.compile(rb"[0-9A-Fa-f]{1,16}\r\n")

_silent = logging.getLogger(f"{__name__}.uvicorn")
_silent.setLevel(logging.CRITICAL + 1)


@dataclass(frozen=True)
class Limits:
    """What callers may use of an axon, and for how long.

    max_unverified_bytes: of all bodies together whose signature has not been verified yet.
    requests_per_second, burst: the budget of each hotkey.
    max_nonces: remembered of callers without a validator permit. Validators are few, and each is
        bounded by its budget.
    """

    max_connections: int = 512
    max_connections_per_ip: int = 128
    max_connections_per_hotkey: int = 64
    max_unverified_bytes: int = 16 * 2**20
    header_seconds: float = 3.0
    body_seconds: float = 10.0
    requests_per_second: float = 200.0
    burst: int = 1000
    max_nonces: int = 200_000


class PortInUse(OperatorError):
    """The port is in use by another program; the next one may be free."""


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens at `host`:`port`. Raises `OperatorError`."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With the protocol named, asyncio sets TCP_NODELAY, without which each answer waits 40 ms.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.set_inheritable(False)
    # Not on Windows, where it lets two processes share a port.
    if os.name == "posix":
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # Inherited by the connections.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, name):
            listener.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    try:
        listener.bind((host, port))
        # A port that is bound but not listened on can still be bound by others.
        listener.listen(BACKLOG)
    except (OSError, OverflowError) as error:
        listener.close()
        raise bind_error(error, "--axon.port", host, port) from None
    close_in_children(listener)
    return listener


def close_in_children(listener: socket.socket) -> None:
    """Forked processes must not keep the port open."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=listener.close)


def bind_error(error: Exception, flag: str, host: str, port: int) -> OperatorError:
    """Why a port could not be bound, and the flag that chooses another."""
    code = getattr(error, "errno", None)
    if code == errno.EADDRINUSE:
        return PortInUse(f"{flag} {port}: the port is in use; choose another, or 0 for any")
    if code == errno.EACCES:
        return OperatorError(f"{flag} {port}: not allowed to this user; choose one above 1023")
    return OperatorError(f"{flag} {port}: cannot listen at {host}: {error}")


class Rank(enum.IntEnum):
    """A connection's rank: the lowest is cut first."""

    STRANGER = 0
    CALLER = 1
    VALIDATOR = 2


class Gate:
    """Limits the connections (in all, per address and per hotkey) and their unverified bodies.

    Above the limit, the oldest one of a stranger is cut; then one of the caller without a permit
    that has the most; then an idle one of a validator; then the newcomer. So neither idle
    connections nor a hotkey with many addresses can displace a validator's call.
    """

    def __init__(self, limits: Limits, *, count: Callable[[str, str], None]) -> None:
        self.limits = limits
        self.count = count
        self.open: dict[Connection, None] = {}  # by age
        self._bodies: dict[Connection, int] = {}  # sizes so far, by age

    def enter(self, newcomer: Connection) -> None:
        """Add a connection, and cut another if there are too many."""
        self.open[newcomer] = None
        near = [each for each in self.open if each.network == newcomer.network]
        if len(near) > self.limits.max_connections_per_ip:
            _victim(near, newcomer).drop("connections_of_ip")
        if len(self.open) > self.limits.max_connections:
            _victim(self.open, newcomer).drop("connections")

    def prove(self, connection: Connection, hotkey: str, rank: Rank) -> None:
        """Record whose connection it is; a hotkey with too many loses its oldest, idle first."""
        connection.rank = rank
        if connection.hotkey == hotkey:
            return
        others = [each for each in self.open if each.hotkey == hotkey]
        connection.hotkey = hotkey
        if len(others) >= self.limits.max_connections_per_hotkey:
            min(others, key=lambda each: not each.idle).drop("connections_of_hotkey")

    def hold_body(self, connection: Connection, size: int) -> None:
        """Record how much has been read of a body whose signature is not verified yet. Above the
        limit, the oldest such request is cut, of a stranger first and of a validator last."""
        self._bodies[connection] = size
        while len(self._bodies) > 1 and self.unverified_bytes > self.limits.max_unverified_bytes:
            victim = min(self._bodies, key=lambda each: each.rank)
            self.release_body(victim)
            victim.drop("body_room")

    def release_body(self, connection: Connection) -> None:
        """The connection's request is verified or has ended. Idempotent."""
        self._bodies.pop(connection, None)

    @property
    def unverified_bytes(self) -> int:
        return sum(self._bodies.values())

    def leave(self, connection: Connection) -> None:
        """Remove a connection. Idempotent."""
        self.open.pop(connection, None)

    def close(self) -> None:
        """Cut every connection."""
        for connection in list(self.open):
            connection.transport.abort()


def _victim(among: Iterable[Connection], newcomer: Connection) -> Connection:
    # This runs for each connection of a flood: the oldest stranger is found at once.
    for connection in among:
        if connection.rank is Rank.STRANGER and connection is not newcomer:
            return connection
    others = [each for each in among if each is not newcomer]
    others = [each for each in others if each.idle or each.rank < Rank.VALIDATOR]
    held = Counter(each.hotkey for each in others)
    return min(
        others, key=lambda each: (each.rank, -held[each.hotkey], not each.idle), default=newcomer
    )


class StrictBuffer(ReceiveBuffer):
    """h11's buffer, without the lines that another program may read differently."""

    def maybe_extract_lines(self) -> list[bytearray] | None:
        """The lines of a header, or of trailers."""
        data = bytes(self)
        lines = super().maybe_extract_lines()
        if lines is not None:
            header = data[: len(data) - len(self)]
            lengths = _LENGTH.findall(header)
            if _LOOSE_LINE.search(header) or len(lengths) > 1:
                raise h11.RemoteProtocolError("ambiguous header")
            if lengths and not _ONE_LENGTH.fullmatch(lengths[0]):
                raise h11.RemoteProtocolError("malformed content-length")
        return lines

    def maybe_extract_next_line(self) -> bytearray | None:
        """The first line of a chunk."""
        line = super().maybe_extract_next_line()
        if line is not None and not _CHUNK_SIZE.fullmatch(line):
            raise h11.RemoteProtocolError("malformed chunk size, or a chunk extension")
        return line


class StrictHTTP(h11.Connection):
    """h11, without what leaves open where a request ends or what its header says."""

    def __init__(self, max_header_bytes: int) -> None:
        super().__init__(h11.SERVER, max_header_bytes)
        self._receive_buffer = StrictBuffer()

    def next_event(self) -> Any:
        event = super().next_event()
        if isinstance(event, h11.Request):
            names = {name for name, _ in event.headers}
            chunked = b"transfer-encoding" in names
            if event.http_version not in (b"1.0", b"1.1") or (
                chunked and (b"content-length" in names or event.http_version == b"1.0")
            ):
                raise h11.RemoteProtocolError("ambiguous request")
        elif isinstance(event, h11.EndOfMessage) and event.headers:
            raise h11.RemoteProtocolError("trailers are not accepted")
        return event


class Connection(H11Protocol):
    """uvicorn's HTTP/1.1 with more deadlines, and without log lines."""

    def __init__(
        self,
        gate: Gate,
        config: uvicorn.Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, {**app_state, "connection": self}, _loop)
        self.conn = StrictHTTP(config.h11_max_incomplete_event_size or 16384)
        # uvicorn writes a line for each malformed request.
        self.logger = _silent
        self.gate = gate
        self.rank = Rank.STRANGER
        self.hotkey = ""
        self.ip = ""
        self.network = ""
        self._header_due: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None

    @property
    def idle(self) -> bool:
        """Whether no request is in progress."""
        # uvicorn's annotation omits that there is none before the first request.
        return self.cycle is None or self.cycle.response_complete  # type: ignore[redundant-expr]

    def drop(self, kind: str) -> None:
        """Cut the connection without an answer."""
        if self.transport.is_closing():
            return
        self.gate.count(kind, self.ip)
        self.gate.leave(self)
        self.transport.abort()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.ip, self.network = _origin(self.client[0] if self.client else "")
        self.gate.enter(self)
        self._await_header(True)

    def connection_lost(self, exc: Exception | None) -> None:
        self._await_header(False)
        self.resume_writing()
        self.gate.leave(self)
        super().connection_lost(exc)
        # The scope's state refers to this connection: break the cycle.
        self.app_state = {}

    def data_received(self, data: bytes) -> None:
        try:
            super().data_received(data)
        # Whatever else the parser raises is the sender's fault, and ends its connection.
        except Exception:  # noqa: BLE001
            self.drop("malformed")
        self._await_header(self.conn.their_state is h11.IDLE)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        begun = self.conn.their_state is h11.IDLE and bool(self.conn.trailing_data[0])
        self._await_header(begun)

    def send_400_response(self, msg: str) -> None:
        self.gate.count("malformed", self.ip)
        if self.idle or not self.cycle.response_started:
            self.transport.write(_BAD_REQUEST)
        if not self.idle:
            # The app still reads this request's body: it sees a disconnect.
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.close()

    def timeout_keep_alive_handler(self) -> None:
        # `close` would wait indefinitely for a peer that does not read.
        self.transport.abort()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = self.loop.call_later(WRITE_SECONDS, self.drop, "unread")

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def _await_header(self, awaited: bool) -> None:
        """One deadline for the whole header."""
        if awaited and self._header_due is None and not self.transport.is_closing():
            self._header_due = self.loop.call_later(
                self.gate.limits.header_seconds, self.drop, "header_deadline"
            )
        elif not awaited and self._header_due is not None:
            self._header_due.cancel()
            self._header_due = None


def _origin(host: str) -> tuple[str, str]:
    """An address, and the network that counts as one origin (IPv6: its /64)."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host, host
    if address.version == 4:
        return host, host
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped), str(address.ipv4_mapped)
    return host, str(ipaddress.ip_network((int(address), 64), strict=False))


class Server(uvicorn.Server):
    """uvicorn's server with these connections; `ready` is set once it serves."""

    def __init__(self, app: Callable[..., Any], gate: Gate, *, max_header_bytes: int) -> None:
        config = uvicorn.Config(
            app,
            http=cast(Any, functools.partial(Connection, gate)),
            loop="asyncio",
            interface="asgi3",
            lifespan="off",
            ws="none",
            # A header that anyone can write must not say where a request comes from.
            proxy_headers=False,
            server_header=False,
            date_header=False,
            access_log=False,
            log_config=None,
            log_level="critical",
            backlog=BACKLOG,
            timeout_keep_alive=IDLE_SECONDS,
            h11_max_incomplete_event_size=max_header_bytes,
        )
        super().__init__(config)
        self.ready = threading.Event()
        self._gate = gate

    def stop_within(self, timeout_seconds: float) -> None:
        """Accept no more requests, and cancel them after the timeout. Callable from any thread."""
        # uvicorn's annotation says whole seconds, its code takes any.
        self.config.timeout_graceful_shutdown = cast(int, timeout_seconds)
        self.should_exit = True

    async def serve_and_close(self, listener: socket.socket) -> None:
        """Serve until `stop_within`, then cut every connection."""
        try:
            await self.serve(sockets=[listener])
        finally:
            # Requests that uvicorn has just cancelled still send their refusal.
            if tasks := set(self.server_state.tasks):
                await asyncio.wait(tasks, timeout=1.0)
            self._gate.close()
            await asyncio.sleep(0)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        # asyncio accepts as many connections at once as its backlog, so that one is short;
        # the kernel's may be longer.
        for listener in sockets or []:
            listener.listen(1024)
        self.ready.set()
