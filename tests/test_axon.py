"""The axon on a real socket: who is served, who is refused, with what status and at what cost."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bittensor
import httpx
import pytest
from bittensor import http_auth
from bittensor.keyfiles import Keypair
from hypothesis import HealthCheck, given, settings
from malformed import Malformed, malformed

from hiveminer.errors import OperatorError, Refused, TrainingError
from hiveminer.protocol import MAX_ROWS, IsAlive, Train
from hiveminer.rpc import axon as axon_module
from hiveminer.rpc.axon import Axon
from hiveminer.rpc.blacklist import STRANGER, Policy, Standing
from hiveminer.rpc.dendrite import ANSWER_METHOD, Dendrite, Endpoint, answer_path
from hiveminer.rpc.queue import WorkQueue

Wallet = SimpleNamespace


def wallet(name: str, **options: Any) -> Wallet:
    key = Keypair.create_from_uri(f"//{name}", **options)
    return Wallet(hotkey=key, coldkey=key, coldkeypub=key)


def ss58(who: Wallet) -> str:
    return str(who.hotkey.ss58_address)


MINER = wallet("Alice")
VALIDATOR = wallet("Bob")
OTHER = wallet("Charlie")
THIRD = wallet("Dave")
NO_PERMIT = wallet("Eve")
UNKNOWN = wallet("Ferdie")
ED25519 = wallet("Bob", crypto_type=bittensor.CRYPTO_ED25519)

STANDINGS = {
    ss58(VALIDATOR): Standing(uid=0, registered=True, validator_permit=True, stake=100.0),
    ss58(OTHER): Standing(uid=1, registered=True, validator_permit=True, stake=20.0),
    ss58(THIRD): Standing(uid=2, registered=True, validator_permit=True, stake=50.0),
    ss58(NO_PERMIT): Standing(uid=3, registered=True, validator_permit=False, stake=1.0),
    ss58(ED25519): Standing(uid=4, registered=True, validator_permit=True, stake=1.0),
}


def standing(hotkey: str) -> Standing:
    return STANDINGS.get(hotkey, STRANGER)


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.005)


def train(request_id: str = "one", **fields: Any) -> bytes:
    common = {"request_id": request_id, "run_id": "run", "data_hash": "data"}
    return json.dumps({**common, "dataset_indices": [3, 1, 2], **fields}).encode()


def signed(
    body: bytes,
    *,
    by: Wallet = VALIDATOR,
    to: Wallet | None = MINER,
    path: str = "/Train",
    method: str = "POST",
    nonce_ns: int | None = None,
) -> dict[str, str]:
    receiver = ss58(to) if to else None
    return http_auth.sign(
        by.hotkey, method=method, path=path, body=body, receiver_ss58=receiver, nonce_ns=nonce_ns
    )


@dataclass
class Served:
    """A miner's axon, with what it was made to do."""

    axon: Axon
    queue: WorkQueue
    gate: threading.Event
    trained: list[str] = field(default_factory=list)
    threads: set[str] = field(default_factory=set)

    def is_alive(self, synapse: IsAlive) -> IsAlive:
        synapse.completion = True
        return synapse

    def forward(self, synapse: Train) -> Train:
        self.threads.add(threading.current_thread().name)
        self.gate.wait(20)
        self.trained.append(synapse.request_id)
        if synapse.run_id == "refused":
            raise Refused(409, "another run")
        if synapse.run_id == "untrainable":
            raise TrainingError("rows without text")
        if synapse.run_id == "bug":
            raise KeyError("what no caller should read")
        synapse.loss, synapse.samples = 2.5, len(synapse.dataset_indices)
        return synapse

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.axon.port}"

    def send(
        self,
        body: bytes,
        headers: dict[str, str],
        *,
        path: str = "/Train",
        method: str = "POST",
    ) -> httpx.Response:
        with httpx.Client(trust_env=False, timeout=20) as client:
            return client.request(method, self.url + path, content=body, headers=headers)

    def call(self, body: bytes = b"", *, path: str = "/Train", **how: Any) -> httpx.Response:
        return self.send(body, signed(body, path=path, **how), path=path)

    def alive(self, **how: Any) -> httpx.Response:
        return self.call(b"{}", path="/IsAlive", **how)

    def raw(self, data: bytes = b"") -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self.axon.port), timeout=10)
        # The axon may have read enough before all is sent.
        with contextlib.suppress(ConnectionError):
            connection.sendall(data)
        return connection

    def raw_call(self, body: bytes, headers: dict[str, str]) -> socket.socket:
        lines = [f"{name}: {value}" for name, value in headers.items()]
        head = "\r\n".join(["POST /Train HTTP/1.1", "host: x", *lines, "", ""])
        return self.raw(head.encode() + body)


