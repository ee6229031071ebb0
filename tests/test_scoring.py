"""What a replayed answer is worth, on curves that are made for it, and who gets what weight."""

from __future__ import annotations

import json
import logging
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_neurons import Recorded, small_validator, told

from hiveminer.protocol import Train
from hiveminer.validation.curves import (
    FEWEST_STEPS,
    FULL_LEARNING,
    LEAST_LEARNING,
    LEAST_VARIANCE,
    Evidence,
    explained_variance,
    learning,
    ramp,
    score,
    shortfalls,
)
from hiveminer.validation.feed import Answered
from hiveminer.validation.judge import EVASIONS, Judge
from hiveminer.validation.scores import ScoreTable

# As the built-in model shows them after its first few hundred rows: groups of rows differ
# by 0.3 nats a token, and ten steps learn a tenth of one.
STEPS = 10
SPREAD = 0.3
LEARNT = 0.1

quick = settings(max_examples=60)
finite = st.floats(allow_nan=False, allow_infinity=False)
curves = st.lists(st.tuples(finite, finite, finite), min_size=1, max_size=20)


def difficulty(seed: int) -> list[float]:
    """What the weights make of each group of rows before anything is learnt."""
    draw = random.Random(seed)
    return [3.0 + draw.gauss(0, SPREAD) for _ in range(STEPS)]


def learnt(untrained: list[float], *, share: float = 1.0) -> tuple[float, ...]:
    """The same rows' losses when each step has learnt from those before it."""
    return tuple(loss - share * gain(i) for i, loss in enumerate(untrained))


def gain(step: int) -> float:
    return LEARNT * (1 - math.exp(-step / 3))


def noisy(curve: tuple[float, ...], *, size: float, seed: int = 1) -> tuple[float, ...]:
    draw = random.Random(seed)
    return tuple(loss + draw.gauss(0, size) for loss in curve)


UNTRAINED = difficulty(0)
TRAINED = learnt(UNTRAINED)
EVIDENCE = Evidence(
    hotkey="5F",
    request_id="r",
    epoch=3,
    answered=TRAINED,
    trained=TRAINED,
    untrained=tuple(UNTRAINED),
    claimed_samples=64,
    given_samples=64,
    tokens=1000,
)


CURVES = ("answered", "trained", "untrained")


def answer(curve: Any) -> float:
    return score(replace(EVIDENCE, answered=tuple(curve)))


SHORT = FEWEST_STEPS - 1


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({}, None),
        # Part of the epoch was trained already when this request began.
        ({"answered": tuple(loss - LEARNT for loss in TRAINED)}, None),
        ({"claimed_samples": 32}, None),
        ({"claimed_samples": 65}, "65 rows are claimed and 64 were given"),
        ({"answered": EVIDENCE.untrained}, "learning 0.00"),
        ({"answered": tuple(reversed(TRAINED))}, "fit 0.51 of 0.9"),
        ({"answered": (*TRAINED[:-1], math.nan)}, "is not finite"),
        ({"answered": (*TRAINED[:-1], math.inf)}, "is not finite"),
        ({"answered": (*TRAINED[:-1], -math.inf)}, "is not finite"),
        ({"answered": TRAINED[:-1]}, "9 losses were answered where a replay has 10"),
        ({"answered": (*TRAINED, 4.0)}, "11 losses were answered where a replay has 10"),
        ({"answered": ()}, "0 losses were answered"),
        ({"untrained": EVIDENCE.untrained[:-1]}, "losses were answered"),
        ({name: getattr(EVIDENCE, name)[:0] for name in CURVES}, "fewer than 6 of its losses"),
        ({name: getattr(EVIDENCE, name)[:SHORT] for name in CURVES}, "fewer than 6"),
        ({name: getattr(EVIDENCE, name)[:FEWEST_STEPS] for name in CURVES}, None),
    ],
)
def test_what_an_answer_is_worth_and_why(changes: dict[str, Any], why: str | None) -> None:
    found = replace(EVIDENCE, **changes)
    assert score(found) == (1.0 if why is None else 0.0)
    assert shortfalls(found) == [] if why is None else why in shortfalls(found)[0]


def test_a_validator_says_why_it_scored_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    metrics = Recorded()
    with small_validator(tmp_path, metrics=metrics) as validator:
        caplog.set_level(logging.INFO)
        validator._record(replace(EVIDENCE, answered=EVIDENCE.untrained))
        (words,) = told(caplog, "score")
        assert words.startswith("5F scores 0.00 of 1 with this answer: ")
        assert "steps were skipped or discarded" in words
        caplog.clear()
        validator._record(EVIDENCE)
        flat = (3.0,) * STEPS
        validator._record(replace(EVIDENCE, trained=flat, untrained=flat))
        assert not told(caplog, "score")
    lines = [(each["score"], each["average"], each["judged"]) for each in metrics.of("evidence")]
    assert lines == [(0.0, 0.0, True), (1.0, 0.5, True), (1.0, 0.5, False)]


