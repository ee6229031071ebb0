"""What a program makes of its terminal, its output, its keys and its temporary folder."""

from __future__ import annotations

import json
import os
import platform
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from hiveminer.errors import OperatorError
from hiveminer.runtime import json_filter, machine
from programs import Program, started


def printed(code: str) -> int:
    """The number that a program of its own prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


# --- where the output goes -----------------------------------------------------------------------


def full_disk() -> None:
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)


def broken_pipe() -> None:
    read, write = os.pipe()
    os.dup2(write, 1)
    os.close(read)


def closed() -> None:
    os.close(1)


@pytest.mark.parametrize(
    ("words", "stdout", "reason"),
    [
        (["--help"], full_disk, "No space left on device"),
        (["--version"], full_disk, "No space left on device"),
        (["miner", "--help"], full_disk, "No space left on device"),
        (["--help"], broken_pipe, "Broken pipe"),
        (["--version"], closed, "Bad file descriptor"),
    ],
)
def test_an_output_that_cannot_be_written_is_one_line(
    words: list[str], stdout: Callable[[], None], reason: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "hiveminer", *words],
        text=True, timeout=120, stderr=subprocess.PIPE, preexec_fn=stdout,
    )  # fmt: skip
    assert done.returncode > 0
    problem = f"the output could not be written: {reason}; look where stdout goes"
    assert done.stderr == f"hiveminer: {problem}\n"


def test_no_file_gets_the_number_of_a_stream_that_is_closed() -> None:
    code = (
        "import os\n"
        "from hiveminer.runtime.program import fill_standard_descriptors\n"
        "fill_standard_descriptors()\n"
        "assert os.open('/dev/null', os.O_RDONLY) > 2\n"
    )

    command = [sys.executable, "-c", code]
    subprocess.run(command, preexec_fn=lambda: os.closerange(0, 3), timeout=60, check=True)


# --- signals -------------------------------------------------------------------------------------

STOPS = """
import signal, sys, threading
if "nohup" in sys.argv:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
from hiveminer.runtime.signals import Signals
taken = Signals(threading.Event())
taken.take()
print("ready", flush=True)
taken.stopping.wait(600)
print("stopped in order", flush=True)
taken.give_back()
"""


@pytest.mark.parametrize(
    ("words", "signals"),
    # The second signal would end the program at once.
    [([], [signal.SIGHUP]), (["nohup"], [signal.SIGHUP, signal.SIGTERM])],
    ids=["terminal", "nohup"],
)
def test_a_closed_terminal_stops_in_order_unless_it_is_ignored(
    tmp_path: Path, words: list[str], signals: list[int]
) -> None:
    with started(STOPS, *words, folder=tmp_path) as program:
        program.says("ready")
        for number in signals:
            program.process.send_signal(number)
        assert program.process.wait(60) == 0
        assert "stopped in order" in program.words


# --- the log for machines ------------------------------------------------------------------------

SPEAKS = """
import ctypes, logging, os, subprocess, sys, threading, warnings
from hiveminer.config.settings import MinerSettings
from hiveminer.runtime.logs import configure_logging
from hiveminer.runtime.program import script

configure_logging(MinerSettings(logging={"format": "json"}), "miner-0")
print("from print")
print("from stderr", file=sys.stderr)
warnings.warn("from warnings")
handler = logging.StreamHandler()
library = logging.getLogger("library")
library.addHandler(handler)
library.propagate = False
library.warning("from a library's own handler")
library.warning("%s", '{"torn')
os.write(2, b"from C\\r50%\\r100%\\n")
subprocess.run(["sh", "-c", "echo from a child"])
thread = threading.Thread(target=lambda: 1 / 0)
thread.start()
thread.join()
if sys.argv[1] == "bug":
    raise RuntimeError("from nobody")
from hiveminer.errors import OperatorError
with script():
    raise OperatorError("from the operator")
"""


@pytest.mark.parametrize(
    ("how", "last"), [("bug", "from nobody"), ("mistake", "from the operator")]
)
def test_every_line_is_json_whoever_writes_it(tmp_path: Path, how: str, last: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SPEAKS, how],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == {"bug": 1, "mistake": 2}[how]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert {line["neuron"] for line in lines} == {"miner-0"}
    messages = [line["message"] for line in lines]
    for words in ("print", "stderr", "a library's own handler", "C", "a child"):
        assert f"from {words}" in messages
    assert "50%" in messages
    assert any("from warnings" in message for message in messages)
    assert any("ZeroDivisionError" in line.get("error", "") for line in lines)
    assert last in messages


def test_json_passes_the_filter_unchanged() -> None:
    line = '{"message":  "already"}'
    assert json_filter.as_json(line, "miner-0") == line
    for other in ("[1]", "12", "{", "[" * 100_000):
        assert json.loads(json_filter.as_json(other, "miner-0"))["message"] == other


# --- temporary files and descriptors -------------------------------------------------------------


def test_a_temporary_folder_that_cannot_be_used_is_one_line(tmp_path: Path) -> None:
    assert machine.check_temporary_folder({"TMPDIR": "/tmp"}) == Path("/tmp")
    assert machine.check_temporary_folder({"TMPDIR": ""}) == Path("/tmp")
    with pytest.raises(OperatorError, match=r"none \(TMP\) does not exist"):
        machine.check_temporary_folder({"TMP": str(tmp_path / "none")})
    long = tmp_path / ("a" * 90)
    long.mkdir()
    with pytest.raises(OperatorError, match=r"\(TMPDIR\) has a path longer than .* set TMPDIR to"):
        machine.check_temporary_folder({"TMPDIR": str(long)})


def test_a_program_refuses_a_temporary_folder_that_is_not_there(tmp_path: Path) -> None:
    env = {"TMPDIR": str(tmp_path / "none"), "HIVEMINER_SUBTENSOR__PATH": str(tmp_path / "net")}
    with Program(["-m", "hiveminer", "miner"], folder=tmp_path / "run", env=env) as program:
        assert program.process.wait(60) == 2
        assert program.words.splitlines()[-1].startswith("hiveminer: the temporary folder ")
        assert "Traceback" not in program.words


def test_too_few_descriptors_are_one_line_and_more_are_taken_where_allowed() -> None:
    code = (
        "from hiveminer.runtime import machine, program\n"
        "with program.script():\n"
        "    print(machine.check_descriptors())\n"
    )

    def limited(soft: int, hard: int) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=60,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard)),
        )  # fmt: skip

    few = limited(64, 64)
    assert few.returncode == 2
    assert few.stderr.startswith("hiveminer: only 64 files and sockets may be open")
    assert limited(64, 1024).stdout == "1024\n"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_memory_that_was_freed_is_returned() -> None:
    code = (
        "import psutil\n"
        "from hiveminer.runtime import machine\n"
        "memory = psutil.Process().memory_info\n"
        "held = [bytearray(60_000) for _ in range(1000)]\n"
        "del held[::2]\n"
        "before = memory().rss\n"
        "machine.return_free_memory()\n"
        "print(before - memory().rss)\n"
    )
    assert printed(code) > 20e6


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_a_thread_that_trains_keeps_the_memory_of_its_last_step() -> None:
    code = (
        "import resource, threading\n"
        "from hiveminer.runtime import machine\n"
        "machine.keep_freed_memory()\n"
        "def step():\n"
        "    return [b'x' * 2**22 for _ in range(12)]\n"
        "def train():\n"
        "    step(), step()\n"
        "    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt\n"
        "    step()\n"
        "    print(resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before)\n"
        "threading.Thread(target=train).start()\n"
    )
    assert printed(code) < 1000  # of 12,288 pages
