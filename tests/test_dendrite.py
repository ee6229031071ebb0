"""The dendrite: what it believes, what it retries, and what a bad neuron cannot do to it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable

import bittensor
import httpx
import pytest
from bittensor import http_auth
from serving import MINER, OTHER, UNKNOWN, VALIDATOR, Wallet, serving, ss58, wallet

from hiveminer.errors import MinerError, OperatorError
from hiveminer.protocol import IsAlive, Synapse, Train
from hiveminer.rpc.dendrite import Dendrite, Endpoint
from hiveminer.rpc.signatures import ANSWER_METHOD, answer_path

Handler = Callable[[httpx.Request], httpx.Response]

ENDPOINT = Endpoint(hotkey=ss58(MINER), ip="127.0.0.1", port=9)


class Once(Synapse):
    """A synapse without a request id, which must not arrive twice."""

    value: int = 0


def train(request_id: str = "one") -> Train:
    return Train(request_id=request_id, run_id="run", data_hash="data", dataset_indices=[1])


def answer(
    request: httpx.Request,
    body: bytes = b'{"completion": true}',
    *,
    by: Wallet = MINER,
    to: Wallet = VALIDATOR,
    status: int = 200,
    signed_status: int = 200,
    nonce: str | None = None,
) -> httpx.Response:
    """What an axon answers, or nearly so."""
    nonce = nonce or request.headers[http_auth.HEADER_NONCE]
    path = answer_path(request.url.raw_path.decode(), nonce, signed_status)
    headers = http_auth.sign(
        by.hotkey, method=ANSWER_METHOD, path=path, body=body, receiver_ss58=ss58(to)
    )
    return httpx.Response(status, content=body, headers=headers)


def streamed(response: httpx.Response) -> httpx.Response:
    """The same, as it comes from a network: not read yet."""
    stream = httpx.ByteStream(response.content)
    return httpx.Response(response.status_code, headers=response.headers, stream=stream)


def call(
    handler: Handler, synapse: Synapse | None = None, *, timeout_seconds: float = 10.0
) -> Synapse:
    async def one() -> Synapse:
        transport = httpx.MockTransport(lambda request: streamed(handler(request)))
        async with Dendrite(VALIDATOR, transport=transport, retry_seconds=0.001) as dendrite:
            return await dendrite.call(
                ENDPOINT, synapse or IsAlive(), timeout_seconds=timeout_seconds
            )

    return asyncio.run(one())


def error_of(handler: Handler, synapse: Synapse | None = None) -> MinerError:
    with pytest.raises(MinerError) as raised:
        call(handler, synapse)
    assert raised.value.hotkey == ss58(MINER)
    return raised.value


# What it believes


def test_an_answer_that_is_signed_for_this_call_is_believed() -> None:
    assert call(answer) == IsAlive(completion=True)


BAD_ANSWERS: dict[str, tuple[Handler, str]] = {
    "unsigned": (lambda r: httpx.Response(200, content=b"{}"), "signature"),
    "another's": (lambda r: answer(r, by=OTHER), "another hotkey"),
    "for another": (lambda r: answer(r, to=OTHER), "signature"),
    "to another request": (lambda r: answer(r, nonce="123"), "signature"),
    "with another status": (lambda r: answer(r, signed_status=429), "signature"),
    "ed25519": (
        lambda r: answer(r, by=wallet("Alice", crypto_type=bittensor.CRYPTO_ED25519)),
        "sr25519",
    ),
    "changed on the way": (
        lambda r: httpx.Response(200, content=b"{}", headers=answer(r).headers),
        "signature",
    ),
    "not JSON": (lambda r: answer(r, b"{"), "does not fit"),
    "with a key twice": (
        lambda r: answer(r, b'{"completion": true, "completion": true}'),
        "key twice",
    ),
    "with an unknown field": (lambda r: answer(r, b'{"loss": 1}'), "does not fit: loss"),
    "with a wrong type": (lambda r: answer(r, b'{"epoch": "x"}'), "does not fit: epoch"),
    "with a long hotkey": (
        lambda r: httpx.Response(
            200,
            content=b"{}",
            headers={**answer(r).headers, http_auth.HEADER_HOTKEY: "5" * 60_000},
        ),
        "that long",
    ),
    "too large": (lambda r: answer(r, b" " * 5000), "larger than 4096 bytes"),
    "a redirect": (lambda r: httpx.Response(307, headers={"location": "/"}), "HTTP 307"),
}


@pytest.mark.parametrize("case", BAD_ANSWERS)
def test_any_other_answer_is_that_miners_error(case: str) -> None:
    handler, reason = BAD_ANSWERS[case]
    assert reason in error_of(handler).reason


def test_an_answer_to_another_request_id_is_an_error() -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        return answer(request, train("two").model_dump_json().encode())

    assert "another request" in error_of(handler, train("one")).reason


def test_a_refusal_has_its_status_and_a_reason_fit_for_a_terminal() -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        detail = "full\x1b[31m\n" + "x" * 9000
        return httpx.Response(429, json={"detail": detail[:3000]}, headers={"retry-after": "7"})

    error = error_of(handler)
    assert (error.status, error.retry_after_seconds) == (429, 7.0)
    assert error.reason.startswith("full [31m xxx")
    assert error.reason.isprintable()
    assert len(error.reason) == 300


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b'{"detail": 3}', b"[" * 4000])
def test_a_refusal_without_a_reason_is_told_by_its_status(body: bytes) -> None:
    error = error_of(lambda request: httpx.Response(503, content=body))
    assert (error.status, error.reason) == (503, "HTTP 503")


# What it tries again


def test_a_connection_that_failed_is_tried_again_under_a_fresh_signature() -> None:
    nonces = []

    def handler(request: httpx.Request) -> httpx.Response:
        nonces.append(request.headers[http_auth.HEADER_NONCE])
        if len(nonces) < 3:
            raise httpx.ConnectError("no route")
        return answer(request)

    assert call(handler) == IsAlive(completion=True)
    assert len(set(nonces)) == 3


@pytest.mark.parametrize(("synapse", "attempts"), [(IsAlive(), 3), (train(), 3), (Once(), 1)])
def test_what_may_have_arrived_is_sent_again_only_if_twice_is_once(
    synapse: Synapse, attempts: int
) -> None:
    seen = []

    def handler(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        raise httpx.ReadError("cut")

    assert error_of(handler, synapse).reason == "cut"
    assert len(seen) == attempts


def test_a_refusal_is_not_tried_again() -> None:
    seen = []

    def handler(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(403, json={"detail": "no"})

    assert error_of(handler).status == 403
    assert len(seen) == 1


# On a real socket


def ask(port: int, *, by: Wallet = VALIDATOR, timeout_seconds: float = 60.0) -> IsAlive:
    """Call a neuron at a port of this machine."""

    async def one() -> IsAlive:
        async with Dendrite(by) as dendrite:
            endpoint = Endpoint(ss58(MINER), "127.0.0.1", port)
            return await dendrite.call(endpoint, IsAlive(), timeout_seconds=timeout_seconds)

    return asyncio.run(one())


def on_socket(serve: Callable[[socket.socket], None], *, timeout_seconds: float = 60.0) -> None:
    """Call a neuron that speaks as `serve` does, until it or the call has ended."""

    def accept() -> None:
        while not ended.is_set():
            try:
                connection, _ = listening.accept()
            except TimeoutError:
                continue
            with connection, contextlib.suppress(OSError):
                connection.settimeout(5)
                serve(connection)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(0.1)
        ended = threading.Event()
        server = threading.Thread(target=accept)
        server.start()
        try:
            ask(listening.getsockname()[1], timeout_seconds=timeout_seconds)
        finally:
            ended.set()
            server.join()


def test_an_endless_answer_is_cut_at_the_cap() -> None:
    def serve(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        while True:
            connection.sendall(b"400\r\n" + b"x" * 1024 + b"\r\n")

    with pytest.raises(MinerError, match="larger than 4096 bytes"):
        on_socket(serve)


def test_a_neuron_that_says_nothing_is_given_up_in_time() -> None:
    def serve(connection: socket.socket) -> None:
        while connection.recv(65536):
            pass

    with pytest.raises(MinerError, match=r"no answer within 0\.2 s"):
        on_socket(serve, timeout_seconds=0.2)


def test_a_neuron_that_speaks_no_http_is_an_error() -> None:
    def serve(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(b"\x00\x01hello\r\n\r\n")

    with pytest.raises(MinerError):
        on_socket(serve)


def test_nobody_there_is_an_error() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(MinerError) as raised:
            ask(taken.getsockname()[1])
    assert raised.value.status is None


@pytest.mark.parametrize(
    ("ip", "port"),
    [
        ("0.0.0.0", 8091),
        ("::", 8091),
        ("127.0.0.1", 0),
        ("127.0.0.1", 70000),
        ("224.0.0.1", 8091),
        ("169.254.169.254", 80),
        ("example.com", 80),
        ("127.0.0.1/x?", 80),
        ("", 80),
    ],
)
def test_an_endpoint_where_nobody_can_be_is_not_called(ip: str, port: int) -> None:
    with pytest.raises(MinerError):
        Endpoint(ss58(MINER), ip, port).url  # noqa: B018


def test_endpoints_have_urls() -> None:
    assert Endpoint("5x", "1.2.3.4", 80).url == "http://1.2.3.4:80"
    assert Endpoint("5x", "2001:db8::1", 80).url == "http://[2001:db8::1]:80"


def test_a_proxy_in_the_environment_sees_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with serving() as served:
        assert ask(served.axon.port).completion


def test_a_refusal_by_a_real_axon_has_status_and_reason() -> None:
    with serving() as served, pytest.raises(MinerError, match="not registered") as raised:
        ask(served.axon.port, by=UNKNOWN)
    assert raised.value.status == 403


def test_a_synapse_over_its_own_cap_is_the_callers_mistake() -> None:
    big = train().model_copy(update={"losses": [1.0] * 60_000})
    with pytest.raises(ValueError, match="larger than"):
        call(answer, big)


def test_a_hotkey_that_is_not_sr25519_is_the_operators_mistake() -> None:
    with pytest.raises(OperatorError, match="sr25519"):
        Dendrite(wallet("Alice", crypto_type=bittensor.CRYPTO_ED25519))
