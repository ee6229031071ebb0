"""The miner: trains the rows that validators send, and averages with the other miners.

Customize it for a subnet in a subclass, for one machine with flags, and for a whole run in
`run.toml`.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable
from dataclasses import asdict

import torch
from transformers import BatchEncoding

from hiveminer.__version__ import __version__
from hiveminer.base_miner import BaseMinerNeuron
from hiveminer.chain import Chain
from hiveminer.config.flags import parse
from hiveminer.config.run import Run, load_run
from hiveminer.config.settings import MinerSettings
from hiveminer.errors import Refused, TrainingError
from hiveminer.protocol import IsAlive, Train
from hiveminer.runtime import machine
from hiveminer.runtime.events import tell
from hiveminer.runtime.metrics import Metrics, progress_bar
from hiveminer.runtime.program import script
from hiveminer.runtime.watchdog import watch
from hiveminer.strategies.base import Context, RoundResult, Strategy, StrategyFactory
from hiveminer.strategies.checkpointer import LAST_SECONDS, Progress
from hiveminer.strategies.registry import open_strategy
from hiveminer.training import model
from hiveminer.training.checkpoint import STATE_FOLDER, Checkpoints
from hiveminer.training.memory import check_device, check_machine, memory_left, memory_needed
from hiveminer.training.task import load_task
from hiveminer.training.trainer import Trainer, TrainResult, has_bfloat16

logger = logging.getLogger(__name__)

COUNT_SECONDS = 30.0
"""Seconds between two `axon` lines in the metrics."""

MAX_LARGE_STEPS = 1024
"""Callers and step sizes to remember, so that each is warned of once."""

JOIN_SECONDS = 180.0
"""Joining the swarm is reported as stuck after this."""


class Miner(BaseMinerNeuron):
    """Trains the rows that validators send, together with the other miners of the run.

    settings: as `hiveminer.config.flags.parse` returns them; by default the command line is
        parsed, and an operator's mistake ends the program with one line.
    chain, metrics: used instead of those that the settings name.
    strategy: creates the strategy, instead of the one that the run names.
    memory_left: bytes available on a device.

    Attributes: `run_file`, `run_id`, `model` (a causal language model), `tokenizer`, `dataset`
    (rows by number), `device`, `swarm` (the strategy), `trainer`, `progress`, `metrics`.
    Construct it in the main thread: Hivemind forks.
    """

    def __init__(
        self,
        settings: MinerSettings | None = None,
        *,
        chain: Chain | None = None,
        metrics: Metrics | None = None,
        strategy: StrategyFactory = open_strategy,
        memory_left: Callable[[torch.device], int] = memory_left,
    ):
        self._script = settings is None
        self._large_steps: set[tuple[str, int]] = set()
        self._counted_at = -math.inf
        with script() if self._script else contextlib.nullcontext():
            if settings is None:
                settings = parse(cls=MinerSettings, prog="miner.py", description=__doc__ or "")
            self.run_file = load_run(settings.neuron.run)
            self.run_file.check_version()
            super().__init__(settings, chain=chain)
            with contextlib.ExitStack() as unfinished:
                unfinished.callback(self.neuron.close)
                self.metrics = metrics or self.neuron.open_metrics(self.run_file)
                unfinished.callback(self.metrics.close)
                self._memory_left = memory_left
                self._build(strategy, unfinished)
                unfinished.pop_all()

    def encode(self, examples: model.Examples) -> BatchEncoding:
        """Texts to `input_ids` and `attention_mask`, each [rows, longest row], truncated to the
        run's sequence length. `examples`: a list of texts, or a mapping whose `text` is one."""
        return self.task.encode(examples)

    def is_alive(self, synapse: IsAlive) -> IsAlive:
        """Report that this miner is up, and its run."""
        synapse.completion = not self.neuron.stopping.is_set()
        synapse.version = __version__
        synapse.run_id = str(self.run_id)
        synapse.data_hash = self.dataset.hash
        synapse.epoch = self.swarm.epoch
        synapse.queued = self.queue.waiting
        synapse.peer = self.swarm.address
        return synapse

    def accept(self, synapse: Train) -> None:
        """Raise Refused for a request of another run, or beyond the run's limits."""
        limits = self.run_file.limits
        difference = self.task.difference(
            version=synapse.version or __version__,
            run_id=synapse.run_id,
            data_hash=synapse.data_hash,
        )
        if difference is not None:
            raise Refused(409, difference)
        if len(synapse.dataset_indices) > limits.rows:
            raise Refused(422, f"dataset_indices: more than this run's {limits.rows} rows")
        if synapse.batch_size > limits.batch_size:
            raise Refused(422, f"batch_size: more than this run's {limits.batch_size}")
        if synapse.timeout_seconds > limits.timeout_seconds:
            raise Refused(422, f"timeout_seconds: more than this run's {limits.timeout_seconds}")
        beyond = max(synapse.dataset_indices)
        if beyond >= len(self.dataset):
            raise Refused(
                422, f"dataset_indices: row {beyond}, and the data has {len(self.dataset)} rows"
            )

    def forward(self, synapse: Train) -> Train:
        """Train on the rows of the request, and fill in the answer.

        Raises Refused or TrainingError; the reason is sent to the caller.
        """
        began = time.monotonic()
        self._check_step(synapse)
        self.swarm.catch_up()
        synapse.epoch = self.swarm.epoch
        synapse.epoch_steps = 0
        self.progress.request()
        try:
            result = self.train(synapse)
        except TrainingError as error:
            logger.warning("request %s: %s", synapse.request_id, error)
            self.swarm.recover()  # with broken weights every later request would fail too
            raise
        self.progress.answered(result)
        if result.discarded:
            cause = f"{result.discarded} rows of request {synapse.request_id[:8]} were discarded"
            why = "this peer had fallen behind the swarm, so they do not count for the answer"
            tell(logger, "catch_up", f"{cause}: {why}")
        synapse.loss = result.loss
        synapse.losses = result.losses
        synapse.steps = result.steps
        synapse.samples = result.samples
        synapse.tokens = result.tokens
        synapse.discarded = result.discarded
        self._tell(synapse, result, seconds=time.monotonic() - began)
        return synapse

    def train(self, synapse: Train) -> TrainResult:
        """Train the rows of a request; `forward` does the rest."""
        in_first_epoch = True
        with progress_bar(
            title=f"train {synapse.request_id[:8]}",
            total=len(synapse.dataset_indices),
            unit="row",
            shown=self.settings.logging.bars,
        ) as bar:

            def on_step(rows: int, loss: float) -> None:
                nonlocal in_first_epoch
                # The step at whose end the swarm averaged still counts as before it.
                synapse.epoch_steps += in_first_epoch
                in_first_epoch = in_first_epoch and self.swarm.epoch == synapse.epoch
                self.progress.step(rows)
                bar.update(rows)
                bar.set_postfix(loss=f"{loss:.3f}", refresh=False)

            return self.trainer.train(
                self.dataset.texts(synapse.dataset_indices),
                batch_size=synapse.batch_size,
                gradient_accumulation_steps=synapse.gradient_accumulation_steps,
                timeout_seconds=synapse.timeout_seconds,
                on_step=on_step,
                stopped=self.neuron.stopping.is_set,
            )

    def idle(self) -> None:
        """Take part in averaging rounds while there is no work."""
        self.swarm.idle()
        self.progress.keep_if_due()

    def check(self) -> None:
        """Raise SwarmError when the swarm has lost something it needs, such as a process."""
        self.swarm.check()

    def run(self) -> None:
        """Serve until Ctrl-C or SIGTERM."""
        with script() if self._script else contextlib.nullcontext():
            super().run()

    def close(self) -> None:
        if not self._closed:
            self.neuron.stopping.set()
            self.swarm.interrupt()
        super().close()

    def release(self) -> None:
        self.neuron.signals.allow(LAST_SECONDS + 1)
        self.progress.keep_last()
        self.swarm.close()
        self.neuron.signals.allow(self.progress.write_seconds + 1)
        self.progress.close()
        self.metrics.close()

    def _build(self, strategy: StrategyFactory, unfinished: contextlib.ExitStack) -> None:
        # The strategy before any device or thread: it may fork.
        settings, run = self.settings, self.run_file
        self.task = load_task(run, threads=self.neuron.threads)
        self.model, self.tokenizer = self.task.model, self.task.tokenizer
        self.dataset, self.run_id = self.task.dataset, self.task.run_id
        length = run.model.sequence_length
        needed = memory_needed(self.model, sequence_length=length)
        check_machine(needed, settings.neuron.device, left=self._memory_left(torch.device("cpu")))
        self.neuron.go_on()
        self.swarm = strategy(
            Context(self.neuron, self.task, lambda: self.public_ip, on_round=self._on_round)
        )
        unfinished.callback(self.swarm.close)
        self.neuron.go_on()
        self.device = model.choose_device(settings.neuron.device)
        bfloat16 = has_bfloat16(self.device)
        needed = memory_needed(self.model, sequence_length=length, bfloat16=bfloat16)
        check_device(needed, self.device, left=self._memory_left(self.device))
        self.swarm.move_to(self.device)
        machine.keep_freed_memory()  # after the strategy, whose processes do not train
        # The longest that a healthy step takes: matchmaking, averaging, and loading the state.
        swarm = run.swarm
        step_seconds = 2 * swarm.matchmaking_seconds + swarm.averaging_timeout_seconds + 90.0
        self.trainer = Trainer(
            self.model,
            encode=self.encode,
            optimizer=_WatchedStep(self.swarm, limit_seconds=step_seconds),
            device=self.device,
            max_grad_norm=run.optimizer.max_grad_norm,
        )
        self.progress = Progress(
            self.swarm,
            Checkpoints(self.neuron.folder / STATE_FOLDER),
            run_id=str(self.run_id),
            every_seconds=settings.neuron.checkpoint_seconds,
        )
        if settings.neuron.resume:
            self.progress.resume()
        self.neuron.go_on()
        with watch("joining the swarm", limit_seconds=JOIN_SECONDS):
            self.swarm.join()
        self.neuron.keep_in_sync(self._sync)
        explain(run)
        logger.info(
            "run %s: %d parameters on %s, %d rows, epoch %d",
            self.run_id,
            self.model.num_parameters(),
            self.device,
            len(self.dataset),
            self.swarm.epoch,
        )

    def _sync(self) -> None:
        self.swarm.sync()
        if self.axon is None or time.monotonic() - self._counted_at < COUNT_SECONDS:
            return
        self._counted_at = time.monotonic()
        counts = dict(self.axon.counts)
        accepted = ("answered", "hung_up")
        refused = sum(count for kind, count in counts.items() if kind not in accepted)
        self.metrics.log("axon", {"refused": refused, "counts": counts})

    def _check_step(self, synapse: Train) -> None:
        """Warn, once per caller and size, of steps with more rows than an epoch."""
        rows = synapse.batch_size * synapse.gradient_accumulation_steps
        rows = min(rows, len(synapse.dataset_indices))
        epoch = self.run_file.swarm.epoch_samples
        asked = (synapse.dendrite.hotkey, rows)
        has_rounds = self.run_file.strategy == "sparseloco"
        if rows <= epoch or has_rounds or asked in self._large_steps:
            return
        if len(self._large_steps) < MAX_LARGE_STEPS:
            self._large_steps.add(asked)
        tell(
            logger, "batch_meaning",
            f"a step of request {synapse.request_id[:8]} holds {rows} rows and an epoch "
            f"{epoch}: every step ends an epoch, and waits for an averaging round",
        )  # fmt: skip

    def _on_round(self, ended: RoundResult) -> None:
        self.progress.epoch_began()
        together = f"averaged in a group of {ended.group_size}, {ended.seconds:.1f} s"
        how = together if ended.group_size > 1 else "alone"
        logger.info("epoch %d begins: %s", ended.epoch, how)
        self.metrics.log("epoch", asdict(ended) | {"seconds": round(ended.seconds, 3)})

    def _tell(self, synapse: Train, result: TrainResult, *, seconds: float) -> None:
        loss = "none" if result.loss is None else f"{result.loss:.3f}"
        logger.info(
            "trained %d rows for %s in %.1f s: loss %s, %.0f tokens/s, epoch %s%s",
            result.samples,
            synapse.dendrite.hotkey[:8] or "ourselves",
            seconds,
            loss,
            result.tokens / max(seconds, 1e-9),
            synapse.epoch,
            "" if result.finished else " (stopped at the deadline)",
        )
        names = {"request_id", "loss", "steps", "samples", "tokens", "discarded", "epoch"}
        answer = synapse.model_dump(include=names)
        measured = {"caller": synapse.dendrite.hotkey, "seconds": round(seconds, 3)}
        self.metrics.log("train", answer | measured)


