"""A peer that sends poison: `python poison_worker.py HOW` and then as swarm_worker.py.

HOW `nan`, `inf` or `loud` (a thousandfold): it sends that instead of its weights, and its own
guards are taken out. HOW `answers`: what it sends is fine, and what it averages for the
others is not finite. HOW `liar`: it hands out another state than its weights, as the
newest.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import swarm_worker
import torch
from hivemind.averaging import allreduce

from hiveminer.strategies.hivemind.averager import SwarmAverager

POISON = {"nan": math.nan, "inf": math.inf, "loud": 1000.0}


def poison_what_is_sent(factor: float) -> None:
    load = SwarmAverager._load_local_tensors_into_averager_

    def poisoned(self: Any) -> None:
        load(self)
        with self.get_tensors() as tensors:
            for tensor in tensors:
                tensor.mul_(factor)

    SwarmAverager._load_local_tensors_into_averager_ = poisoned
    SwarmAverager._apply_averaging_results_ = lambda self: None
    SwarmAverager.is_sound = lambda self: True


def poison_what_is_averaged() -> None:
    pack = allreduce.serialize_torch_tensor

    def packed(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return pack(torch.full_like(tensor, math.nan), *args, **kwargs)

    allreduce.serialize_torch_tensor = packed


def lie_about_the_state() -> None:
    state = SwarmAverager.get_current_state

    def lied(self: Any) -> Any:
        metadata, tensors, infos = state(self)
        return metadata, [tensor + 0.1 for tensor in tensors], infos

    SwarmAverager.get_current_state = lied
    # Whoever joins asks the donor of the highest priority first.
    SwarmAverager.state_sharing_priority = property(lambda self: 1e9, _always_first)


def _always_first(averager: Any, _value: float) -> None:
    averager._state_sharing_priority.value = 1e9
    averager._outer_pipe.send(("_trigger_declare_load_state", [], {}))


if __name__ == "__main__":
    how = sys.argv.pop(1)
    if how in POISON:
        poison_what_is_sent(POISON[how])
    elif how == "answers":
        poison_what_is_averaged()
    else:
        assert how == "liar", how
        lie_about_the_state()
    swarm_worker.main()
