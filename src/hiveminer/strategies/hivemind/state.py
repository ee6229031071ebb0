"""Everything that a peer's training goes on from, taken out of its optimizer and put back.

The weights of this moment, those that the epoch began with (the averaging buffers, which
joiners are given), the inner optimizer's state, the learning rate's place in its schedule,
the epoch, and the rows trained in it. Training on after `load_state_dict` gives the same numbers,
bit for bit, as never having stopped.

Parameters go by their number in the optimizer: its groups follow from the model, and the
model's shape is part of the run id.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hiveminer.strategies.hivemind.optimizer import SwarmOptimizer
from hiveminer.strategies.hivemind.records import is_count
from hiveminer.training.optimizer import parameter_groups


def state_dict(optimizer: SwarmOptimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Copies on the CPU, 16 bytes a parameter at most, and facts that JSON holds.

    `weights.3`, `moments.3.exp_avg` (its every tensor of the inner optimizer) and `start.3`,
    which is left out where it equals the weights, as it does when an epoch has just begun.
    Call it between two steps.
    """
    averager = optimizer.state_averager
    with torch.no_grad(), averager.get_tensors() as buffers:
        places = _places(optimizer, buffers)
        tensors = {name: _copy(value) for name, value in places.items()}
    for number in range(len(averager.main_parameters)):
        if torch.equal(tensors[f"start.{number}"], tensors[f"weights.{number}"]):
            del tensors[f"start.{number}"]
    scheduler = averager.scheduler.state_dict()
    return tensors, {
        "epoch": int(optimizer.local_epoch),
        "rows": int(optimizer.local_progress.samples_accumulated),
        "schedule": {
            "epoch": int(scheduler["last_epoch"]),
            "steps": int(scheduler["_step_count"]),
            "rates": [float(rate) for rate in scheduler["_last_lr"]],
        },
    }


def load_state_dict(
    optimizer: SwarmOptimizer, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]
) -> None:
    """Make the optimizer what it was when this was taken, and tell the swarm so.

    Raises ValueError, having changed nothing, for what does not fit it.
    """
    epoch, rows, schedule = _read(facts, groups=len(optimizer.opt.param_groups))
    averager = optimizer.state_averager
    with torch.no_grad(), averager.get_tensors() as buffers:
        places = _places(optimizer, buffers)
        # A start that is left out equals the weights.
        starts = {name.replace("weights.", "start."): value for name, value in tensors.items()}
        values = starts | dict(tensors)
        wrong = values.keys() ^ places.keys() or {
            name
            for name, place in places.items()
            if values[name].shape != place.shape or values[name].dtype != place.dtype
        }
        if wrong:
            raise ValueError(f"it does not fit the model: {min(wrong)}")
        for name, place in places.items():
            place.copy_(values[name])
    averager.scheduler.load_state_dict(averager.scheduler.state_dict() | schedule)
    for group, rate in zip(optimizer.opt.param_groups, schedule["_last_lr"], strict=True):
        group["lr"] = rate
    averager.local_epoch = epoch
    averager.vouch()
    _report(optimizer, epoch=epoch, rows=rows)


def weights_by_name(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a checkpoint's tensors, by the names that the model has for them.

    Raises ValueError for a checkpoint that does not hold all of them.
    """
    names = {id(value): name for name, value in model.named_parameters()}
    groups = parameter_groups(model.parameters(), weight_decay=0.0)
    ordered = [parameter for group in groups for parameter in group["params"]]
    try:
        return {
            names[id(parameter)]: tensors[f"weights.{number}"]
            for number, parameter in enumerate(ordered)
        }
    except KeyError as error:
        raise ValueError(f"it does not hold the model's weights: {error} is missing") from None


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _places(optimizer: SwarmOptimizer, buffers: Any) -> dict[str, Tensor]:
    """The optimizer's own tensors by their names in a checkpoint."""
    places: dict[str, Tensor] = {}
    for number, weights in enumerate(optimizer.state_averager.main_parameters):
        places[f"weights.{number}"] = weights
        places[f"start.{number}"] = buffers[number]
        for key, value in optimizer.opt.state[weights].items():
            places[f"moments.{number}.{key}"] = value
    return places


def _read(facts: Mapping[str, Any], *, groups: int) -> tuple[int, int, dict[str, Any]]:
    """Epoch, rows trained in it, and the scheduler's state."""
    try:
        epoch, rows, schedule = facts["epoch"], facts["rows"], facts["schedule"]
        counts = [epoch, rows, schedule["epoch"], schedule["steps"]]
        rates = list(schedule["rates"])
    except (KeyError, TypeError):
        raise ValueError("it does not say its epoch, rows and learning rate") from None
    if not all(map(is_count, counts)):
        raise ValueError(f"its counts are out of bounds: {counts!r:.80}")
    if len(rates) != groups or not all(type(r) is float and math.isfinite(r) for r in rates):
        raise ValueError(f"its learning rates do not fit: {rates!r:.80}")
    return epoch, rows, {"last_epoch": counts[2], "_step_count": counts[3], "_last_lr": rates}


def _report(optimizer: SwarmOptimizer, *, epoch: int, rows: int) -> None:
    """Report this peer's progress to the tracker, and so to the swarm."""
    tracker = optimizer.tracker
    with tracker.pause_updates():
        tracker.update_epoch(epoch)
        # Not as progress: that would count as rows trained within this moment.
        tracker.local_progress.samples_accumulated = rows
        if tracker.global_progress.epoch == epoch:
            tracker.global_progress.samples_accumulated += rows
        tracker.report_local_progress(epoch, rows)
    optimizer.state_averager.state_sharing_priority = epoch
