"""The validator: gives miners rows, looks at what comes back, and sets weights.

It finds the live miners with `IsAlive`, keeps two requests at each of them so that nobody
idles, replays a sample of the answers from its own copy of the swarm's state, writes a
line of evidence for each score, and sets weights. A subclass overrides `assign` (who gets
which rows) and `score` (what a replayed answer is worth).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
import uuid
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Self, TypeVar

from bittensor import Metagraph

from hiveminer.__version__ import __version__
from hiveminer.chain import Chain
from hiveminer.chain.weights import EMBEDDED_FILL_SECONDS, FILL_SECONDS, WeightSetter, filled
from hiveminer.config.run import load_run
from hiveminer.config.settings import ValidatorSettings, parse
from hiveminer.errors import HiveminerError, MinerError, TrainingError
from hiveminer.neuron import Neuron
from hiveminer.protocol import IsAlive, Train
from hiveminer.rpc.dendrite import Dendrite, Endpoint, endpoint_of
from hiveminer.runtime import events
from hiveminer.runtime.metrics import Metrics
from hiveminer.runtime.program import script
from hiveminer.strategies.base import Context, GlobalState, ObserverFactory
from hiveminer.strategies.registry import open_observer
from hiveminer.training import model
from hiveminer.training.checkpoint import SCORES_FOLDER, of_run
from hiveminer.training.data import split_held_out
from hiveminer.training.task import load_task
from hiveminer.validation import scoring
from hiveminer.validation.replay import Curves, Replayer
from hiveminer.validation.scoring import Evidence, ScoreTable

logger = logging.getLogger(__name__)

T = TypeVar("T")

EMBEDDED_STAKE = 10_000.0
"""TAO that a validator stakes on the embedded network, where it is free."""

REQUESTS_AT_ONCE = 2
"""Requests at one miner: the next waits there when the last one ends."""

KEPT_STATES = 3
"""Epochs whose state is kept for replays."""

MAX_REPLAYED_STEPS = 10
"""Optimizer steps of one answer that are replayed; more would tell little more."""

MAX_SAMPLES_WAITING = 16
"""Answers that wait to be replayed; the oldest gives way."""

HELD_OUT_ROWS = 32
"""Held-out rows that the swarm's state is measured on."""

STALE_EPOCHS = 3
"""An answer that says it began longer ago than this is not counted as work."""

EVASIONS = 3
"""So many answers in a row that cannot be replayed are judged as one that is worth nothing."""

LEAST_SECONDS = 1.0
"""A miner that answers sooner is asked again only after this: whoever answers at once and
without work would otherwise be what the validator is busy with."""

ALIVE_SECONDS = 5.0

WORKING_SECONDS = 60.0
"""A miner that answered with work so lately is to be seen among the swarm's peers."""


@dataclass(frozen=True)
class Sample:
    """An answer that is to be replayed."""

    request: Train
    answer: Train
    hotkey: str

    @property
    def epoch(self) -> int:
        return self.answer.epoch or 0

    @property
    def losses(self) -> tuple[float, ...]:
        """The part of the answered curve that started from the epoch's state, or its head."""
        return tuple(self.answer.losses[: min(self.answer.epoch_steps, MAX_REPLAYED_STEPS)])

    @property
    def rows(self) -> list[int]:
        """The rows of that part."""
        group = self.request.batch_size * self.request.gradient_accumulation_steps
        return self.request.dataset_indices[: group * len(self.losses)]


@dataclass
class LiveMiner:
    """A miner that answered `IsAlive` and is in our run."""

    endpoint: Endpoint
    tasks: list[asyncio.Task[None]]


