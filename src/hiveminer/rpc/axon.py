"""Serve synapses to whoever the subnet knows, and cost a stranger's request next to nothing.

A request is turned down as early, and so as cheaply, as it can be:

1. connections: so many in all and by address; the header within three seconds
2. method, path, size of the header, shape of the hotkey
3. `blacklist` on the hotkey that the header claims; no body is read for one who fails
4. the body, within the synapse's cap and a deadline
5. the signature: receiver, age, replay (`_verify`, the only place)
6. the caller's budget of requests; only a verified request spends it
7. the fields of the synapse, `check`, and the queue

A synapse with a `WorkQueue` is served by its worker thread, the others at once on the
event loop, which therefore never does anything slow. Answers to verified callers are
signed and bound to their request (`dendrite.answer_path`); nobody else gets a signature.

Requests signed before this process began to serve are refused, so that what the process
before it has seen need not be kept. To make that rule complete, a synapse with a queue
does not begin before the time at which its request says it was signed.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import json
import logging
import math
import os
import socket
import threading
import time
import typing
import weakref
from collections import Counter, deque
from collections.abc import Awaitable, Callable, MutableMapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Self, cast

import uvicorn
from bittensor import http_auth
from prometheus_client import CollectorRegistry, Gauge, Histogram, start_http_server
from prometheus_client import Counter as PrometheusCounter
from pydantic import ValidationError

from hiveminer.errors import OperatorError, Refused, TrainingError
from hiveminer.protocol import IsAlive, Synapse, Terminal
from hiveminer.rpc import blacklist
from hiveminer.rpc.blacklist import STRANGER, Policy, Standing
from hiveminer.rpc.connections import ACCEPTS_A_TURN, Connection, Gate, Server, bind, unbound
from hiveminer.rpc.dendrite import (
    ALLOWED_SKEW_SECONDS,
    ANSWER_METHOD,
    MAX_AGE_SECONDS,
    MAX_HOTKEY,
    answer_path,
    clean,
    own_hotkey,
    verify_signed,
)
from hiveminer.rpc.queue import WorkQueue

log = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

MAX_HEADER_BYTES = 8192
MAX_HEADERS = 64
MAX_UNVERIFIED_BYTES = 16 * 1024 * 1024
"""Bytes of bodies, of all connections together, that nobody has answered for yet."""

MAX_NONCES = 200_000
MAX_BUDGETS = 10_000
"""Bounds that only an axon which serves unregistered hotkeys can come to."""

NOTE_SECONDS = 60.0
ROUGH_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.1, 0.25, 1, 5, 20, 60, 300, 1200)

_AUTH_KINDS: tuple[tuple[type[http_auth.AuthError], str], ...] = (
    (http_auth.WrongReceiver, "receiver"),
    (http_auth.StaleRequest, "stale"),
    (http_auth.ReplayedRequest, "replay"),
    (http_auth.BadSignature, "signature"),
)


DRAIN_BYTES = 4 * 2**20
DRAIN_SECONDS = 1.0
"""How much of a body that was refused unread is taken in, so that the refusal arrives."""


class _Declined(Refused):
    """A refusal of the axon's own; `kind` is the name under which it is counted."""

    def __init__(
        self, kind: str, status: int, reason: str, *, retry_after_seconds: float | None = None
    ):
        super().__init__(status, reason, retry_after_seconds=retry_after_seconds)
        self.kind = kind


class _HungUp(Exception):
    """The caller has gone; nobody is left to answer."""


@dataclass
class _Route:
    """A synapse and what to do with it."""

    synapse: type[Synapse]
    forward: Callable[[Any], Any]
    blacklist: Callable[[Any], tuple[bool, str]]
    priority: Callable[[Any], float]
    check: Callable[[Any], None] | None
    queue: WorkQueue | None
    wait_seconds: float


