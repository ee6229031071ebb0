"""The validator: sends rows to miners, judges their answers, and sets weights.

From an answer to a weight: `Feed` sends rows and receives answers (`_take` counts the work),
`Samples` picks some, `Judge` replays them from the run's `States` (`_judge_next` scores the
evidence), and `ScoreTable` turns scores and work into weights (`_set_weights`). A subclass
overrides `assign` (which rows a miner gets) and `score` (what a replayed answer is worth).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import random
import time
from collections.abc import Awaitable, Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Self, TypeVar

from bittensor import Metagraph

from hiveminer.chain import Chain
from hiveminer.chain.weights import EMBEDDED_FILL_SECONDS, FILL_SECONDS, WeightSetter
from hiveminer.config.flags import parse
from hiveminer.config.run import load_run
from hiveminer.config.settings import ValidatorSettings
from hiveminer.errors import HiveminerError
from hiveminer.neuron import Neuron
from hiveminer.rpc.dendrite import Dendrite
from hiveminer.runtime import events
from hiveminer.runtime.metrics import Metrics
from hiveminer.runtime.program import script
from hiveminer.strategies.base import Context, GlobalState, ObserverFactory
from hiveminer.strategies.registry import open_observer
from hiveminer.training import model
from hiveminer.training.checkpoint import SCORES_FOLDER, Checkpoints
from hiveminer.training.data import split_held_out
from hiveminer.training.evaluation import HELD_OUT_ROWS
from hiveminer.training.task import load_task
from hiveminer.validation import curves
from hiveminer.validation.curves import Evidence
from hiveminer.validation.feed import Answered, Feed
from hiveminer.validation.judge import (
    Judge,
    Samples,
    States,
    credited,
    texts,
    warn_of_short_requests,
)
from hiveminer.validation.models import MODELS_FOLDER, KeptModels
from hiveminer.validation.replay import Replayer
from hiveminer.validation.scores import SavedScores, ScoreTable

logger = logging.getLogger(__name__)

T = TypeVar("T")

EMBEDDED_STAKE = 10_000.0
"""TAO to stake on the embedded network, where it is free."""

ALIVE_SECONDS = 5.0


class Validator:
    """Sends rows to a run's miners, and scores their answers.

    settings: by default the command line is parsed; an operator's mistake is then one line.
    chain, metrics, observer: used instead of those that the settings and the run's strategy name.

    Attributes: `run_file`, `run_id`, `dataset`, `training_rows` (numbers of the rows for miners),
    `neuron`, `table` (the scores).
    """

    def __init__(
        self,
        settings: ValidatorSettings | None = None,
        *,
        chain: Chain | None = None,
        metrics: Metrics | None = None,
        observer: ObserverFactory = open_observer,
    ):
        self._script = settings is None
        self._deck: list[int] = []
        with script() if self._script else contextlib.nullcontext():
            if settings is None:
                settings = parse(
                    cls=ValidatorSettings, prog="validator.py", description=__doc__ or ""
                )
            self.settings = settings
            self.run_file = load_run(settings.neuron.run)
            self.run_file.check_version()
            with contextlib.ExitStack() as parts:
                self.neuron = Neuron(settings, role="validator", stake=EMBEDDED_STAKE, chain=chain)
                parts.callback(logger.info, "stopped")
                parts.callback(self.neuron.close)
                self.metrics = metrics or self.neuron.open_metrics(self.run_file)
                parts.callback(self.metrics.close)
                self._build(observer, parts)
                self._parts = parts.pop_all()

    def assign(self, hotkey: str) -> list[int]:
        """The rows that this miner trains next: dealt from a shuffled deck of all training rows,
        so that miners get different ones; a used up deck is shuffled again."""
        count = min(self.settings.validator.rows, len(self.training_rows))
        if len(self._deck) < count:
            self._deck = list(self.training_rows)
            self._chance.shuffle(self._deck)
        dealt, self._deck = self._deck[:count], self._deck[count:]
        return dealt

    def score(self, evidence: Evidence) -> float:
        """What a replayed answer is worth, between 0 and 1."""
        return curves.score(evidence)

    def run(self) -> None:
        """Validate until Ctrl-C or SIGTERM."""
        with script() if self._script else contextlib.nullcontext():
            self.neuron.go_on()
            # In another thread: this one may have a running event loop, as in a notebook.
            with ThreadPoolExecutor(1, thread_name_prefix="validator") as pool:
                pool.submit(asyncio.run, self._main()).result()

    def close(self) -> None:
        """Save the scores, and release everything."""
        self.neuron.stopping.set()
        self._parts.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # --- start ---------------------------------------------------------------------------

    def _build(self, observer: ObserverFactory, parts: contextlib.ExitStack) -> None:
        settings, run, neuron = self.settings, self.run_file, self.neuron
        self.task = load_task(run, threads=neuron.threads)
        self.dataset, self.run_id = self.task.dataset, self.task.run_id
        self.training_rows, self._held_out_rows = split_held_out(
            len(self.dataset), run.data.held_out
        )
        self._chance = random.Random(settings.validator.seed)
        checkpoints = Checkpoints(neuron.folder / SCORES_FOLDER)
        self.scores = SavedScores(checkpoints, run_id=str(self.run_id))
        self.table = self.scores.load() if settings.neuron.resume else ScoreTable()
        neuron.go_on()
        self.observer = observer(Context(neuron, self.task))
        parts.callback(self.observer.close)
        neuron.go_on()
        self.replayer = Replayer(
            self.task,
            step_from=self.observer.local_step,
            device=model.choose_device(settings.neuron.device),
        )
        self.models = KeptModels(
            neuron.folder / MODELS_FOLDER, task=self.task, keep=settings.neuron.keep_models
        )
        self.judge = Judge(self.replayer, task=self.task, stopped=neuron.stopping.is_set)
        self._io = ThreadPoolExecutor(4, thread_name_prefix="chain")
        parts.callback(self._io.shutdown, wait=False, cancel_futures=True)
        self._compute = ThreadPoolExecutor(1, thread_name_prefix="replay")
        parts.callback(self._compute.shutdown, wait=True, cancel_futures=True)
        self.weights = WeightSetter(
            neuron.chain,
            path=neuron.folder / "weights.json",
            every_seconds=settings.weights_seconds,
            stopping=neuron.stopping,
        )
        self.states = States(self.observer.initial_state())
        if self.observer.shares() is None:
            warn_of_short_requests(settings.validator, rows=len(self.training_rows))
        self.samples = Samples(rate=settings.validator.sample_rate, chance=self._chance)
        self.feed = Feed(
            task=self.task,
            work=settings.validator,
            assign=lambda hotkey: self.assign(hotkey),
            take=self._take,
            metrics=self.metrics,
        )
        self._began = time.monotonic()
        self.observer.declare()
        self._sync()
        neuron.keep_in_sync(self._sync)
        parts.callback(self._save)
        logger.info("run %s: %d rows to give out", self.run_id, len(self.training_rows))

    def _sync(self) -> None:
        self.observer.sync(working=self.feed.working)

    # --- the loops -----------------------------------------------------------------------

    async def _main(self) -> None:
        """Run all loops until the neuron stops."""
        settings = self.settings
        alive_seconds = 1.0 if settings.embedded else ALIVE_SECONDS
        weights_seconds = min(30.0, settings.weights_seconds / 4)
        async with Dendrite(self.neuron.chain.wallet) as dendrite:
            loops = [
                asyncio.create_task(_again(act, pause_seconds=seconds))
                for act, seconds in (
                    (lambda: self._find_miners(dendrite), alive_seconds),
                    (self._follow, 0.5),
                    (self._judge_next, 0.1),
                    (lambda: self._in(self._io, self._save), settings.neuron.checkpoint_seconds),
                    (lambda: self._set_weights(self.feed.hotkeys), weights_seconds),
                )
            ]
            loops.append(asyncio.create_task(self._evaluate(self.states[self.states.newest])))
            try:
                while not self.neuron.stopping.is_set():
                    self.neuron.check_registered()
                    self.observer.check()
                    await asyncio.wait(loops, timeout=0.2, return_when=asyncio.FIRST_EXCEPTION)
                    for loop in loops:
                        if loop.done():
                            loop.result()
            finally:
                for loop in loops:
                    loop.cancel()
                await asyncio.gather(*loops, return_exceptions=True)
                await self.feed.stop()

    async def _find_miners(self, dendrite: Dendrite) -> None:
        ours = self.neuron.hotkey
        await self.feed.find(dendrite, [n for n in self.neuron.metagraph if n.hotkey != ours])

    async def _take(self, answered: Answered) -> None:
        """Count an answer's work, and perhaps queue it for a replay."""
        hotkey, answer = answered.hotkey, answered.answer
        rows, tokens = await self._in(self._io, lambda: credited(answered, self.task))
        if self.states.is_timely(answer.epoch, now=self.observer.epoch):
            self.table.add_work(hotkey, tokens)
        else:
            logger.warning("an answer of %s for epoch %s is not counted", hotkey[:8], answer.epoch)
        counted = {"hotkey": hotkey, "samples": rows, "tokens": tokens}
        said = answer.model_dump(include={"request_id", "loss", "discarded", "epoch"})
        seconds = round(answered.seconds, 3)
        self.metrics.log("answer", counted | said | {"seconds": seconds})
        if self.observer.shares() is None:  # otherwise the rounds say what is earned
            self.samples.offer(answered, unproved=self.table.of(hotkey).replays == 0)

    async def _follow(self) -> None:
        """Download the global state when an epoch begins, and evaluate it."""
        if self.observer.epoch <= self.states.newest:
            return
        state = await self._in(self._io, self.observer.fetch)
        if state is not None and self.states.add(state, wanted=self.samples.epochs):
            await self._evaluate(state)

    async def _evaluate(self, state: GlobalState) -> None:
        rows = list(self._held_out_rows)[:HELD_OUT_ROWS]
        if not rows:
            return
        try:
            await self._in(self._compute, lambda: self._evaluate_on(rows, state))
        except HiveminerError as error:
            logger.warning("epoch %d: no held-out loss: %s", state.epoch, error)

    def _evaluate_on(self, rows: list[int], state: GlobalState) -> None:
        """Evaluate a state on held-out rows, and keep its model; runs in the compute thread."""
        loss = self.replayer.loss(state, texts(self.task, rows))
        if loss is not None and math.isfinite(loss):
            self.models.save(self.replayer.model, epoch=state.epoch, loss=loss, rows=len(rows))
        logger.info("epoch %d: held-out loss %s", state.epoch, loss and f"{loss:.3f}")
        # After the model, so that a reported loss has its folder.
        self.metrics.log("held_out", {"epoch": state.epoch, "loss": loss})

    async def _judge_next(self) -> None:
        """Replay and score the waiting answer of the miner with the fewest replays."""
        sample = self.samples.next(self.states, replays=lambda who: self.table.of(who).replays)
        if sample is None:
            return
        state = self.states.replayed(sample.epoch, hotkey=sample.hotkey)
        if state is None:
            return
        evidence = await self._in(self._compute, lambda: self.judge.judge(sample, state))
        if evidence is not None:
            self._record(evidence)

    def _record(self, evidence: Evidence) -> None:
        """Score one answer, and log the evidence."""
        hotkey, judged = evidence.hotkey, evidence.tells
        value = min(1.0, max(0.0, self.score(evidence))) if judged else 1.0
        if judged:
            self.table.add_score(hotkey, value)
        else:
            self.table.add_unjudged(hotkey)
        average = self.table.of(hotkey).score
        comparable = len(evidence.answered) == len(evidence.trained) > 0
        fit = round(evidence.explained_variance, 3) if comparable else None
        learning = round(evidence.learning, 3) if comparable else None
        logger.info(
            "score of %s: %s (fit %s, learning %s), on average %.2f",
            hotkey[:8],
            f"{value:.2f}" if judged else "none, the curves are too flat or too short",
            fit,
            learning,
            average,
        )
        if value < 1:
            why = "; ".join(curves.shortfalls(evidence)) or "by this subnet's own score"
            cause = f"{hotkey[:8]} scores {value:.2f} of 1 with this answer: {why}"
            events.tell(logger, "score", cause, level=logging.INFO)
        verdict = {"score": value, "judged": judged, "average": average}
        compared = {"fit": fit, "learning": learning}
        self.metrics.log("evidence", asdict(evidence) | verdict | compared)

    async def _set_weights(self, live: Collection[str]) -> None:
        """Set weights from the scores when they are due. live: hotkeys of the fed miners."""
        sent = await self._in(
            self._io, lambda: self.weights.set_if_due(lambda graph: self._earned(graph, live))
        )
        if sent is None:
            return
        if not sent.burnt:
            self.table.decay_work()
        shares = dict(sorted(sent.shares.items()))
        logger.info(
            "weights set: %s%s",
            {uid: round(share, 3) for uid, share in shares.items()},
            " (burnt: nobody has earned any)" if sent.burnt else "",
        )
        weights = {str(uid): share for uid, share in shares.items()}
        self.metrics.log("weights", {"weights": weights, "burnt": sent.burnt})

    def _earned(self, graph: Metagraph, live: Collection[str]) -> dict[str, float] | None:
        """Weights by hotkey; None while too few of the live miners were replayed."""
        registered = {neuron.hotkey for neuron in graph}
        self.table.retain(registered)
        self._save()
        shares = self.observer.shares()
        if shares is not None:
            return {who: share for who, share in shares.items() if who in registered} or None
        return weights_of(
            self.table,
            registered.intersection(live),
            waited_seconds=time.monotonic() - self._began,
            patience=EMBEDDED_FILL_SECONDS if self.settings.embedded else FILL_SECONDS,
        )

    def _save(self) -> None:
        self.scores.save(self.table)

    async def _in(self, pool: ThreadPoolExecutor, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(pool, call)


async def _again(act: Callable[[], Awaitable[None]], *, pause_seconds: float) -> None:
    """Repeat an action; its HiveminerErrors are logged."""
    while True:
        try:
            await act()
        except HiveminerError as error:
            logger.warning("%s", error)
        await asyncio.sleep(pause_seconds)


def weights_of(
    table: ScoreTable, live: Collection[str], *, waited_seconds: float, patience: float
) -> dict[str, float] | None:
    """Weights by hotkey; None until every live miner was replayed, or the wait is over."""
    # A score without a verdict is the benefit of the doubt: that hotkey was replayed too.
    replayed = {who for who, s in list(table.standings.items()) if s.replays or s.score}
    everybody = bool(live) and replayed.issuperset(live)
    return table.weights() if everybody or waited_seconds >= patience else None


def main(settings: ValidatorSettings) -> int:
    """Run a validator; returns the exit code."""
    with Validator(settings) as validator:
        validator.run()
    return 0
