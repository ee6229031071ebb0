"""A Train's own deadline, from the signed request to the signed answer, with a real model."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import torch
from serving import MINER, VALIDATOR, serving, ss58

from hiveminer.protocol import Train
from hiveminer.rpc.dendrite import Dendrite, Endpoint
from hiveminer.training import model
from hiveminer.training.trainer import LocalStep, Trainer

ROWS = 1024
DEADLINE_SECONDS = 3.0


class RealTraining:
    """Trains the built-in model for a request."""

    def __init__(self) -> None:
        self.tokenizer = model.load_tokenizer()
        network = model.load_model()
        optimizer = LocalStep(torch.optim.SGD(network.parameters(), lr=1e-3))
        self.trainer = Trainer(network, encode=self.encode, optimizer=optimizer)

    def encode(self, texts: Sequence[str]) -> dict[str, torch.Tensor]:
        encoded = model.encode(self.tokenizer, texts, max_length=512)
        return {key: encoded[key] for key in ("input_ids", "attention_mask")}

    def forward(self, synapse: Train) -> Train:
        result = self.trainer.train(
            ["for row in rows: print(row)\n" * 16] * len(synapse.dataset_indices),
            batch_size=synapse.batch_size,
            timeout_seconds=synapse.timeout_seconds,
        )
        synapse.loss, synapse.steps, synapse.samples = result.loss, result.steps, result.samples
        return synapse


def test_training_stops_at_its_deadline_and_answers_with_whole_batches() -> None:
    request = Train(
        request_id="late",
        run_id="run",
        data_hash="data",
        dataset_indices=list(range(ROWS)),
        batch_size=2,
        timeout_seconds=DEADLINE_SECONDS,
    )

    async def call(port: int) -> Train:
        endpoint = Endpoint(ss58(MINER), "127.0.0.1", port)
        async with Dendrite(VALIDATOR) as dendrite:
            return await dendrite.call(endpoint, request, timeout_seconds=60)

    with serving(train={"forward": RealTraining().forward}) as served:
        answer = asyncio.run(call(served.axon.port))
    assert answer.loss is not None
    assert answer.samples == 2 * answer.steps
    assert 0 < answer.samples < ROWS
