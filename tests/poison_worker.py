"""A peer that sends poison: `python poison_worker.py HOW` and then as swarm_worker.py.

HOW `nan`, `inf` or `loud` (a thousandfold): it sends that instead of its weights, and its own
guards are taken out. HOW `answers`: what it sends is fine, and what it averages for the
others is not finite. HOW `liar`: it hands out another state than its weights, as the
newest. HOW `silent`: it joins groups, and then neither sends nor answers in them. HOW `ahead`: it
reports to be two epochs further. HOW `rows`: it reports a whole epoch's rows that it never trained.
"""

from __future__ import annotations

import asyncio
import functools
import math
import sys
from collections.abc import AsyncIterator
from typing import Any

import swarm_worker
import torch
from hivemind.averaging import DecentralizedAverager, allreduce
from hivemind.proto import averaging_pb2

from hiveminer.strategies.hivemind.averager import SwarmAverager
from hiveminer.strategies.hivemind.tracker import SampleTracker

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


def say_nothing_in_rounds() -> None:
    async def hang(*_: Any, **__: Any) -> None:
        await asyncio.sleep(3600)

    async def hang_on(*_: Any) -> AsyncIterator[averaging_pb2.AveragingData]:
        await asyncio.sleep(3600)
        yield averaging_pb2.AveragingData()

    SwarmAverager._run_allreduce_inplace_ = hang
    DecentralizedAverager.rpc_aggregate_part = functools.wraps(
        DecentralizedAverager.rpc_aggregate_part
    )(hang_on)


def report(*, epochs: int = 0, rows: int = 0) -> None:
    """Report this many more epochs and rows than are true."""
    progress = SampleTracker._get_local_progress

    def lied(self: Any, local_epoch: int, samples_accumulated: int) -> Any:
        honest = progress(self, local_epoch, samples_accumulated)
        more = {"epoch": honest.epoch + epochs, "samples_per_second": 1e9}
        return honest.copy(update=more | {"samples_accumulated": samples_accumulated + rows})

    SampleTracker._get_local_progress = lied
    # What it counts itself stays true, so that it does nothing else than say so.
    SampleTracker.ready_to_update_epoch = property(lambda self: False)


if __name__ == "__main__":
    how = sys.argv.pop(1)
    if how in POISON:
        poison_what_is_sent(POISON[how])
    elif how == "silent":
        say_nothing_in_rounds()
    elif how == "ahead":
        report(epochs=2)
    elif how == "rows":
        report(rows=10_000)
    elif how == "answers":
        poison_what_is_averaged()
    else:
        assert how == "liar", how
        lie_about_the_state()
    swarm_worker.main()
