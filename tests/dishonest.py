"""Miners that do not do the work, and one that does; `python dishonest.py KIND ...flags`."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

from hiveminer import Miner, Train
from hiveminer.training.trainer import TrainResult


class Posting(Miner):
    """Has a board, on which one of them writes and another reads."""

    def __init__(self, *given: Any, board: Path, **options: Any):
        self.board = board
        super().__init__(*given, **options)


class Honest(Posting):
    """Does the work, and lets a friend read its answers."""

    def forward(self, synapse: Train) -> Train:
        answer = super().forward(synapse)
        draft = self.board.with_suffix(".draft")
        draft.write_text(json.dumps(answer.losses))
        draft.replace(self.board)
        return answer


class ForwardOnly(Posting):
    """Measures the loss with the swarm's weights, and never trains: it loads the average of
    the others before each request."""

    def train(self, synapse: Train) -> TrainResult:
        group = synapse.batch_size * synapse.gradient_accumulation_steps
        texts = self.dataset.texts(synapse.dataset_indices)
        result = self.trainer.evaluate(
            texts, batch_size=synapse.batch_size, global_batch_size=group
        )
        result.steps = synapse.epoch_steps = len(result.losses)
        return result


class Inventor(Posting):
    """Writes down a curve that looks right."""

    start = 4.0

    def train(self, synapse: Train) -> TrainResult:
        steps = -(-len(synapse.dataset_indices) // synapse.batch_size)
        self.start = max(2.8, self.start - 0.2)
        losses = [self.start - 0.01 * k + random.gauss(0, 0.1) for k in range(steps)]
        return _claim(synapse, losses)


class Copycat(Posting):
    """Answers with what another miner answered to other rows."""

    def train(self, synapse: Train) -> TrainResult:
        self.idle()
        losses = json.loads(self.board.read_text()) if self.board.exists() else [3.0]
        steps = -(-len(synapse.dataset_indices) // synapse.batch_size)
        return _claim(synapse, (losses * steps)[:steps])


def _claim(synapse: Train, losses: list[float]) -> TrainResult:
    synapse.epoch_steps = len(losses)
    return TrainResult(
        loss=sum(losses) / len(losses),
        losses=losses,
        steps=len(losses),
        samples=len(synapse.dataset_indices),
        tokens=256 * len(synapse.dataset_indices),
    )


KINDS = {kind.__name__.lower(): kind for kind in (Honest, ForwardOnly, Inventor, Copycat)}

if __name__ == "__main__":
    chosen = KINDS[sys.argv.pop(1)]
    with chosen(board=Path(sys.argv.pop(1))) as miner:
        miner.run()
