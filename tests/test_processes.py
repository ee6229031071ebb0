"""Hivemind's processes: nothing of them outlives a killed program, and nothing dies unseen."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from uuid import uuid4

import psutil
import pytest
from hivemind.p2p.p2p_daemon_bindings.control import ControlClient
from hivemind.proto.p2pd_pb2 import PersistentConnectionResponse

from hiveminer.chain import embedded_wallet
from hiveminer.errors import SwarmError
from hiveminer.runtime.processes import lives
from hiveminer.strategies.hivemind.averager import SwarmAverager
from hiveminer.swarm import processes
from hiveminer.swarm.processes import ChildProcesses, guard_tasks, shared_memory_problem, sweep
from programs import Network, Program, descendants_gone, started, wait_for

linux = pytest.mark.skipif(
    not Path("/proc/net/unix").exists(), reason="only Linux tells which sockets are open"
)

RUN = """
[model]
sequence_length = 64
[swarm]
epoch_samples = 32
matchmaking_seconds = 3.0
"""

PEER = """
import sys, time
from pathlib import Path
import torch
from hiveminer.swarm import Peer
from hiveminer.swarm.processes import ChildProcesses

torch.set_num_threads(1)
peer = Peer()
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

DEAF_PEER = """
from hiveminer.swarm import Peer
from hiveminer.swarm.processes import ChildProcesses
from programs import wait_for

async def deafen(_dht, node):
    reading = node.p2p._client.control._read_task.get_coro()
    reading.cr_frame.f_locals["reader"].set_exception(ValueError("no message"))

peer = Peer()
children = ChildProcesses()
children.watch("the DHT's process", peer.process)
peer.dht.run_coroutine(deafen, return_future=True)
print("lost", wait_for(children.lost, seconds=20), flush=True)
"""

SLOW_FORK = """
import os, time
from hiveminer.swarm import peer

class Slow(peer._Node):
    def run(self):
        print("forked", os.getpid(), flush=True)
        time.sleep(2)
        super().run()

peer._Node = Slow
peer.Peer()
"""

# A tracker that ends while it waits for the DHT.
WAITING_TRACKER = """
import asyncio, gc, os, signal
from hiveminer.swarm import Peer
from hiveminer.strategies.hivemind.tracker import SampleTracker
from programs import wait_for

def waiting():
    return [each for each in gc.get_objects() if isinstance(each, asyncio.Task)]

peer = Peer()
tracker = SampleTracker(
    dht=peer.dht, prefix="run", target_batch_size=8, start=True,
    default_refresh_period=0.1, min_refresh_period=0.1, max_refresh_period=0.1,
)
os.kill(peer.dht.pid, signal.SIGSTOP)
# One waits for the end from the start, and another one for the DHT's answer.
wait_for(lambda: sum("wait_for" in repr(each) for each in waiting()) >= 2, seconds=20)
tracker.shutdown(5)
tracker.join(10)
print("left", tracker.is_alive(), waiting(), flush=True)
os.kill(peer.dht.pid, signal.SIGCONT)
peer.close()
"""

MARKED = """
import multiprocessing.util, time
from hiveminer.swarm.processes import mark_temporary_folder
mark_temporary_folder()
print(multiprocessing.util.get_temp_dir(), flush=True)
time.sleep(60)
"""

# A miner that says when a round of its swarm is under way.
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


def dead_number() -> int:
    """The number of a process that has ended."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait(20)
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
def test_a_socket_that_is_made_during_a_sweep_stays(
    short: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two peers start at once: the sweep of one must not take the other's."""
    look, made = processes._open_sockets, []

    def look_and_be_overtaken() -> set[str] | None:
        table = look()
        made.append(bound(short / "hivemind-p2pd-new.sock"))
        return table

    monkeypatch.setattr(processes, "_open_sockets", look_and_be_overtaken)
    sweep(shared_memory=short, sockets=short)
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
        going.result(10)


