"""The axon's port and its requests across restarts, forks and kills."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from serving import (
    MINER,
    Served,
    ns,
    serving,
    signed,
    status_of,
    train,
    until,
)

from hiveminer.errors import OperatorError
from hiveminer.rpc.axon import Axon


@pytest.fixture(scope="module")
def shared() -> Iterator[Served]:
    """One axon for the tests that leave it as they found it."""
    with serving() as served:
        yield served


@pytest.fixture
def served() -> Iterator[Served]:
    with serving() as served:
        yield served


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
    connection = socket.create_connection(("127.0.0.1", port), timeout=60)
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
            process.wait(60)
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
        assert waiting.result(60).status_code == 503
        served.axon.stop(0.3)
        assert running.result(60).status_code == 503
        assert status_of(silent) == 0
        silent.close()
