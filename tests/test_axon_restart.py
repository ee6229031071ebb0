"""The axon's port and its requests across restarts, forks and kills, and a port in use."""

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
from typing import Any

import pytest
from serving import (
    message,
    ns,
    serving,
    signed,
    status_of,
    train,
    until,
)
from small_neurons import SmallMiner, miner_settings, running, settings_in

from hiveminer.config.settings import AxonSettings, MinerSettings
from hiveminer.errors import OperatorError
from hiveminer.rpc.connections import bind
from programs import wait_for

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
        return message({**signed(body), "content-length": str(len(body))}) + body

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


def test_nothing_begins_before_the_time_at_which_it_was_signed() -> None:
    """Or the process after this one could not tell that it was done already."""
    body = train()
    nonce = ns(0.4)
    with serving() as served:
        assert served.send(body, signed(body, nonce_ns=nonce)).status_code == 200
        assert time.time_ns() >= nonce


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_child_that_was_forked_does_not_hold_the_port() -> None:
    with serving() as served:
        port = served.axon.port
        assert not served.axon._listener.get_inheritable()
        read, write = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if child == 0:
            os.close(write)
            os.read(read, 1)
            os._exit(0)
    try:
        bind("127.0.0.1", port).close()
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


# Where the port is another's


@contextlib.contextmanager
def neuron(folder: Path, **axon: Any) -> Iterator[SmallMiner]:
    with SmallMiner(settings_in(folder, MinerSettings, axon=axon)) as miner:
        miner.queue.start()
        yield miner


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as other:
        yield other.getsockname()[1]


@pytest.mark.parametrize("flag", ["port", "metrics_port"])
def test_a_port_that_was_asked_for_and_is_in_use_is_named_by_its_flag(
    tmp_path: Path, taken: int, flag: str
) -> None:
    """That of the metrics also where the axon itself may take the next free port."""
    with (
        neuron(tmp_path, **{flag: taken}) as idle,
        pytest.raises(OperatorError, match=f"--axon.{flag} {taken}: the port is in use"),
    ):
        idle._start_axon()


def test_the_next_free_port_is_taken_where_none_was_asked_for(tmp_path: Path) -> None:
    usual = AxonSettings().port
    with neuron(tmp_path) as idle, contextlib.ExitStack() as stack:
        # It may be another program's already: it is in use either way.
        with contextlib.suppress(OSError):
            stack.enter_context(socket.create_server(("127.0.0.1", usual)))
        idle.axon = idle._start_axon()
        assert usual < idle.axon.port < usual + 64


def test_a_miner_whose_axon_has_died_ends_and_names_it(tmp_path: Path) -> None:
    with running(miner_settings(tmp_path)) as program:
        program.endpoint()
        axon = program.miner.axon
        assert axon is not None
        axon._server.should_exit = True
        wait_for(lambda: not program.thread.is_alive(), seconds=60)
    assert "the thread 'axon' has died" in str(program.error)
