"""A bounded queue in front of the one worker thread that trains.

Training changes the model, so exactly one thread does it, one job at a time. Callers take
turns: in each round every caller with a job waiting is served once, highest priority
(stake) first, so stake decides the order and nobody is starved. Each caller has a share
of the places. When all of them are taken, a caller that holds fewer than another one, or
as many and has more stake, gets a place of that one.
"""

from __future__ import annotations

import logging
import math
import threading
import time
import traceback
from collections import Counter, OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from hiveminer.errors import HiveminerError, Refused

log = logging.getLogger(__name__)

FIRST_GUESS_SECONDS = 10.0
"""Assumed duration of a job before one has been measured."""

REMEMBERED_CALLERS = 256


@dataclass(eq=False)
class _Job:
    call: Callable[[], Any]
    caller: str
    key: str
    content: str
    priority: float
    future: Future[Any] = field(default_factory=Future)
    waiters: int = 1


class WorkQueue:
    """See the module.

    capacity, share: jobs that may wait, in all and per caller.
    remember: answers kept per caller, so that a retry does not run again.
    idle: called in the worker thread about every `idle_seconds` while nothing waits.
    """

    def __init__(
        self,
        *,
        capacity: int = 64,
        share: int = 4,
        remember: int = 16,
        idle: Callable[[], None] = lambda: None,
        idle_seconds: float = 1.0,
    ) -> None:
        self.capacity = capacity
        self.share = share
        self.remember = remember
        self.idle = idle
        self.idle_seconds = idle_seconds
        self._changed = threading.Condition()
        self._waiting: list[_Job] = []
        self._running: _Job | None = None
        self._finished: OrderedDict[str, OrderedDict[str, _Job]] = OrderedDict()
        self._served: set[str] = set()
        self._average_seconds = FIRST_GUESS_SECONDS
        self._stopping = False
        self.thread = threading.Thread(target=self._work, name="worker", daemon=True)

    def start(self) -> None:
        """Start the worker; jobs may have been submitted before."""
        self.thread.start()

    def stop(self, timeout_seconds: float) -> list[str]:
        """Refuse the waiting jobs and let the running one finish.

        Returns the keys of the jobs without a result, including the running one if it did not
        end within `timeout_seconds`.
        """
        with self._changed:
            self._stopping = True
            dropped, self._waiting = self._waiting, []
            self._changed.notify_all()
        for job in dropped:
            job.future.set_exception(Refused(503, "the miner is stopping"))
        if self.thread.is_alive():
            self.thread.join(timeout_seconds)
        running = self._running
        return [job.key for job in dropped] + ([running.key] if running else [])

    @property
    def waiting(self) -> int:
        """Number of waiting jobs, without the running one."""
        return len(self._waiting)

    @property
    def busy(self) -> bool:
        """Whether a job is running."""
        return self._running is not None

    def submit(
        self,
        call: Callable[[], Any],
        *,
        caller: str,
        key: str,
        priority: float,
        content: str = "",
    ) -> Future[Any]:
        """Queue `call`, or join the job that `caller` submitted under the same `key`.

        The future fails with `Refused` 429 if the job loses its place. Raises `Refused`: 409 for a
        known key with other `content`, 429 when the queue or the caller's share is full, 503 after
        `stop`.
        """
        with self._changed:
            known = self._find(caller, key)
            if known is not None:
                if known.content != content:
                    raise Refused(409, f"request_id {key} was used for another request")
                known.waiters += 1
                return known.future
            priority = -math.inf if math.isnan(priority) else priority
            displaced = self._make_room(caller, priority)
            job = _Job(call, caller, key, content, priority)
            self._waiting.append(job)
            self._changed.notify_all()
        if displaced is not None:
            displaced.future.set_exception(self._full())
        return job.future

    def leave(self, future: Future[Any]) -> None:
        """Withdraw one waiter of `future`; a waiting job is removed with its last one."""
        with self._changed:
            for job in [job for job in self._waiting if job.future is future]:
                job.waiters -= 1
                if not job.waiters:
                    self._waiting.remove(job)
                    future.cancel()

    def _find(self, caller: str, key: str) -> _Job | None:
        for job in (self._running, *self._waiting):
            if job is not None and (job.caller, job.key) == (caller, key):
                return job
        answers = self._finished.get(caller, OrderedDict())
        if key not in answers:
            return None
        self._finished.move_to_end(caller)
        answers.move_to_end(key)
        return answers[key]

    def _make_room(self, caller: str, priority: float) -> _Job | None:
        """Remove and return a job if the queue is full. Raises `Refused` if none may be removed."""
        if self._stopping:
            raise Refused(503, "the miner is stopping")
        held = Counter(job.caller for job in self._waiting)
        if held[caller] >= self.share:
            reason = f"{self.share} requests of this hotkey are already waiting"
            raise Refused(429, reason, retry_after_seconds=self._retry_seconds())
        if len(self._waiting) < self.capacity:
            return None
        # The newest job of the caller with the most jobs; among equals, the least stake.
        victim = max(reversed(self._waiting), key=lambda job: (held[job.caller], -job.priority))
        if (held[victim.caller], priority) <= (held[caller] + 1, victim.priority):
            raise self._full()
        self._waiting.remove(victim)
        return victim

    def _full(self) -> Refused:
        return Refused(429, "the queue is full", retry_after_seconds=self._retry_seconds())

    def _retry_seconds(self) -> float:
        return min(max(self._average_seconds, 1.0), 600.0)

    def _work(self) -> None:
        while not self._stopping:
            job = self._next()
            if job is not None:
                self._run(job)
            elif not self._stopping:
                try:
                    self.idle()
                except Exception:
                    log.exception("the worker's idle step failed; the worker continues")

    def _next(self) -> _Job | None:
        """The job with the highest priority among the callers not served yet in this round; None
        when `idle` is due or the queue has stopped."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._stopping, self.idle_seconds)
            if not self._waiting:
                return None
            candidates = [job for job in self._waiting if job.caller not in self._served]
            if not candidates:
                self._served.clear()
                candidates = self._waiting
            job = max(candidates, key=lambda job: job.priority)
            self._served.add(job.caller)
            self._waiting.remove(job)
            job.future.set_running_or_notify_cancel()
            self._running = job
            return job

    def _run(self, job: _Job) -> None:
        began = time.monotonic()
        result: Any = None
        error: Exception | None = None
        try:
            result = job.call()
        # Without its worker the miner could not train, so everything is caught.
        except BaseException as raised:  # noqa: BLE001
            error = _as_exception(raised)
        with self._changed:
            seconds = time.monotonic() - began
            self._average_seconds = 0.7 * self._average_seconds + 0.3 * seconds
            self._running = None
            if not isinstance(error, Refused):
                self._remember(job)
            self._changed.notify_all()
        if error is None:
            job.future.set_result(result)
        else:
            job.future.set_exception(error)

    def _remember(self, job: _Job) -> None:
        answers = self._finished.setdefault(job.caller, OrderedDict())
        self._finished.move_to_end(job.caller)
        job.call = lambda: None  # it holds the request
        answers[job.key] = job
        if len(answers) > self.remember:
            answers.popitem(last=False)
        if len(self._finished) > REMEMBERED_CALLERS:
            self._finished.popitem(last=False)


def _as_exception(raised: BaseException) -> Exception:
    """The error for waiters; logged unless it was raised on purpose.

    It may be kept for long, so its frames are cleared: they hold a batch, or activations.
    """
    if not isinstance(raised, HiveminerError):
        log.error("a job failed", exc_info=raised)
    seen: BaseException | None = raised
    while seen is not None:
        traceback.clear_frames(seen.__traceback__)
        seen = seen.__cause__ or seen.__context__
    if isinstance(raised, Exception) and not isinstance(raised, StopIteration):
        return raised
    return RuntimeError(f"a job ended with {type(raised).__name__}: {raised}")
