"""The end of a program has a deadline, and may be allowed more."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from programs import started

HANGS = """
import logging, sys, threading
from hiveminer.runtime import signals

logging.basicConfig(level=logging.INFO)
signals.SHUTDOWN_SECONDS = float(sys.argv[1])
taken = signals.Signals(threading.Event())
taken.take()
print("ready", flush=True)
taken.stopping.wait(600)
if len(sys.argv) > 2:
    taken.allow(float(sys.argv[2]))
threading.Event().wait(600)
"""


@pytest.mark.parametrize(
    ("allowed", "seconds"), [(["0.5"], 0.5), (["1.5", "3"], 3.0), (["0.5", "0.1"], 0.5)]
)
def test_a_program_that_hangs_ends_at_its_deadline(
    tmp_path: Path, allowed: list[str], seconds: float
) -> None:
    with started(HANGS, *allowed, folder=tmp_path) as program:
        program.says("ready")
        began = time.monotonic()
        program.process.send_signal(signal.SIGTERM)
        assert program.process.wait(60) == 128 + signal.SIGTERM
        assert time.monotonic() - began >= seconds
        assert "still not stopped after" in program.words


def test_a_second_signal_ends_it_however_much_was_allowed(tmp_path: Path) -> None:
    with started(HANGS, "60", "100", folder=tmp_path) as program:
        program.says("ready")
        program.process.send_signal(signal.SIGTERM)
        program.says("stopping (SIGTERM)")
        time.sleep(0.3)  # what counts as a second one, not the same twice
        program.process.send_signal(signal.SIGINT)
        assert program.process.wait(60) == 128 + signal.SIGINT