@dataclass(eq=False)
class _Request:
    """One request on its way through the refusals."""

    method: str
    target: str
    path: str
    headers: dict[str, str]
    connection: Connection
    route: _Route | None = None
    caller: str | None = None
    body_read: bool = False
    extra: list[tuple[str, str]] = field(default_factory=list)

    @property
    def claimed(self) -> str:
        return self.headers.get("x-bittensor-hotkey", "")

    @property
    def nonce(self) -> str:
        return self.headers.get("x-bittensor-nonce", "")


def nobody(hotkey: str) -> Standing:
    """The standing of every hotkey on a subnet without neurons."""
    return STRANGER


class Axon:
    """Serves synapses over HTTP at `host`:`port` (0: any free port), in a thread of its own.

    `standing` says what the chain knows of a hotkey; it is asked on the event loop, so it
    must not wait for anything. `policy` is what the default blacklist asks of it.
    `counts` holds the number of requests by how they ended; the same and latencies go to
    `registry`, which is served at `http://metrics_host:metrics_port/metrics` if a port is
    given. A hotkey may make `requests_per_second`, and `burst` at once.
    """

    def __init__(
        self,
        wallet: Any,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        standing: Callable[[str], Standing] = nobody,
        policy: Policy | None = None,
        registry: CollectorRegistry | None = None,
        metrics_port: int | None = None,
        metrics_host: str = "127.0.0.1",
        max_connections: int = 512,
        max_connections_per_ip: int = 128,
        header_seconds: float = 3.0,
        body_seconds: float = 10.0,
        idle_seconds: float = 30.0,
        requests_per_second: float = 200.0,
        burst: int = 1000,
        quiet_seconds: float = 600.0,
    ) -> None:
        self.wallet = wallet
        self.hotkey = own_hotkey(wallet)
        # By the key itself: by a wallet, each signature reads its files again (2 ms).
        self._key = wallet.hotkey
        self.host = host
        self.port = port
        self.standing = standing
        self.policy = policy or Policy()
        self.body_seconds = body_seconds
        self.quiet_seconds = quiet_seconds
        self.metrics_host = metrics_host
        self.metrics_port = metrics_port
        self.registry = registry or CollectorRegistry()
        self.counts: Counter[str] = Counter()
        self._metrics = _Metrics(self.registry, connections=lambda: len(self._gate.open))
        self._notes = _Notes()
        self._routes: dict[str, _Route] = {}
        self._ledger = _Ledger(requests_per_second=requests_per_second, burst=burst)
        self._bodies: dict[_Request, int] = {}
        self._gate = Gate(
            max_connections=max_connections,
            max_connections_per_ip=max_connections_per_ip,
            header_seconds=header_seconds,
            count=lambda kind, ip: self._count(kind, "a connection was cut", ip),
        )
        self._idle_seconds = idle_seconds
        self._socket: socket.socket | None = None
        self._server: Server | None = None
        self._thread: threading.Thread | None = None
        self._metrics_server: Any = None
        self._last_validator = time.monotonic()
        _open_axons.add(self)

    # What is served

    def attach(
        self,
        forward_fn: Callable[[Any], Any],
        blacklist_fn: Callable[[Any], tuple[bool, str]] | None = None,
        priority_fn: Callable[[Any], float] | None = None,
        *,
        synapse: type[Synapse] | None = None,
        queue: WorkQueue | None = None,
        check_fn: Callable[[Any], None] | None = None,
        needs_permit: bool | None = None,
        wait_seconds: float = 900.0,
    ) -> Self:
        """Serve `POST /<synapse>` with `forward_fn(synapse) -> synapse`.

        The synapse is what `forward_fn` says it takes, unless given. Without a `queue`,
        `forward_fn` runs on the event loop and must be quick; with one it runs in the
        queue's worker (an `async def` in a loop of its own), after at most `wait_seconds`
        in the line.

        - `blacklist_fn(synapse) -> (refused, reason)` gets a synapse of which only
          `dendrite` is filled, before the body is read and before the signature is
          checked. Default: the standing of the hotkey under `policy`; `needs_permit`
          says whether a permit is asked (default: of all but `IsAlive`).
        - `check_fn(synapse)` gets the parsed one, before the queue, and raises `Refused`.
        - `priority_fn(synapse)` gets the parsed one. Default: the stake, in TAO.

        `forward_fn` may raise `Refused` (its status) and `TrainingError` (422).
        """
        kind = synapse or _annotated(forward_fn)
        permit = not issubclass(kind, IsAlive) if needs_permit is None else needs_permit
        self._routes[f"/{kind.name()}"] = _Route(
            synapse=kind,
            forward=forward_fn,
            blacklist=blacklist_fn or functools.partial(self._default_blacklist, permit),
            priority=priority_fn or self._stake,
            check=check_fn,
            queue=queue,
            wait_seconds=wait_seconds,
        )
        return self

    def _default_blacklist(self, needs_permit: bool, synapse: Synapse) -> tuple[bool, str]:
        standing = self.standing(synapse.dendrite.hotkey)
        reason = blacklist.refusal(standing, self.policy, needs_permit=needs_permit)
        return reason is not None, reason or ""

    def _stake(self, synapse: Synapse) -> float:
        return self.standing(synapse.dendrite.hotkey).stake

    # Life

    def bind(self) -> int:
        """Take the port, without serving yet. Returns it.

        Raises `OperatorError` if it cannot be had. `start` does this by itself.
        """
        if self._socket is None:
            self._socket = bind(self.host, self.port)
            self.port = int(self._socket.getsockname()[1])
        return self.port

    def start(self, *, timeout_seconds: float = 10.0) -> Self:
        """Bind and serve; returns when the first request can come."""
        assert self._thread is None, "an axon starts once"
        self.bind()
        try:
            self._start_metrics()
        except OperatorError:
            self.stop()
            raise
        self._ledger.start(time.time_ns())
        self._last_validator = time.monotonic()
        self._server = Server(self._config(), notify=threading.Event())
        self._thread = threading.Thread(target=self._run, name="axon", daemon=True)
        self._thread.start()
        if not self._server.notify.wait(timeout_seconds):
            self.stop()
            raise OperatorError(f"the axon did not start within {timeout_seconds:g} s")
        return self

    def stop(self, timeout_seconds: float = 5.0) -> None:
        """Take no more requests, let those in flight end, then cut the rest off.

        Stop the queues first: whoever waits in one is then told so.
        """
        _open_axons.discard(self)
        if self._server is not None and self._thread is not None:
            # uvicorn's own annotation asks for whole seconds, its code takes any.
            self._server.config.timeout_graceful_shutdown = cast(int, timeout_seconds)
            self._server.should_exit = True
            self._thread.join(timeout_seconds + 2.0)
        if self._socket is not None:
            self._socket.close()
        if self._metrics_server is not None:
            self._metrics_server.shutdown()
            self._metrics_server.server_close()
            self._metrics_server = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *error: object) -> None:
        self.stop()

    def _config(self) -> uvicorn.Config:
        return uvicorn.Config(
            self._serve,
            http=cast(Any, functools.partial(Connection, self._gate)),
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
            backlog=ACCEPTS_A_TURN,
            timeout_keep_alive=cast(int, self._idle_seconds),
            h11_max_incomplete_event_size=2 * MAX_HEADER_BYTES,
        )

    def _run(self) -> None:
        asyncio.run(self._main())

    async def _main(self) -> None:
        assert self._server is not None
        assert self._socket is not None
        watch = asyncio.create_task(self._watch_silence())
        try:
            await self._server.serve(sockets=[self._socket])
        finally:
            watch.cancel()
            # What uvicorn has just cancelled still tells its caller.
            if tasks := set(self._server.server_state.tasks):
                await asyncio.wait(tasks, timeout=1.0)
            self._gate.close()
            await asyncio.sleep(0)

    async def _watch_silence(self) -> None:
        """Nothing on this machine can prove that it can be reached, but silence tells."""
        told = 0.0
        while True:
            due = max(self._last_validator, told) + self.quiet_seconds
            now = time.monotonic()
            if now < due:
                await asyncio.sleep(due - now)
                continue
            told = now
            log.warning(
                "no validator has called for %d minutes: if that goes on, see whether "
                "port %d can be reached from outside",
                (now - self._last_validator) // 60,
                self.port,
            )

    def _start_metrics(self) -> None:
        if self.metrics_port is None:
            return
        try:
            self._metrics_server, _ = start_http_server(
                self.metrics_port, addr=self.metrics_host, registry=self.registry
            )
        except OSError as error:
            raise unbound(
                error, "--axon.metrics_port", self.metrics_host, self.metrics_port
            ) from None
        self.metrics_port = self._metrics_server.server_port

    # One request

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        began = time.monotonic()
        request = _request(scope)
        try:
            status, body = await self._answer_or_refuse(request, receive)
        except _HungUp:
            self._count("hung_up")
            return
        finally:
            self._bodies.pop(request, None)
        if request.route is not None and request.caller is not None:
            self._metrics.observe(request.route.synapse.name(), time.monotonic() - began)
        try:
            headers = self._headers(request, status, body)
        # A wallet that cannot sign any more: uvicorn would say nothing of it.
        except Exception as error:  # noqa: BLE001
            status, body = self._fail(request, error)
            request.caller = None
            headers = self._headers(request, status, body)
        await _drain(request, receive)
        await _send(send, status, body, headers)

    async def _answer_or_refuse(self, request: _Request, receive: Receive) -> tuple[int, bytes]:
        try:
            body = await self._answer(request, receive)
            self._count("answered")
            return 200, body
        except Refused as refused:
            return self._decline(request, refused)
        except TrainingError as error:
            return self._decline(request, _Declined("training", 422, str(error)))
        except _HungUp:
            raise
        # Only `stop` cancels a request; its caller is told so.
        except asyncio.CancelledError:
            return self._decline(request, _Declined("stopping", 503, "the miner is stopping"))
        except Exception as error:  # noqa: BLE001
            return self._fail(request, error)

    def _fail(self, request: _Request, error: Exception) -> tuple[int, bytes]:
        self._notes.trace(error)
        return self._decline(request, _Declined("failed", 500, "the miner failed; see its log"))

    def _decline(self, request: _Request, refused: Refused) -> tuple[int, bytes]:
        kind = getattr(refused, "kind", f"refused_{refused.status}")
        self._count(kind, refused.reason, request.connection.ip)
        if refused.retry_after_seconds is not None:
            request.extra.append(("retry-after", str(math.ceil(refused.retry_after_seconds))))
        return refused.status, json.dumps({"detail": refused.reason}).encode()

    def _headers(self, request: _Request, status: int, body: bytes) -> list[tuple[str, str]]:
        headers = [
            ("content-type", "application/json"),
            ("content-length", str(len(body))),
            *request.extra,
        ]
        if request.caller is None:
            # A stranger's connection ends here, and with it whatever it still sends.
            return [*headers, ("connection", "close")]
        signed = http_auth.sign(
            self._key,
            method=ANSWER_METHOD,
            path=answer_path(request.target, request.nonce, status),
            body=body,
            receiver_ss58=request.caller,
        )
        return [*headers, *signed.items()]

    async def _answer(self, request: _Request, receive: Receive) -> bytes:
        if request.path == "/" and request.method == "GET":
            return b'{"status": "alive"}'
        route = self._find(request)
        _check_headers(request)
        self._blacklist(request, route)
        body = await self._read(request, receive, cap=route.synapse.max_request_bytes)
        caller = self._verify(request, body)
        self._accept(request, caller)
        synapse = _parse(route.synapse, body)
        synapse._dendrite = _terminal(request)
        if route.check is not None:
            route.check(synapse)
        if route.queue is None:
            answer = route.forward(synapse)
            return _dump(await answer if inspect.isawaitable(answer) else answer, route)
        await _until(caller.nonce_ns)
        return await self._work(route, route.queue, synapse, request, receive)

    def _find(self, request: _Request) -> _Route:
        route = self._routes.get(request.path)
        if route is None and request.path != "/":
            raise _Declined("path", 404, "there is no such synapse here")
        if route is None or request.method != "POST":
            request.extra.append(("allow", "GET" if route is None else "POST"))
            raise _Declined("method", 405, "synapses are called with POST")
        request.route = route
        return route

    def _blacklist(self, request: _Request, route: _Route) -> None:
        """On the claimed hotkey: who lies about it falls to the signature."""
        claim = route.synapse.model_construct()
        claim._dendrite = _terminal(request)
        refused, reason = route.blacklist(claim)
        if refused:
            raise _Declined("blacklist", 403, reason)

    async def _read(self, request: _Request, receive: Receive, *, cap: int) -> bytes:
        length = request.headers.get("content-length", "0")
        if len(length) > 12 or int(length or "0") > cap:
            raise _Declined("body_size", 413, f"the body is larger than {cap} bytes")
        body = bytearray()
        try:
            async with asyncio.timeout(self.body_seconds):
                while not request.body_read:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _HungUp
                    body += message.get("body", b"")
                    if len(body) > cap:
                        reason = f"the body is larger than {cap} bytes"
                        raise _Declined("body_size", 413, reason)
                    request.body_read = not message.get("more_body", False)
                    self._hold(request, len(body))
        except TimeoutError:
            raise _Declined("body_deadline", 408, "the body took too long") from None
        return bytes(body)

    def _hold(self, request: _Request, size: int) -> None:
        """Keep the books of unverified bodies; the oldest gives way when they are full."""
        self._bodies[request] = size
        while len(self._bodies) > 1 and sum(self._bodies.values()) > MAX_UNVERIFIED_BYTES:
            oldest = next(iter(self._bodies))
            del self._bodies[oldest]
            oldest.connection.drop("body_room")

    def _verify(self, request: _Request, body: bytes) -> http_auth.Caller:
        """The one place where a caller is believed."""
        try:
            caller = verify_signed(
                request.headers,
                body,
                method=request.method,
                path=request.target,
                receiver=self.hotkey,
                nonce_store=self._ledger,
            )
        except http_auth.AuthError as error:
            kinds = (kind for known, kind in _AUTH_KINDS if isinstance(error, known))
            raise _Declined(next(kinds, "credentials"), 401, str(error)) from None
        return caller

    def _accept(self, request: _Request, caller: http_auth.Caller) -> None:
        """From here on the request is its caller's."""
        self._bodies.pop(request, None)
        request.caller = caller.hotkey_ss58
        request.connection.trusted = True
        if self.standing(caller.hotkey_ss58).validator_permit:
            self._last_validator = time.monotonic()

    async def _work(
        self,
        route: _Route,
        queue: WorkQueue,
        synapse: Synapse,
        request: _Request,
        receive: Receive,
    ) -> bytes:
        """Wait for the worker's answer, or for the caller to hang up."""
        assert request.caller is not None
        future = queue.submit(
            functools.partial(_forward, route, synapse),
            caller=request.caller,
            key=getattr(synapse, "request_id", "") or f"{request.path} {request.nonce}",
            priority=float(route.priority(synapse)),
            expires_seconds=route.wait_seconds,
        )
        try:
            await _first(future, receive)
        finally:
            gone = not future.done()
            if gone:
                queue.leave(future)
        if gone:
            raise _HungUp
        if future.cancelled():
            raise _Declined("cancelled", 503, "the request was dropped")
        return cast(bytes, future.result())

    def _count(self, kind: str, reason: str = "", ip: str = "") -> None:
        self.counts[kind] += 1
        self._metrics.requests.labels(kind).inc()
        if reason:
            self._notes.note(kind, reason, ip)