@contextlib.contextmanager
def serving(*, queue: WorkQueue | None = None, **options: Any) -> Iterator[Served]:
    queue = queue or WorkQueue(name="trainer")
    queue.start()
    axon = Axon(MINER, **{"standing": standing, **options})
    served = Served(axon, queue, threading.Event())
    served.gate.set()
    axon.attach(served.is_alive).attach(served.forward, queue=queue)
    axon.start()
    try:
        yield served
    finally:
        served.gate.set()
        queue.stop(5)
        axon.stop()


@pytest.fixture(scope="module")
def shared() -> Iterator[Served]:
    """One axon for the tests that leave it as they found it."""
    with serving() as served:
        yield served


@pytest.fixture
def served() -> Iterator[Served]:
    with serving() as served:
        yield served


def status_of(connection: socket.socket) -> int:
    """The status of the answer on a raw connection; 0 if it was cut without one."""
    data = b""
    with contextlib.suppress(ConnectionError):
        while b"\r\n\r\n" not in data and (more := connection.recv(65536)):
            data += more
    return int(data.split(b" ", 2)[1]) if data.startswith(b"HTTP/1.1 ") else 0


# Who is served


def test_a_signed_call_is_answered_and_the_answer_is_signed_for_that_call(shared: Served) -> None:
    body = train("signed")
    headers = signed(body)
    response = shared.send(body, headers)
    assert response.status_code == 200
    answer = Train.model_validate_json(response.content)
    assert (answer.loss, answer.samples, answer.dataset_indices) == (2.5, 3, [3, 1, 2])
    nonce = headers[http_auth.HEADER_NONCE]
    caller = http_auth.verify(
        response.headers,
        response.content,
        method=ANSWER_METHOD,
        path=answer_path("/Train", nonce, 200),
        self_hotkey_ss58=ss58(VALIDATOR),
        nonce_store=http_auth.InMemoryNonceStore(),
    )
    assert caller.hotkey_ss58 == ss58(MINER)
    assert shared.threads == {"trainer"}


def test_the_query_is_part_of_what_is_signed(shared: Served) -> None:
    path = "/IsAlive?a=%2F&b=1"
    assert shared.send(b"{}", signed(b"{}", path=path), path=path).status_code == 200


def test_a_stranger_learns_that_it_is_alive_and_gets_no_signature(shared: Served) -> None:
    for method, path, status in [
        ("GET", "/", 200),
        ("POST", "/", 405),
        ("GET", "/Train", 405),
        ("PUT", "/IsAlive", 405),
        ("GET", "/docs", 404),
        ("GET", "/openapi.json", 404),
        ("POST", "/train", 404),
        ("POST", "/%54rain", 404),
        ("POST", "/Train/", 404),
        ("POST", "/Train", 401),
    ]:
        response = shared.send(b"", {}, path=path, method=method)
        assert response.status_code == status, (method, path)
        assert len(response.content) < 100
        assert not [name for name in response.headers if name.startswith("x-bittensor")]
        assert "server" not in response.headers


def test_an_error_to_a_proved_caller_is_signed_too(shared: Served) -> None:
    body = train("no", batch_size=0)
    headers = signed(body)
    response = shared.send(body, headers)
    http_auth.verify(
        response.headers,
        response.content,
        method=ANSWER_METHOD,
        path=answer_path("/Train", headers[http_auth.HEADER_NONCE], 422),
        self_hotkey_ss58=ss58(VALIDATOR),
        nonce_store=http_auth.InMemoryNonceStore(),
    )


# Who is not


def ns(seconds: float) -> int:
    return time.time_ns() + int(seconds * 1e9)


