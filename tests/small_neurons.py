"""Neurons without a swarm, in this process: a miner's life and a validator's keys, in
milliseconds. What they stand on (settings, chain, axon) is the real thing."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import string
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import pytest
from in_process import Hub
from tiny import save_tiny

from hiveminer.base_miner import BaseMinerNeuron
from hiveminer.chain import Chain
from hiveminer.config.settings import MinerSettings, Settings, ValidatorSettings
from hiveminer.errors import HiveminerError, MinerError
from hiveminer.miner import Miner
from hiveminer.protocol import IsAlive, Train
from hiveminer.rpc.dendrite import Dendrite, Endpoint
from hiveminer.runtime.metrics import Metrics
from hiveminer.strategies.base import StrategyFactory
from hiveminer.validator import Validator
from programs import wait_for

S = TypeVar("S", bound=Settings)


def miner_settings(folder: Path, **groups: Any) -> MinerSettings:
    """Settings whose every folder lies in `folder`, with any free ports."""
    return settings_in(folder, MinerSettings, axon={"port": 0} | groups.pop("axon", {}), **groups)


def settings_in(folder: Path, cls: type[S], **groups: Any) -> S:
    """The same for any kind of neuron."""
    given: dict[str, Any] = {
        "subtensor": {"path": folder / "network", "block_seconds": 0.05},
        "neuron": {"path": folder / "state"},
        "dht": {"port": 0},
        "wallet": {"path": folder / "wallets"},
    }
    for name, values in groups.items():
        given[name] = given.get(name, {}) | values if isinstance(values, dict) else values
    return cls(**given)


def small_run(folder: Path, toml: str = "", *, rows: int = 400) -> Path:
    """A run.toml of a tiny model and a few rows of text, made in this folder."""
    save_tiny("llama", folder / "model")
    draw = random.Random(3)
    words = [draw.choices(string.ascii_lowercase, k=draw.randint(2, 9)) for _ in range(200)]
    lines = (
        " ".join("".join(draw.choice(words)) for _ in range(draw.randint(4, 12)))
        for _ in range(rows)
    )
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": x}) + "\n" for x in lines))
    path = folder / "run.toml"
    path.write_text(
        f'[model]\nname = "{folder / "model"}"\nsequence_length = 64\n'
        f'[data]\nname = "{folder / "rows.jsonl"}"\n{toml}'
    )
    return path


class Recorded:
    """Metrics that a test reads."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, dict[str, Any]]] = []
        self.closed = False

    def log(self, kind: str, fields: Mapping[str, Any]) -> None:
        self.lines.append((kind, dict(fields)))

    def close(self) -> None:
        self.closed = True

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [fields for name, fields in list(self.lines) if name == kind]


@contextlib.contextmanager
def small_validator(
    folder: Path,
    *,
    cls: type[Validator] = Validator,
    metrics: Metrics | None = None,
    chain: Chain | None = None,
    **groups: Any,
) -> Iterator[Validator]:
    """A validator of a small run, which observes a swarm of nobody."""
    groups["neuron"] = {"run": small_run(folder, rows=60)} | groups.get("neuron", {})
    settings = settings_in(folder, ValidatorSettings, **groups)
    with cls(settings, chain=chain, metrics=metrics, observer=Hub().observer) as validator:
        yield validator


@contextlib.contextmanager
def miner_alone(
    folder: Path, *, toml: str = "", strategy: StrategyFactory | None = None
) -> Iterator[Miner]:
    """A whole miner of a small run, in a swarm of its own within this process."""
    settings = miner_settings(folder, neuron={"run": small_run(folder, toml, rows=60)})
    with Miner(settings, strategy=strategy or Hub().strategy) as miner:
        yield miner


class SmallMiner(BaseMinerNeuron):
    """Answers, and trains nothing."""

    peer = ""

    def is_alive(self, synapse: IsAlive) -> IsAlive:
        synapse.completion = not self.neuron.stopping.is_set()
        synapse.epoch = 7
        synapse.peer = self.peer
        return synapse

    def forward(self, synapse: Train) -> Train:
        return synapse


class Running:
    """A small miner in a thread of its own, and what it ended with."""

    def __init__(self, miner: SmallMiner):
        self.miner = miner
        self.error: HiveminerError | None = None
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.miner.run()
        except HiveminerError as error:
            self.error = error

    def endpoint(self) -> Endpoint:
        axon = wait_for(lambda: self.miner.axon, seconds=60, about="the axon")
        assert axon is not None
        return Endpoint(self.miner.neuron.hotkey, "127.0.0.1", axon.port)

    def alive(self, wallet: Any) -> bool:
        """Ask it, as a validator does; False as well when it refuses."""

        async def ask() -> bool:
            async with Dendrite(wallet) as dendrite:
                with contextlib.suppress(MinerError):
                    call = dendrite.call(self.endpoint(), IsAlive(), timeout_seconds=5)
                    return (await call).completion
            return False

        return asyncio.run(ask())


@contextlib.contextmanager
def running(settings: MinerSettings, chain: Chain | None = None) -> Iterator[Running]:
    """A small miner that serves until the block ends."""
    with SmallMiner(settings, chain=chain) as miner:
        program = Running(miner)
        try:
            yield program
        finally:
            miner.neuron.stopping.set()
            program.thread.join(60)
            assert not program.thread.is_alive()


def told(caplog: pytest.LogCaptureFixture, event: str) -> list[str]:
    """The messages of this event so far."""
    found = [r for r in caplog.records if getattr(r, "event", None) == event]
    return [record.getMessage() for record in found]
