"""The memory that training needs: estimated, and refused before anything is taken."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from in_process import Hub, InProcessStrategy
from small_neurons import miner_settings
from steps import LONGEST, ROWS, trainer
from tiny import tiny_model

from hiveminer import miner
from hiveminer.config.run import Run
from hiveminer.errors import OperatorError
from hiveminer.strategies.base import Context
from hiveminer.training.memory import (
    MemoryNeeded,
    check_device,
    check_machine,
    memory_left,
    memory_needed,
)
from hiveminer.training.optimizer import build_optimizer
from hiveminer.training.trainer import LocalStep


def test_what_is_counted_is_what_the_tensors_hold() -> None:
    model = tiny_model("llama")
    optimizer = build_optimizer(model.parameters(), Run().optimizer)
    trainer(model, optimizer=LocalStep(optimizer)).train(ROWS, batch_size=64)
    needed = memory_needed(model, sequence_length=LONGEST)
    states = optimizer.state.values()
    assert needed.optimizer_state == sum(
        state[moment].nbytes for state in states for moment in ("exp_avg", "exp_avg_sq")
    )
    assert needed.weights == needed.gradients == 4 * needed.parameters
    assert needed.casts == 0
    half = memory_needed(model, sequence_length=LONGEST, bfloat16=True)
    assert half.casts == 2 * needed.parameters
    assert needed.averaging == 20 * needed.parameters
    assert needed.snapshot == 16 * needed.parameters


def test_memory_is_estimated_without_taking_it() -> None:
    with torch.device("meta"):
        model = tiny_model("gpt2")
    needed = memory_needed(model, sequence_length=64)
    assert needed == memory_needed(tiny_model("gpt2"), sequence_length=64)
    assert needed.activations == 64 * (2 * 16 + 2 * 32) * 4


SEVEN_BILLION = MemoryNeeded(
    parameters=7 * 10**9,
    weights=28 * 10**9,
    gradients=28 * 10**9,
    optimizer_state=56 * 10**9,
    casts=0,
    averaging=140 * 10**9,
    snapshot=112 * 10**9,
    activations=10**9,
)


@pytest.mark.parametrize(("device", "wanted"), [("cpu", 337 * 10**9), ("cuda:0", 224 * 10**9)])
def test_a_model_that_cannot_fit_the_machine_is_refused_with_the_figure(
    device: str, wanted: int
) -> None:
    check_machine(SEVEN_BILLION, device, left=wanted)
    with pytest.raises(OperatorError) as caught:
        check_machine(SEVEN_BILLION, device, left=wanted - 1)
    assert "7,000.0M parameters" in str(caught.value)
    assert f"{wanted / 2**30:,.2f} GiB more memory" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_model_that_cannot_fit_the_device_is_refused_with_the_figure() -> None:
    device = torch.device("cuda", 1)
    check_device(SEVEN_BILLION, device, left=113 * 10**9)
    with pytest.raises(OperatorError, match=r"105\.24 GiB .* cuda:1 has 74\.51 GiB left"):
        check_device(SEVEN_BILLION, device, left=80 * 10**9)
    # On the machine's own memory, weights and optimizer_state are there already.
    check_device(SEVEN_BILLION, torch.device("cpu"), left=141 * 10**9)
    with pytest.raises(OperatorError, match="this machine has"):
        check_device(SEVEN_BILLION, torch.device("cpu"), left=140 * 10**9)


def test_a_containers_limit_counts(tmp_path: Path) -> None:
    def left() -> int:
        return memory_left(torch.device("cpu"), cgroup=tmp_path)

    assert left() > 2**20, "no limit there: what the machine has"
    (tmp_path / "memory.max").write_text("3000000\n")
    (tmp_path / "memory.current").write_text("2500000\n")
    (tmp_path / "memory.stat").write_text("anon 7\ninactive_file 100000\nfile 9\n")
    assert left() == 600_000
    (tmp_path / "memory.max").write_text("max\n")
    assert left() > 2**20


# --- CUDA and forks -----------------------------------------------------------------------------


def test_no_device_is_touched_before_the_strategy_is_built(tmp_path: Path) -> None:
    def touched(*_: object, **__: object) -> None:
        raise AssertionError("CUDA was touched")

    forbidden = pytest.MonkeyPatch()
    for name in ("_lazy_init", "mem_get_info", "is_available"):
        forbidden.setattr(torch.cuda, name, touched)

    def forking(context: Context) -> InProcessStrategy:
        assert {value.device.type for value in context.task.model.parameters()} == {"cpu"}
        forbidden.undo()
        return Hub().strategy(context)

    try:
        with miner.Miner(miner_settings(tmp_path), strategy=forking) as one:
            assert one.trainer.device == one.device
    finally:
        forbidden.undo()


def test_a_miner_without_the_memory_says_so_before_its_strategy_is_built(tmp_path: Path) -> None:
    def build(_: Context) -> InProcessStrategy:
        raise AssertionError("the strategy was built")

    words = r"0\.9M parameters .* this machine has 0\.00 GiB left"
    with pytest.raises(OperatorError, match=words):
        miner.Miner(miner_settings(tmp_path), strategy=build, memory_left=lambda _: 2**20)
