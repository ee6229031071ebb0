"""A restart loses nothing: the same numbers go on, in an optimizer and in a whole miner."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from steps import by_hand
from talk import Talk, caller, talking

from hiveminer.chain import Chain, join_embedded
from hiveminer.strategies.hivemind.state import weights_by_name
from hiveminer.training.checkpoint import STATE, STATE_FOLDER, Checkpoint, newest
from hiveminer.training.data import builtin_rows
from hiveminer.training.model import builtin_model, builtin_tokenizer, encode
from programs import Network, Program, descendants_gone, started

T = TypeVar("T")

SAME = '''
import os, sys, time, traceback
from pathlib import Path
import torch
from hiveminer.training.checkpoint import Checkpoints
from hiveminer.training.data import builtin_rows
from hiveminer.training.model import builtin_model, builtin_tokenizer, encode
from hiveminer.config.run import Run
from hiveminer.strategies.hivemind.strategy import HivemindStrategy
from hiveminer.swarm.peer import Peer
from hiveminer.swarm.membership import Membership
from identities import who

torch.set_num_threads(1)
TARGET = 1000
run = Run.model_validate({
    "swarm": {"epoch_samples": TARGET},
    "optimizer": {"warmup_epochs": 6, "schedule": "cosine", "total_epochs": 9},
})
tokenizer, rows = builtin_tokenizer(), builtin_rows()

class Machine:
    """A peer from its start to its end."""

    def __init__(self):
        self.model, member = builtin_model(), Membership(Peer(identity=who("Alice")))
        self.swarm = HivemindStrategy(self.model, membership=member, run=run, run_id="r-1-2-3")
        self.kept = Checkpoints(Path(sys.argv[1]))

    def train(self, steps):
        """Each step: its number, and as how many rows it counts."""
        for number, counts in steps:
            texts = rows.texts(range(4 * number, 4 * number + 4))
            ids = encode(tokenizer, texts, max_length=32)["input_ids"]
            self.model(input_ids=ids, labels=ids).loss.backward()
            epoch, deadline = self.swarm.epoch, time.monotonic() + 20
            assert self.swarm.step(batch_size=counts)
            self.swarm.zero_grad()
            # A look at the DHT within the step may have missed its rows; then the next
            # moment turns the epoch, and changes no weight.
            while counts == TARGET and self.swarm.epoch == epoch:
                assert time.monotonic() < deadline
                self.swarm.idle()

    def state(self):
        """Every number that training goes on from."""
        tensors, facts = self.swarm.state_dict()
        return {name: value.numpy().tobytes() for name, value in tensors.items()}, facts

BEFORE = [(0, TARGET), (1, 4), (2, TARGET), (3, TARGET), (4, 4), (5, 4)]
AFTER = [(6, 4), (7, TARGET), (8, 4), (9, 4), (10, TARGET), (11, 4)]

def main():
    first = Machine()
    first.train(BEFORE)
    assert first.kept.save(*first.swarm.state_dict())
    saved = first.state()
    assert (saved[1]["epoch"], saved[1]["rows"]) == (3, 8), saved[1]
    first.train(AFTER)
    expected = first.state()
    first.swarm.close()

    second = Machine()
    found = second.kept.load()
    untouched = second.state()

    def refused(tensors, facts):
        try:
            second.swarm.load_state_dict(tensors, facts)
        except ValueError as error:
            assert "\\n" not in str(error)
            assert second.state() == untouched  # nothing was changed
            return
        raise AssertionError("it was taken")

    for name in ("weights.0", "moments.3.exp_avg", "moments.0.step"):
        refused({key: value for key, value in found.tensors.items() if key != name}, found.metadata)
    refused(found.tensors | {"weights.99": torch.zeros(1)}, found.metadata)
    refused(found.tensors | {"weights.0": torch.zeros(1)}, found.metadata)
    refused(found.tensors | {"weights.0": found.tensors["weights.0"].double()}, found.metadata)
    refused(found.tensors | {"start.1": torch.zeros(1)}, found.metadata)
    for wrong in ({"epoch": -1}, {"epoch": "3"}, {"rows": 2**60}, {"rows": None}, {"schedule": 1}):
        refused(found.tensors, found.metadata | wrong)
    for wrong in ({"rates": [0.1]}, {"rates": "ab"}, {"steps": True}):
        refused(found.tensors, found.metadata | {"schedule": found.metadata["schedule"] | wrong})

    second.swarm.load_state_dict(found.tensors, found.metadata)
    assert second.state() == saved
    assert second.swarm.optimizer.local_progress.epoch == 3
    assert second.swarm.optimizer.tracker.global_progress.samples_accumulated == 8
    assert second.swarm.optimizer.tracker.performance_ema.num_updates == 0
    # A joiner is given the weights that the epoch began with.
    averager = second.swarm.optimizer.state_averager
    metadata, given, _ = averager.get_current_state()
    assert metadata["epoch"] == 3
    with averager.get_tensors() as start:
        assert all(torch.equal(a, b) for a, b in zip(given, start))
    assert not torch.equal(given[0], averager.main_parameters[0])
    second.train(AFTER)
    assert second.state() == expected, (second.state()[1], expected[1])
    assert expected[1]["schedule"]["rates"] != saved[1]["schedule"]["rates"]
    # Where an epoch has just begun, its start is not kept twice.
    second.train([(12, TARGET)])
    tensors, facts = second.swarm.state_dict()
    assert facts["rows"] == 0 and not any(name.startswith("start.") for name in tensors)
    second.swarm.close()
    print("the same", flush=True)

try:
    main()
except BaseException:
    traceback.print_exc()
    os._exit(1)  # hivemind's threads would keep it up
'''

RUN = """
[model]
sequence_length = 32
[limits]
rows = 4096
[swarm]
epoch_samples = 1000000
"""


@pytest.mark.timeout(180)
def test_training_on_after_a_restart_gives_the_same_bits(tmp_path: Path) -> None:
    with started(SAME, str(tmp_path / "kept"), folder=tmp_path / "same") as same:
        told = same.says("the same", seconds=150)
        assert same.process.wait(60) == 0, told


# --- a whole miner ----------------------------------------------------------------------------

LAST_ROWS = [7, 8, 9, 10]


async def next_loss(talk: Talk, name: str) -> float:
    """The loss of LAST_ROWS with the weights that the miner has; it then trains them."""
    answer = await talk.ask(request_id=name, dataset_indices=LAST_ROWS, batch_size=len(LAST_ROWS))
    (loss,) = answer.losses
    return loss


def talk_to(program: Program, chain: Chain, what: Callable[[Talk], Coroutine[Any, Any, T]]) -> T:
    """Do something with a miner that serves already."""

    async def talked() -> T:
        async with talking(chain, program) as talk:
            return await what(talk)

    return asyncio.run(talked())


def kept_by(network: Network) -> Checkpoint:
    """The newest sound checkpoint of a network's miner."""
    (folder,) = (network.folder / "state").glob(f"*/*/*/{STATE_FOLDER}")
    found = newest(folder)
    assert found is not None
    return found