# Steps that need no axon


def _annotated(forward: Callable[..., Any]) -> type[Synapse]:
    """The synapse that a forward function says it takes."""
    function = forward if inspect.isroutine(forward) else type(forward).__call__
    first = next(iter(inspect.signature(forward).parameters))
    kind = typing.get_type_hints(function).get(first)
    if not (isinstance(kind, type) and issubclass(kind, Synapse)):
        raise TypeError(f"annotate {first!r} with a synapse, or pass synapse=")
    return kind


def _request(scope: Scope) -> _Request:
    path = scope["raw_path"].decode("ascii")
    query = scope["query_string"].decode("ascii")
    headers: dict[str, str] = {}
    size = 0
    for name, value in scope["headers"]:
        size += len(name) + len(value)
        text = name.decode("latin-1")
        # Two values for one name: verification and blacklist must see the same one.
        headers[text] = "" if text in headers else value.decode("latin-1")
    if size > MAX_HEADER_BYTES or len(scope["headers"]) > MAX_HEADERS:
        headers = {"": "too large"}
    return _Request(
        method=scope["method"],
        target=f"{path}?{query}" if query else path,
        path=path,
        headers=headers,
        connection=scope["state"]["connection"],
    )


def _check_headers(request: _Request) -> None:
    if "" in request.headers:
        raise _Declined("header_size", 431, "the header is too large")
    if not request.claimed:
        raise _Declined("credentials", 401, f"missing {http_auth.HEADER_HOTKEY}")
    if len(request.claimed) > MAX_HOTKEY:
        raise _Declined("credentials", 401, "no hotkey is that long")
    if len(request.nonce) > 20:
        raise _Declined("credentials", 401, "no nonce is that long")


