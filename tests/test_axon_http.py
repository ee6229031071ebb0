"""What the axon takes for a request, and what one may cost, on raw sockets."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Self

import httpx
import pytest
from bittensor import http_auth
from hypothesis import given, settings
from malformed import Malformed, malformed
from serving import (
    BODY,
    MINER,
    NO_PERMIT,
    OTHER,
    THIRD,
    UNKNOWN,
    VALIDATOR,
    Served,
    Wallet,
    message,
    served_axon,  # noqa: F401 - a fixture
    serving,
    shared_axon,  # noqa: F401 - a fixture
    signed,
    ss58,
    standing,
    status_of,
    train,
    until,
    wallet,
)

from hiveminer.protocol import IsAlive
from hiveminer.rpc.blacklist import Standing
from hiveminer.rpc.dendrite import Dendrite, Endpoint

# What it costs


def test_a_body_over_the_cap_is_not_read(shared: Served) -> None:
    head = signed(BODY)
    with shared.raw_call(b"", {**head, "content-length": "50000000"}) as connection:
        assert status_of(connection) == 413
    with shared.raw_call(b"", {**head, "content-length": "9" * 400}) as connection:
        assert status_of(connection) in (400, 413)
    with shared.raw_call(b"", {**head, "transfer-encoding": "chunked"}) as connection:
        chunk = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
        with contextlib.suppress(ConnectionError):
            for _ in range(64):
                connection.sendall(chunk)
        assert status_of(connection) in (413, 0)
    small = b"x" * (IsAlive.max_request_bytes + 1)
    assert shared.call(small, path="/IsAlive").status_code == 413
    assert shared.axon.counts["body_size"] >= 3


def test_a_long_hotkey_or_header_never_reaches_base58(shared: Served) -> None:
    before = shared.axon.counts["signature"]
    for length, statuses in ((65, [401]), (5000, [401]), (65536, [431, 400])):
        head = {**signed(BODY), http_auth.HEADER_HOTKEY: "5" * length, "content-length": "0"}
        with shared.raw_call(b"", head) as connection:
            assert status_of(connection) in statuses
    many = {f"x-{i}": "1" for i in range(80)}
    assert shared.send(b"", {**signed(b""), **many}).status_code == 431
    assert shared.axon.counts["signature"] == before


def alive_message(start: str = "POST /IsAlive HTTP/1.1", **headers: str) -> bytes:
    """A good signed `IsAlive`, with the headers given."""
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    return message({**signed(b"{}", path="/IsAlive"), **given}, start=start)


Make = Callable[[], bytes]
"""A request, made when it is sent: a signature is soon too old."""

CHUNKS = b"2\r\n{}\r\n0\r\n"


def chunked(chunks: bytes, encoding: str = "chunked", **headers: str) -> Make:
    return lambda: alive_message(transfer_encoding=encoding, **headers) + chunks


def edited(old: bytes, new: bytes) -> Make:
    """A good request in which something is replaced."""
    return lambda: alive_message(a="b", content_length="2").replace(old, new) + b"{}"


SIZES = ["+2", "-2", "0x2", " 2", "2 ", "2\t", "2;a=b", "2;" + "a" * 8000, "2;\r", "", "1" * 17]
ENCODINGS = ["chunked, chunked", "gzip, chunked", "identity", "\x0bchunked", "xchunked"]
LENGTHS = ["+2", "-2", "0x2", "2, 2", "2,3", "2 2", "2\r\ncontent-length: 2", "", "\x0b2"]
VERSIONS = ["HTTP/0.9", "HTTP/1.2", "HTTP/2.0", "HTTP/9.9", "HTTP/1", "http/1.1"]

AMBIGUOUS: dict[str, Make] = {
    "length and chunks": chunked(CHUNKS + b"\r\n", content_length="2"),
    "chunks in HTTP/1.0": chunked(CHUNKS + b"\r\n", start="POST /IsAlive HTTP/1.0"),
    "trailers": chunked(CHUNKS + b"a: b\r\n\r\n"),
    "a bare line feed after the last chunk": chunked(CHUNKS + b"\n"),
    "a bare line feed after a chunk": chunked(b"2\r\n{}\n0\r\n\r\n"),
    "a bare line feed after a chunk's size": chunked(b"2\n{}\r\n0\r\n\r\n"),
    "a longer chunk than it says": chunked(b"2\r\n{} \r\n0\r\n\r\n"),
    "a space before the colon": edited(b"content-length:", b"content-length :"),
    "a tab before the colon": edited(b"content-length:", b"content-length\t:"),
    "a carriage return alone": edited(b"a: b\r\n", b"a: b\r"),
    "a carriage return in a value": edited(b"a: b", b"a: b\rc"),
    "a tab in the first line": edited(b"POST ", b"POST\t"),
    "a space before the first header": edited(b"HTTP/1.1\r\n", b"HTTP/1.1\r\n "),
    "a bare line feed": edited(b"a: b\r\n", b"a: b\n"),
    "bare line feeds": edited(b"\r\n", b"\n"),
    "a bare line feed before the body": edited(b"\r\n\r\n", b"\r\n\n"),
    "a folded header": edited(b"a: b", b"a: b\r\n c"),
    "a header folded by a tab": edited(b"a: b", b"a: b\r\n\tc"),
}
for size in SIZES:
    AMBIGUOUS[f"the chunk size {size[:20]!r}"] = chunked(size.encode() + b"\r\n{}\r\n0\r\n\r\n")
for encoding in ENCODINGS:
    AMBIGUOUS[f"the encoding {encoding!r}"] = chunked(CHUNKS + b"\r\n", encoding)
for length in LENGTHS:
    AMBIGUOUS[f"the length {length!r}"] = edited(b"length: 2", f"length: {length}".encode())
for version in VERSIONS:
    AMBIGUOUS[version] = edited(b"HTTP/1.1", version.encode())


@pytest.mark.parametrize("case", AMBIGUOUS)
def test_a_request_that_could_be_read_in_two_ways_is_refused_and_closed(
    shared: Served, case: str
) -> None:
    with shared.raw(AMBIGUOUS[case]()) as connection:
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert answer.count(b"HTTP/1.1") == 1


def test_chunks_and_http_1_0_are_served(shared: Served) -> None:
    for make in (chunked(CHUNKS + b"\r\n"), edited(b"HTTP/1.1", b"HTTP/1.0")):
        with shared.raw(make()) as connection:
            assert status_of(connection) == 200


@pytest.mark.parametrize(
    ("start", "headers", "status"),
    [
        ("POST /Train HTTP/1.1", {}, 401),
        ("POST /nothing HTTP/1.1", {}, 404),
        ("PUT /Train HTTP/1.1", {}, 405),
        ("POST /Train HTTP/1.1", {http_auth.HEADER_HOTKEY: ss58(UNKNOWN)}, 403),
        ("POST /Train HTTP/1.1", {http_auth.HEADER_HOTKEY: ss58(NO_PERMIT)}, 403),
        ("POST /Train HTTP/1.1", {http_auth.HEADER_HOTKEY: "5" * 65}, 401),
        (
            "POST /Train HTTP/1.1",
            {http_auth.HEADER_HOTKEY: ss58(VALIDATOR), "content-length": "200000"},
            413,
        ),
    ],
)
def test_who_asks_before_sending_a_body_gets_the_refusal_and_no_100(
    shared: Served, start: str, headers: dict[str, str], status: int
) -> None:
    head = {"expect": "100-continue", "content-length": "100", **headers}
    with shared.raw(message(head, start=start)) as connection:
        assert status_of(connection) == status


def test_a_verified_caller_who_asks_before_sending_a_body_is_told_to_send_it(
    shared: Served,
) -> None:
    with shared.raw(alive_message(expect="100-continue", content_length="2")) as connection:
        assert status_of(connection) == 100
        connection.sendall(b"{}")
        assert status_of(connection) == 200


def test_a_header_given_twice_proves_nothing(shared: Served) -> None:
    body = b"{}"
    lines = [f"{name}: {value}" for name, value in signed(body, path="/IsAlive").items()]
    lines.append(f"{http_auth.HEADER_HOTKEY}: {ss58(OTHER)}")
    head = "\r\n".join(["POST /IsAlive HTTP/1.1", "host: x", "content-length: 2", *lines, "", ""])
    with shared.raw(head.encode() + body) as connection:
        assert status_of(connection) == 401


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        (b"", 400, "JSON"),
        (b"\xff\xfe{}", 400, "JSON"),
        (b"[" * 100_000, 400, "JSON"),
        (b"[]", 422, "object"),
        (train(batch_size=0), 422, "batch_size"),
        (train(dataset_indices=["a"] * 4000), 422, "dataset_indices"),
        (train(dataset_indices=[-1]), 422, "dataset_indices.0"),
        (train("x", **{"a\n\x1b[31mb": 1}), 422, "a [31mb"),
        (b'{"request_id": "x"}', 422, "run_id"),
        (train().replace(b'"run_id"', b'"run_id": "a", "run_id"'), 400, "key twice"),
        (train().replace(b"{", b'{"losses": [], "losses": [], ', 1), 400, "key twice"),
    ],
)
def test_a_body_that_does_not_fit_is_refused_by_name(
    shared: Served, body: bytes, status: int, reason: str
) -> None:
    trained = len(shared.trained)
    response = shared.call(body)
    assert response.status_code == status
    detail = response.json()["detail"]
    assert reason in detail
    assert "\n" not in detail
    assert len(detail) <= 300
    assert len(shared.trained) == trained


def test_half_open_connections_are_cut(served: Served) -> None:
    silent = [served.raw() for _ in range(20)]
    begun = [served.raw(b"POST /Train HTTP/1.1\r\nhost:") for _ in range(20)]
    slow = served.raw(b"GET /nothing HTTP/1.1\r\nhost: x\r\n")

    def all_cut() -> bool:
        with contextlib.suppress(ConnectionError):
            slow.sendall(b"a: b\r\n")  # a line now and then does not help
        return served.axon.counts["header_deadline"] == 41

    until(all_cut)
    assert not served.axon._gate.open
    for connection in (*silent, *begun, slow):
        connection.close()


def test_a_body_that_does_not_come_is_not_waited_for() -> None:
    with serving(body_seconds=0.2) as served:
        head = {**signed(BODY), "content-length": "100"}
        with served.raw_call(b"{", head) as connection:
            assert status_of(connection) == 408


def test_a_slow_body_is_refused_before_its_connection_is_reset() -> None:
    with serving(body_seconds=0.2) as served:
        head = {**signed(BODY), "content-length": "10000"}
        with served.raw_call(b"{", head) as connection:
            connection.settimeout(0.01)
            answer = b""
            while b"\r\n\r\n" not in answer:
                connection.sendall(b" ")
                with contextlib.suppress(TimeoutError):
                    answer += connection.recv(65536)
            for _ in range(5):
                connection.sendall(b" ")
                time.sleep(0.02)
    assert answer.startswith(b"HTTP/1.1 408 ")


def test_connections_that_say_nothing_push_out_one_another_and_no_caller() -> None:
    with serving(max_connections=20, max_connections_per_ip=10) as served:
        with httpx.Client(trust_env=False) as client:
            url = f"{served.url}/IsAlive"
            client.post(url, content=b"{}", headers=signed(b"{}", path="/IsAlive"))
            flood = [served.raw() for _ in range(40)]
            until(lambda: served.axon.counts["connections_of_ip"] >= 31)
            response = client.post(url, content=b"{}", headers=signed(b"{}", path="/IsAlive"))
            assert response.status_code == 200
            assert client.get(served.url).status_code == 200
            assert len(served.axon._gate.open) <= 10
        for connection in flood:
            connection.close()


class Crowd:
    """Hotkeys, each of which holds connections with a verified call and half of the next."""

    def __init__(self, served: Served) -> None:
        self.served = served
        self.connections: list[socket.socket] = []

    def join(self, who: Wallet, *, times: int, source: str = "127.0.0.1") -> None:
        for _ in range(times):
            head = {**signed(b"{}", by=who, path="/IsAlive"), "content-length": "2"}
            start = "POST /IsAlive HTTP/1.1"
            connection = self.served.raw(message(head, start=start) + b"{}", source=source)
            self.connections.append(connection)
            if status_of(connection) == 200:
                head["content-length"] = "100"
                with contextlib.suppress(ConnectionError):
                    connection.sendall(message(head, start=start) + b"{")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for connection in self.connections:
            connection.close()


@pytest.mark.skipif(sys.platform != "linux", reason="one loopback address")
@pytest.mark.parametrize("hotkeys", [1, 12])
def test_hotkeys_without_a_permit_take_no_validators_place(hotkeys: int) -> None:
    many = [wallet(f"many{number}") for number in range(hotkeys)]
    plain = Standing(registered=True, validator_permit=False, stake=0.0)
    known = {ss58(who): plain for who in many}
    with (
        serving(
            standing=lambda hotkey: known.get(hotkey) or standing(hotkey),
            max_connections=24,
            max_connections_per_ip=12,
        ) as served,
        Crowd(served) as crowd,
        httpx.Client(trust_env=False) as client,
    ):

        def call() -> int:
            headers = signed(b"{}", path="/IsAlive")
            return client.post(f"{served.url}/IsAlive", content=b"{}", headers=headers).status_code

        assert call() == 200
        for number in range(48):
            crowd.join(many[number % hotkeys], times=1, source=f"127.0.0.{2 + number % 5}")
        until(lambda: len(served.axon._gate.open) == 24)
        cut = served.axon.counts["connections"]
        assert call() == 200
        assert served.axon.counts["connections"] == cut, "the validator had to come again"
        assert served.alive(by=OTHER).status_code == 200


def test_a_validator_takes_no_other_validators_place() -> None:
    with serving(max_connections=8, max_connections_per_hotkey=4) as served, Crowd(served) as crowd:
        crowd.join(VALIDATOR, times=2)
        crowd.join(OTHER, times=20)
        until(lambda: served.axon.counts["connections_of_hotkey"] == 16)
        assert served.alive(by=THIRD).status_code == 200
        assert len(served.axon._gate.open) >= 6


def test_a_validators_body_is_not_cut_for_those_of_others() -> None:
    with serving(max_unverified_bytes=30_000) as served, Crowd(served) as crowd:
        crowd.join(VALIDATOR, times=1)
        until(lambda: served.axon._gate.unverified_bytes == 1)
        head = {**signed(BODY), "content-length": "20000"}
        rest = [served.raw_call(b"x" * 10_000, head) for _ in range(4)]
        until(lambda: served.axon.counts["body_room"] == 2)
        crowd.connections[0].sendall(b" " * 99)
        assert status_of(crowd.connections[0]) == 401
        for connection in rest:
            connection.close()


def test_the_oldest_unproved_body_gives_way_when_there_are_too_many() -> None:
    head = {**signed(BODY), "content-length": "20000"}
    with serving(max_unverified_bytes=30_000) as served:
        first = served.raw_call(b"x" * 10_000, head)
        until(lambda: served.axon._gate.unverified_bytes == 10_000)
        rest = [served.raw_call(b"x" * 10_000, head) for _ in range(4)]
        assert status_of(first) == 0
        until(lambda: served.axon.counts["body_room"] == 2)
        assert served.call(train()).status_code == 200
        for connection in (first, *rest):
            connection.close()


def test_a_stranger_under_the_validators_name_spends_nothing_of_its_budget() -> None:
    with serving(requests_per_second=0.01, burst=3) as served:
        forged = {**signed(b"{}", by=OTHER, path="/IsAlive")}
        forged[http_auth.HEADER_HOTKEY] = ss58(VALIDATOR)
        for _ in range(20):
            assert served.send(b"{}", forged, path="/IsAlive").status_code == 401
        assert [served.alive().status_code for _ in range(4)] == [200, 200, 200, 429]
        over = served.alive()
        assert int(over.headers["retry-after"]) >= 1
        assert served.alive(by=OTHER).status_code == 200


# Whatever comes


def test_no_request_however_malformed_brings_a_500() -> None:
    statuses: Counter[int] = Counter()

    def sign(body: bytes, target: str) -> dict[str, str]:
        return signed(body, path=target)

    @settings(max_examples=500)
    @given(request=malformed(hotkeys=[ss58(VALIDATOR), ss58(MINER)]))
    def fuzz(request: Malformed) -> None:
        with fuzzed.raw(request.raw(sign)) as connection:
            statuses[status_of(connection)] += 1

    # With room for all that is signed: none of it is to end at the caller's budget.
    with serving(header_seconds=0.15, body_seconds=0.15, burst=5000) as fuzzed:
        fuzz()
        assert {400, 401, 404, 405, 422} <= set(statuses)
        assert max(statuses) < 500
        assert fuzzed.axon.counts["failed"] == 0
        assert fuzzed.axon.counts["fields"] > 5
        until(lambda: fuzzed.alive().status_code == 200)
        until(lambda: not fuzzed.axon._gate.open)
        assert fuzzed.axon._gate.unverified_bytes == 0
        assert len(fuzzed.axon._callers._seen) <= 1000
        assert fuzzed.queue.waiting == 0


def test_many_at_once_are_all_answered(served: Served) -> None:
    async def ask() -> list[IsAlive]:
        endpoint = Endpoint(ss58(MINER), "127.0.0.1", served.axon.port)
        async with Dendrite(VALIDATOR) as dendrite:
            calls = [dendrite.call(endpoint, IsAlive(), timeout_seconds=60) for _ in range(64)]
            return await asyncio.gather(*calls)

    answers = asyncio.run(ask())
    assert [answer.completion for answer in answers] == [True] * 64
