"""Whom the failure detector checks, and that the averager is told of each loss."""

from __future__ import annotations

import threading
from typing import Any

from hiveminer.strategies.hivemind.failure_detector import FailureDetector, Group, Watched
from programs import wait_for


def test_members_of_the_round_are_checked_although_their_report_has_expired() -> None:
    watched = Watched()
    assert watched.update({"a"}, Group()) == {"a"}
    assert watched.update({"a"}, Group(b"1", frozenset("ac"))) == {"a", "c"}


def test_a_peer_that_was_left_out_is_checked_again_when_it_is_back() -> None:
    watched = Watched()
    first = Group(b"1", frozenset("c"))
    assert watched.update({"c"}, first) == {"c"}
    watched.leave_out({"c"})
    assert watched.update(set(), first) == set()  # once for each loss
    assert watched.update({"c"}, first) == {"c"}  # it reports anew
    watched.leave_out({"c"})
    assert watched.update(set(), Group(b"2", frozenset("c"))) == {"c"}  # it is in the next group


class Swarm:
    """The peer and the tracker of a failure detector; peers die and come back at will."""

    peer_id = "us"

    def __init__(self) -> None:
        self.reports = self
        self.local_progress = self
        self.epoch = 0
        self.alive: set[str] = set()
        self.seconds: dict[str, float] = {}
        self.epochs: dict[str, int] = {}

    def answering(self, peers: set[str], *, timeout_seconds: float) -> set[str]:
        return peers & self.alive

    def refresh(self, *, timeout_seconds: float) -> set[str]:
        return {*self.seconds, self.peer_id}

    def leave_out(self, peer: str) -> None:
        self.seconds.pop(peer, None)


def test_a_peer_lost_twice_in_one_step_is_reported_twice() -> None:
    """It is left out, comes back within the step, joins the group, and dies in its round."""
    swarm = Swarm()
    swarm.seconds, swarm.alive = {"c": 1.0}, set()
    lost: list[set[str]] = []
    group = Group()
    detector: Any = FailureDetector(
        peer=swarm,  # type: ignore[arg-type]
        tracker=swarm,  # type: ignore[arg-type]
        is_running=lambda: True,
        group=lambda: group,
        on_lost=lost.append,
        on_deserted=lambda: None,
    )
    ended = threading.Event()

    def step() -> None:
        with detector.during():
            ended.wait(60)

    thread = threading.Thread(target=step)
    thread.start()
    try:
        wait_for(lambda: len(lost) == 1, seconds=60)
        swarm.seconds, swarm.alive = {"c": 2.0}, {"c"}
        group = Group(b"1", frozenset("c"))
        swarm.alive = set()
        wait_for(lambda: len(lost) == 2, seconds=60)
        assert lost == [{"c"}, {"c"}]
    finally:
        ended.set()
        thread.join()
        detector.close()