def test_the_folder_of_a_killed_program_is_swept(tmp_path: Path) -> None:
    with started(MARKED, folder=tmp_path / "marked") as program:
        wait_for(lambda: program.words.endswith("\n"), seconds=60, about=program.words)
        folder = Path(program.words.strip())
        sweep()
        assert folder.is_dir()  # its program lives
        program.process.kill()
        program.process.wait(10)
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
    peer.program.says('lost ["the libp2p daemon of the DHT\'s process"]', seconds=20)
    peer.node.kill()
    peer.program.says('lost ["the DHT\'s process", ', seconds=20)


@pytest.mark.slow
@pytest.mark.timeout(150)
def test_whoever_is_told_to_end_takes_the_daemon_along(peer: RunningPeer) -> None:
    peer.node.terminate()
    wait_for(lambda: gone(peer.node) and gone(peer.daemon), seconds=5, about="both to end")


@pytest.mark.slow
@pytest.mark.timeout(150)
def test_a_daemon_ends_when_everybody_else_is_killed(peer: RunningPeer) -> None:
    """`pkill -9 python`: nobody is left who could take the daemon along."""
    os.kill(peer.program.process.pid, signal.SIGSTOP)
    peer.node.kill()
    peer.program.process.kill()
    peer.program.process.wait(10)
    wait_for(lambda: gone(peer.node) and gone(peer.daemon), seconds=5, about="both to end")


@pytest.mark.timeout(150)
def test_a_parent_that_dies_before_its_child_has_settled(tmp_path: Path) -> None:
    with started(SLOW_FORK, folder=tmp_path / "slow") as program:
        words = program.says("forked", seconds=60)
        child = psutil.Process(int(words.split("forked ")[1].split()[0]))
        program.process.kill()
        program.process.wait(10)
        assert lives(child)  # it has not even begun to look at its parent
        descendants_gone([child], seconds=5)


@pytest.mark.timeout(120)
def test_a_tracker_leaves_no_task_behind(tmp_path: Path) -> None:
    """Python would log each as an error."""
    path = {"PYTHONPATH": str(Path(__file__).parent)}
    with started(WAITING_TRACKER, folder=tmp_path / "waiting", env=path) as program:
        assert "left False []" in program.says("left ", seconds=60)
        assert program.process.wait(30) == 0
        assert "destroyed" not in program.words


@pytest.mark.timeout(120)
def test_a_process_ends_with_a_lasting_task_and_says_which(tmp_path: Path) -> None:
    path = {"PYTHONPATH": str(Path(__file__).parent)}
    with started(DEAF_PEER, folder=tmp_path / "deaf", env=path) as program:
        program.says("lost [", seconds=60)
        assert "task that reads the libp2p daemon's answers has died" in program.words
        assert "ValueError: no message" in program.words


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
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as program:
        children = ChildProcesses()
        children.watch("a program", program.pid)
        children.watch("one that never was", dead_number())
        assert children.lost() == []
        children.end()
        program.wait(10)
        assert children.lost() == ["a program"]


def test_a_thread_that_dies_is_named() -> None:
    needed = ChildProcesses()
    ended, done = threading.Thread(target=lambda: None), threading.Event()
    running = threading.Thread(target=done.wait)
    running.start()
    try:
        needed.watch_thread("what goes on", running)
        needed.check()
        ended.start()
        ended.join()
        needed.watch_thread("the progress tracker", ended)
        with pytest.raises(SwarmError, match="the thread of the progress tracker has died"):
            needed.check()
    finally:
        done.set()
        running.join()


def test_too_little_shared_memory_is_one_line_with_what_is_needed(tmp_path: Path) -> None:
    assert shared_memory_problem(1000, folder=tmp_path) is None
    assert shared_memory_problem(10**18, folder=tmp_path / "none") is None
    problem = str(shared_memory_problem(10**18, folder=tmp_path))
    assert f"{tmp_path} has" in problem
    assert "the model needs 4000000000001.0 MB" in problem
    assert "\n" not in problem


