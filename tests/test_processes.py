"""Hivemind's processes: nothing of them outlives a killed program, and nothing dies unseen."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from uuid import uuid4

import psutil
import pytest
from hivemind.p2p.p2p_daemon_bindings.control import ControlClient
from hivemind.proto.p2pd_pb2 import PersistentConnectionResponse

from hiveminer.errors import OperatorError, SwarmError
from hiveminer.runtime.processes import lives
from hiveminer.swarm import processes
from hiveminer.swarm.processes import ChildProcesses, guard_tasks, require_shared_memory, sweep
from programs import Program, descendants_gone, started, wait_for

linux = pytest.mark.skipif(
    not Path("/proc/net/unix").exists(), reason="only Linux tells which sockets are open"
)

PEER = """
import sys, time
from pathlib import Path
import torch
from hiveminer.swarm.peer import Peer
from hiveminer.swarm.processes import ChildProcesses
from identities import who

torch.set_num_threads(1)
peer = Peer(identity=who("Alice"))
children = ChildProcesses()
children.watch("the DHT's process", peer.dht.pid)
print("started", peer.dht.pid, flush=True)
told = []
while True:
    if children.lost() != told:
        told = children.lost()
        print("lost", told, flush=True)
    time.sleep(0.05)
"""

# A DHT and a validator's averager that cannot read their daemon's answers any more.
DEAF_PEER = """
import torch
from hiveminer.config.run import Run
from hiveminer.strategies.hivemind.averager import SwarmAverager
from hiveminer.strategies.hivemind.bounds import Bounds
from hiveminer.swarm.peer import Peer
from hiveminer.swarm.processes import ChildProcesses
from identities import who
from programs import wait_for

def deafen(p2p):
    reading = p2p._client.control._read_task.get_coro()
    reading.cr_frame.f_locals["reader"].set_exception(ValueError("no message"))

class Averager(SwarmAverager):
    async def deafen(self):
        deafen(self._p2p)

async def deafen_dht(_dht, node):
    deafen(node.p2p)

peer = Peer(identity=who("Alice"))
averager = Averager(
    run_id="run-a-b-c", bounds=Bounds.of(Run()), dht=peer.dht, params=[torch.ones(2)],
    optimizer=lambda groups: torch.optim.SGD(groups, 1.0), client_mode=True, start=True,
)
for name, pid, act in (
    ("averager", averager.pid, lambda: averager._outer_pipe.send(("deafen", [], {}))),
    ("DHT", peer.dht.pid, lambda: peer.dht.run_coroutine(deafen_dht, return_future=True)),
):
    children = ChildProcesses()
    children.watch(name, pid)
    act()
    print("lost", name, wait_for(children.lost, seconds=60), flush=True)
"""

SLOW_FORK = """
import os, time
from hiveminer.swarm import peer
from identities import who

class Slow(peer._Node):
    def run(self):
        parent = os.getppid()
        print("forked", os.getpid(), flush=True)
        while os.getppid() == parent:
            time.sleep(0.01)
        print("alone", flush=True)
        super().run()

peer._Node = Slow
peer.Peer(identity=who("Alice"))
"""

# A tracker that ends while it waits for the DHT.
WAITING_TRACKER = """
import asyncio, gc, os, signal
from hiveminer.swarm.peer import Peer
from hiveminer.strategies.hivemind.tracker import SampleTracker
from identities import who
from programs import wait_for

def waiting():
    return [each for each in gc.get_objects() if isinstance(each, asyncio.Task)]

peer = Peer(identity=who("Alice"))
tracker = SampleTracker(
    dht=peer.dht, prefix="run", target_batch_size=8, start=True,
    default_refresh_period=0.1, min_refresh_period=0.1, max_refresh_period=0.1,
)
os.kill(peer.dht.pid, signal.SIGSTOP)
# One waits for the end from the start, and another one for the DHT's answer.
wait_for(lambda: sum("wait_for" in repr(each) for each in waiting()) >= 2, seconds=60)
tracker.shutdown(5)
tracker.join(60)
print("left", tracker.is_alive(), waiting(), flush=True)
os.kill(peer.dht.pid, signal.SIGCONT)
peer.close()
"""

MARKED = """
import multiprocessing.util, time
from hiveminer.swarm.processes import mark_temporary_folder
mark_temporary_folder()
print(multiprocessing.util.get_temp_dir(), flush=True)
time.sleep(600)
"""


def dead_number() -> int:
    """The number of a process that has ended."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait(60)
    return ended.pid


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder with a short name: a socket's path has room for 100 characters."""
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="hm-test-") as name:
        yield Path(name)


