"""Whom the failure detector checks, and that each loss is reported."""

from __future__ import annotations

import threading
from typing import Any

from hiveminer.strategies.hivemind.failure_detector import FailureDetector, Group
from programs import wait_for


class Swarm:
    """The peer and the tracker of a failure detector; its peers are dead."""

    peer_id = "us"

    def __init__(self) -> None:
        self.reports = self
        self.local_progress = self
        self.epoch = 0
        self.checks = 0
        self.seconds: dict[str, float] = {}
        self.epochs: dict[str, int] = {}

    def answering(self, peers: set[str], *, timeout_seconds: float) -> set[str]:
        self.checks += 1
        return set()

    def refresh(self, *, timeout_seconds: float) -> set[str]:
        return {*self.seconds, self.peer_id}

    def leave_out(self, peer: str) -> None:
        self.seconds.pop(peer, None)


def test_each_loss_of_a_peer_in_one_step_is_reported_once() -> None:
    """It reports, joins a group although its report has expired, and reports anew; and dies each
    time."""
    swarm = Swarm()
    swarm.seconds = {"c": 1.0}
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
        group = Group(b"1", frozenset("c"))
        wait_for(lambda: len(lost) == 2, seconds=60)
        checks = swarm.checks
        wait_for(lambda: swarm.checks >= checks + 3, seconds=60)
        assert len(lost) == 2
        swarm.seconds = {"c": 2.0}
        wait_for(lambda: len(lost) == 3, seconds=60)
        assert lost == [{"c"}] * 3
    finally:
        ended.set()
        thread.join()
        detector.close()