BODY = train("never trained")
TAMPERED: dict[str, tuple[Callable[[], dict[str, str]], str]] = {
    "another body": (lambda: signed(train("another")), "signature"),
    "another path": (lambda: signed(BODY, path="/IsAlive"), "signature"),
    "another query": (lambda: signed(BODY, path="/Train?a=1"), "signature"),
    "another method": (lambda: signed(BODY, method="GET"), "signature"),
    "another receiver": (lambda: signed(BODY, to=OTHER), "receiver"),
    "no receiver": (lambda: signed(BODY, to=None), "receiver"),
    "another's signature": (
        lambda: {**signed(BODY, by=OTHER), http_auth.HEADER_HOTKEY: ss58(VALIDATOR)},
        "signature",
    ),
    "an hour old": (lambda: signed(BODY, nonce_ns=ns(-3600)), "stale"),
    "a year ahead": (lambda: signed(BODY, nonce_ns=ns(365 * 86400)), "stale"),
    "ed25519": (lambda: signed(BODY, by=ED25519), "credentials"),
    "ed25519, not said": (
        lambda: {
            name: value
            for name, value in signed(BODY, by=ED25519).items()
            if name != http_auth.HEADER_CRYPTO
        },
        "signature",
    ),
    "no signature": (lambda: {http_auth.HEADER_HOTKEY: ss58(VALIDATOR)}, "credentials"),
    "a signature of another length": (
        lambda: {**signed(BODY), http_auth.HEADER_SIGNATURE: "0x1234"},
        "credentials",
    ),
    "a signature that is no hex": (
        lambda: {**signed(BODY), http_auth.HEADER_SIGNATURE: "zz"},
        "credentials",
    ),
    "a long nonce": (
        lambda: {**signed(BODY), http_auth.HEADER_NONCE: "1" * 4000},
        "credentials",
    ),
}


@pytest.mark.parametrize("case", TAMPERED)
def test_what_is_not_as_it_was_signed_is_refused(shared: Served, case: str) -> None:
    make, kind = TAMPERED[case]
    before = shared.axon.counts[kind]
    response = shared.send(BODY, make())
    assert response.status_code == 401
    assert response.json()["detail"]
    assert shared.axon.counts[kind] == before + 1
    assert "never trained" not in shared.trained


def test_a_query_that_was_not_signed_is_refused(shared: Served) -> None:
    assert shared.send(BODY, signed(BODY), path="/Train?a=1").status_code == 401


def test_a_replay_is_refused_and_a_retry_is_not(shared: Served) -> None:
    body = train("replayed")
    headers = signed(body)
    assert shared.send(body, headers).status_code == 200
    replay = shared.send(body, headers)
    assert (replay.status_code, replay.json()["detail"]) == (
        401,
        "this nonce was already accepted from this hotkey",
    )
    assert shared.call(body).status_code == 200
    assert shared.trained.count("replayed") == 1


