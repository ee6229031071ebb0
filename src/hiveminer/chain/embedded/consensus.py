"""Validator permits, and the metagraph's scores from the weights; pure functions.

A simple substitute for Yuma consensus. The real chain clips weights to a stake-weighted median,
keeps bonds over time and runs once per epoch; here everything is computed from the current weights
at each read, so that tests and demos see what was set.

With `s_i` the stake share of validator i among the validators whose weights count, and
`w_ij` its weights normalised to a sum of 1:

    incentive_j = sum_i s_i w_ij
    dividends_i = s_i sum_j w_ij incentive_j, normalised to a sum of 1
    emission_j  = half incentive_j, half dividends_j
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hiveminer.chain.embedded.schema import RAO_PER_TAO
from hiveminer.chain.embedded.state import Neuron

STAKE_THRESHOLD_RAO = 1_000 * RAO_PER_TAO
"""The least stake a hotkey needs to set weights, as on the main network."""


@dataclass(frozen=True)
class Scores:
    """One column each, by uid, every value from 0 to 1."""

    incentive: list[float]
    dividends: list[float]
    emission: list[float]


def permits(neurons: Sequence[Neuron], settings: Mapping[str, int]) -> list[bool]:
    """Whether each uid holds a validator permit.

    The `max_validators` largest stakes do, if they reach the threshold; a tie goes to the lower
    uid. The real chain renews permits once per epoch, this one at every block.
    """
    able = [n for n in neurons if n.stake >= STAKE_THRESHOLD_RAO]
    best = sorted(able, key=lambda n: (-n.stake, n.uid))[: settings["max_validators"]]
    return [n in best for n in neurons]


def scores(
    neurons: Sequence[Neuron],
    weights: Mapping[int, Mapping[int, int]],
    settings: Mapping[str, int],
    *,
    block: int,
) -> Scores:
    """The columns of the metagraph, by the formulas at the top.

    `weights` is {validator's uid: {uid: weight}}. A row counts while its validator holds
    a permit and set it no longer than `activity_cutoff` blocks ago; a weight counts if it
    was set after its target registered, so that a recycled uid inherits nothing.
    """
    permitted = permits(neurons, settings)
    rows: dict[int, dict[int, int]] = {}
    for uid, given in weights.items():
        set_at = neurons[uid].last_update
        row = {to: weight for to, weight in given.items() if neurons[to].registered < set_at}
        if row and permitted[uid] and block - set_at <= settings["activity_cutoff"]:
            rows[uid] = row
    total = sum(neurons[uid].stake for uid in rows)
    incentive, earned = [0.0] * len(neurons), [0.0] * len(neurons)
    for uid, row in rows.items():
        for target, weight in row.items():
            incentive[target] += neurons[uid].stake / total * weight / sum(row.values())
    for uid, row in rows.items():
        good = sum(weight * incentive[target] for target, weight in row.items())
        earned[uid] = neurons[uid].stake / total * good / sum(row.values())
    dividends = [each / (sum(earned) or 1.0) for each in earned]
    emission = [(i + d) / 2 for i, d in zip(incentive, dividends, strict=True)]
    return Scores(incentive, dividends, emission)