class Validator:
    """Keeps the miners of a run honest.

    settings: as `hiveminer.config.settings.parse` reads them; without, the command line is read,
        and an operator's mistake ends the program with one line.
    chain, metrics: instead of those that the settings name.
    observer: makes the observer, instead of that of the run's strategy.
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
        """The rows that this miner trains next: fresh ones, different for everybody.

        Rows are dealt from a shuffled deck of all training rows; when it is used up, it is
        shuffled again.
        """
        count = min(self.settings.validator.rows, len(self._training_rows))
        if len(self._deck) < count:
            self._deck = list(self._training_rows)
            self._chance.shuffle(self._deck)
        dealt, self._deck = self._deck[:count], self._deck[count:]
        return dealt

    def score(self, evidence: Evidence) -> float:
        """What a replayed answer is worth, between 0 and 1."""
        return scoring.score(evidence)

    def run(self) -> None:
        """Validate until Ctrl-C or SIGTERM."""
        with script() if self._script else contextlib.nullcontext():
            self.neuron.go_on()
            asyncio.run(self._main())

    def close(self) -> None:
        """Save the scores, and let go of everything."""
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
        self._training_rows, self._held_out_rows = split_held_out(
            len(self.dataset), run.data.held_out
        )
        self._chance = random.Random(settings.validator.seed)
        self.table = ScoreTable()
        self.checkpoints = neuron.checkpoints(SCORES_FOLDER)
        if settings.neuron.resume:
            self._restore()
        neuron.go_on()
        self.observer = observer(
            Context(neuron, self.task, public_ip=lambda: "", on_round=lambda _: None)
        )
        parts.callback(self.observer.close)
        self._worked_at: dict[str, float] = {}
        neuron.go_on()
        self.replayer = Replayer(
            self.task.model,
            encode=self.task.tensors,
            run=run,
            device=model.choose_device(settings.neuron.device),
            step_from=self.observer.local_step,
        )
        self.states: dict[int, GlobalState] = {0: self.observer.initial_state()}
        self._measured_start = False
        self._io = ThreadPoolExecutor(4, thread_name_prefix="chain")
        parts.callback(self._io.shutdown, wait=False, cancel_futures=True)
        self._compute = ThreadPoolExecutor(1, thread_name_prefix="replay")
        parts.callback(self._compute.shutdown, wait=True, cancel_futures=True)
        self._samples: list[Sample] = []
        self._last_epoch: dict[str, int] = {}
        self._began = time.monotonic()
        self.weights = WeightSetter(
            neuron.chain,
            path=neuron.folder / "weights.json",
            every_seconds=settings.weights_seconds,
            stopping=neuron.stopping,
        )
        self._evasions: dict[str, int] = {}
        self._miners: dict[str, LiveMiner] = {}
        self._complaints: dict[str, str] = {}
        neuron.keep_committed(f"run {self.run_id}".encode())
        self._sync()
        neuron.keep_in_sync(self._sync)
        parts.callback(self._save)
        logger.info("run %s: %d rows to give out", self.run_id, len(self._training_rows))

    def _sync(self) -> None:
        since = time.monotonic() - WORKING_SECONDS
        self.observer.sync(working=sum(at > since for at in list(self._worked_at.values())))

    # --- the loops -----------------------------------------------------------------------

    async def _main(self) -> None:
        """All loops at once, until the neuron is told to stop."""
        async with Dendrite(self.neuron.chain.wallet) as dendrite:
            loops = [
                asyncio.create_task(self._again(self._find_miners, dendrite, self._alive_seconds)),
                asyncio.create_task(self._again(self._watch_swarm, None, 0.5)),
                asyncio.create_task(self._again(self._replay_next, None, 0.1)),
                asyncio.create_task(
                    self._again(self._keep_scores, None, self.settings.neuron.checkpoint_seconds)
                ),
                asyncio.create_task(
                    self._again(
                        self._set_weights, None, min(30.0, self.settings.weights_seconds / 4)
                    )
                ),
            ]
            try:
                while not self.neuron.stopping.is_set():
                    self.neuron.check_registered()
                    self.observer.check()
                    await asyncio.wait(loops, timeout=0.2, return_when=asyncio.FIRST_EXCEPTION)
                    for loop in loops:
                        if loop.done():
                            loop.result()
            finally:
                feeds = [task for miner in self._miners.values() for task in miner.tasks]
                for task in [*loops, *feeds]:
                    task.cancel()
                await asyncio.gather(*loops, *feeds, return_exceptions=True)

    @property
    def _alive_seconds(self) -> float:
        return 1.0 if self.settings.embedded else ALIVE_SECONDS

    async def _again(
        self, act: Callable[[Any], Awaitable[None]], argument: Any, pause_seconds: float
    ) -> None:
        """Do something, pause, and do it again; a trouble that passes is logged."""
        while True:
            try:
                await act(argument)
            except HiveminerError as error:
                logger.warning("%s", error)
            await asyncio.sleep(pause_seconds)

    async def _find_miners(self, dendrite: Dendrite) -> None:
        """Ask every served axon whether it is alive; feed those that are, drop the others."""
        endpoints = [
            endpoint
            for neuron in self.neuron.metagraph
            if neuron.hotkey != self.neuron.hotkey and (endpoint := endpoint_of(neuron)) is not None
        ]
        alive = await asyncio.gather(*(self._probe(dendrite, each) for each in endpoints))
        live = {each.hotkey: each for each, good in zip(endpoints, alive, strict=True) if good}
        for hotkey in set(self._miners) - set(live):
            logger.info("miner %s is gone", hotkey[:8])
            self._worked_at.pop(hotkey, None)
            for task in self._miners.pop(hotkey).tasks:
                task.cancel()
        for hotkey, endpoint in live.items():
            known = self._miners.get(hotkey)
            if known is not None and known.endpoint == endpoint:
                continue
            for task in known.tasks if known is not None else ():
                task.cancel()
            logger.info("miner %s is alive at %s:%d", hotkey[:8], endpoint.ip, endpoint.port)
            self._miners[hotkey] = LiveMiner(
                endpoint,
                [
                    asyncio.create_task(self._feed(dendrite, endpoint))
                    for _ in range(REQUESTS_AT_ONCE)
                ],
            )

    async def _probe(self, dendrite: Dendrite, endpoint: Endpoint) -> bool:
        """Whether this miner is there and in our run; why not is told once."""
        began = time.monotonic()
        try:
            answer = await dendrite.call(endpoint, IsAlive(), timeout_seconds=5.0)
        except MinerError as error:
            self._complain(endpoint.hotkey, error.reason)
            # A slow answer from a miner that is being fed is no reason to take its work away.
            known = self._miners.get(endpoint.hotkey)
            return known is not None and known.endpoint == endpoint and error.status is not None
        milliseconds = 1000 * (time.monotonic() - began)
        self.metrics.log("alive", {"hotkey": endpoint.hotkey, "milliseconds": milliseconds})
        problem = self._problem_with(answer)
        self._complain(endpoint.hotkey, problem)
        return problem is None

    def _problem_with(self, answer: IsAlive) -> str | None:
        if not answer.completion:
            return "it takes no work"
        if not self.run_file.accepts_version(answer.version):
            return (
                f"its version {answer.version or 'unknown'} is older than "
                f"{self.run_file.oldest_version}, the oldest of this run"
            )
        if answer.data_hash != self.dataset.hash:
            return f"its data differs: hash {answer.data_hash} there, {self.dataset.hash} here"
        return self.run_id.difference(answer.run_id)

    def _complain(self, hotkey: str, problem: str | None) -> None:
        if problem is None:
            self._complaints.pop(hotkey, None)
        elif self._complaints.get(hotkey) != problem:
            self._complaints[hotkey] = problem
            logger.warning("miner %s is not asked: %s", hotkey[:8], problem)

    async def _feed(self, dendrite: Dendrite, endpoint: Endpoint) -> None:
        """Give one miner request after request."""
        pause = 1.0
        while True:
            request = self._request(endpoint.hotkey)
            began = time.monotonic()
            try:
                answer = await dendrite.call(
                    endpoint,
                    request,
                    # Its own time, the time of the one before it, and some for the way.
                    timeout_seconds=REQUESTS_AT_ONCE * request.timeout_seconds + 30.0,
                )
            except MinerError as error:
                logger.warning("%s", error)
                self.metrics.log("refused", {"hotkey": endpoint.hotkey, "reason": error.reason})
                await asyncio.sleep(error.retry_after_seconds or pause)
                pause = min(60.0, 2 * pause)
                continue
            pause = 1.0
            self._take(endpoint.hotkey, request, answer, seconds=time.monotonic() - began)
            await asyncio.sleep(max(0.0, began + LEAST_SECONDS - time.monotonic()))

    def _request(self, hotkey: str) -> Train:
        work = self.settings.validator
        return Train(
            request_id=uuid.uuid4().hex,
            run_id=str(self.run_id),
            data_hash=self.dataset.hash,
            version=__version__,
            dataset_indices=self.assign(hotkey),
            batch_size=work.batch_size,
            gradient_accumulation_steps=work.gradient_accumulation_steps,
            timeout_seconds=work.timeout_seconds,
        )

    def _take(self, hotkey: str, request: Train, answer: Train, *, seconds: float) -> None:
        """Count an answer, and perhaps keep it for a replay."""
        rows = request.dataset_indices[: min(answer.samples, len(request.dataset_indices))]
        mask = self.task.tensors(self.dataset.texts(rows))["attention_mask"] if rows else None
        tokens = min(answer.tokens, int(mask.sum()) if mask is not None else 0)
        if answer.samples:
            self._worked_at[hotkey] = time.monotonic()
        if self._is_timely(answer):
            self.table.add_work(hotkey, tokens)
        else:
            logger.warning("an answer of %s for epoch %s is not counted", hotkey[:8], answer.epoch)
        self.metrics.log(
            "answer",
            {
                "hotkey": hotkey,
                "request_id": request.request_id,
                "loss": answer.loss,
                "samples": len(rows),
                "tokens": tokens,
                "discarded": answer.discarded,
                "epoch": answer.epoch,
                "seconds": round(seconds, 3),
            },
        )
        self._keep_sample(Sample(request, answer, hotkey))

    def _is_timely(self, answer: Train) -> bool:
        """Whether the epoch that an answer names can be true: a replay needs that one."""
        now = max(self.observer.epoch, *self.states)
        return answer.epoch is not None and now - STALE_EPOCHS <= answer.epoch <= now + 1

    def _keep_sample(self, sample: Sample) -> None:
        """Queue an answer for a replay, if chance will have it or nothing is known yet.

        Only a miner's first answer of an epoch: it began nearest to the state that the
        replay begins from. Later ones began from what the miner has learnt since.
        """
        hotkey = sample.hotkey
        if self._last_epoch.get(hotkey) == sample.epoch:
            return
        self._last_epoch[hotkey] = sample.epoch
        unproved = self.table.of(hotkey).replays == 0
        waiting = any(other.hotkey == hotkey for other in self._samples)
        by_chance = self._chance.random() < self.settings.validator.sample_rate
        if (unproved and not waiting) or by_chance:
            self._samples.append(sample)
            del self._samples[:-MAX_SAMPLES_WAITING]

    async def _watch_swarm(self, _: None) -> None:
        """Download the swarm's state when an epoch begins, and measure it."""
        if not self._measured_start:
            self._measured_start = True
            await self._measure(self.states[0])
        if self.observer.epoch <= max(self.states):
            return
        state = await self._in(self._io, self.observer.fetch)
        if state is None or state.epoch in self.states:
            return
        self.states[state.epoch] = state
        waited_for = {sample.epoch for sample in self._samples}
        for old in sorted(self.states)[:-KEPT_STATES]:
            if old not in waited_for or old < state.epoch - 2 * KEPT_STATES:
                del self.states[old]
        await self._measure(state)

    async def _measure(self, state: GlobalState) -> None:
        texts = self.dataset.texts(list(self._held_out_rows)[:HELD_OUT_ROWS])
        if not texts:
            return
        loss = await self._in(self._compute, lambda: self.replayer.loss(state, texts))
        logger.info("epoch %d: held-out loss %s", state.epoch, loss and f"{loss:.3f}")
        self.metrics.log("held_out", {"epoch": state.epoch, "loss": loss})

    async def _replay_next(self, _: None) -> None:
        """Replay the waiting answer of the miner that was looked at least."""
        newest = max(self.states)
        # What there is no state for any more cannot be replayed.
        self._samples = [s for s in self._samples if s.epoch >= newest or s.epoch in self.states]
        ready = [s for s in self._samples if s.epoch in self.states]
        if not ready:
            return
        sample = min(ready, key=lambda s: self.table.of(s.hotkey).replays)
        self._samples.remove(sample)
        if len(sample.losses) < scoring.FEWEST_STEPS:
            self._count_evasion(sample)
            return
        self._evasions.pop(sample.hotkey, None)
        texts = self.dataset.texts(sample.rows)
        state = self.states[sample.epoch]
        try:
            curves = await self._in(self._compute, lambda: self._replay(state, texts, sample))
        except TrainingError as error:
            logger.warning("an answer of %s cannot be replayed: %s", sample.hotkey[:8], error)
            return
        if curves is not None:
            self._judge(sample, curves)

    def _count_evasion(self, sample: Sample) -> None:
        """The swarm's averaging may cut a curve short; a miner whose curves are always cut
        short is telling stories."""
        count = self._evasions.get(sample.hotkey, 0) + 1
        self._evasions[sample.hotkey] = count % EVASIONS
        if count == EVASIONS:
            self._judge(sample, Curves((), ()))

    def _replay(self, state: GlobalState, texts: list[str], sample: Sample) -> Curves | None:
        return self.replayer.curves(
            state,
            texts,
            batch_size=sample.request.batch_size,
            gradient_accumulation_steps=sample.request.gradient_accumulation_steps,
            stopped=self.neuron.stopping.is_set,
        )

    def _judge(self, sample: Sample, curves: Curves) -> None:
        """Score one answer, and write the evidence down."""
        evidence = Evidence(
            hotkey=sample.hotkey,
            request_id=sample.request.request_id,
            epoch=sample.epoch,
            answered=sample.losses,
            trained=curves.trained,
            untrained=curves.untrained,
            claimed_samples=sample.answer.samples,
            given_samples=len(sample.request.dataset_indices),
            tokens=sample.answer.tokens,
        )
        value = min(1.0, max(0.0, self.score(evidence)))
        self.table.add_score(sample.hotkey, value)
        same = len(evidence.answered) == len(evidence.trained) > 0
        fit = round(evidence.fit, 3) if same else None
        learning = round(evidence.learning, 3) if same else None
        logger.info(
            "score of %s: %.2f (fit %s, learning %s), on average %.2f",
            sample.hotkey[:8], value, fit, learning, self.table.of(sample.hotkey).score,
        )  # fmt: skip
        if value < 1:
            why = "; ".join(scoring.shortfalls(evidence)) or "by this subnet's own score"
            cause = f"{sample.hotkey[:8]} scores {value:.2f} of 1 with this answer: {why}"
            events.tell(logger, "score", cause, level=logging.INFO)
        self.metrics.log(
            "evidence",
            {
                "hotkey": sample.hotkey,
                "request_id": evidence.request_id,
                "epoch": evidence.epoch,
                "score": value,
                "average": self.table.of(sample.hotkey).score,
                "fit": fit,
                "learning": learning,
                "answered": evidence.answered,
                "trained": evidence.trained,
                "untrained": evidence.untrained,
            },
        )

    async def _set_weights(self, _: None) -> None:
        """Set weights from the scores when it is time, by the uids of that moment."""
        sent = await self._in(self._io, lambda: self.weights.set_if_due(self._earned))
        if sent is None:
            return
        if not sent.burnt:
            self.table.fade_work()
        shares = dict(sorted(sent.shares.items()))
        logger.info(
            "weights set: %s%s",
            {uid: round(share, 3) for uid, share in shares.items()},
            " (burnt: nobody has earned any)" if sent.burnt else "",
        )
        self.metrics.log(
            "weights",
            {"weights": {str(uid): w for uid, w in shares.items()}, "burnt": sent.burnt},
        )

    def _earned(self, graph: Metagraph) -> dict[str, float] | None:
        """Weights by hotkey; None while the table is only half filled."""
        registered = {neuron.hotkey for neuron in graph}
        self.table.keep(registered)
        self._save()
        standings = self.table.standings
        enough = filled(
            registered.intersection(list(self._miners)),
            replayed=[who for who, standing in list(standings.items()) if standing.replays],
            waited_seconds=time.monotonic() - self._began,
            patience=EMBEDDED_FILL_SECONDS if self.settings.embedded else FILL_SECONDS,
        )
        return self.table.weights() if enough else None

    async def _in(self, pool: ThreadPoolExecutor, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(pool, call)

    # --- what survives a restart ---------------------------------------------------------

    _saved: dict[str, Any] | None = None
    """What the newest checkpoint says."""

    async def _keep_scores(self, _: None) -> None:
        await self._in(self._io, self._save)

    def _save(self) -> None:
        said = {"run_id": str(self.run_id), "scores": self.table.dump()}
        if said != self._saved and self.checkpoints.save(None, said) is not None:
            self._saved = said

    def _restore(self) -> None:
        found = self.checkpoints.load(of_run(str(self.run_id)))
        if found is None:
            return
        try:
            self.table = ScoreTable.restore(found.metadata["scores"])
        except (KeyError, ValueError) as error:
            events.tell(logger, "checkpoint", f"{found.name} is not used: {error!s:.200}")
            return
        logger.info("resumed %d scores, from %s", len(self.table.standings), found.name)


def main(settings: ValidatorSettings) -> int:
    """Run a validator to its end; the exit code."""
    with Validator(settings) as validator:
        validator.run()
    return 0