def test_an_honest_answer_may_differ_a_little() -> None:
    assert EVIDENCE.fit == 1.0
    assert EVIDENCE.learning == pytest.approx(1.0)
    assert answer(noisy(TRAINED, size=0.02)) > 0.8


@pytest.mark.parametrize("seed", range(5))
def test_only_running_forward_is_worth_nothing(seed: int) -> None:
    assert answer(UNTRAINED) == 0.0
    assert answer(noisy(tuple(UNTRAINED), size=0.005, seed=seed)) < 0.2


@pytest.mark.parametrize("seed", range(5))
def test_an_invented_curve_is_worth_nothing(seed: int) -> None:
    smooth = tuple(3.0 - gain(i) for i in range(STEPS))
    assert answer(smooth) < 0.2
    assert answer(noisy(smooth, size=SPREAD, seed=100 + seed)) < 0.2
    assert answer([3.0] * STEPS) == 0.0
    assert answer([0.0] * STEPS) == 0.0
    assert answer([0.0] * (STEPS - 1) + [1.7e308]) == 0.0


@pytest.mark.parametrize("seed", range(1, 9))
def test_the_answer_for_other_rows_is_worth_nothing(seed: int) -> None:
    assert answer(learnt(difficulty(seed))) < 0.2


def test_learning_less_is_worth_less() -> None:
    half = (LEAST_LEARNING + FULL_LEARNING) / 2
    worth = [answer(learnt(UNTRAINED, share=share)) for share in (0, LEAST_LEARNING, half, 1.0)]
    assert worth == pytest.approx([0.0, 0.0, 0.5, 1.0])


def test_explained_variance_and_learning_on_curves_worked_out_by_hand() -> None:
    assert explained_variance([1.0, 3.0], [0.0, 2.0]) == 1.0, "a common offset is taken off"
    assert explained_variance([1.0, 1.0], [0.0, 2.0]) == 0.0, "a flat answer shares nothing"
    assert explained_variance([2.0, 0.0], [0.0, 2.0]) == -3.0
    assert explained_variance([9.0, 9.0], [1.0, 1.0]) == 1.0
    assert explained_variance([9.0, 8.0], [1.0, 1.0]) == -10.0
    assert learning([4.0, 3.0], trained=[4.0, 2.0], untrained=[4.0, 4.0]) == 0.5
    assert learning([9.0, 9.0], trained=[4.0, 4.0], untrained=[4.0, 4.0]) == 0.0
    assert [ramp(x, 1, 3) for x in (0, 1, 2, 3, 4)] == [0, 0, 0.5, 1, 1]


@quick
@given(points=curves, claimed=st.integers(0, 100), given_samples=st.integers(0, 100))
def test_a_score_lies_between_0_and_1_and_has_its_reason(
    points: list[tuple[float, float, float]], claimed: int, given_samples: int
) -> None:
    answered, trained, untrained = (tuple(curve) for curve in zip(*points, strict=True))
    found = replace(
        EVIDENCE,
        answered=answered,
        trained=trained,
        untrained=untrained,
        claimed_samples=claimed,
        given_samples=given_samples,
    )
    assert 0 <= score(found) <= 1
    assert score(found) == 1 or shortfalls(found)


def table_of(work: list[tuple[str, float, int]]) -> ScoreTable:
    table = ScoreTable()
    for hotkey, value, tokens in work:
        table.add_score(hotkey, value)
        table.add_work(hotkey, tokens)
    return table


def test_a_weight_is_score_times_tokens() -> None:
    table = table_of([("a", 1.0, 100), ("b", 0.5, 100), ("c", 1.0, 50)])
    assert table.weights() == pytest.approx({"a": 0.5, "b": 0.25, "c": 0.25})


def test_work_without_a_replay_and_a_replay_without_work_earn_nothing() -> None:
    table = ScoreTable()
    assert table.weights() == {}
    table.add_work("unproved", 10_000)
    table.add_score("idle", 1.0)
    assert table.weights() == {}
    table.add_score("works", 1.0)
    table.add_work("works", 1)
    assert table.weights() == {"works": 1.0}


def test_the_average_forgets_slowly() -> None:
    table = ScoreTable()
    scores = []
    for value in (1.0, 0.0, 0.5, 0.5, 0.5, 0.5):
        table.add_score("a", value)
        scores.append(table.of("a").score)
    assert scores == pytest.approx([1.0, 0.5, 0.5, 0.5, 0.5, 0.5])
    table.add_score("a", 1.0)
    assert table.of("a").score == pytest.approx(0.625)
    assert table.of("a").replays == 7


