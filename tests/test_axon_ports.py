"""A neuron's axon where a port is another's: the next one, or the name of the right flag; and
where its thread dies."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from small_neurons import SmallMiner, miner_settings, running

from hiveminer.config.settings import AxonSettings, MinerSettings, NeuronSettings, SubtensorSettings
from hiveminer.errors import OperatorError
from programs import wait_for


@contextlib.contextmanager
def neuron(folder: Path, **axon: Any) -> Iterator[SmallMiner]:
    settings = MinerSettings(
        subtensor=SubtensorSettings(path=folder / "embedded"),
        neuron=NeuronSettings(path=folder / "neuron"),
        axon=AxonSettings(**axon),
    )
    with SmallMiner(settings) as miner:
        miner.queue.start()
        yield miner


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as other:
        yield other.getsockname()[1]


def test_a_port_that_was_asked_for_and_is_in_use_is_named(tmp_path: Path, taken: int) -> None:
    with (
        neuron(tmp_path, port=taken) as idle,
        pytest.raises(OperatorError, match=f"--axon.port {taken}: the port is in use"),
    ):
        idle._start_axon()


def test_a_metrics_port_in_use_is_named_by_its_own_flag(tmp_path: Path, taken: int) -> None:
    """Also where the axon itself may take the next free port."""
    with (
        neuron(tmp_path, metrics_port=taken) as idle,
        pytest.raises(OperatorError, match=f"--axon.metrics_port {taken}: the port is in use"),
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
        assert axon._server is not None
        axon._server.should_exit = True
        wait_for(lambda: not program.thread.is_alive(), seconds=60)
    assert "the thread 'axon' has died" in str(program.error)
