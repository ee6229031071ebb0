"""Validator permits, and the metagraph's scores from the weights; pure functions.

A simple substitute for Yuma consensus. The real chain clips weights to a stake-weighted median,
keeps bonds over time and runs once per epoch; here everything is computed from the current weights
at each read, so that tests and demos see what was set.

With `s_i` the stake share of validator i among the validators whose weights count, and
`w_ij` its weights normalised to a sum of 1:

    rank_j      = sum_i s_i w_ij
    incentive_j = rank_j / sum_k rank_k
    consensus_j = rank_j / max_k rank_k
    trust_j     = the stake share of those who gave j any weight
    dividends_i = s_i sum_j w_ij incentive_j, normalised to a sum of 1
    emission_j  = half incentive_j, half dividends_j
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

RAO_PER_TAO = 10**9

STAKE_THRESHOLD_RAO = 1_000 * RAO_PER_TAO
"""The least stake a hotkey needs to set weights, as on the main network."""


@dataclass(frozen=True)
class Member:
    """A neuron, as consensus sees it; its index in the list is its uid.

    stake: in rao. last_update: the block of its last weights. registered: the block of its
    registration.
    """

    stake: int
    last_update: int
    registered: int


@dataclass(frozen=True)
class Scores:
    """One column each, by uid, every value from 0 to 1."""

    rank: list[float]
    trust: list[float]
    consensus: list[float]
    incentive: list[float]
    dividends: list[float]
    emission: list[float]


def permits(stakes: Sequence[int], *, max_validators: int) -> list[bool]:
    """Whether each uid holds a validator permit.

    The `max_validators` largest stakes do, if they reach the threshold; a tie goes to the lower
    uid. The real chain renews permits once per epoch, this one at every block.
    """
    able = [uid for uid, stake in enumerate(stakes) if stake >= STAKE_THRESHOLD_RAO]
    best = set(sorted(able, key=lambda uid: (-stakes[uid], uid))[:max_validators])
    return [uid in best for uid in range(len(stakes))]


def scores(
    neurons: Sequence[Member],
    weights: Mapping[int, Mapping[int, int]],
    *,
    permitted: Sequence[bool],
    block: int,
    activity_cutoff: int,
) -> Scores:
    """The columns of the metagraph, by the formulas at the top.

    `weights` is {validator's uid: {uid: weight}}. A row counts while its validator holds
    a permit and set it no longer than `activity_cutoff` blocks ago; a weight counts if it
    was set after its target registered, so that a recycled uid inherits nothing.
    """
    size = len(neurons)
    rows = {
        uid: row
        for uid, given in weights.items()
        if uid < size
        and permitted[uid]
        and block - neurons[uid].last_update <= activity_cutoff
        and (row := _normalised(given, neurons, neurons[uid].last_update))
    }
    total = sum(neurons[uid].stake for uid in rows)
    share = {uid: neurons[uid].stake / total for uid in rows}
    rank, trust, earned = [0.0] * size, [0.0] * size, [0.0] * size
    for uid, row in rows.items():
        for target, weight in row.items():
            rank[target] += share[uid] * weight
            trust[target] += share[uid]
    incentive = _share(rank)
    for uid, row in rows.items():
        earned[uid] = share[uid] * sum(w * incentive[target] for target, w in row.items())
    dividends = _share(earned)
    top = max(rank, default=0.0)
    return Scores(
        rank=rank,
        trust=trust,
        consensus=[value / top if top else 0.0 for value in rank],
        incentive=incentive,
        dividends=dividends,
        emission=_share([i + d for i, d in zip(incentive, dividends, strict=True)]),
    )


def _normalised(
    given: Mapping[int, int], neurons: Sequence[Member], updated: int
) -> dict[int, float]:
    kept = {
        uid: value
        for uid, value in given.items()
        if uid < len(neurons) and value > 0 and neurons[uid].registered < updated
    }
    total = sum(kept.values())
    return {uid: value / total for uid, value in kept.items()}


def _share(values: Sequence[float]) -> list[float]:
    total = sum(values)
    return [value / total if total else 0.0 for value in values]
