"""One worker, and the line in front of it.

Training changes the model, so exactly one thread does it, one job after the other. The
line is bounded, each caller has a share of it, and nobody waits for ever. Who comes next
is decided by stake: a caller is served in proportion to it, so the highest goes first,
and one that always has something waiting cannot keep the others out. The price is that a
caller's second job may stand behind another caller's first.
"""

from __future__ import annotations

import logging
import threading
import time
import traceback
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from hiveminer.errors import HiveminerError, Refused

log = logging.getLogger(__name__)

FIRST_GUESS_SECONDS = 10.0
"""How long a job is taken to run before any has been seen to."""

SMALLEST_WEIGHT = 1e-9
"""A caller without stake still has a place in the order: the last."""

REMEMBERED_CALLERS = 256


@dataclass(eq=False)
class _Job:
    call: Callable[[], Any]
    caller: str
    key: str
    weight: float
    order: int
    expires_at: float
    future: Future[Any] = field(default_factory=Future)
    waiters: int = 1

    @property
    def name(self) -> tuple[str, str]:
        return self.caller, self.key


class WorkQueue:
    """A bounded queue before one worker thread.

    `capacity` jobs may wait in all, `share` of one caller. The answers to the last
    `remember` jobs of each caller are kept, so that a retry is answered and not run.
    `idle` is called in the worker thread about every `idle_seconds` while nothing waits.
    """

    def __init__(
        self,
        *,
        capacity: int = 64,
        share: int = 4,
        remember: int = 16,
        idle: Callable[[], None] | None = None,
        idle_seconds: float = 1.0,
        name: str = "worker",
    ) -> None:
        self.capacity = capacity
        self.share = share
        self.remember = remember
        self.idle = idle
        self.idle_seconds = idle_seconds
        self._changed = threading.Condition()
        self._line: list[_Job] = []
        self._running: _Job | None = None
        self._by_name: dict[tuple[str, str], _Job] = {}
        self._by_future: dict[Future[Any], _Job] = {}
        self._finished: OrderedDict[str, OrderedDict[str, Future[Any]]] = OrderedDict()
        self._order = 0
        self._clock = 0.0
        self._clocks: dict[str, float] = {}
        self._average_seconds: float | None = None
        self._stopping = False
        self._worker = threading.Thread(target=self._work, name=name, daemon=True)
        self._usher = threading.Thread(target=self._expire, name=f"{name}-waits", daemon=True)

    # Life

    def start(self) -> None:
        """Begin to work. Jobs may be submitted before; they wait."""
        self._worker.start()
        self._usher.start()

    def stop(self, timeout_seconds: float) -> list[str]:
        """Turn away who waits, let the running job finish, and say what was dropped.

        Returns the keys of the jobs that got no result: those that waited, and the
        running one if it did not end within `timeout_seconds`.
        """
        with self._changed:
            self._stopping = True
            dropped = list(self._line)
            for job in dropped:
                self._forget(job)
            self._changed.notify_all()
        for job in dropped:
            _fail(job.future, Refused(503, "the miner is stopping"))
        if self._worker.is_alive():
            self._worker.join(timeout_seconds)
        running = self._running
        return [job.key for job in dropped] + ([running.key] if running else [])

    # Callers

    @property
    def waiting(self) -> int:
        """Jobs that wait; the running one is not counted."""
        return len(self._line)

    @property
    def busy(self) -> bool:
        """Whether a job is running now."""
        return self._running is not None

    def submit(
        self,
        call: Callable[[], Any],
        *,
        caller: str,
        key: str,
        priority: float,
        expires_seconds: float,
    ) -> Future[Any]:
        """Put `call` in the line, or join the same job if `caller` gave `key` before.

        The future's result is what `call` returns; a job that waits longer than
        `expires_seconds` fails with `Refused` 503. Raises `Refused`: 429 when the line
        or the caller's share of it is full, 503 after `stop`.
        """
        with self._changed:
            known = self._known(caller, key)
            if known is not None:
                return known
            self._admit(caller)
            self._order += 1
            job = _Job(
                call=call,
                caller=caller,
                key=key,
                weight=max(priority, SMALLEST_WEIGHT) if priority == priority else SMALLEST_WEIGHT,
                order=self._order,
                expires_at=time.monotonic() + expires_seconds,
            )
            self._line_up(job)
            self._by_name[job.name] = job
            self._by_future[job.future] = job
            self._changed.notify_all()
        job.future.add_done_callback(self._cancelled)
        return job.future

    def leave(self, future: Future[Any]) -> bool:
        """One waiter of `future` has gone. True if that freed a place in the line.

        The place is freed when nobody else waits for the same job; a job that runs is
        never interrupted.
        """
        with self._changed:
            job = self._by_future.get(future)
            if job is None:
                return False
            job.waiters -= 1
            if job.waiters > 0 or job not in self._line:
                return False
            self._forget(job)
        future.cancel()
        return True

    def _known(self, caller: str, key: str) -> Future[Any] | None:
        job = self._by_name.get((caller, key))
        if job is not None:
            job.waiters += 1
            return job.future
        answers = self._finished.get(caller)
        if answers is None or key not in answers:
            return None
        self._finished.move_to_end(caller)
        answers.move_to_end(key)
        return answers[key]

    def _admit(self, caller: str) -> None:
        if self._stopping:
            raise Refused(503, "the miner is stopping")
        wait = min(max(self._average_seconds or FIRST_GUESS_SECONDS, 1.0), 600.0)
        if sum(job.caller == caller for job in self._line) >= self.share:
            reason = f"{self.share} requests of this hotkey wait already"
            raise Refused(429, reason, retry_after_seconds=wait)
        if len(self._line) >= self.capacity:
            raise Refused(429, "the queue is full", retry_after_seconds=wait)

    def _cancelled(self, future: Future[Any]) -> None:
        if future.cancelled():
            with self._changed:
                job = self._by_future.get(future)
                if job is not None:
                    self._forget(job)

    def _forget(self, job: _Job) -> None:
        """Take a job out of the books; the lock is held."""
        if job in self._line:
            self._line.remove(job)
        if self._by_name.get(job.name) is job:
            del self._by_name[job.name]
        self._by_future.pop(job.future, None)

    # The worker

    def _work(self) -> None:
        while not self._stopping:
            job = self._next()
            if job is not None:
                self._run(job)
            elif self.idle is not None and not self._stopping:
                _survive(self.idle)

    def _next(self) -> _Job | None:
        """The next job, or None when it is time for `idle`, or for the end."""
        idle_at = time.monotonic() + self.idle_seconds
        with self._changed:
            while not self._stopping:
                job = self._pick()
                if job is not None:
                    return job
                left = idle_at - time.monotonic()
                if left <= 0:
                    return None
                self._changed.wait(left)
        return None

    def _pick(self) -> _Job | None:
        """Take the job that weighted fair queueing serves first (Demers et al., 1989).

        Each caller's clock goes on by 1/stake a job; the job that would end first on its
        caller's clock is next, so that between equals it is first come, first served.
        """
        while self._line:
            job = min(self._line, key=self._turn)
            self._line.remove(job)
            if not job.future.set_running_or_notify_cancel():
                self._forget(job)
                continue
            self._clock = max(self._clock, self._clocks[job.caller])
            self._clocks[job.caller] += 1.0 / job.weight
            self._running = job
            return job
        return None

    def _turn(self, job: _Job) -> tuple[float, int]:
        return self._clocks[job.caller] + 1.0 / job.weight, job.order

    def _line_up(self, job: _Job) -> None:
        """A caller that had nothing waiting begins where the others are: waiting saves
        no turns up, and an empty line forgets."""
        if not self._line:
            self._clock, self._clocks = 0.0, {}
        if not any(other.caller == job.caller for other in self._line):
            self._clocks[job.caller] = max(self._clock, self._clocks.get(job.caller, 0.0))
        self._line.append(job)

    def _run(self, job: _Job) -> None:
        began = time.monotonic()
        result: Any = None
        error: Exception | None = None
        try:
            result = job.call()
        # A thread that dies would leave the miner deaf, so nothing gets past here.
        except BaseException as raised:  # noqa: BLE001
            error = _as_exception(raised)
        with self._changed:
            self._learn(time.monotonic() - began)
            self._forget(job)
            self._running = None
            if not isinstance(error, Refused):
                self._keep(job)
            self._changed.notify_all()
        if error is None:
            job.future.set_result(result)
        else:
            job.future.set_exception(error)

    def _learn(self, seconds: float) -> None:
        average = self._average_seconds
        self._average_seconds = seconds if average is None else 0.7 * average + 0.3 * seconds

    def _keep(self, job: _Job) -> None:
        answers = self._finished.setdefault(job.caller, OrderedDict())
        self._finished.move_to_end(job.caller)
        answers[job.key] = job.future
        if len(answers) > self.remember:
            answers.popitem(last=False)
        if len(self._finished) > REMEMBERED_CALLERS:
            self._finished.popitem(last=False)

    def _expire(self) -> None:
        """Turn away who has waited too long, also while the worker is busy."""
        while not self._stopping:
            with self._changed:
                now = time.monotonic()
                late = [job for job in self._line if job.expires_at <= now]
                for job in late:
                    self._forget(job)
                if not late:
                    ends = [job.expires_at for job in self._line]
                    self._changed.wait(min(ends) - now if ends else None)
            for job in late:
                _fail(job.future, Refused(503, "waited too long for its turn"))


def _fail(future: Future[Any], error: Exception) -> None:
    if future.set_running_or_notify_cancel():
        future.set_exception(error)


def _survive(call: Callable[[], None]) -> None:
    try:
        call()
    except Exception:
        log.exception("the worker's idle step failed; it goes on")


def _as_exception(raised: BaseException) -> Exception:
    """The error as its waiters get it, logged if nobody raised it on purpose.

    It may be remembered for long, so it lets go of what its frames hold (a batch, or a
    model's activations).
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
