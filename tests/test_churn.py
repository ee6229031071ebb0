"""What `scripts/bench churn` counts: which tokens ended in the swarm's state, and when."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.churn import Life, Window, counted, longest_stall, rate, restarts


def life(number: int, lines: list[dict[str, Any]], *, started: float, ended: float) -> Life:
    """A life of miner 0 that was ready a second after its start."""
    ready = {"event": "ready", "time": started + 1.0, "number": 0, "epoch": 0}
    return Life(index=0, number=number, started=started, ended=ended, lines=[ready, *lines])


def step(number: int, time: float, *, epoch: int = 0, kept: bool = True) -> dict[str, Any]:
    """A step of one second that ended at that time."""
    tokens = 100 if kept else 0
    line = {"event": "step", "time": time, "number": number, "began": time - 1.0}
    return line | {"epoch": epoch, "kept": kept, "tokens": tokens}


def averaging(through: int, time: float, *, size: int) -> dict[str, Any]:
    return {"event": "round", "time": time, "number": through, "through": through, "size": size}


def numbers(*lives: Life) -> list[int]:
    return sorted(line["number"] for line in counted(lives))


def test_a_step_counts_once_its_weights_were_averaged() -> None:
    lines = [step(n, n) for n in (1, 2, 3, 4, 5)]
    alone = averaging(2, 2.5, size=1)
    together = averaging(4, 3.9, size=3)  # told within the step that it ends
    assert numbers(life(0, [*lines, alone], started=0, ended=6)) == []
    assert numbers(life(0, [*lines, alone, together], started=0, ended=6)) == [1, 2, 3, 4]


@pytest.mark.parametrize(("changed", "counts"), [(True, [4]), (False, [1, 2, 4])])
def test_what_a_download_replaces_is_lost(changed: bool, counts: list[int]) -> None:
    load = {"event": "load", "time": 2.5, "began": 2.4, "number": 3, "changed": changed}
    lines = [step(1, 1), step(2, 2), load, step(3, 3, kept=False), step(4, 4)]
    assert numbers(life(0, [*lines, averaging(4, 4, size=2)], started=0, ended=6)) == counts


def test_a_checkpoint_carries_what_was_in_it_and_no_more() -> None:
    first = life(0, [step(n, n) for n in (1, 2, 3, 4)], started=0, ended=5)
    resume = {"event": "resume", "time": 11.0, "number": 0, "epoch": 0, "written_at": 2.5}
    later = [step(11, 12), averaging(11, 12, size=2)]
    assert numbers(first, life(1, later, started=10, ended=20)) == [11]
    # The third step had begun when it was written, and was in it: it is told later.
    assert numbers(first, life(1, [resume, *later], started=10, ended=20)) == [1, 2, 3, 11]
    loaded = {"event": "load", "time": 11.5, "began": 11.4, "number": 0, "changed": True}
    assert numbers(first, life(1, [resume, loaded, *later], started=10, ended=20)) == [11]


def test_the_rate_is_by_the_second_of_a_live_miner() -> None:
    first = life(0, [step(1, 2), step(2, 4), averaging(2, 4, size=2)], started=0, ended=6)
    second = life(1, [step(3, 13), averaging(3, 13, size=2)], started=10, ended=30)
    both, window = [first, second], Window(1, 21)
    assert rate(both, window) == pytest.approx(300 / (5 + 10))
    assert rate(both, window, with_restarts=True) == pytest.approx(300 / (5 + 11))
    assert rate(both, Window(3, 6)) == pytest.approx(100 / 3)


def test_a_stall_and_a_restart_are_timed() -> None:
    first = life(0, [step(1, 2), step(2, 3), step(3, 15)], started=0, ended=16)
    assert longest_stall([first], Window(0, 20)) == 11.0
    assert longest_stall([first], Window(0, 2.5)) == 0.0
    ahead = Life(index=1, number=0, started=0, lines=[step(1, 17, epoch=4)])
    late = [step(1, 22, epoch=0), step(2, 23, epoch=4, kept=False), step(3, 24, epoch=4)]
    assert restarts([first, ahead, life(1, late, started=18, ended=30)]) == [6.0]
