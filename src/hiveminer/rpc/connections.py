"""The axon's connections: deadlines and limits that uvicorn lacks, and its port.

uvicorn has no deadline for a header, so that connections which say nothing live for ever,
and one limit for all, so that they shut out whoever has something to say. Here a header
has a few seconds, an unread answer too, and where there is no room the oldest connection
that nobody has proved to be anybody on gives way.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import logging
import os
import socket
import threading
from collections.abc import Callable
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from hiveminer.errors import OperatorError

WRITE_SECONDS = 10.0
"""How long a caller may leave its answer unread."""

ACCEPTS_A_TURN = 128
"""Connections taken in before those that are open get their turn again."""

_BAD_REQUEST = (
    b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\n"
    b"content-length: 28\r\nconnection: close\r\n\r\n"
    b'{"detail": "malformed HTTP"}'
)

_silent = logging.getLogger(f"{__name__}.uvicorn")
_silent.setLevel(logging.CRITICAL + 1)


class PortInUse(OperatorError):
    """The port that was asked for is another's; the next one may be free."""


def bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # The protocol by name: only then does asyncio set TCP_NODELAY on the connections, and
    # without that each answer waits 40 ms for an acknowledgement of its header.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.set_inheritable(False)
    # Not on Windows, where it lets two processes share a port.
    if os.name == "posix":
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # Inherited by the connections: a caller that lost power is noticed in the end.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, name):
            listener.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    try:
        listener.bind((host, port))
        # A bound port that does not listen can still be bound by another: hold it.
        listener.listen(ACCEPTS_A_TURN)
    except (OSError, OverflowError) as error:
        listener.close()
        raise unbound(error, "--axon.port", host, port) from None
    return listener


def unbound(error: Exception, flag: str, host: str, port: int) -> OperatorError:
    code = getattr(error, "errno", None)
    if code == errno.EADDRINUSE:
        return PortInUse(f"{flag} {port}: the port is in use; choose another, or 0 for any")
    if code == errno.EACCES:
        return OperatorError(f"{flag} {port}: not allowed to this user; choose one above 1023")
    return OperatorError(f"{flag} {port}: cannot listen at {host}: {error}")


class Gate:
    """How many connections there may be, in all and from one address.

    Where there is no room, the oldest that nobody has proved to be anybody on gives way,
    then the oldest proved one that lies idle, then the newcomer: a flood of connections
    that say nothing pushes out itself, and no caller in the midst of a call.
    """

    def __init__(
        self,
        *,
        max_connections: int,
        max_connections_per_ip: int,
        header_seconds: float,
        count: Callable[[str, str], None],
    ) -> None:
        self.header_seconds = header_seconds
        self.count = count
        self.open: dict[Connection, None] = {}
        self._most = max_connections
        self._most_per_ip = max_connections_per_ip
        self._by_ip: dict[str, dict[Connection, None]] = {}

    def enter(self, newcomer: Connection) -> None:
        """Let a connection in, and another out if need be."""
        near = self._by_ip.setdefault(newcomer.network, {})
        near[newcomer] = None
        self.open[newcomer] = None
        if len(near) > self._most_per_ip:
            _victim(near, newcomer).drop("connections_of_ip")
        if len(self.open) > self._most:
            _victim(self.open, newcomer).drop("connections")

    def leave(self, connection: Connection) -> None:
        """Forget a connection; twice does no harm."""
        self.open.pop(connection, None)
        near = self._by_ip.get(connection.network, {})
        near.pop(connection, None)
        if not near:
            self._by_ip.pop(connection.network, None)

    def close(self) -> None:
        """Cut every connection."""
        for connection in list(self.open):
            connection.transport.abort()


def _victim(among: dict[Connection, None], newcomer: Connection) -> Connection:
    # In a flood this runs for each connection: the oldest stranger is found at once.
    for connection in among:
        if not connection.trusted and connection is not newcomer:
            return connection
    idle = (one for one in among if one.idle and one is not newcomer)
    return next(idle, newcomer)


class Connection(H11Protocol):
    """uvicorn's HTTP/1.1, with the deadlines that it lacks and without its log lines."""

    def __init__(
        self,
        gate: Gate,
        config: uvicorn.Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, {**app_state, "connection": self}, _loop)
        # uvicorn writes a line for each malformed request.
        self.logger = _silent
        self.gate = gate
        self.trusted = False
        self.ip = ""
        self.network = ""
        self._header_due: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None

    @property
    def idle(self) -> bool:
        """Whether no request is under way."""
        # uvicorn's annotation leaves out that there is none before the first request.
        return self.cycle is None or self.cycle.response_complete  # type: ignore[redundant-expr]

    def drop(self, kind: str) -> None:
        """Cut the connection, without a word."""
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
        # The scope's state holds this connection: let go of it without the collector.
        self.app_state = {}

    def data_received(self, data: bytes) -> None:
        try:
            super().data_received(data)
        # What the parser does not foresee is the sender's fault, and costs it the line.
        except Exception:  # noqa: BLE001
            self.drop("malformed")
        self._await_header(self.conn.their_state is h11.IDLE)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        begun = self.conn.their_state is h11.IDLE and bool(self.conn.trailing_data[0])
        self._await_header(begun)

    def send_400_response(self, msg: str) -> None:
        self.gate.count("malformed", self.ip)
        if self.idle:
            self.transport.write(_BAD_REQUEST)
        else:
            # The app still reads this request's body, and is told that nobody is there.
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.close()

    def timeout_keep_alive_handler(self) -> None:
        # `close` would wait for ever for a peer that does not read.
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
        """One deadline for a whole header, however slowly its bytes come in."""
        if awaited and self._header_due is None and not self.transport.is_closing():
            self._header_due = self.loop.call_later(
                self.gate.header_seconds, self.drop, "header_deadline"
            )
        elif not awaited and self._header_due is not None:
            self._header_due.cancel()
            self._header_due = None


def _origin(host: str) -> tuple[str, str]:
    """An address as text, and the network that is taken for one origin (IPv6: /64)."""
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
    """uvicorn's server, which says when it has begun."""

    def __init__(self, config: uvicorn.Config, *, notify: threading.Event) -> None:
        super().__init__(config)
        self.notify = notify

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        # asyncio takes in as many connections at once as the backlog is long, so that one
        # is short; the kernel's may be longer.
        for listener in sockets or []:
            listener.listen(1024)
        self.notify.set()
