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
import json
import math
import socket
import threading
import time
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any

from bittensor import http_auth

from hiveminer.errors import OperatorError, Refused, TrainingError
from hiveminer.rpc.blacklist import Standing
from hiveminer.rpc.callers import Callers
from hiveminer.rpc.connections import Gate, Limits, Rank, Server
from hiveminer.rpc.metrics import AxonMetrics, SilenceWatch
from hiveminer.rpc.request import (
    MAX_HEADER_BYTES,
    Answer,
    Disconnected,
    Receive,
    Request,
    Send,
)
from hiveminer.rpc.route import Route
from hiveminer.rpc.signatures import own_hotkey, sign_answer, verify_signed

START_SECONDS = 10.0

_AUTH_KINDS: tuple[tuple[type[http_auth.AuthError], str], ...] = (
    (http_auth.WrongReceiver, "receiver"),
    (http_auth.StaleRequest, "stale"),
    (http_auth.ReplayedRequest, "replay"),
    (http_auth.BadSignature, "signature"),
    (http_auth.AuthError, "credentials"),
)


class Axon:
    """Serves synapses over HTTP on a socket that listens (`connections.bind`), in its own thread.

    standing: a hotkey's standing on the subnet; called on the event loop, so it must not block.
    metrics_port: of Prometheus metrics, at http://127.0.0.1:metrics_port/metrics.
    """

    def __init__(
        self,
        wallet: Any,
        listener: socket.socket,
        routes: Sequence[Route],
        *,
        standing: Callable[[str], Standing],
        metrics_port: int | None = None,
        limits: Limits | None = None,
    ) -> None:
        limits = limits or Limits()
        self.hotkey = own_hotkey(wallet)
        # A wallet would read its files again for each signature (2 ms).
        self._key = wallet.hotkey
        self._listener = listener
        self.port = int(listener.getsockname()[1])
        self.metrics_port = metrics_port
        self._routes = {f"/{route.synapse.name()}": route for route in routes}
        self._standing = standing
        self._body_seconds = limits.body_seconds
        self._gate = Gate(
            limits, count=lambda kind, ip: self.metrics.count(kind, "a connection was cut", ip)
        )
        self.metrics = AxonMetrics(connections=lambda: len(self._gate.open))
        self.counts = self.metrics.counts
        self._callers = Callers(limits, is_validator=lambda who: standing(who).validator_permit)
        self.silence = SilenceWatch(port=self.port)
        self._server = Server(self._serve, self._gate, max_header_bytes=2 * MAX_HEADER_BYTES)
        self.thread = threading.Thread(target=self._run, name="axon", daemon=True)

    def start(self) -> None:
        """Serve; returns once requests are accepted. Raises `OperatorError`."""
        try:
            if self.metrics_port is not None:
                self.metrics_port = self.metrics.serve(self.metrics_port)
            self.thread.start()
            if not self._server.ready.wait(START_SECONDS):
                raise OperatorError(f"the axon did not start within {START_SECONDS:g} s")
        except OperatorError:
            self.stop()
            raise

    def stop(self, timeout_seconds: float = 5.0) -> None:
        """Accept no more requests, wait for those in progress, then cut the rest off.

        Stop the queues first, so that waiting callers get a refusal.
        """
        if self.thread.is_alive():
            self._server.stop_within(timeout_seconds)
            self.thread.join(timeout_seconds + 2.0)
        self._listener.close()
        self.metrics.close()

    def _run(self) -> None:
        asyncio.run(self._server.serve_and_close(self._listener))

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
            self._gate.release_body(request.connection)
        if request.caller is not None:
            self.metrics.observe(request.path[1:], time.monotonic() - began)
        await request.respond(send, answer, self._signature(request, answer))

    async def _answer(self, request: Request) -> Answer:
        """The answer, also to a failed request. Raises `Disconnected`."""
        try:
            body = await self._process(request)
            self.metrics.count("answered")
            return Answer(200, body)
        except Refused as error:
            refused = error
        except TrainingError as error:
            refused = Refused(422, str(error), kind="training")
        except Disconnected:
            raise
        # Only `stop` cancels a request.
        except asyncio.CancelledError:
            refused = Refused(503, "the miner is stopping", kind="stopping")
        except Exception as error:  # noqa: BLE001
            self.metrics.log.failed(error)
            refused = Refused(500, "the miner failed; see its log", kind="failed")
        self.metrics.count(refused.kind, refused.reason, request.connection.ip)
        headers = []
        if refused.status == 405:
            headers.append(("allow", "GET" if request.path == "/" else "POST"))
        if refused.retry_after_seconds is not None:
            headers.append(("retry-after", str(math.ceil(refused.retry_after_seconds))))
        return Answer(refused.status, json.dumps({"detail": refused.reason}).encode(), headers)

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
            cap=route.synapse.max_request_bytes, deadline_seconds=self._body_seconds
        )
        self._verify(request, body)
        return await route.answer(route.parse(body, request.terminal), request)

    def _route(self, request: Request) -> Route:
        route = self._routes.get(request.path)
        if route is None and request.path != "/":
            raise Refused(404, "there is no such synapse here", kind="path")
        if route is None or request.method != "POST":
            raise Refused(405, "synapses are called with POST", kind="method")
        return route

    def _verify(self, request: Request, body: bytes) -> None:
        """Authenticate the caller; nothing else does. Raises `Refused`."""
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
            raise Refused(401, str(error), kind=kind) from None
        self._gate.release_body(request.connection)
        request.caller = caller.hotkey_ss58
        rank = Rank.CALLER
        if self._standing(caller.hotkey_ss58).validator_permit:
            rank = Rank.VALIDATOR
            self.silence.heard()
        self._gate.prove(request.connection, caller.hotkey_ss58, rank)
