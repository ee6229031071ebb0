"""Ctrl-C while a copied miner.py or validator.py still imports its libraries."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import psutil
import pytest

from programs import ROOT, Program, wait_for


@pytest.mark.skipif(not hasattr(psutil.Process, "memory_maps"), reason="no memory maps")
@pytest.mark.parametrize("library", ["pydantic", "torch"])
@pytest.mark.parametrize("name", ["miner.py", "validator.py"])
def test_an_interrupt_during_the_imports_ends_in_one_line(
    tmp_path: Path, name: str, library: str
) -> None:
    shutil.copy(ROOT / name, tmp_path)
    program = Program([name], folder=tmp_path, fresh=True)
    try:
        process = psutil.Process(program.process.pid)

        def loads() -> bool:
            return any(f"/{library}" in each.path for each in process.memory_maps())

        wait_for(loads, seconds=60, about=f"{library} in the process")
        assert program.interrupt(seconds=60) == 128 + signal.SIGINT
        assert program.words == "hiveminer: interrupted while starting\n"
    finally:
        program.end()