def test_a_cheat_who_was_honest_once_sinks_under_a_fifth_in_six_replays() -> None:
    table = ScoreTable()
    for value in (1.0, *[0.0] * 6):
        table.add_score("a", value)
    assert table.of("a").score < 0.2


def test_old_work_fades() -> None:
    table = table_of([("old", 1.0, 100), ("new", 1.0, 0)])
    table.decay_work()
    table.add_work("new", 100)
    assert table.weights() == pytest.approx({"old": 9 / 19, "new": 10 / 19})


def test_retain_forgets_who_is_gone_and_a_newcomer_inherits_nothing() -> None:
    table = table_of([("stays", 1.0, 10), ("goes", 1.0, 10)])
    table.retain({"stays", "newcomer"})
    assert table.weights() == {"stays": 1.0}
    assert "newcomer" not in table.standings
    assert (table.of("goes").score, table.of("goes").replays) == (0.0, 0)


standings = st.lists(
    st.tuples(st.sampled_from("abcde"), st.floats(0, 1), st.integers(0, 10**12)), max_size=20
)


@quick
@given(work=standings)
def test_weights_are_shares_of_one(work: list[tuple[str, float, int]]) -> None:
    weights = table_of(work).weights()
    assert all(0 <= weight <= 1 for weight in weights.values())
    if weights:
        assert sum(weights.values()) == pytest.approx(1.0)


@quick
@given(work=standings)
def test_a_dump_is_json_and_comes_back_the_same(work: list[tuple[str, float, int]]) -> None:
    table = table_of(work)
    again = ScoreTable.restore(json.loads(json.dumps(table.dump())))
    assert again.standings == table.standings
    assert again.weights() == table.weights()


@pytest.mark.parametrize(
    "row",
    [
        {},
        {"score": 0.5, "replays": 1},
        {"score": 1.5, "replays": 1, "tokens": 1},
        {"score": -0.5, "replays": 1, "tokens": 1},
        {"score": math.nan, "replays": 1, "tokens": 1},
        {"score": 0.5, "replays": -1, "tokens": 1},
        {"score": 0.5, "replays": math.inf, "tokens": 1},
        {"score": 0.5, "replays": 1, "tokens": -1},
        {"score": 0.5, "replays": 1, "tokens": math.nan},
        {"score": 0.5, "replays": 1, "tokens": math.inf},
        {"score": "high", "replays": 1, "tokens": 1},
        {"score": None, "replays": 1, "tokens": 1},
        [0.5, 1, 1],
        "0.5",
        None,
    ],
)
def test_a_bad_state_is_refused(row: Any) -> None:
    for saved in ({"a": row}, [row], None):
        with pytest.raises(ValueError, match="score"):
            ScoreTable.restore(saved)


def test_a_fall_that_all_share_does_not_hide_that_the_rows_were_others() -> None:
    """In the first epoch every curve falls by two nats, whatever the rows are."""
    steps = range(10)
    fall = [3.2 + 2.2 * 0.8**step for step in steps]
    rows = (0.10, -0.12, 0.05, 0.14, -0.09, 0.02, -0.15, 0.11, -0.04, 0.07)
    others = (-0.08, 0.10, 0.13, -0.06, 0.01, -0.14, 0.09, -0.02, 0.12, -0.11)
    trained = [at + row for at, row in zip(fall, rows, strict=True)]
    copied = [at + row for at, row in zip(fall, others, strict=True)]
    assert explained_variance(trained, trained) == 1.0
    assert explained_variance(copied, trained) < LEAST_VARIANCE


# Curves that tell nothing ------------------------------------------------------------------------


def evidence_of(answered: Any, *, trained: Any, untrained: Any) -> Evidence:
    curves = {"answered": answered, "trained": trained, "untrained": untrained}
    return replace(EVIDENCE, **{name: tuple(curve) for name, curve in curves.items()})


@pytest.mark.parametrize("seed", range(12))
def test_rows_that_are_all_alike_judge_nobody(seed: int) -> None:
    """A few thousandths of a nat are what rounding and a little training make of them."""
    draw = random.Random(seed)
    noise = [[0.11 + draw.gauss(0, 0.003) for _ in range(STEPS)] for _ in range(3)]
    found = evidence_of(noise[0], trained=noise[1], untrained=noise[2])
    assert found.explained_variance < LEAST_VARIANCE, "there is something to see after all"
    assert not found.tells
    assert score(found) == 1.0


