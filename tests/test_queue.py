"""The work queue: its order, its bounds, and what the worker survives."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import pytest

from hiveminer.errors import Refused, TrainingError
from hiveminer.rpc.queue import WorkQueue
from programs import wait_for


class Held:
    """A queue whose worker is held by a first job until `release`."""

    def __init__(self, **options: Any) -> None:
        self.queue = WorkQueue(**options)
        self.done: list[str] = []
        self._gate = threading.Event()
        self.queue.start()
        self.first = self.queue.submit(self._gate.wait, caller="first", key="first", priority=1.0)
        wait_for(lambda: self.queue.busy, seconds=60)

    def submit(self, key: str, *, caller: str = "", priority: float = 1.0) -> Future[Any]:
        def job() -> str:
            self.done.append(key)
            return f"did {key}"

        return self.queue.submit(job, caller=caller or key, key=key, priority=priority)

    def release(self) -> None:
        self._gate.set()


@pytest.fixture
def options() -> dict[str, int]:
    return {"capacity": 6, "share": 3}


@pytest.fixture
def held(options: dict[str, int]) -> Iterator[Held]:
    held = Held(**options)
    yield held
    held.release()
    held.queue.stop(5)


@pytest.fixture
def queue(held: Held) -> WorkQueue:
    """A queue whose worker waits for jobs."""
    held.release()
    return held.queue


@pytest.mark.parametrize(
    ("asked", "order"),
    [
        ({"low": 1, "a": 5, "high": 9, "b": 5, "none": 0}, "high a b low none"),
        ({"one1": 1, "one2": 3, "one3": 2}, "one2 one3 one1"),
        # Callers take turns.
        (
            {"rich1": 4, "rich2": 4, "rich3": 4, "poor1": 1, "poor2": 1, "middle": 2},
            "rich1 middle poor1 rich2 poor2 rich3",
        ),
        ({"odd": math.nan, "low": 0.5, "most": math.inf}, "most low odd"),
    ],
)
def test_who_is_served_when(held: Held, asked: dict[str, float], order: str) -> None:
    """asked: priorities by key, which is the caller's name and a number."""
    futures = [
        held.submit(key, caller=key.rstrip("123"), priority=priority)
        for key, priority in asked.items()
    ]
    held.release()
    assert [future.result(60) for future in futures] == [f"did {key}" for key in asked]
    assert held.done == order.split()


def refused(held: Held, key: str, **how: Any) -> Refused:
    with pytest.raises(Refused) as raised:
        held.submit(key, **how)
    return raised.value


def test_the_queue_and_each_share_of_it_are_bounded(held: Held) -> None:
    for caller in ("a", "b"):
        for i in range(3):
            held.submit(f"{caller}{i}", caller=caller)
    own = refused(held, "a3", caller="a")
    assert "already waiting" in str(own)
    assert own.status == 429
    assert own.retry_after_seconds is not None
    assert own.retry_after_seconds >= 1
    assert held.queue.waiting == 6


def test_a_full_queue_gives_a_place_of_the_caller_that_holds_most(held: Held) -> None:
    many = [held.submit(f"a{i}", caller="a", priority=9) for i in range(3)]
    for i in range(2):
        held.submit(f"b{i}", caller="b", priority=5)
    held.submit("c0", caller="c", priority=5)
    held.submit("d0", caller="d", priority=1)  # takes the newest of a's three places
    with pytest.raises(Refused, match="full"):
        many[2].result(0)
    assert "full" in str(refused(held, "c1", caller="c", priority=1))
    held.submit("c2", caller="c", priority=6)  # as many as b then, and more stake
    assert refused(held, "b2", caller="b", priority=5).status == 429
    held.release()
    assert many[1].result(60) == "did a1"
    wait_for(lambda: len(held.done) == 6, seconds=60)
    assert held.done == ["a0", "c2", "b0", "d0", "a1", "c0"]