class _WatchedStep:
    """The swarm's step, reported when it hangs: it waits for other peers."""

    def __init__(self, swarm: Strategy, *, limit_seconds: float):
        self._swarm = swarm
        self._limit_seconds = limit_seconds

    def step(self, *, batch_size: int) -> bool:
        with watch("the swarm's step", limit_seconds=self._limit_seconds):
            return self._swarm.step(batch_size=batch_size)

    def zero_grad(self) -> None:
        self._swarm.zero_grad()


def explain(run: Run) -> None:
    """Explain what a batch, an epoch and the learning rate mean here."""
    epoch = (
        f"an epoch ends, and weights are averaged, after {run.swarm.epoch_samples} rows of all "
        "peers together"
    )
    if run.strategy == "sparseloco":
        epoch = (
            f"an epoch is a round of {run.sparseloco.round_blocks} blocks, after which the updates "
            "that count are applied"
        )
    tell(
        logger, "batch_meaning",
        "a step trains batch_size x gradient_accumulation_steps rows of a request; "
        f"{epoch}; the learning rate of {run.optimizer.learning_rate:g} is that of each "
        "peer's own steps, and does not grow with the number of peers",
        level=logging.INFO,
    )  # fmt: skip


def main(settings: MinerSettings) -> int:
    """Run a miner; returns the exit code."""
    with Miner(settings) as miner:
        miner.run()
    return 0
