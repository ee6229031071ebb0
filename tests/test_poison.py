"""One peer sends what is not to be averaged or loaded; the others are unharmed: real processes."""

from __future__ import annotations

import re
import time
from pathlib import Path

import numpy as np
import pytest
from test_survival import MOST_SECONDS, START_SECONDS, Worker, Workers

POISONER = Path(__file__).resolve().with_name("poison_worker.py")

slow = pytest.mark.slow


def start_poisoner(swarm: Workers, how: str) -> Worker:
    more = ("--rows", str(swarm.rows * 4 // 3), "--limit", "15")  # it waits in vain
    return swarm.start("c", *more, script=(str(POISONER), how))


def beside_liar(swarm: Workers, how: str, *, epochs: int) -> tuple[list[Worker], float]:
    """The honest peers, once they ended so many epochs with a liar; and since when it lies."""
    liar, honest = start_poisoner(swarm, how), [swarm.all[name] for name in "ab"]
    swarm.wait(lambda: len(liar.events("step")) > 20, START_SECONDS)
    since = time.time()
    swarm.wait(lambda: all(each.epochs(since=since) >= epochs for each in honest), 120)
    return honest, since


def newest_common(folder: Path, names: str) -> tuple[int, list[np.ndarray]]:
    """The last epoch that all of them ended by a round, and their weights after it."""
    epochs = [
        {int(path.name.split(".")[1]) for path in folder.glob(f"{name}.*.round.npy")}
        for name in names
    ]
    epoch = max(set.intersection(*epochs))
    return epoch, [np.load(folder / f"{name}.{epoch}.round.npy") for name in names]


@slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("how", ["nan", "loud", "inf", "answers"])
def test_poison_from_one_peer_leaves_the_others_unharmed(how: str, tmp_path: Path) -> None:
    with Workers(tmp_path, size=3, peer_rows=15) as swarm:
        swarm.start_all("ab")
        _, before = newest_common(tmp_path, "ab")
        began = time.time()
        poisoner = start_poisoner(swarm, how)
        honest = [swarm.all[name] for name in "ab"]
        swarm.wait(lambda: all("[poison]" in each.words for each in honest), START_SECONDS)
        since = max(each.events("step")[-1]["time"] for each in honest)
        rounds = lambda each: each.events("round", since=since)  # noqa: E731
        swarm.wait(lambda: all(len(rounds(each)) >= 4 for each in honest), 90)
        assert poisoner.process.poll() is None, swarm.told()
        # Once they know it, they average with each other as if it were not there.
        assert [each["size"] for each in rounds(honest[0])[-2:]] == [2, 2], swarm.told()
        _, (first, second) = newest_common(tmp_path, "ab")
        assert np.isfinite(first).all(), swarm.told()
        assert np.abs(first - second).max() < 1e-3, swarm.told()
        assert np.linalg.norm(first) < 2 * np.linalg.norm(before[0]), swarm.told()
        for each in honest:  # not one step of theirs was lost
            assert all(step["kept"] for step in each.events("step", since=began)), swarm.told()


@slow
@pytest.mark.timeout(240)
def test_a_member_that_says_nothing_costs_little_and_is_shunned(tmp_path: Path) -> None:
    with Workers(tmp_path, size=3, peer_rows=15) as swarm:
        swarm.start_all("ab")
        began = time.time()
        silent = start_poisoner(swarm, "silent")
        honest = [swarm.all[name] for name in "ab"]
        swarm.wait(lambda: all("for the second time" in each.words for each in honest), 150)
        since = max(each.events("step")[-1]["time"] for each in honest)
        swarm.wait(lambda: all(each.epochs(since=since) >= 4 for each in honest), 90)
        assert silent.process.poll() is None, swarm.told()
        for each in honest:
            # Twice the time that a member is given to begin, and never again.
            assert max(each.stalls(since=began), default=0.0) <= MOST_SECONDS, swarm.told()
            assert len(each.stalls(since=began)) <= 3, swarm.told()
        sizes = lambda each: [ended["size"] for ended in each.events("round")[-2:]]  # noqa: E731
        swarm.wait(lambda: all(sizes(each) == [2, 2] for each in honest), 60)


@slow
@pytest.mark.timeout(240)
def test_a_peer_that_says_it_is_ahead_does_not_make_the_others_throw_rows_away(
    tmp_path: Path,
) -> None:
    with Workers(tmp_path, size=3) as swarm:
        swarm.start_all("ab")
        began = time.time()
        honest, _ = beside_liar(swarm, "ahead", epochs=3)
        for each in honest:
            # One may be lost when an epoch ends elsewhere first; the liar made it most of them.
            steps = each.events("step", since=began)
            assert sum(step["kept"] for step in steps) >= 0.9 * len(steps), swarm.told()
            assert each.events("round")[-1]["size"] == 2, swarm.told()


@slow
@pytest.mark.timeout(240)
def test_rows_that_nobody_trained_do_not_end_epochs(tmp_path: Path) -> None:
    with Workers(tmp_path, size=3) as swarm:
        swarm.start_all("ab")
        honest, since = beside_liar(swarm, "rows", epochs=5)
        for each in honest:
            steps = len(each.events("step", since=since))
            # Of 90 rows in an epoch, 4 in a step; the liar counts for four times one of them.
            assert steps / each.epochs(since=since) >= 2.5, swarm.told()


@slow
@pytest.mark.timeout(240)
def test_a_state_that_the_others_contradict_is_not_loaded(tmp_path: Path) -> None:
    with Workers(tmp_path, size=3) as swarm:
        swarm.start_all("ab")
        start_poisoner(swarm, "liar")
        swarm.wait(lambda: swarm.averaged("c", 3), START_SECONDS)
        joiner = swarm.start("d")
        load = swarm.wait(lambda: joiner.events("load"), START_SECONDS)[-1]
        words = joiner.words
        assert load["loaded"], swarm.told()
        refused = re.findall(r"the state of peer \S+ is refused: \d of \d peers hold", words)
        assert refused, words
        epoch = load["epoch"]
        given = np.load(tmp_path / f"d.{epoch}.load.npy")
        theirs = np.load(tmp_path / f"a.{epoch}.round.npy")
        assert np.abs(given - theirs).max() < 1e-3, swarm.told()