def _terminal(request: _Request) -> Terminal:
    return Terminal(hotkey=request.claimed, ip=request.connection.ip)


def _parse(kind: type[Synapse], body: bytes) -> Synapse:
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    if first["type"] == "json_invalid":
        raise _Declined("json", 400, "the body is not JSON")
    where = ".".join(str(part) for part in first["loc"])[:100]
    reason = f"{where}: {first['msg']}" if where else first["msg"]
    raise _Declined("fields", 422, clean(reason))


def _forward(route: _Route, synapse: Synapse) -> bytes:
    """In the worker: run forward and turn its answer to bytes, which are what is kept."""
    answer = route.forward(synapse)
    if inspect.iscoroutine(answer):
        answer = asyncio.run(answer)
    return _dump(answer, route)


def _dump(answer: Any, route: _Route) -> bytes:
    assert isinstance(answer, route.synapse), f"forward answers with a {route.synapse.name()}"
    body = answer.model_dump_json().encode()
    assert len(body) <= route.synapse.max_response_bytes, "the answer is larger than its cap"
    return body


async def _until(nonce_ns: int) -> None:
    """A caller whose clock is ahead waits until its request's time has come.

    So nothing has been begun that a process which starts later would not refuse.
    """
    ahead = (nonce_ns - time.time_ns()) / 1e9
    if ahead > 0:
        await asyncio.sleep(ahead)


