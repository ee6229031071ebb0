"""Whole programs that are killed: nothing of them outlives them."""

from __future__ import annotations

import contextlib
import os
import tempfile
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from hiveminer.chain import embedded_wallet
from hiveminer.runtime.addresses import port_is_free
from hiveminer.runtime.locks import hold
from hiveminer.strategies.hivemind.averager import SwarmAverager
from hiveminer.swarm.processes import sweep
from programs import Network, Program, descendants_gone, free_port, wait_for

RUN = """
[model]
sequence_length = 64
[swarm]
epoch_samples = 32
matchmaking_seconds = 3.0
"""


# A real miner, killed with -9 in each state that it can be in

TELLING = """
import threading, time
from hiveminer import Miner

def watch(miner):
    while not miner.swarm._is_rounding():
        time.sleep(0.002)
    print("in a round", flush=True)

with Miner() as miner:
    threading.Thread(target=watch, args=(miner,), daemon=True).start()
    miner.run()
"""


@dataclass
class Left:
    """What a family of processes holds, to be looked for when it is dead."""

    family: list[psutil.Process]
    sockets: set[str]

    @classmethod
    def of(cls, program: Program) -> Left:
        family = program.family()
        sockets = set()
        for process in family:
            with contextlib.suppress(psutil.Error):
                names = (str(each.laddr) for each in process.net_connections("unix"))
                sockets |= {name for name in names if name.startswith("/")}
        return cls(family, sockets)

    @property
    def files(self) -> list[str]:
        numbers = [process.pid for process in self.family]
        memory = [str(p) for n in numbers for p in Path("/dev/shm").glob(f"torch_{n}_*")]
        place = Path(tempfile.gettempdir())
        folders = [str(p) for n in numbers for p in place.glob(f"pymp-*/hiveminer-{n}")]
        return [name for name in self.sockets if os.path.exists(name)] + memory + folders


def all_free(network: Network, ports: dict[str, int]) -> bool:
    """Whether a miner could start with this key and these ports now."""
    with embedded_wallet(network.folder / "network", prefix="miner") as claim:
        key = claim.wallet.hotkey_str == "miner-0"
    lock = hold(Path(tempfile.gettempdir()) / f"hiveminer-peer-{ports['dht']}.lock")
    if isinstance(lock, str):
        return False
    lock.release()
    return key and all(port_is_free("127.0.0.1", port) for port in ports.values())


def pythons(program: Program) -> list[psutil.Process]:
    """The processes that the program forked itself: in a group of their own, or not yet."""
    with contextlib.suppress(psutil.Error):
        main = psutil.Process(program.process.pid)
        return [child for child in main.children() if child.cmdline() == main.cmdline()]
    return []


def daemons(program: Program) -> list[psutil.Process]:
    found = []
    for child in pythons(program):
        with contextlib.suppress(psutil.Error):
            found += [each for each in child.children() if each.name() == "p2pd"]
    return found


STATES = {
    "the DHT is forked": lambda program: bool(pythons(program)),
    "the daemon is started": lambda program: bool(daemons(program)),
    "the averager is forked": lambda program: len(pythons(program)) > 1,
    "it serves": lambda program: "serving on" in program.words,
}


def kill(network: Network, program: Program, ports: dict[str, int]) -> None:
    """Kill the main process; then all must be free, and swept."""
    left = Left.of(program)
    program.process.kill()
    descendants_gone(left.family, seconds=60)
    wait_for(lambda: all_free(network, ports), seconds=60, about="key and ports to be free")
    sweep()
    assert left.files == []


@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.parametrize("state", STATES)
def test_kill_9_of_a_miner_that_starts(state: str, tmp_path: Path) -> None:
    ports = {"axon": free_port(), "dht": free_port()}
    flags = [f"--{name}.port={port}" for name, port in ports.items()]
    with Network(tmp_path, run=RUN) as network:
        miner = network.start("miner-0", *flags, ports=False)
        wait_for(lambda: STATES[state](miner), seconds=90, about=state, programs=[miner])
        kill(network, miner, ports)
        if state == "it serves":  # and another can have all of it
            again = network.start("miner-again", *flags, ports=False)
            again.says(f"serving on 127.0.0.1 port {ports['axon']}", seconds=90)
            assert "(key miner-0)" in again.words


@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    ("role", "ready", "number", "name"),
    [
        ("miner-0", "serving on", 0, "the DHT's process"),
        pytest.param("miner-0", "serving on", 1, "the averager's", marks=pytest.mark.slow),
        pytest.param("validator", "rows to give", 0, "the DHT's", marks=pytest.mark.slow),
        pytest.param("validator", "rows to give", 1, "the averager's", marks=pytest.mark.slow),
    ],
)
def test_a_neuron_whose_child_dies_ends_and_says_so(
    role: str, ready: str, number: int, name: str, tmp_path: Path
) -> None:
    with Network(tmp_path) as network:
        program = network.start(role)
        program.says(ready, seconds=90)
        family = program.family()
        pythons(program)[number].kill()
        assert program.process.wait(40) == 1
        descendants_gone(family, seconds=60)
        assert f"hiveminer: {name}" in program.words
        assert "has ended, and without it there is no swarm" in program.words


def test_nobody_waits_for_the_download_of_a_process_that_has_ended() -> None:
    dead, alive = SimpleNamespace(is_alive=lambda: False), SimpleNamespace(is_alive=lambda: True)
    never: Future[str] = Future()
    with pytest.raises(ConnectionError, match="has ended"):
        SwarmAverager._wait_for(dead, never, 60.0)  # type: ignore[arg-type]
    with pytest.raises(TimeoutError):
        SwarmAverager._wait_for(alive, never, 0.6)  # type: ignore[arg-type]
    done: Future[str] = Future()
    done.set_result("state")
    assert SwarmAverager._wait_for(dead, done, 60.0) == "state"  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_kill_9_of_miners_that_train_and_average(tmp_path: Path) -> None:
    script = tmp_path / "telling.py"
    script.write_text(TELLING)
    ports = {"axon": free_port(), "dht": free_port()}
    flags = [f"--{name}.port={port}" for name, port in ports.items()]
    with Network(tmp_path, run=RUN) as network:
        miner = network.start("miner-0", *flags, script=script, ports=False)
        miner.says("serving on", seconds=90)
        other = network.start("miner-1")
        other.says("serving on", seconds=90)
        network.start("validator", "--validator.rows", "64")
        wait_for(lambda: network.numbers("train"), seconds=90, about="training")
        miner.says("in a round", seconds=90)
        kill(network, miner, ports)
        trained = len(network.numbers("train"))
        wait_for(lambda: len(network.numbers("train")) > trained, seconds=90, programs=[other])
        left = Left.of(other)
        other.process.kill()  # while it trains
        descendants_gone(left.family, seconds=60)
        sweep()
        assert left.files == []
