"""A Train's own deadline, from the signed request to the signed answer, with a real model."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from types import SimpleNamespace

import pytest
import torch
from bittensor.keyfiles import Keypair

from hiveminer.protocol import Train
from hiveminer.rpc.axon import Axon
from hiveminer.rpc.blacklist import Standing
from hiveminer.rpc.dendrite import Dendrite, Endpoint
from hiveminer.rpc.queue import WorkQueue
from hiveminer.training import model
from hiveminer.training.trainer import LocalStep, Trainer

ROWS = 256
DEADLINE_SECONDS = 2.0


def wallet(name: str) -> SimpleNamespace:
    key = Keypair.create_from_uri(f"//{name}")
    return SimpleNamespace(hotkey=key, coldkey=key, coldkeypub=key)


def permitted(hotkey: str) -> Standing:
    return Standing(uid=0, registered=True, validator_permit=True, stake=1.0)


class Clocked:
    """Trains the built-in model for a request, and knows how long its batches took."""

    def __init__(self) -> None:
        self.tokenizer = model.load_tokenizer()
        network = model.load_model()
        optimizer = LocalStep(torch.optim.SGD(network.parameters(), lr=1e-3))
        self.trainer = Trainer(network, encode=self.encode, optimizer=optimizer)
        self.ends: list[float] = []

    def encode(self, texts: Sequence[str]) -> dict[str, torch.Tensor]:
        encoded = model.encode(self.tokenizer, texts, max_length=512)
        return {key: encoded[key] for key in ("input_ids", "attention_mask")}

    def forward(self, synapse: Train) -> Train:
        self.ends.append(time.monotonic())
        result = self.trainer.train(
            ["for row in rows: print(row)\n" * 16] * len(synapse.dataset_indices),
            batch_size=synapse.batch_size,
            timeout_seconds=synapse.timeout_seconds,
            on_step=lambda rows, loss: self.ends.append(time.monotonic()),
        )
        synapse.loss, synapse.steps, synapse.samples = result.loss, result.steps, result.samples
        return synapse

    @property
    def slowest_seconds(self) -> float:
        """The longest of the batches, or of the encoding and the first batch together."""
        return max(end - start for start, end in zip(self.ends, self.ends[1:], strict=False))


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_a_deadline_of_two_seconds_is_met_within_one_batch() -> None:
    miner, validator = wallet("Alice"), wallet("Bob")
    clocked, queue = Clocked(), WorkQueue()
    queue.start()
    request = Train(
        request_id="late",
        run_id="run",
        data_hash="data",
        dataset_indices=list(range(ROWS)),
        batch_size=8,
        timeout_seconds=DEADLINE_SECONDS,
    )

    async def call(port: int) -> Train:
        endpoint = Endpoint(miner.hotkey.ss58_address, "127.0.0.1", port)
        async with Dendrite(validator) as dendrite:
            return await dendrite.call(endpoint, request, timeout_seconds=60)

    with Axon(miner, standing=permitted).attach(clocked.forward, queue=queue) as axon:
        began = time.monotonic()
        answer = asyncio.run(call(axon.port))
        seconds = time.monotonic() - began
    queue.stop(5)
    assert answer.loss is not None
    assert answer.samples == 8 * answer.steps
    assert 0 < answer.samples < ROWS
    trained_seconds = clocked.ends[-1] - clocked.ends[0]
    assert trained_seconds <= DEADLINE_SECONDS + clocked.slowest_seconds
    # What is left are the way there and back.
    assert seconds <= trained_seconds + clocked.slowest_seconds + 2.0