async def _first(future: Future[bytes], receive: Receive) -> None:
    """Return when the future is done or the caller has hung up."""
    loop = asyncio.get_running_loop()
    done = asyncio.Event()

    def wake(_: Future[bytes]) -> None:
        # The loop may be closed by then: nobody waits any more.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(done.set)

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    future.add_done_callback(wake)
    waits = [asyncio.ensure_future(done.wait()), asyncio.ensure_future(gone())]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()


async def _drain(request: _Request, receive: Receive) -> None:
    """Take in a little of a body that was refused unread.

    A connection that is closed on top of unread bytes is reset, and the caller may never
    see why it was refused.
    """
    size = 0
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DRAIN_SECONDS):
            while not request.body_read and size < DRAIN_BYTES:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return
                size += len(message.get("body", b""))
                request.body_read = not message.get("more_body", False)


async def _send(send: Send, status: int, body: bytes, headers: list[tuple[str, str]]) -> None:
    raw = [(name.lower().encode("ascii"), value.encode("ascii")) for name, value in headers]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": body})


# Books


class _Ledger:
    """What verified callers have sent: nonces against replay, and a budget of requests.

    Bounded: nonces are forgotten when they are too old to be accepted anyway, and a
    caller over its budget leaves none, so that each hotkey holds at most
    `burst + requests_per_second * retention` of them.
    """

    def __init__(self, *, requests_per_second: float, burst: int) -> None:
        self.retention = MAX_AGE_SECONDS + ALLOWED_SKEW_SECONDS + 1.0
        self._rate = requests_per_second
        self._burst = float(burst)
        self._seen: set[tuple[str, int]] = set()
        self._ends: deque[tuple[float, tuple[str, int]]] = deque()
        self._budgets: dict[str, tuple[float, float]] = {}
        self._started_ns = 0

    def start(self, now_ns: int) -> None:
        """From now on: whatever was signed before is the business of the process before."""
        self._started_ns = now_ns

    @property
    def known(self) -> int:
        """Requests that are remembered."""
        return len(self._seen)

    def check_and_store(self, hotkey_ss58: str, nonce_ns: int) -> bool:
        """False for a replay. Called by `http_auth.verify` when the signature is proved.

        Raises `StaleRequest` for what was signed before the start, `Refused` over budget.
        """
        if nonce_ns < self._started_ns:
            raise http_auth.StaleRequest("signed before this neuron started; sign it anew")
        now = time.monotonic()
        while self._ends and self._ends[0][0] <= now:
            self._seen.discard(self._ends.popleft()[1])
        name = (hotkey_ss58, nonce_ns)
        if name in self._seen:
            return False
        self._spend(hotkey_ss58, now)
        self._seen.add(name)
        self._ends.append((now + self.retention, name))
        return True

    def _spend(self, hotkey: str, now: float) -> None:
        if len(self._seen) >= MAX_NONCES:
            raise _Declined("nonces", 503, "too many callers at once", retry_after_seconds=1.0)
        if len(self._budgets) >= MAX_BUDGETS:
            self._budgets = {
                name: budget
                for name, budget in self._budgets.items()
                if self._left(budget, now) < self._burst
            }
        left = self._left(self._budgets.get(hotkey, (self._burst, now)), now)
        if left < 1.0:
            wait = (1.0 - left) / self._rate
            reason = f"more than {self._rate:g} requests a second"
            raise _Declined("budget", 429, reason, retry_after_seconds=wait)
        self._budgets[hotkey] = (left - 1.0, now)

    def _left(self, budget: tuple[float, float], now: float) -> float:
        left, since = budget
        return min(self._burst, left + (now - since) * self._rate)