def test_the_scheme_is_asked_for_where_the_sdk_takes_it(
    shared: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    installed = http_auth.verify

    def later(
        headers: Any, body: bytes, *, expected_crypto_type: int, **options: Any
    ) -> http_auth.Caller:
        asked.append(expected_crypto_type)
        return installed(headers, body, **options)

    monkeypatch.setattr(http_auth, "verify", later)
    assert shared.alive().status_code == 200
    assert shared.send(BODY, signed(BODY, by=ED25519)).status_code == 401
    assert asked == [bittensor.CRYPTO_SR25519]


def test_only_the_registered_are_served_and_only_the_permitted_trained_for(
    shared: Served,
) -> None:
    for path in ("/IsAlive", "/Train"):
        unknown = shared.call(BODY, path=path, by=UNKNOWN)
        assert unknown.status_code == 403
        assert "not registered" in unknown.json()["detail"]
    assert shared.alive(by=NO_PERMIT).status_code == 200
    no_permit = shared.call(BODY, by=NO_PERMIT)
    assert no_permit.status_code == 403
    assert "permit" in no_permit.json()["detail"]
    assert "never trained" not in shared.trained


def test_too_little_stake_is_refused_with_the_reason() -> None:
    with serving(policy=Policy(min_stake=50.0)) as served:
        poor = served.call(train(), by=OTHER)
        assert (poor.status_code, "stake" in poor.json()["detail"]) == (403, True)
        assert served.call(train()).status_code == 200


def test_without_a_chain_nobody_is_served() -> None:
    with serving(standing=axon_module.nobody) as served:
        assert served.alive().status_code == 403


def test_the_blacklist_is_asked_before_the_body_and_sees_only_the_caller() -> None:
    seen: list[tuple[str, str]] = []

    def forward(synapse: Train) -> Train:
        return synapse

    def blacklist(synapse: Train) -> tuple[bool, str]:
        seen.append((synapse.dendrite.hotkey, synapse.dendrite.ip))
        return True, "closed today"

    with serving() as served:
        served.axon.attach(forward, blacklist, queue=served.queue)
        head = {"content-length": "5000", http_auth.HEADER_HOTKEY: ss58(VALIDATOR)}
        with served.raw_call(b"", head) as connection:
            assert status_of(connection) == 403
    assert seen == [(ss58(VALIDATOR), "127.0.0.1")]


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


def test_a_long_hotkey_or_header_never_reaches_base58(
    shared: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    def verify(*args: object, **options: object) -> None:
        raise AssertionError("it got as far as the signature")

    monkeypatch.setattr(http_auth, "verify", verify)
    began = time.monotonic()
    for length, statuses in ((65, [401]), (5000, [401]), (65536, [431, 400])):
        head = {**signed(BODY), http_auth.HEADER_HOTKEY: "5" * length, "content-length": "0"}
        with shared.raw_call(b"", head) as connection:
            assert status_of(connection) in statuses
    many = {f"x-{i}": "1" for i in range(80)}
    assert shared.send(b"", {**signed(b""), **many}).status_code == 431
    assert time.monotonic() - began < 1


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
        (b"not json", 400, "JSON"),
        (b"\xff\xfe{}", 400, "JSON"),
        (b"[" * 100_000, 400, "JSON"),
        (b"[]", 422, "object"),
        (train(batch_size=0), 422, "batch_size"),
        (train(batch_size=1_000_000), 422, "batch_size"),
        (train(batch_size="8"), 422, "batch_size"),
        (train(gradient_accumulation_steps=0), 422, "gradient_accumulation_steps"),
        (train(timeout_seconds=-1), 422, "timeout_seconds"),
        (train(dataset_indices=[]), 422, "dataset_indices"),
        (train(dataset_indices=list(range(MAX_ROWS + 1))), 422, "dataset_indices"),
        (train(dataset_indices=["a"] * 4000), 422, "dataset_indices"),
        (train(dataset_indices=[-1]), 422, "dataset_indices.0"),
        (train(dataset_indices=[1, 1]), 422, "twice"),
        (train(request_id=""), 422, "request_id"),
        (train(request_id="a\nb"), 422, "request_id"),
        (train(surprise=1), 422, "surprise"),
        (train("x", **{"a\n\x1b[31mb": 1}), 422, "a [31mb"),
        (b'{"request_id": "x"}', 422, "run_id"),
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


def test_half_open_connections_are_gone_within_five_seconds(served: Served) -> None:
    silent = [served.raw() for _ in range(20)]
    begun = [served.raw(b"POST /Train HTTP/1.1\r\nhost:") for _ in range(20)]
    again = served.raw(b"GET /nothing HTTP/1.1\r\nhost: x\r\n")
    end = time.monotonic() + 5
    while served.axon.counts["header_deadline"] < 41 and time.monotonic() < end:
        with contextlib.suppress(ConnectionError):
            again.sendall(b"a: b\r\n")  # a line now and then does not help
        time.sleep(0.1)
    assert served.axon.counts["header_deadline"] == 41
    assert not served.axon._gate.open
    for connection in (*silent, *begun, again):
        connection.close()


def test_a_body_that_does_not_come_is_not_waited_for() -> None:
    with serving(body_seconds=0.2) as served:
        head = {**signed(BODY), "content-length": "100"}
        with served.raw_call(b"{", head) as connection:
            assert status_of(connection) == 408


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


def test_the_oldest_unproved_body_gives_way_when_there_are_too_many(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(axon_module, "MAX_UNVERIFIED_BYTES", 30_000)
    head = {**signed(BODY), "content-length": "20000"}
    first = served.raw_call(b"x" * 10_000, head)
    until(lambda: sum(served.axon._bodies.values()) == 10_000)
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


# The queue


def test_is_alive_is_answered_while_the_worker_is_busy(served: Served) -> None:
    served.gate.clear()
    with ThreadPoolExecutor() as pool:
        training = pool.submit(served.call, train())
        until(lambda: served.queue.busy)
        assert served.alive().json()["completion"] is True
        assert served.queue.busy
        served.gate.set()
        assert training.result(10).status_code == 200


def test_the_same_request_trains_once_also_at_the_same_time(served: Served) -> None:
    served.gate.clear()
    with ThreadPoolExecutor(8) as pool:
        calls = [pool.submit(served.call, train("same")) for _ in range(6)]
        until(lambda: served.axon._ledger.known == 6)
        served.gate.set()
        answers = {call.result(10).content for call in calls}
    answers.add(served.call(train("same")).content)
    assert len(answers) == 1
    assert served.call(train("same"), by=OTHER).status_code == 200
    assert served.trained == ["same", "same"]


def test_the_highest_stake_is_trained_for_first(served: Served) -> None:
    served.gate.clear()
    with ThreadPoolExecutor() as pool:
        calls = [pool.submit(served.call, train("running"), by=OTHER)]
        until(lambda: served.queue.busy)
        for place, (name, who) in enumerate(
            [("low", OTHER), ("high", VALIDATOR), ("middle", THIRD)], start=1
        ):
            calls.append(pool.submit(served.call, train(name), by=who))
            until(lambda place=place: served.queue.waiting == place)  # type: ignore[misc]
        served.gate.set()
        assert {call.result(10).status_code for call in calls} == {200}
    assert served.trained == ["running", "high", "middle", "low"]


def test_a_full_queue_says_when_to_come_again_and_others_have_their_share() -> None:
    with serving(queue=WorkQueue(capacity=4, share=1)) as served, ThreadPoolExecutor() as pool:
        served.gate.clear()
        pool.submit(served.call, train("running"))
        until(lambda: served.queue.busy)
        pool.submit(served.call, train("waiting"))
        until(lambda: served.queue.waiting == 1)
        for attempt in range(3):
            full = served.call(train(f"no {attempt}".replace(" ", "-")))
            assert full.status_code == 429
            assert 1 <= int(full.headers["retry-after"]) <= 600
        other = pool.submit(served.call, train("other"), by=OTHER)
        until(lambda: served.queue.waiting == 2)
        served.gate.set()
        assert other.result(10).status_code == 200


def test_who_hangs_up_frees_the_place_and_stops_no_training(served: Served) -> None:
    served.gate.clear()
    running = train("running")
    head = {**signed(running), "content-length": str(len(running))}
    first = served.raw_call(running, head)
    until(lambda: served.queue.busy)
    waiting = train("waiting")
    second = served.raw_call(waiting, {**signed(waiting), "content-length": str(len(waiting))})
    until(lambda: served.queue.waiting == 1)
    first.close()
    second.close()
    until(lambda: served.queue.waiting == 0)
    until(lambda: served.axon.counts["hung_up"] == 2)
    assert served.queue.busy
    served.gate.set()
    assert served.call(running).json()["loss"] == 2.5
    assert served.trained == ["running"]


def test_what_forward_raises_becomes_a_status_and_the_miner_goes_on(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    for run, status, reason in [
        ("refused", 409, "another run"),
        ("untrainable", 422, "rows without text"),
        ("bug", 500, "the miner failed; see its log"),
    ]:
        response = served.call(train(run, run_id=run))
        assert (response.status_code, response.json()["detail"]) == (status, reason)
    assert "KeyError" in caplog.text
    assert served.call(train("good")).status_code == 200


def test_a_wallet_that_cannot_sign_any_more_is_told_in_the_log(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    served.axon._key = None
    response = served.alive()
    assert (response.status_code, served.axon.counts["failed"]) == (500, 1)
    assert "a request failed" in caplog.text
    assert not [name for name in response.headers if name.startswith("x-bittensor")]


def test_a_check_refuses_before_the_queue_and_an_async_forward_runs_in_the_worker() -> None:
    threads = []

    async def forward(synapse: Train) -> Train:
        await asyncio.sleep(0)
        threads.append(threading.current_thread().name)
        synapse.loss = 1.5
        return synapse

    async def alive(synapse: IsAlive) -> IsAlive:
        synapse.epoch = 7
        return synapse

    def check(synapse: Train) -> None:
        if synapse.run_id != "run":
            raise Refused(409, f"this miner trains run, not {synapse.run_id}")

    with serving() as served:
        served.axon.attach(forward, queue=served.queue, check_fn=check).attach(alive)
        assert served.call(train("good")).json()["loss"] == 1.5
        other = served.call(train("bad", run_id="another"))
        assert (other.status_code, "not another" in other.json()["detail"]) == (409, True)
        assert served.alive().json()["epoch"] == 7
    assert threads == ["trainer"]


def test_forward_must_say_what_it_takes() -> None:
    with pytest.raises(TypeError, match="annotate"):
        Axon(MINER).attach(lambda synapse: synapse)


# Across restarts


def test_what_was_signed_before_the_start_is_refused() -> None:
    body = train()
    headers = signed(body)
    with serving() as served:
        refused = served.send(body, headers)
        assert refused.status_code == 401
        assert "before this neuron started" in refused.json()["detail"]
        assert served.call(body).status_code == 200


@contextlib.contextmanager
def another_process(*, port: int, train_seconds: float) -> Iterator[subprocess.Popen[str]]:
    """The same miner's axon in a process of its own; killed in the end."""
    worker = Path(__file__).with_name("axon_worker.py")
    process = subprocess.Popen(
        [sys.executable, str(worker), str(port), str(train_seconds)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def sent(data: bytes, *, port: int) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), timeout=10)
    connection.sendall(data)
    return connection


def test_after_kill_9_in_mid_work_the_same_bytes_are_refused_and_a_fresh_request_is_not() -> None:
    body = train("killed")

    def request() -> bytes:
        head = {**signed(body), "host": "x", "content-length": str(len(body))}
        lines = [f"{name}: {value}" for name, value in head.items()]
        return "\r\n".join(["POST /Train HTTP/1.1", *lines, "", ""]).encode() + body

    with another_process(port=0, train_seconds=60) as process:
        port = int(line_of(process))
        # Signed after the start, as the first process saw it in time.
        first = request()
        with sent(first, port=port) as connection:
            assert line_of(process) == "killed"
            process.send_signal(signal.SIGKILL)
            process.wait(10)
            assert status_of(connection) == 0
    with another_process(port=port, train_seconds=0) as process:
        assert int(line_of(process)) == port
        with sent(first, port=port) as connection:
            assert status_of(connection) == 401
        with sent(request(), port=port) as connection:
            assert status_of(connection) == 200
        assert line_of(process) == "killed"


def test_nothing_begins_before_the_time_at_which_it_was_signed(served: Served) -> None:
    """Or the process after this one could not tell that it was done already."""
    body = train()
    nonce = ns(0.4)
    assert served.send(body, signed(body, nonce_ns=nonce)).status_code == 200
    assert time.time_ns() >= nonce


def test_a_port_in_use_is_told_in_one_line(served: Served) -> None:
    for options, flag in [
        ({"port": served.axon.port}, "--axon.port"),
        ({"metrics_port": served.axon.port}, "--axon.metrics_port"),
    ]:
        with pytest.raises(OperatorError, match=f"{flag} {served.axon.port}: .*in use"):
            Axon(MINER, **options).start()  # type: ignore[arg-type]


def test_a_port_can_be_taken_before_it_is_served() -> None:
    axon = Axon(MINER)
    port = axon.bind()
    with pytest.raises(OperatorError, match="in use"):
        Axon(MINER, port=port).bind()
    axon.stop()
    again = Axon(MINER, port=port)
    assert again.bind() == port
    again.stop()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_child_that_was_forked_does_not_hold_the_port() -> None:
    with serving() as served:
        port = served.axon.port
        assert served.axon._socket is not None
        assert not served.axon._socket.get_inheritable()
        read, write = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if child == 0:
            os.close(write)
            os.read(read, 1)
            os._exit(0)
    try:
        again = Axon(MINER, port=port)
        again.start()
        again.stop()
    finally:
        os.close(write)
        os.waitpid(child, 0)
        os.close(read)


def test_stop_tells_who_waits_and_cuts_off_who_is_silent() -> None:
    with serving() as served, ThreadPoolExecutor() as pool:
        served.gate.clear()
        running = pool.submit(served.call, train("running"))
        until(lambda: served.queue.busy)
        waiting = pool.submit(served.call, train("waiting"))
        until(lambda: served.queue.waiting == 1)
        silent = served.raw()
        assert served.queue.stop(0.01) == ["waiting", "running"]
        assert waiting.result(10).status_code == 503
        served.axon.stop(0.3)
        assert running.result(10).status_code == 503
        assert status_of(silent) == 0
        silent.close()


# What is to be seen


def test_counts_and_latencies_are_served_and_the_log_is_not_flooded(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with serving(metrics_port=0) as served:
        for _ in range(20):
            served.alive(by=UNKNOWN)
        served.alive()
        with httpx.Client(trust_env=False) as client:
            page = client.get(f"http://127.0.0.1:{served.axon.metrics_port}/metrics").text
        assert 'hiveminer_axon_requests_total{kind="blacklist"} 20.0' in page
        assert 'hiveminer_axon_requests_total{kind="answered"} 1.0' in page
        assert 'hiveminer_axon_seconds_count{synapse="IsAlive"} 1.0' in page
    refusals = [record for record in caplog.records if "blacklist" in record.getMessage()]
    assert len(refusals) == 1


def test_the_next_line_of_a_refusal_says_how_many_there_were(
    served: Served, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(axon_module, "NOTE_SECONDS", 1.0)
    began = time.monotonic()
    for _ in range(5):
        served.alive(by=UNKNOWN)
    assert time.monotonic() - began < 1.0
    served.send(b"", {}, path="/nothing")
    until(lambda: time.monotonic() - began > 2.0)
    served.alive(by=UNKNOWN)
    lines = [line for line in caplog.messages if "(blacklist)" in line]
    assert [line.rpartition("; ")[2][:6] for line in lines] == ["0 more", "4 more"]
    assert sum("(path)" in line for line in caplog.messages) == 1


def test_silence_is_told_each_time_that_it_lasts_too_long(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING)
    with serving(quiet_seconds=0.05):
        until(lambda: caplog.text.count("no validator has called") == 2)


def test_only_a_validators_verified_call_ends_the_silence(
    caplog: pytest.LogCaptureFixture,
) -> None:
    forged = {**signed(b"{}", by=OTHER, path="/IsAlive"), http_auth.HEADER_HOTKEY: ss58(VALIDATOR)}
    with serving(quiet_seconds=1.0) as served:
        begun = served.axon._last_validator
        assert served.send(b"{}", forged, path="/IsAlive").status_code == 401
        assert served.alive(by=NO_PERMIT).status_code == 200
        assert served.axon._last_validator == begun
        until(lambda: time.monotonic() - begun > 0.5)
        assert served.alive().status_code == 200
        until(lambda: "no validator has called" in caplog.text)
        assert time.monotonic() - begun >= 1.5


# Whatever comes


def test_no_request_however_malformed_brings_a_500() -> None:
    statuses: Counter[int] = Counter()

    def sign(body: bytes, target: str) -> dict[str, str]:
        return signed(body, path=target)

    @settings(
        max_examples=1000,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(request=malformed(hotkeys=[ss58(VALIDATOR), ss58(MINER)]))
    def fuzz(request: Malformed) -> None:
        with fuzzed.raw(request.raw(sign)) as connection:
            statuses[status_of(connection)] += 1

    # With room for all that is signed: none of it is to end at the caller's budget.
    with serving(header_seconds=0.02, body_seconds=0.02, burst=5000) as fuzzed:
        fuzz()
        assert {400, 401, 404, 405, 422} <= set(statuses)
        assert max(statuses) < 500
        assert fuzzed.axon.counts["failed"] == 0
        assert fuzzed.axon.counts["fields"] > 10
        assert fuzzed.alive().status_code == 200
        until(lambda: not fuzzed.axon._gate.open)
        assert not fuzzed.axon._bodies
        assert fuzzed.axon._ledger.known <= 1000
        assert fuzzed.queue.waiting == 0


def test_many_at_once_are_all_answered(served: Served) -> None:
    async def ask() -> list[IsAlive | Any]:
        endpoint = Endpoint(ss58(MINER), "127.0.0.1", served.axon.port)
        async with Dendrite(VALIDATOR) as dendrite:
            return await dendrite.broadcast([endpoint] * 64, IsAlive(), timeout_seconds=10)

    answers = asyncio.run(ask())
    assert [answer.completion for answer in answers] == [True] * 64