def bound(path: Path) -> socket.socket:
    path.parent.mkdir(exist_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    return listener


@linux
def test_a_sweep_takes_what_the_dead_left_and_nothing_else(short: Path) -> None:
    dead = dead_number()
    gone = [short / f"torch_{dead}_1_0", short / "hivemind-p2pd-old.sock"]
    kept = [
        *(short / f"torch_{os.getpid()}_1_0", short / "torch_x_1", short / "other.sock"),
        *(short / "hivemind-p2pclient-new.sock", short / "torch-shm-dir-new/manager.sock"),
    ]
    for path in (gone[0], *kept[:3]):
        path.touch()
    gone.append(short / "torch-shm-dir-old/manager.sock")
    bound(gone[1]).close()
    bound(gone[2]).close()
    with bound(kept[3]), bound(kept[4]):
        assert sweep(shared_memory=short, sockets=short) >= 3
        assert [path for path in gone if path.exists()] == []
        assert [path for path in kept if not path.exists()] == []
    assert not gone[2].parent.exists()


@linux
def test_a_socket_that_is_made_during_a_sweep_stays(short: Path) -> None:
    """Two peers start at once: the sweep of one must not take the other's."""
    made = []

    def overtaken() -> set[str] | None:
        table = processes.open_sockets()
        made.append(bound(short / "hivemind-p2pd-new.sock"))
        return table

    sweep(shared_memory=short, sockets=short, open_sockets=overtaken)
    assert (short / "hivemind-p2pd-new.sock").exists()
    made[0].close()


def test_a_sweep_beside_a_program_that_ends_is_no_error(
    short: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its folder goes between the sweep's two looks."""
    monkeypatch.setattr(tempfile, "tempdir", str(short))
    over = threading.Event()

    def come_and_go() -> None:
        while not over.is_set():
            Path(tempfile.mkdtemp(prefix="pymp-", dir=short)).rmdir()

    with ThreadPoolExecutor(1) as beside:
        going = beside.submit(come_and_go)
        try:
            for _ in range(2000):
                sweep(shared_memory=short, sockets=short)
        finally:
            over.set()
        going.result(60)


def test_the_folder_of_a_killed_program_is_swept(tmp_path: Path) -> None:
    with started(MARKED, folder=tmp_path / "marked") as program:
        wait_for(lambda: program.words.endswith("\n"), seconds=60, programs=[program])
        folder = Path(program.words.strip())
        sweep()
        assert folder.is_dir()  # its program lives
        program.process.kill()
        program.process.wait(60)
        sweep()
        assert not folder.exists()


@dataclass
class RunningPeer:
    program: Program
    node: psutil.Process
    """The DHT's process."""
    daemon: psutil.Process


@pytest.fixture
def peer(tmp_path: Path) -> Iterator[RunningPeer]:
    with started(PEER, folder=tmp_path / "peer") as program:
        words = program.says("started", seconds=90)
        node = psutil.Process(int(words.split("started ")[1].split()[0]))
        (daemon,) = [child for child in node.children() if child.name() == "p2pd"]
        try:
            yield RunningPeer(program, node, daemon)
        finally:
            for process in (node, daemon):
                with contextlib.suppress(psutil.Error):
                    process.kill()


def gone(process: psutil.Process) -> bool:
    return not lives(process)


@pytest.mark.timeout(150)
def test_a_child_that_dies_is_missed(peer: RunningPeer) -> None:
    peer.daemon.kill()
    peer.program.says('lost ["the libp2p daemon of the DHT\'s process"]')
    peer.node.kill()
    peer.program.says('lost ["the DHT\'s process", ')


@pytest.mark.slow
@pytest.mark.timeout(150)
def test_whoever_is_told_to_end_takes_the_daemon_along(peer: RunningPeer) -> None:
    peer.node.terminate()
    wait_for(lambda: gone(peer.node) and gone(peer.daemon), seconds=60, about="both to end")


@pytest.mark.slow
@pytest.mark.timeout(150)
def test_a_daemon_ends_when_everybody_else_is_killed(peer: RunningPeer) -> None:
    """`pkill -9 python`: nobody is left who could take the daemon along."""
    os.kill(peer.program.process.pid, signal.SIGSTOP)
    peer.node.kill()
    peer.program.process.kill()
    peer.program.process.wait(60)
    wait_for(lambda: gone(peer.node) and gone(peer.daemon), seconds=60, about="both to end")


@pytest.mark.timeout(150)
def test_a_parent_that_dies_before_its_child_has_settled(tmp_path: Path) -> None:
    with started(SLOW_FORK, folder=tmp_path / "slow") as program:
        words = program.says("forked", seconds=60)
        child = psutil.Process(int(words.split("forked ")[1].split()[0]))
        program.process.kill()
        program.process.wait(60)
        descendants_gone([child], seconds=60)
        assert "alone" in program.words  # it had not even begun to look at its parent


@pytest.mark.timeout(120)
def test_a_tracker_leaves_no_task_behind(tmp_path: Path) -> None:
    """Python would log each as an error."""
    with started(WAITING_TRACKER, folder=tmp_path / "waiting") as program:
        assert "left False []" in program.says("left ", seconds=60)
        assert program.process.wait(60) == 0
        assert "destroyed" not in program.words


@pytest.mark.timeout(120)
def test_a_process_ends_with_a_lasting_task_and_says_which(tmp_path: Path) -> None:
    with started(DEAF_PEER, folder=tmp_path / "deaf") as program:
        for name in ("averager", "DHT"):
            program.says(f"lost {name} [", seconds=60)
        assert program.words.count("task that reads the libp2p daemon's answers has died") == 2
        assert program.words.count("ValueError: no message") == 2


def test_an_answer_to_a_call_that_was_cancelled_this_moment_harms_no_other() -> None:
    async def answers() -> list[str]:
        ended: list[str] = []
        control = ControlClient(None, _initialized_with_create=True)
        ours, cancelled = uuid4(), uuid4()
        control._pending_calls = {call: asyncio.Future() for call in (cancelled, ours)}
        control._pending_calls[cancelled].cancel()
        reader = asyncio.StreamReader()
        reading = asyncio.create_task(control._read_from_persistent_conn(reader))
        p2p = SimpleNamespace(_client=SimpleNamespace(control=control))
        guard_tasks(p2p, end=lambda: ended.append("ended"))
        for call in (cancelled, ours):
            answer = PersistentConnectionResponse(callId=call.bytes)
            answer.callUnaryResponse.response = b"here"
            data = answer.SerializeToString()
            reader.feed_data(bytes([len(data)]) + data)
        assert await asyncio.wait_for(control._pending_calls[ours], 5) == b"here"
        reader.feed_eof()
        await reading
        return ended

    assert asyncio.run(answers()) == []


def test_the_end_of_children_kills_what_is_left() -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as program:
        children = ChildProcesses()
        children.watch("a program", program.pid)
        children.watch("one that never was", dead_number())
        assert children.lost() == []
        children.end()
        program.wait(60)
        assert children.lost() == ["a program"]


def test_a_thread_that_dies_is_named() -> None:
    needed = ChildProcesses()
    needed.watch_thread("what goes on", threading.current_thread())
    needed.check()
    ended = threading.Thread(target=lambda: None)
    ended.start()
    ended.join()
    needed.watch_thread("the progress tracker", ended)
    with pytest.raises(SwarmError, match="the thread of the progress tracker has died"):
        needed.check()


def test_too_little_shared_memory_is_one_line_with_what_is_needed(tmp_path: Path) -> None:
    require_shared_memory(1000, folder=tmp_path)
    require_shared_memory(10**18, folder=tmp_path / "none")
    words = f"{tmp_path} has .* free, and the model needs 4000000000001.0 MB"
    with pytest.raises(OperatorError, match=words):
        require_shared_memory(10**18, folder=tmp_path)


LITTLE_SHARED_MEMORY = """
import ctypes, subprocess, sys
from hiveminer.cli import main

assert not ctypes.CDLL(None).unshare(0x20000)  # a mount namespace of its own
subprocess.run(["mount", "--make-rprivate", "/"], check=True)
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", "/dev/shm"], check=True)
paths = ["--subtensor.path", "net", "--neuron.path", "state"]
sys.exit(main(["miner", *paths, "--axon.port", "0", "--dht.port", "0"]))
"""


def test_a_miner_without_shared_memory_ends_with_one_line(tmp_path: Path) -> None:
    """Docker gives 64 MB; here it is 2 MB."""
    if not shutil.which("unshare") or subprocess.call(["unshare", "--mount", "true"]):
        pytest.skip("needs a mount namespace of its own")
    with started(LITTLE_SHARED_MEMORY, folder=tmp_path / "miner") as miner:
        assert miner.process.wait(120) == 2, miner.words
        assert "/dev/shm has" in miner.words.splitlines()[-1]
        assert "Traceback" not in miner.words
