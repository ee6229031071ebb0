"""Thousands of random schedules of sparseloco's rounds; see round_simulator for the checks."""

from __future__ import annotations

from collections import Counter

import pytest
from round_simulator import EVENTS, World

SCHEDULES = 4000
CHUNK = 200
ALWAYS = 600
"""The schedules that also run without --all."""

OUTCOMES = {"returned", "repairs", "differs"}
"""A blob given back to its author by a void, a state that had to be downloaded, and one that
differed by rounding."""


@pytest.mark.parametrize(
    "first",
    [
        first if first < ALWAYS else pytest.param(first, marks=pytest.mark.slow)
        for first in range(0, SCHEDULES, CHUNK)
    ],
)
def test_peers_agree_and_lose_nothing_whatever_happens(first: int) -> None:
    seen: Counter[str] = Counter()
    for seed in range(first, first + CHUNK):
        world = World(seed)
        try:
            world.run()
        except (AssertionError, KeyError, ValueError) as error:
            error.add_note(f"seed {seed}, block {world.chain.head.number}")
            raise
        seen.update(world.events)
        seen["rounds that counted"] += sum(map(bool, world.truth.decided.values()))
        seen["void rounds"] += world.truth.voids
    # The schedules are as bad as they claim to be, and rounds count all the same.
    assert set(EVENTS) | OUTCOMES <= set(seen)
    assert seen["void rounds"] > 0
    assert seen["rounds that counted"] > 4 * CHUNK