@pytest.mark.parametrize("seed", range(12))
def test_a_converged_model_judges_by_the_rows_alone(seed: int) -> None:
    """Training moves each loss a little, up or down, and where the miner stands as well."""
    draw = random.Random(seed)

    def moved() -> list[float]:
        return [loss + draw.gauss(0, 0.01) for loss in UNTRAINED]

    honest = evidence_of(moved(), trained=moved(), untrained=UNTRAINED)
    assert not honest.tells
    assert score(honest) == 1.0
    other_rows = replace(honest, answered=tuple(difficulty(seed + 1)))
    assert other_rows.tells
    assert score(other_rows) < 0.2


REPLAYED = [
    tuple([int(x) / 1000 for x in part.split()] for part in line.split("|"))
    for line in (
        "0 55 129 203 248 267 284 427 | 0 55 118 208 290 298 164 430",
        "0 24 33 31 58 65 25 57 | 64 123 32 106 106 150 119 209",
        "0 9 -12 42 60 71 100 146 | 78 26 137 56 104 59 121 87",
        "0 10 68 14 19 81 79 86 | 33 13 60 -12 39 93 95 110",
        "0 26 43 76 38 73 101 150 | 1 22 47 51 26 83 83 101",
        "0 39 37 39 72 54 5 13 | -14 -30 -1 -19 -47 29 24 54",
        "0 -5 27 48 96 91 63 117 | 0 32 37 42 44 55 28 -3",
    )
]
"""What training gained in replays of an honest miner, alone in a swarm with a tiny Llama, and what
its answers showed of it."""


def replays(shown: list[list[float]]) -> list[float]:
    """The scores of answers that show this much, one after another."""
    nothing: Any = None
    judge = Judge(nothing, task=nothing, stopped=lambda: False)
    scores = []
    for (gained, _), part in zip(REPLAYED, shown, strict=True):
        untrained = difficulty(len(scores))[: len(gained)]
        answered, trained = (
            [loss - x for loss, x in zip(untrained, gains, strict=True)] for gains in (part, gained)
        )
        found = evidence_of(answered, trained=trained, untrained=untrained)
        assert found.shows_learning
        scores.append(score(judge._beside_the_last(found)))
    return scores


def test_one_answer_that_shows_nothing_by_chance_costs_an_honest_miner_nothing() -> None:
    shown = [part for _, part in REPLAYED]
    lowest = min(learning([-x for x in part], trained=[-x for x in gained], untrained=[0.0] * 8)
                 for gained, part in REPLAYED)  # fmt: skip
    assert lowest < LEAST_LEARNING
    assert replays(shown) == [1.0] * len(REPLAYED)
    idle = [[0.0] * 8] * len(REPLAYED)
    assert replays(idle) == [0.0] * len(REPLAYED)
    stopped = replays([shown[0], *idle[1:]])
    assert stopped[-1] == 0.0, "who has stopped working is seen after six replays"


def test_a_request_that_is_too_short_to_be_judged_costs_nothing() -> None:
    nothing: Any = None
    judge = Judge(nothing, task=nothing, stopped=lambda: False)
    for rows, judged in ((20, False), (21, True)):
        answer = Train(
            request_id="r", run_id="r", data_hash="d", dataset_indices=list(range(rows)),
            batch_size=2, gradient_accumulation_steps=2, losses=[3.0] * 5, epoch_steps=5,
        )  # fmt: skip
        answered = Answered("5F", answer, answer, seconds=1.0)
        found = [judge.judge(answered, nothing) for _ in range(EVASIONS)]
        told = [each.tells for each in found if each is not None]
        assert told == ([True] if judged else [False] * EVASIONS)


def test_no_answer_can_make_the_curves_flat() -> None:
    for answered in (UNTRAINED, [3.0] * STEPS, noisy(TRAINED, size=2.0), [1e30] * STEPS):
        found = evidence_of(answered, trained=TRAINED, untrained=UNTRAINED)
        assert found.tells
        assert score(found) < 0.2
    flat = evidence_of([3.0] * STEPS, trained=[3.0] * STEPS, untrained=[3.0] * STEPS)
    for wrong in ({"answered": (3.0,)}, {"answered": (math.nan,) * STEPS}, {"claimed_samples": 65}):
        assert score(replace(flat, **wrong)) == 0.0


def test_a_hotkey_that_cannot_be_judged_is_paid_until_it_can() -> None:
    table = ScoreTable()
    table.add_work("new", 10)
    assert table.weights() == {}
    for _ in range(2):
        table.add_unjudged("new")
        assert table.weights() == {}
    table.add_unjudged("new")
    assert table.weights() == {"new": 1.0}
    table.add_score("new", 0.0)
    assert table.weights() == {}, "the first judgement replaces the benefit of the doubt"
    table.add_unjudged("new")
    assert table.weights() == {}