@pytest.mark.parametrize("options", [{"capacity": 3}])
def test_the_least_stake_gives_way_when_all_hold_one_place(held: Held) -> None:
    futures = [held.submit(f"p{p}", priority=p) for p in (2, 1, 3)]
    refused(held, "p0", priority=0.5)
    held.submit("p4", priority=4)
    with pytest.raises(Refused, match="full"):
        futures[1].result(0)
    held.release()
    futures[0].result(60)
    assert held.done == ["p4", "p3", "p2"]


def test_a_key_with_other_content_is_refused(held: Held) -> None:
    first = held.queue.submit(lambda: 1, caller="a", key="k", priority=1, content="x")

    def again(content: str) -> Future[Any]:
        return held.queue.submit(lambda: 2, caller="a", key="k", priority=1, content=content)

    for _ in range(2):
        assert again("x") is first
        with pytest.raises(Refused) as conflict:
            again("y")
        assert conflict.value.status == 409
        held.release()
        assert first.result(60) == 1


def test_the_same_key_runs_once_while_it_waits_and_afterwards(held: Held) -> None:
    first = held.submit("x", caller="a")
    assert held.submit("x", caller="a") is first
    other = held.submit("x", caller="b")
    assert other is not first
    held.release()
    assert first.result(60) == other.result(60) == "did x"
    assert held.submit("x", caller="a") is first
    assert held.done == ["x", "x"]


@pytest.mark.parametrize("options", [{"remember": 2}])
def test_only_the_last_answers_of_a_caller_are_remembered(queue: WorkQueue) -> None:
    runs: list[str] = []

    def run(key: str) -> None:
        queue.submit(lambda: runs.append(key), caller="a", key=key, priority=1).result(60)

    for key in ("1", "2", "3", "3", "2", "1"):
        run(key)
    assert runs == ["1", "2", "3", "1"]


def test_an_error_is_remembered_and_a_refusal_is_not(queue: WorkQueue) -> None:
    runs: list[str] = []

    def run(error: Exception) -> BaseException | None:
        def job() -> None:
            runs.append(str(error))
            raise error

        return queue.submit(job, caller="a", key=str(error), priority=1).exception(60)

    for error in (TrainingError("no"), TrainingError("no"), Refused(409, "x"), Refused(409, "x")):
        assert type(run(error)) is type(error)
    assert runs == ["no", "x", "x"]


def test_who_leaves_frees_the_place_unless_another_waits_for_it(held: Held) -> None:
    future = held.submit("x", caller="a")
    held.submit("x", caller="a")
    held.queue.leave(future)
    assert held.queue.waiting == 1
    held.queue.leave(future)
    assert held.queue.waiting == 0
    assert future.cancelled()
    held.queue.leave(held.first)
    held.release()
    assert held.first.result(60) is True
    assert held.done == []


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("error", [ValueError("x"), SystemExit(3), StopIteration(), MemoryError()])
def test_the_worker_survives_whatever_a_job_raises(held: Held, error: BaseException) -> None:
    def job() -> None:
        raise error

    future = held.queue.submit(job, caller="a", key="bad", priority=1)
    good = held.submit("good")
    held.release()
    assert isinstance(future.exception(60), Exception)
    assert good.result(60) == "did good"


def test_idle_is_called_in_the_worker_while_nothing_waits_and_may_fail() -> None:
    threads: list[str] = []

    def idle() -> None:
        threads.append(threading.current_thread().name)
        raise ValueError("an idle step that fails")

    queue = WorkQueue(idle=idle, idle_seconds=0.01)
    queue.start()
    wait_for(lambda: len(threads) >= 3, seconds=60)
    assert set(threads) == {"worker"}
    name = queue.submit(lambda: threading.current_thread().name, caller="a", key="k", priority=1)
    assert name.result(60) == "worker"
    queue.stop(5)


def test_stop_turns_away_who_waits_and_names_what_was_dropped(held: Held) -> None:
    waiting = held.submit("x")
    assert held.queue.stop(0.05) == ["x", "first"]
    with pytest.raises(Refused) as refused:
        waiting.result(0)
    assert refused.value.status == 503
    with pytest.raises(Refused, match="stopping"):
        held.submit("y")
    held.release()
    assert held.first.result(60) is True
    assert held.queue.stop(5) == []