def loss_of(tensors: dict[str, torch.Tensor]) -> float:
    """The loss of LAST_ROWS with a checkpoint's weights, measured apart from any miner."""
    model, tokenizer = builtin_model(), builtin_tokenizer()
    if tensors:
        model.load_state_dict(weights_by_name(model, tensors), strict=False)
    texts = builtin_rows().texts(LAST_ROWS)
    rows = [encode(tokenizer, [text], max_length=32)["input_ids"][0].tolist() for text in texts]
    return by_hand(model, rows)


async def _begin_a_long_request(talk: Talk) -> None:
    """Train some rows; then leave a miner alone that trains many, with more to come."""
    answer = await talk.ask(request_id="first", dataset_indices=list(range(100, 420)), batch_size=8)
    assert answer.samples == 320
    long, after = (
        asyncio.create_task(
            talk.ask(request_id=name, dataset_indices=list(range(*rows)), batch_size=8)
        )
        for name, rows in (("long", (1000, 5000)), ("after", (5000, 5100)))
    )
    deadline = time.monotonic() + 30
    while (await talk.is_alive()).queued != 1:  # the one is running, and the other waits
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)
    for task in (long, after):
        task.cancel()
    await asyncio.gather(long, after, return_exceptions=True)


@pytest.mark.timeout(400)
def test_a_miner_goes_on_where_it_was(tmp_path: Path) -> None:
    """SIGTERM in mid epoch and mid request, a torn checkpoint, kill -9, and a start anew."""
    with Network(tmp_path, run=RUN) as network, caller(tmp_path / "network") as chain:

        def start(name: str, *flags: str) -> Program:
            program = network.start(name, *flags)
            program.says("serving on", seconds=90)
            return program

        def end(program: Program) -> None:
            family = program.family()
            program.process.send_signal(signal.SIGTERM)
            assert program.process.wait(60) == 0, program.words
            descendants_gone(family, seconds=60)
            assert "Traceback" not in program.words, program.words

        first = start("miner-0")
        join_embedded(chain, stake_tao=10_000)
        talk_to(first, chain, _begin_a_long_request)
        end(first)
        found = kept_by(network)
        rows = sum(line["samples"] for line in network.numbers("train"))
        assert 320 <= rows < 4320  # in the middle of the long request, at a batch's edge
        assert found.metadata["trained"]["rows"] == found.metadata["swarm"]["rows"] == rows
        assert found.metadata["swarm"]["epoch"] == 0
        words = f"epoch 0 with {rows} rows of it, {rows} rows in all"
        assert f"kept {words}, in {found.name}" in first.words
        learned, untrained = loss_of(found.tensors), loss_of({})
        assert learned < untrained - 0.5
        loss = pytest.approx(learned, rel=1e-5)

        second = start("miner-0-again")
        assert f"resumed {words}, from {found.name}" in second.words
        assert talk_to(second, chain, lambda talk: next_loss(talk, "second")) == loss
        end(second)
        torn = kept_by(network)
        assert torn.name != found.name
        assert torn.metadata["trained"]["rows"] == rows + len(LAST_ROWS)
        (path,) = (network.folder / "state").glob(f"*/*/*/*/{torn.name}/{STATE}")
        path.write_bytes(path.read_bytes()[:-100])

        third = start("miner-0-after-all")
        assert f"{torn.name} is refused: {STATE} has" in third.words
        assert f"resumed {words}, from {found.name}" in third.words
        assert talk_to(third, chain, lambda talk: next_loss(talk, "third")) == loss
        family = third.family()
        third.process.kill()
        descendants_gone(family, seconds=60)

        fourth = start("miner-0-anew", "--no-neuron.resume")
        assert "resumed" not in fourth.words
        assert talk_to(fourth, chain, lambda talk: next_loss(talk, "fourth")) == pytest.approx(
            untrained, rel=1e-5
        )
        end(fourth)
        assert kept_by(network).metadata["trained"]["rows"] == len(LAST_ROWS)
