"""Finds the miners of a run, and keeps each of them busy with requests."""

from __future__ import annotations

import asyncio
import logging
import math
import time
import uuid
from collections.abc import Awaitable, Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

from bittensor import MetagraphNeuron

from hiveminer.__version__ import __version__
from hiveminer.config.settings import WorkSettings
from hiveminer.errors import HiveminerError, MinerError
from hiveminer.protocol import IsAlive, Train
from hiveminer.rpc.dendrite import Dendrite, Endpoint, endpoints_of
from hiveminer.runtime.metrics import Metrics
from hiveminer.training.task import Task

logger = logging.getLogger(__name__)

REQUESTS_AT_ONCE = 2
"""Requests at one miner: the next is waiting there when one ends."""

LEAST_SECONDS = 1.0
"""Least interval between requests, against miners that answer at once without work."""

PROBE_SECONDS = 5.0
TRANSFER_SECONDS = 30.0
MAX_PAUSE_SECONDS = 60.0

MAX_REPLAYED_STEPS = 10
"""Optimizer steps of one answer to replay; more would add little."""

WORKING_SECONDS = 60.0
"""A miner that answered with work within this time counts as working."""


@dataclass(frozen=True)
class Answered:
    """A request, and what a miner answered. seconds: until the answer."""

    hotkey: str
    request: Train
    answer: Train
    seconds: float

    @property
    def epoch(self) -> int:
        return self.answer.epoch or 0

    @property
    def losses(self) -> tuple[float, ...]:
        """The beginning of the answered curve, as far as it started from the epoch's state."""
        return tuple(self.answer.losses[: min(self.answer.epoch_steps, MAX_REPLAYED_STEPS)])

    @property
    def given_steps(self) -> int:
        """Optimizer steps in the request."""
        return -(-len(self.request.dataset_indices) // self._step_rows)

    @property
    def rows(self) -> list[int]:
        """The rows of that part."""
        return self.request.dataset_indices[: self._step_rows * len(self.losses)]

    @property
    def _step_rows(self) -> int:
        return self.request.batch_size * self.request.gradient_accumulation_steps


@dataclass
class LiveMiner:
    """A miner that answered `IsAlive` and is in our run. worked_at: a monotonic time."""

    endpoint: Endpoint
    feeding: asyncio.Task[Any] = field(init=False)
    worked_at: float = -math.inf


@dataclass(eq=False)
class Feed:
    """Finds live miners, and sends them requests.

    work: what to ask for. assign: the rows for a hotkey. take: called with each answer.
    """

    task: Task
    work: WorkSettings
    assign: Callable[[str], list[int]]
    take: Callable[[Answered], Awaitable[None]]
    metrics: Metrics
    _miners: dict[str, LiveMiner] = field(default_factory=dict, init=False)
    _complaints: dict[str, str] = field(default_factory=dict, init=False)

    @property
    def hotkeys(self) -> Collection[str]:
        """The live miners."""
        return list(self._miners)

    @property
    def working(self) -> int:
        """How many miners have recently answered with work."""
        since = time.monotonic() - WORKING_SECONDS
        return sum(miner.worked_at > since for miner in list(self._miners.values()))

    async def find(self, dendrite: Dendrite, neurons: Iterable[MetagraphNeuron]) -> None:
        """Probe every axon; feed the live miners, and drop the others. Raises the error with which
        a feeding task has failed."""
        for miner in self._miners.values():
            if miner.feeding.done():
                miner.feeding.result()
        endpoints = endpoints_of(neurons)
        alive = await asyncio.gather(*(self._probe(dendrite, each) for each in endpoints))
        live = {each.hotkey: each for each, good in zip(endpoints, alive, strict=True) if good}
        for hotkey in set(self._miners) - set(live):
            logger.info("miner %s is gone", hotkey[:8])
            self._miners.pop(hotkey).feeding.cancel()
        for hotkey, endpoint in live.items():
            known = self._miners.get(hotkey)
            if known is not None and known.endpoint == endpoint:
                continue
            if known is not None:
                known.feeding.cancel()
            logger.info("miner %s is alive at %s:%d", hotkey[:8], endpoint.ip, endpoint.port)
            miner = self._miners[hotkey] = LiveMiner(endpoint)
            miner.feeding = asyncio.create_task(self._feed(dendrite, miner))

    async def stop(self) -> None:
        """Cancel all requests."""
        feedings = [miner.feeding for miner in self._miners.values()]
        for feeding in feedings:
            feeding.cancel()
        await asyncio.gather(*feedings, return_exceptions=True)

    async def _probe(self, dendrite: Dendrite, endpoint: Endpoint) -> bool:
        """Whether this miner is up and in our run; logs once why not."""
        began = time.monotonic()
        try:
            answer = await dendrite.call(endpoint, IsAlive(), timeout_seconds=PROBE_SECONDS)
        except MinerError as error:
            self._complain(endpoint.hotkey, error.reason)
            # A busy miner that answers slowly keeps its work.
            known = self._miners.get(endpoint.hotkey)
            return known is not None and known.endpoint == endpoint and error.status is not None
        milliseconds = 1000 * (time.monotonic() - began)
        self.metrics.log("alive", {"hotkey": endpoint.hotkey, "milliseconds": milliseconds})
        problem: str | None = "it takes no work"
        if answer.completion:
            problem = self.task.difference(
                version=answer.version, run_id=answer.run_id, data_hash=answer.data_hash
            )
        self._complain(endpoint.hotkey, problem)
        return problem is None

    def _complain(self, hotkey: str, problem: str | None) -> None:
        if problem is None:
            self._complaints.pop(hotkey, None)
        elif self._complaints.get(hotkey) != problem:
            self._complaints[hotkey] = problem
            logger.warning("miner %s is not asked: %s", hotkey[:8], problem)

    async def _feed(self, dendrite: Dendrite, miner: LiveMiner) -> None:
        await asyncio.gather(*(self._send(dendrite, miner) for _ in range(REQUESTS_AT_ONCE)))

    async def _send(self, dendrite: Dendrite, miner: LiveMiner) -> None:
        """Send one miner request after request."""
        hotkey, pause = miner.endpoint.hotkey, 1.0
        while True:
            began = time.monotonic()
            try:
                answered = await self._ask(dendrite, miner.endpoint)
            except MinerError as error:
                logger.warning("%s", error)
                self.metrics.log("refused", {"hotkey": hotkey, "reason": error.reason})
                await asyncio.sleep(error.retry_after_seconds or pause)
                pause = min(MAX_PAUSE_SECONDS, 2 * pause)
                continue
            pause = 1.0
            if answered.answer.samples:
                miner.worked_at = time.monotonic()
            try:
                await self.take(answered)
            except HiveminerError as error:
                logger.warning("an answer of %s is not counted: %s", hotkey[:8], error)
            await asyncio.sleep(max(0.0, began + LEAST_SECONDS - time.monotonic()))

    async def _ask(self, dendrite: Dendrite, endpoint: Endpoint) -> Answered:
        request = Train(
            request_id=uuid.uuid4().hex,
            run_id=str(self.task.run_id),
            data_hash=self.task.dataset.hash,
            version=__version__,
            dataset_indices=self.assign(endpoint.hotkey),
            batch_size=self.work.batch_size,
            gradient_accumulation_steps=self.work.gradient_accumulation_steps,
            timeout_seconds=self.work.timeout_seconds,
        )
        began = time.monotonic()
        # Its own time, that of the request before it, and some for the transfer.
        limit = REQUESTS_AT_ONCE * request.timeout_seconds + TRANSFER_SECONDS
        answer = await dendrite.call(endpoint, request, timeout_seconds=limit)
        return Answered(endpoint.hotkey, request, answer, time.monotonic() - began)
