"""Checks of the run, the memory, the model and its data, and the peers to train with."""

from __future__ import annotations

import concurrent.futures
import socket
from collections.abc import Iterable, Mapping

from hiveminer.commands.checks.base import Check, Checks, failed, gigabytes, passed, warned
from hiveminer.config.run import load_run

PEER_SECONDS = 3.0
MAX_PEERS = 64

USUAL_ROWS = 4
"""A validator's batch, unless it says otherwise."""


class TrainingChecks(Checks):
    """Can this machine train the run's model, and with whom?"""

    def run_file(self) -> Check:
        self._run = load_run(self.settings.neuron.run)
        self._run.check_version()
        place = self.settings.neuron.run or "built in"
        return passed(f"{self._run.name} ({place}), hash {self._run.hash[:8]}")

    def memory(self) -> Check:
        """Device, and memory for this model: one row at a time, and a batch as usual."""
        if self._run is None:
            return failed("not known without the run", "put the run right first")
        from hiveminer.swarm.processes import shared_memory_problem
        from hiveminer.training.memory import memory_left, memory_needed
        from hiveminer.training.model import choose_device, shape_of_model

        named = self._run.model
        built = shape_of_model(named.name, revision=named.revision)
        device = choose_device(self.settings.neuron.device)
        free = memory_left(device)
        needed = memory_needed(built, sequence_length=self._run.model.sequence_length)
        least = needed.training + (0 if device.type == "cuda" else needed.host)
        usual = least + (USUAL_ROWS - 1) * needed.activations
        said = (
            f"{device}, {gigabytes(free)} free; {needed.parameters / 1e6:.1f}M parameters take "
            f"{gigabytes(least)} at least, {gigabytes(usual)} with {USUAL_ROWS} rows at a time"
        )
        self._fits = least <= free
        if not self._fits:
            return failed(said, "use a device with more memory, or a smaller model in run.toml")
        if problem := shared_memory_problem(needed.parameters):
            return failed(problem, "give the container more shared memory: --shm-size")
        if usual > free:
            return warned(said, "it trains, in smaller pieces and slower")
        return passed(said)

    def task(self) -> Check:
        """Everything that a program loads at its start, checked as it does."""
        if self._run is None:
            return failed("not known without the run", "put the run right first")
        if not self._fits:
            return failed("not known without the memory to load it", "put the memory right first")
        from hiveminer.training.model import REPORTED_SHARE
        from hiveminer.training.task import load_task

        task = load_task(self._run)
        self._run_id = task.run_id
        compared = "as the run wants it" if self._run.data.hash else "the run names none"
        found = (
            f"model {self._run.model.name}; data {self._run.data.name}: {len(task.dataset)} rows, "
            f"hash {task.dataset.hash[:8]} ({compared})"
        )
        if task.beyond >= REPORTED_SHARE:
            return warned(
                f"{found}; about {task.beyond:.0%} of it is beyond the sequence length and never "
                "trained",
                "cut its rows into shorter ones, or raise model.sequence_length in run.toml",
            )
        return passed(found)

    def peers(self) -> Check:
        """Do the known peers answer, and is the run that validators commit ours?"""
        known = list(self.settings.dht.initial_peers)
        commitments: Mapping[str, bytes] = {}
        if self._chain is not None and self._metagraph is not None:
            commitments = self._chain.commitments(self._metagraph)
            own = self._chain.hotkey
            said = (
                text.decode(errors="replace") for who, text in commitments.items() if who != own
            )
            known = known or [text.split()[0] for text in said if text.startswith("/")]
        other = self._other_run(commitments)
        if other:
            return failed(other, "get the subnet's run.toml and data: --neuron.run")
        if not known:
            return passed("none yet; this miner would be the first")
        answered = sum(answers(known[:MAX_PEERS]))
        said_so = f"{answered} of {min(len(known), MAX_PEERS)} take a connection"
        if answered:
            return passed(said_so)
        cure = "their ports may be closed to you; a miner starts alone and tries again"
        return (failed if self.settings.dht.initial_peers else warned)(said_so, cure)

    def _other_run(self, commitments: Mapping[str, bytes]) -> str | None:
        """How our run differs from every one that a validator has committed, if it does."""
        if self._run_id is None or self._metagraph is None:
            return None
        permitted = {n.hotkey for n in self._metagraph if n.validator_permit}
        runs = [
            text.decode(errors="replace").removeprefix("run ")
            for who, text in commitments.items()
            if who in permitted and text.startswith(b"run ")
        ]
        differences = [self._run_id.difference(run) for run in runs]
        return differences[0] if differences and None not in differences else None


def answers(peers: Iterable[str]) -> list[bool]:
    """Which of these multiaddresses take a TCP connection; all are tried at once."""
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        return list(pool.map(_answers, peers))


def _answers(peer: str) -> bool:
    parts = peer.split("/")
    try:
        host, port = parts[2], int(parts[parts.index("tcp") + 1])
        with socket.create_connection((host, port), timeout=PEER_SECONDS):
            return True
    except (OSError, ValueError, IndexError, OverflowError):
        return False