@pytest.mark.timeout(300)
def test_a_miner_without_shared_memory_ends_with_one_line(tmp_path: Path) -> None:
    """Docker gives 64 MB; here it is 2 MB."""
    if not shutil.which("unshare") or subprocess.call(["unshare", "--mount", "true"]):
        pytest.skip("needs a mount namespace of its own")
    miner = f"{sys.executable} -m hiveminer miner --subtensor.path net --neuron.path state"
    script = f"mount -t tmpfs -o size=2m tmpfs /dev/shm && exec {miner} --axon.port 0 --dht.port 0"
    ended = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script],
        cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert ended.returncode == 2, ended.stderr
    assert "/dev/shm has" in ended.stderr.splitlines()[-1]
    assert "Traceback" not in ended.stderr


# A real miner, killed with -9 in each state that it can be in


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


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


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return True
    return False


def peers_lock_is_free(port: int) -> bool:
    path = Path(tempfile.gettempdir()) / f"hiveminer-peer-{port}.lock"
    if not path.exists():
        return True
    with path.open("r+b") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
    return True


def all_free(network: Network, ports: dict[str, int]) -> bool:
    """Whether a miner could start with this key and these ports now."""
    with embedded_wallet(network.folder / "network", prefix="miner") as claim:
        key = claim.hotkey_name == "miner-0"
    return key and all(map(is_free, ports.values())) and peers_lock_is_free(ports["dht"])


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


@contextlib.contextmanager
def killed(network: Network, program: Program, ports: dict[str, int]) -> Iterator[None]:
    """Kill the main process in the block; then all must be free, and swept, within 5 s."""
    left = Left.of(program)
    yield
    program.process.kill()
    descendants_gone(left.family, seconds=5)
    wait_for(lambda: all_free(network, ports), seconds=5, about="key and ports to be free")
    sweep()
    assert left.files == []


@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    "state",
    [
        pytest.param("the DHT is forked", marks=pytest.mark.slow),
        pytest.param("the daemon is started", marks=pytest.mark.slow),
        pytest.param("the averager is forked", marks=pytest.mark.slow),
        pytest.param("it serves", marks=pytest.mark.slow),
    ],
)
def test_kill_9_of_a_miner_that_starts(state: str, tmp_path: Path) -> None:
    ports = {"axon": free_port(), "dht": free_port()}
    flags = [f"--{name}.port={port}" for name, port in ports.items()]
    with Network(tmp_path, run=RUN) as network:
        miner = network.start("miner-0", *flags, ports=False)
        wait_for(lambda: STATES[state](miner), seconds=90, about=f"{state}: {miner.words}")
        with killed(network, miner, ports):
            pass
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
        descendants_gone(family, seconds=5)
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
        with killed(network, miner, ports):
            pass
        trained = len(network.numbers("train"))
        wait_for(lambda: len(network.numbers("train")) > trained, seconds=90, about=other.words)
        left = Left.of(other)
        other.process.kill()  # while it trains
        descendants_gone(left.family, seconds=5)
        sweep()
        assert left.files == []


KILLED_TESTS = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from programs import started
program = started("import time; time.sleep(600)", folder=Path("inner"))
print("program", program.process.pid, flush=True)
time.sleep(600)
"""


def test_programs_of_a_killed_test_run_end_with_it(tmp_path: Path) -> None:
    tests = str(Path(__file__).parent)
    with started(KILLED_TESTS, tests, folder=tmp_path / "tests") as run:
        pid = int(run.says("program ", seconds=120).split("program ")[1].split()[0])
        assert psutil.pid_exists(pid)
        run.process.kill()
        run.process.wait(10)
        wait_for(lambda: not psutil.pid_exists(pid), seconds=20, about="the program's end")
