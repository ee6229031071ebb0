"""Doctor's checks of the run, the memory, the model and its data, and the bootstrap peers."""

from __future__ import annotations

import asyncio
import concurrent.futures
import socket
from collections.abc import Mapping

import torch

from hiveminer.commands.checks.base import Check, Examination, failed, gigabytes, passed, warned
from hiveminer.config.run import load_run
from hiveminer.errors import OperatorError
from hiveminer.protocol import IsAlive
from hiveminer.rpc.dendrite import endpoints_of, probe
from hiveminer.strategies.sparseloco.records import decode_mark, run_prefix
from hiveminer.training.memory import MemoryNeeded, memory_left, memory_needed
from hiveminer.training.model import REPORTED_SHARE, choose_device, shape_of_model
from hiveminer.training.task import load_task

MAX_PEERS = 64

USUAL_ROWS = 4
"""A validator's batch size by default."""


def run_file(exam: Examination) -> Check:
    exam.run = load_run(exam.settings.neuron.run)
    exam.run.check_version()
    place = exam.settings.neuron.run or "built in"
    return passed(f"{exam.run.name} ({place}), hash {exam.run.hash[:8]}")


def memory(exam: Examination) -> Check:
    """Whether the device has the memory for one row at a time, and for the usual batch."""
    if exam.run is None:
        return failed("unknown without the run", "fix the run first")
    from hiveminer.swarm.processes import require_shared_memory

    named = exam.run.model
    built = shape_of_model(named.name, revision=named.revision)
    device = choose_device(exam.settings.neuron.device)
    needed = memory_needed(built, sequence_length=exam.run.model.sequence_length)
    check = memory_check(needed, device, free=memory_left(device))
    exam.fits = check.verdict != "failed"
    try:
        if exam.fits:
            require_shared_memory(needed.parameters)
    except OperatorError as error:
        return failed(str(error), "give the container more shared memory: --shm-size")
    return check


def memory_check(needed: MemoryNeeded, device: torch.device, *, free: int) -> Check:
    least = needed.training + (0 if device.type == "cuda" else needed.host)
    usual = least + (USUAL_ROWS - 1) * needed.activations
    said = (
        f"{device}, {gigabytes(free)} free; {needed.parameters / 1e6:.1f}M parameters take "
        f"{gigabytes(least)} at least, {gigabytes(usual)} with {USUAL_ROWS} rows at a time"
    )
    if least > free:
        return failed(said, "use a device with more memory, or a smaller model in run.toml")
    if usual > free:
        return warned(said, "it trains with smaller micro-batches, and slower")
    return passed(said)


def task(exam: Examination) -> Check:
    """Load what a miner loads at its start."""
    if exam.run is None:
        return failed("unknown without the run", "fix the run first")
    if not exam.fits:
        return failed("unknown without the memory to load it", "fix the memory first")
    task = load_task(exam.run)
    exam.run_id = task.run_id
    compared = "as in the run" if exam.run.data.hash else "the run names none"
    found = (
        f"model {exam.run.model.name}; data {exam.run.data.name}: {len(task.dataset)} rows, "
        f"hash {task.dataset.hash[:8]} ({compared})"
    )
    if task.beyond >= REPORTED_SHARE:
        return warned(
            f"{found}; about {task.beyond:.0%} of it is beyond the sequence length and never "
            "trained",
            "cut its rows into shorter ones, or raise model.sequence_length in run.toml",
        )
    return passed(found)


def peers(exam: Examination) -> Check:
    """Whether a known peer accepts connections, and the validators' committed run is ours."""
    known = list(exam.settings.dht.initial_peers)
    commitments: Mapping[str, bytes] = {}
    if exam.chain is not None and exam.metagraph is not None:
        commitments = exam.chain.commitments(exam.metagraph)
        own = exam.chain.hotkey
        said = {who: text.decode(errors="replace") for who, text in commitments.items()}
        if exam.run is not None and exam.run.strategy == "sparseloco":  # records have the slot
            axons = asyncio.run(probe(exam.chain.wallet, endpoints_of(exam.metagraph)))
            said |= {who: each.peer for who, each in axons.items() if isinstance(each, IsAlive)}
        others = (text for who, text in said.items() if who != own)
        known = known or [text.split()[0] for text in others if text.startswith("/")]
    if other := _other_run(exam, commitments):
        return failed(other, "get the subnet's run.toml and data: --neuron.run")
    if not known:
        return passed("none yet; this miner would be the first")
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        answered = sum(pool.map(_answers, known[:MAX_PEERS]))
    said_so = f"{answered} of {min(len(known), MAX_PEERS)} take a connection"
    if answered:
        return passed(said_so)
    cure = "their ports may be closed to you; a miner starts alone and tries again"
    return (failed if exam.settings.dht.initial_peers else warned)(said_so, cure)


def _other_run(exam: Examination, commitments: Mapping[str, bytes]) -> str | None:
    """How our run differs from the committed runs of all validators, if it does."""
    if exam.run_id is None or exam.metagraph is None:
        return None
    permitted = {n.hotkey for n in exam.metagraph if n.validator_permit}
    runs = [
        text.decode(errors="replace").removeprefix("run ")
        for who, text in commitments.items()
        if who in permitted and text.startswith(b"run ")
    ]
    marks = [m for who, raw in commitments.items() if who in permitted and (m := decode_mark(raw))]
    if marks and run_prefix(str(exam.run_id)) not in {mark.run for mark in marks}:
        return f"validators mark the rounds of another run than {exam.run_id}"
    differences = [exam.run_id.difference(run) for run in runs]
    return differences[0] if differences and None not in differences else None


def _answers(peer: str) -> bool:
    """Whether this multiaddress accepts a TCP connection."""
    parts = peer.split("/")
    try:
        host, port = parts[2], int(parts[parts.index("tcp") + 1])
        with socket.create_connection((host, port), timeout=3.0):
            return True
    except (OSError, ValueError, IndexError, OverflowError):
        return False