class _Metrics:
    """The same counts and latencies for Prometheus."""

    def __init__(self, registry: CollectorRegistry, *, connections: Callable[[], float]) -> None:
        Gauge("hiveminer_axon_connections", "Open connections", registry=registry).set_function(
            connections
        )
        self.requests = PrometheusCounter(
            "hiveminer_axon_requests",
            "Requests and connections by how they ended",
            ["kind"],
            registry=registry,
        )
        self._seconds = Histogram(
            "hiveminer_axon_seconds",
            "From a verified request's header to its answer, waiting and work included",
            ["synapse"],
            buckets=ROUGH_SECONDS,
            registry=registry,
        )

    def observe(self, synapse: str, seconds: float) -> None:
        self._seconds.labels(synapse).observe(seconds)


class _Notes:
    """One log line a minute for each kind of refusal, with how many there were."""

    def __init__(self) -> None:
        self._next: dict[str, float] = {}
        self._since: Counter[str] = Counter()

    def note(self, kind: str, reason: str, ip: str) -> None:
        """Log a refusal, or count it for the line that comes next."""
        if self._due(kind):
            more = f"{self._since.pop(kind, 0)} more since the last such line"
            log.warning("refused (%s): %s, from %s; %s", kind, reason, ip, more)

    def trace(self, error: Exception) -> None:
        """Log a bug with its traceback."""
        if self._due("trace"):
            log.error("a request failed", exc_info=error)

    def _due(self, kind: str) -> bool:
        now = time.monotonic()
        if now < self._next.get(kind, 0.0):
            self._since[kind] += 1
            return False
        self._next[kind] = now + NOTE_SECONDS
        return True


_open_axons: weakref.WeakSet[Axon] = weakref.WeakSet()


def _let_go() -> None:
    """In a forked child (Hivemind forks several): it must not hold the port."""
    for axon in list(_open_axons):
        if axon._socket is not None:
            axon._socket.close()
        if axon._metrics_server is not None:
            axon._metrics_server.socket.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)
