"""The server side of synapses. A stranger's request costs it next to nothing.

A request is refused as early, and so as cheaply, as possible:

1. connections: a limit in all, per address and per hotkey; the header within three seconds
2. method, path, size of the header, shape of the hotkey
3. `blacklist` on the hotkey that the header claims, before any body is read
4. the body, within the synapse's cap and a deadline
5. the signature: receiver, age, replay (`_verify`, the only place)
6. the caller's budget of requests; only a verified request is charged
7. the fields of the synapse, `check`, and the queue

A synapse with a `WorkQueue` is served by its worker thread, the others at once on the
event loop, which therefore never does anything slow. Answers to verified callers are
signed and bound to their request (`signatures`); nobody else gets a signature.

Requests signed before this process began to serve are refused, so nonces need not be
stored across restarts. To make that rule complete, a synapse with a queue does not begin
before the time at which its request says it was signed.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import socket
import threading
import time
import typing
import weakref
from collections import Counter
from collections.abc import Callable, MutableMapping
from typing import Any, Self

from bittensor import http_auth

from hiveminer.errors import OperatorError, Refused, TrainingError
from hiveminer.protocol import IsAlive, Synapse
from hiveminer.rpc import blacklist
from hiveminer.rpc.blacklist import STRANGER, Policy, Standing
from hiveminer.rpc.callers import Callers
from hiveminer.rpc.connections import Gate, Rank, Server, bind
from hiveminer.rpc.metrics import AxonMetrics, SilenceWatch
from hiveminer.rpc.queue import WorkQueue
from hiveminer.rpc.request import (
    MAX_HEADER_BYTES,
    MAX_UNVERIFIED_BYTES,
    Answer,
    Declined,
    Disconnected,
    Receive,
    Request,
    Send,
    UnverifiedBodies,
)
from hiveminer.rpc.route import Route, wait_until_signed_time
from hiveminer.rpc.signatures import own_hotkey, sign_answer, verify_signed

_AUTH_KINDS: tuple[tuple[type[http_auth.AuthError], str], ...] = (
    (http_auth.WrongReceiver, "receiver"),
    (http_auth.StaleRequest, "stale"),
    (http_auth.ReplayedRequest, "replay"),
    (http_auth.BadSignature, "signature"),
    (http_auth.AuthError, "credentials"),
)


def nobody(hotkey: str) -> Standing:
    """The default standing: nobody is registered."""
    return STRANGER


class Axon:
    """Serves synapses over HTTP at `host`:`port` (0: any free port), in its own thread.

    standing: a hotkey's standing on the subnet; called on the event loop, so it must not block.
    policy: of the default blacklist.
    metrics_port: of Prometheus metrics, at http://127.0.0.1:metrics_port/metrics.
    requests_per_second, burst: the budget of each hotkey.
    quiet_seconds: a warning is logged after this long without a validator's call.
    """

    def __init__(
        self,
        wallet: Any,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        standing: Callable[[str], Standing] = nobody,
        policy: Policy | None = None,
        metrics_port: int | None = None,
        max_connections: int = 512,
        max_connections_per_ip: int = 128,
        max_connections_per_hotkey: int = 64,
        max_unverified_bytes: int = MAX_UNVERIFIED_BYTES,
        header_seconds: float = 3.0,
        body_seconds: float = 10.0,
        requests_per_second: float = 200.0,
        burst: int = 1000,
        quiet_seconds: float = 600.0,
    ) -> None:
        self.hotkey = own_hotkey(wallet)
        # A wallet would read its files again for each signature (2 ms).
        self._key = wallet.hotkey
        self.host = host
        self.port = port
        self.standing = standing
        self.policy = policy or Policy()
        self.metrics_port = metrics_port
        self._body_seconds = body_seconds
        self._routes: dict[str, Route] = {}
        self._gate = Gate(
            max_connections=max_connections,
            max_connections_per_ip=max_connections_per_ip,
            max_connections_per_hotkey=max_connections_per_hotkey,
            header_seconds=header_seconds,
            count=lambda kind, ip: self.metrics.count(kind, "a connection was cut", ip),
        )
        self.metrics = AxonMetrics(connections=lambda: len(self._gate.open))
        self._callers = Callers(
            requests_per_second=requests_per_second,
            burst=burst,
            is_validator=lambda hotkey: self.standing(hotkey).validator_permit,
        )
        self._bodies = UnverifiedBodies(max_unverified_bytes)
        self._socket: socket.socket | None = None
        self._server: Server | None = None
        self.thread: threading.Thread | None = None
        self._silence = SilenceWatch(quiet_seconds)
        _open_axons.add(self)

    @property
    def counts(self) -> Counter[str]:
        """Number of requests by how they ended."""
        return self.metrics.counts

    def attach(
        self,
        forward_fn: Callable[[Any], Any],
        blacklist_fn: Callable[[Any], tuple[bool, str]] | None = None,
        priority_fn: Callable[[Any], float] | None = None,
        *,
        synapse: type[Synapse] | None = None,
        queue: WorkQueue | None = None,
        check_fn: Callable[[Any], None] = lambda synapse: None,
        wait_seconds: float = 900.0,
    ) -> Self:
        """Serve `POST /<synapse>` with `forward_fn(synapse) -> synapse`.

        The synapse is the annotation of `forward_fn`'s parameter, unless given. Without a
        `queue`, `forward_fn` runs on the event loop and must be quick; with one it runs in
        the queue's worker (an `async def` in its own loop), after waiting at most
        `wait_seconds`.

        - `blacklist_fn(synapse) -> (refused, reason)` gets a synapse of which only
          `dendrite` is filled, before the body is read and the signature is checked.
          Default: the standing of the hotkey under `policy`.
        - `check_fn(synapse)` gets the parsed one, before the queue, and raises `Refused`.
        - `priority_fn(synapse)` gets the parsed one. Default: the stake, in TAO.

        `forward_fn` may raise `Refused` (its status) and `TrainingError` (422).
        """
        kind = synapse or _annotated(forward_fn)
        self._routes[f"/{kind.name()}"] = Route(
            synapse=kind,
            forward=forward_fn,
            blacklist=blacklist_fn or self._blacklist,
            priority=priority_fn or self._stake,
            check=check_fn,
            queue=queue,
            wait_seconds=wait_seconds,
        )
        return self

    def _blacklist(self, synapse: Synapse) -> tuple[bool, str]:
        standing = self.standing(synapse.dendrite.hotkey)
        needs_permit = not isinstance(synapse, IsAlive)
        reason = blacklist.refusal(standing, self.policy, needs_permit=needs_permit)
        return reason is not None, reason or ""

    def _stake(self, synapse: Synapse) -> float:
        return self.standing(synapse.dendrite.hotkey).stake

    # Start and stop

    def bind(self) -> int:
        """Bind the port without serving yet, and return it. Raises `OperatorError`."""
        if self._socket is None:
            self._socket = bind(self.host, self.port)
            self.port = int(self._socket.getsockname()[1])
        return self.port

    def start(self, *, timeout_seconds: float = 10.0) -> Self:
        """Bind and serve; returns once requests are accepted. Raises `OperatorError`."""
        assert self.thread is None, "an axon starts once"
        self.bind()
        try:
            if self.metrics_port is not None:
                self.metrics_port = self.metrics.serve(self.metrics_port)
        except OperatorError:
            self.stop()
            raise
        self._callers.start(time.time_ns())
        self._silence.heard()
        assert self._socket is not None
        self._server = Server(self._serve, self._gate, max_header_bytes=2 * MAX_HEADER_BYTES)
        main = self._main(self._server, self._socket)
        self.thread = threading.Thread(target=asyncio.run, args=[main], name="axon", daemon=True)
        self.thread.start()
        if not self._server.ready.wait(timeout_seconds):
            self.stop()
            raise OperatorError(f"the axon did not start within {timeout_seconds:g} s")
        return self

    def stop(self, timeout_seconds: float = 5.0) -> None:
        """Accept no more requests, wait for those in progress, then cut the rest off.

        Stop the queues first, so that waiting callers get a refusal.
        """
        _open_axons.discard(self)
        if self._server is not None and self.thread is not None:
            self._server.stop_within(timeout_seconds)
            self.thread.join(timeout_seconds + 2.0)
        if self._socket is not None:
            self._socket.close()
        self.metrics.close()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *error: object) -> None:
        self.stop()

    async def _main(self, server: Server, listener: socket.socket) -> None:
        watch = asyncio.create_task(self._silence.watch(self.port))
        try:
            await server.serve_and_close(listener)
        finally:
            watch.cancel()

    # One request

    async def _serve(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        began = time.monotonic()
        request = Request(scope, receive)
        try:
            answer = await self._answer(request)
        except Disconnected:
            self.metrics.count("hung_up")
            return
        finally:
            self._bodies.remove(request)
        if request.caller is not None:
            self.metrics.observe(request.path[1:], time.monotonic() - began)
        try:
            headers = self._signature(request, answer)
        # A wallet that can no longer sign, which uvicorn would not report.
        except Exception as error:  # noqa: BLE001
            request.caller = None
            answer = self._failed(request, error)
            headers = self._signature(request, answer)
        await request.respond(send, answer, headers)

    async def _answer(self, request: Request) -> Answer:
        """The answer, also to a failed request. Raises `Disconnected`."""
        try:
            body = await self._process(request)
            self.metrics.count("answered")
            return Answer(200, body)
        except Refused as refused:
            return self._refused(request, refused)
        except TrainingError as error:
            return self._refused(request, Declined("training", 422, str(error)))
        except Disconnected:
            raise
        # Only `stop` cancels a request.
        except asyncio.CancelledError:
            return self._refused(request, Declined("stopping", 503, "the miner is stopping"))
        except Exception as error:  # noqa: BLE001
            return self._failed(request, error)

    def _failed(self, request: Request, error: Exception) -> Answer:
        self.metrics.log.failed(error)
        return self._refused(request, Declined("failed", 500, "the miner failed; see its log"))

    def _refused(self, request: Request, refused: Refused) -> Answer:
        kind = getattr(refused, "kind", f"refused_{refused.status}")
        self.metrics.count(kind, refused.reason, request.connection.ip)
        return Answer.refusal(refused)

    def _signature(self, request: Request, answer: Answer) -> list[tuple[str, str]]:
        if request.caller is None:
            return [("connection", "close")]
        signed = sign_answer(
            self._key,
            answer.body,
            target=request.target,
            nonce=request.nonce,
            status=answer.status,
            receiver=request.caller,
        )
        return list(signed.items())

    async def _process(self, request: Request) -> bytes:
        """Process a request, and return the answer's body. Raises `Refused`."""
        if request.path == "/" and request.method == "GET":
            return b'{"status": "alive"}'
        route = self._route(request)
        request.check_header()
        route.check_caller(request.terminal)
        body = await request.read(
            cap=route.synapse.max_request_bytes,
            deadline_seconds=self._body_seconds,
            bodies=self._bodies,
        )
        caller = self._verify(request, body)
        synapse = route.parse(body, request.terminal)
        if route.queue is None:
            return await route.answer_at_once(synapse)
        await wait_until_signed_time(caller.nonce_ns)
        return await route.answer_from_worker(route.queue, synapse, request)

    def _route(self, request: Request) -> Route:
        route = self._routes.get(request.path)
        if route is None and request.path != "/":
            raise Declined("path", 404, "there is no such synapse here")
        if route is None or request.method != "POST":
            allow = ("allow", "GET" if route is None else "POST")
            raise Declined("method", 405, "synapses are called with POST", headers=[allow])
        return route

    def _verify(self, request: Request, body: bytes) -> http_auth.Caller:
        """Authenticate the caller; nothing else does. Raises `Declined`."""
        try:
            caller = verify_signed(
                request.headers,
                body,
                method=request.method,
                path=request.target,
                receiver=self.hotkey,
                nonce_store=self._callers,
            )
        except http_auth.AuthError as error:
            kind = next(kind for known, kind in _AUTH_KINDS if isinstance(error, known))
            raise Declined(kind, 401, str(error)) from None
        self._bodies.remove(request)
        request.caller = caller.hotkey_ss58
        rank = Rank.CALLER
        if self.standing(caller.hotkey_ss58).validator_permit:
            rank = Rank.VALIDATOR
            self._silence.heard()
        self._gate.prove(request.connection, caller.hotkey_ss58, rank)
        return caller


def _annotated(forward: Callable[..., Any]) -> type[Synapse]:
    function = forward if inspect.isroutine(forward) else type(forward).__call__
    first = next(iter(inspect.signature(forward).parameters))
    kind = typing.get_type_hints(function).get(first)
    if not (isinstance(kind, type) and issubclass(kind, Synapse)):
        raise TypeError(f"annotate {first!r} with a synapse, or pass synapse=")
    return kind


_open_axons: weakref.WeakSet[Axon] = weakref.WeakSet()


def _close_sockets() -> None:
    """In a forked child, which must not keep the port open."""
    for axon in list(_open_axons):
        if axon._socket is not None:
            axon._socket.close()
        axon.metrics.close_socket()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_sockets)
