"""A miner's axon in this process, and callers who sign: for the tests of the axon."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import bittensor
import httpx
import pytest
from bittensor import http_auth
from bittensor.keyfiles import Keypair

from hiveminer.config.settings import BlacklistSettings
from hiveminer.errors import Refused, TrainingError
from hiveminer.protocol import IsAlive, Synapse, Train
from hiveminer.rpc.axon import Axon
from hiveminer.rpc.blacklist import STRANGER, Standing, refusal
from hiveminer.rpc.connections import Limits, bind
from hiveminer.rpc.queue import WorkQueue
from hiveminer.rpc.route import Route
from programs import wait_for

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
    ss58(VALIDATOR): Standing(registered=True, validator_permit=True, stake=100.0),
    ss58(OTHER): Standing(registered=True, validator_permit=True, stake=20.0),
    ss58(THIRD): Standing(registered=True, validator_permit=True, stake=50.0),
    ss58(NO_PERMIT): Standing(registered=True, validator_permit=False, stake=1.0),
    ss58(ED25519): Standing(registered=True, validator_permit=True, stake=1.0),
}


def until(condition: Callable[[], object]) -> None:
    wait_for(condition, seconds=60)


def ns(seconds: float) -> int:
    """A time from now, as a nonce."""
    return time.time_ns() + int(seconds * 1e9)


def standing(hotkey: str) -> Standing:
    return STANDINGS.get(hotkey, STRANGER)


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


BODY = train("never trained")


def message(headers: dict[str, str], *, start: str = "POST /Train HTTP/1.1") -> bytes:
    """The header of a request, as it is sent."""
    lines = [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([start, "host: x", *lines, "", ""]).encode()


@dataclass
class Served:
    """A miner's axon, and what it has trained; its worker waits for `gate`."""

    queue: WorkQueue
    axon: Axon = field(init=False)
    gate: threading.Event = field(default_factory=threading.Event)
    trained: list[str] = field(default_factory=list)
    threads: set[str] = field(default_factory=set)

    def is_alive(self, synapse: IsAlive) -> IsAlive:
        synapse.completion = True
        return synapse

    def forward(self, synapse: Train) -> Train:
        self.threads.add(threading.current_thread().name)
        self.gate.wait(100)
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
        with httpx.Client(trust_env=False, timeout=60) as client:
            return client.request(method, self.url + path, content=body, headers=headers)

    def call(self, body: bytes = b"", *, path: str = "/Train", **how: Any) -> httpx.Response:
        return self.send(body, signed(body, path=path, **how), path=path)

    def alive(self, **how: Any) -> httpx.Response:
        return self.call(b"{}", path="/IsAlive", **how)

    def raw(self, data: bytes = b"", *, source: str = "127.0.0.1") -> socket.socket:
        """A connection from an address of this machine, with these bytes sent."""
        there, here = ("127.0.0.1", self.axon.port), (source, 0)
        connection = socket.create_connection(there, timeout=60, source_address=here)
        # The axon may have read enough before all is sent.
        with contextlib.suppress(ConnectionError):
            connection.sendall(data)
        return connection

    def raw_call(self, body: bytes, headers: dict[str, str]) -> socket.socket:
        return self.raw(message(headers) + body)


@contextlib.contextmanager
def serving(
    *,
    queue: WorkQueue | None = None,
    port: int = 0,
    metrics_port: int | None = None,
    standing: Callable[[str], Standing] = standing,
    alive: Mapping[str, Any] | None = None,
    train: Mapping[str, Any] | None = None,
    **limits: Any,
) -> Iterator[Served]:
    """A miner's axon that serves until the block ends; alive, train: changes to their routes."""

    def blacklist(synapse: Synapse) -> tuple[bool, str]:
        caller = standing(synapse.dendrite.hotkey)
        needs_permit = isinstance(synapse, Train)
        reason = refusal(caller, BlacklistSettings(), needs_permit=needs_permit)
        return reason is not None, reason or ""

    def stake(synapse: Synapse) -> float:
        return standing(synapse.dendrite.hotkey).stake

    served = Served(queue or WorkQueue())
    common: dict[str, Any] = {"blacklist": blacklist, "priority": stake}
    is_alive = {"forward": served.is_alive} | common | (alive or {})
    training = {"forward": served.forward, "queue": served.queue} | common | (train or {})
    served.axon = Axon(
        MINER,
        bind("127.0.0.1", port),
        [Route(IsAlive, **is_alive), Route(Train, **training)],
        standing=standing,
        metrics_port=metrics_port,
        limits=Limits(**limits),
    )
    served.gate.set()
    served.queue.start()
    try:
        served.axon.start()
        yield served
    finally:
        served.gate.set()
        served.queue.stop(5)
        served.axon.stop()


@pytest.fixture(name="shared", scope="module")
def shared_axon() -> Iterator[Served]:
    """One axon for the tests that leave it as they found it."""
    with serving() as served:
        yield served


@pytest.fixture(name="served")
def served_axon() -> Iterator[Served]:
    with serving() as served:
        yield served


def status_of(connection: socket.socket) -> int:
    """The status of the next answer on a raw connection; 0 if it was cut without one."""
    data = b""
    with contextlib.suppress(ConnectionError):
        while b"\r\n\r\n" not in data and (more := connection.recv(65536)):
            data += more
        head, _, body = data.partition(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head)
        while length and len(body) < int(length[1]) and (more := connection.recv(65536)):
            body += more
    return int(data.split(b" ", 2)[1]) if data.startswith(b"HTTP/1.1 ") else 0
