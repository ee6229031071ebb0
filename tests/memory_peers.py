"""Miners and a validator that go through rounds together, without a network or a clock."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from memory_network import MemoryExchange, MemoryMembership, Network, NetworkView, Swarm
from tiny import VOCABULARY, tiny_model
from transformers import PreTrainedModel

from hiveminer.config.run import OptimizerSection, Run, SparselocoSection
from hiveminer.strategies.base import RoundResult
from hiveminer.strategies.sparseloco.log import Log
from hiveminer.strategies.sparseloco.observer import SparselocoObserver
from hiveminer.strategies.sparseloco.parts import Parts
from hiveminer.strategies.sparseloco.plan import Plan
from hiveminer.strategies.sparseloco.rounds import Neuron
from hiveminer.strategies.sparseloco.shelf import Shelf
from hiveminer.strategies.sparseloco.strategy import SparselocoStrategy

SECTION = SparselocoSection(
    round_blocks=15, mark_blocks=7, cut_blocks=2, density=0.25, bits=2, contributor_power=0.5
)
OPTIMIZER = OptimizerSection(learning_rate=0.01)
RUN = Run(strategy="sparseloco", sparseloco=SECTION)
RUN_ID = f"{RUN.name}-{RUN.hash[:12]}-b-c"


def key(uid: int) -> bytes:
    return bytes([uid + 1]) * 32


def tiny_llama() -> PreTrainedModel:
    return tiny_model("llama", layers=1)  # each tensor costs time, however small


class Peers:
    """Three miners and a validator. A block is one look of everybody, and a step of each miner."""

    def __init__(
        self,
        folder: Path,
        *,
        miners: int = 3,
        optimizer: OptimizerSection = OPTIMIZER,
        model: Callable[[], PreTrainedModel] = tiny_llama,
    ):
        self.folder = folder
        self.optimizer = optimizer
        self.model = model
        self.validator_uid, self.is_validating = 9, True
        neurons = [Neuron(uid, key(uid), False, 0, 0) for uid in range(6)]
        neurons.append(Neuron(self.validator_uid, key(self.validator_uid), True, 100, 0))
        self.network, self.swarm = Network(tuple(neurons)), Swarm()
        self.rounds: list[tuple[int, RoundResult]] = []
        self.views: dict[int, NetworkView] = {}
        self.miners: dict[int, SparselocoStrategy] = {}
        self.rows = torch.Generator().manual_seed(0)
        for uid in range(miners):
            self.start(uid)
        self.validator = SparselocoObserver(self.model(), self.parts(self.validator_uid))

    def parts(self, uid: int) -> Parts:
        model = self.model()
        plan = Plan.of(SECTION, run_id=RUN_ID, model=model)
        log = Log(self.folder / str(uid))
        log.begin(plan, run_id=RUN_ID)
        shelf = self.swarm.sources[key(uid)] = Shelf(log)
        view = self.views[uid] = NetworkView(self.network, key(uid))
        return Parts(
            section=self.optimizer, plan=plan, hotkey=key(uid), chain=view,
            membership=MemoryMembership(), exchange=MemoryExchange(self.swarm),
            log=log, shelf=shelf,
        )  # fmt: skip

    def start(self, uid: int) -> SparselocoStrategy:
        def on_round(ended: RoundResult) -> None:
            self.rounds.append((uid, ended))

        strategy = SparselocoStrategy(self.model(), self.parts(uid), on_round=on_round)
        self.miners[uid] = strategy
        return strategy

    def stop(self, uid: int) -> SparselocoStrategy:
        """As kill -9: nothing is saved, and nothing is served any more."""
        del self.swarm.sources[key(uid)]
        return self.miners.pop(uid)

    def look(self) -> None:
        validators = [self.validator] if self.is_validating else []
        for peer in (*self.miners.values(), *validators):
            if not self.network.down:
                peer.follower.follow()

    def block(self, count: int = 1, *, training: bool = True) -> None:
        for _ in range(count):
            self.network.advance()
            self.look()
            for miner in self.miners.values():
                if training:
                    self.train(miner)
                else:
                    miner.idle()

    def train(self, miner: SparselocoStrategy) -> bool:
        miner.zero_grad()
        first = torch.randint(2, VOCABULARY - 4, (4, 1), generator=self.rows)
        tokens = first + torch.arange(4)  # each token follows from the one before
        torch.autograd.backward(miner.model(input_ids=tokens, labels=tokens).loss)
        return miner.step(batch_size=4)

    def round(self, count: int = 1) -> None:
        """With training in every third block."""
        for number in range(count * SECTION.round_blocks):
            self.block(training=number % 3 == 0)

    def short_round(self, count: int = 1) -> None:
        """With a single step of training in each."""
        for _ in range(count):
            self.block()
            self.block(SECTION.round_blocks - 1, training=False)

    def states(self) -> set[bytes | None]:
        peers = (*self.miners.values(), self.validator)
        return {peer.replica.position.newest for peer in peers}

    def loss(self) -> float:
        """Of the global state."""
        model = self.model()
        weights = self.validator.replica.state.weights
        with torch.no_grad():
            for name, value in weights.items():
                model.get_parameter(name).copy_(value)
            tokens = torch.arange(2, VOCABULARY - 4).unsqueeze(1) + torch.arange(4)
            return float(model(input_ids=tokens, labels=tokens).loss)
