"""`scripts/bench frontier`: cells resume, their bytes are real, and points follow from them."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import frontier
from benchmarks._frontier import report
from benchmarks._frontier.cell import EXACT, Cell
from benchmarks._frontier.exchange import peer_weights
from benchmarks._frontier.grid import CELLS
from benchmarks._frontier.model import Text
from benchmarks._frontier.simulate import Simulation, run_cell
from hiveminer.strategies.sparseloco.codec import Compression, Header, encode
from hiveminer.training.data import builtin_rows

TINY = Cell(
    "tiny", "sparseloco", 0.02, size="tiny", every=2, density=0.1, keep=0.9,
    replicas=3, rows=2, length=16, steps=6,
)  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Text:
    folder = tmp_path_factory.mktemp("library")
    lines = (f"value_{n} = {n * n} + {n % 7}\n" for n in range(4000))
    (folder / "values.py").write_text("".join(lines), encoding="utf-8")
    return Text(builtin_rows(folder), evaluation_tokens=256)


def result(simulation: Simulation) -> dict[str, Any]:
    while simulation.at < simulation.cell.steps:
        simulation.step()
    return {key: value for key, value in simulation.numbers().items() if key != "seconds"}


@pytest.mark.parametrize(
    "cell",
    [
        replace(TINY, delay=1, last_bits=4, embedding_density=0.5, share=0.3, late_every=3),
        replace(TINY, method="diloco", bits=4, density=1.0, outer_momentum=0.5),
        replace(TINY, method="data_parallel", optimizer="adamw"),
    ],
    ids=lambda cell: cell.method,
)
def test_a_cell_resumes_with_the_same_numbers(cell: Cell, text: Text, tmp_path: Path) -> None:
    whole = result(Simulation(cell, text))
    stopped = Simulation(cell, text)
    while stopped.at < 4:  # a cut waits to be settled
        stopped.step()
    stopped.save(tmp_path / "tiny.pt")
    resumed = Simulation(cell, text)
    resumed.load(tmp_path / "tiny.pt")
    assert resumed.at == 4
    assert result(resumed) == whole
    assert whole["loss"] is not None
    other = Simulation(replace(cell, rate=0.5), text)
    other.load(tmp_path / "tiny.pt")
    assert other.at == 0, "a checkpoint of other settings is ignored"


def test_bytes_are_the_lengths_of_the_blobs(text: Text) -> None:
    cell = replace(TINY, steps=2)
    simulation = Simulation(cell, text)
    start = {name: weight.clone() for name, weight in simulation.weights.items()}
    simulation.step()
    lengths = []
    cut = simulation.exchange.cut

    def measured(number: int, *, last: bool) -> None:
        for peer in range(cell.replicas):
            local = peer_weights(simulation.weights, peer)
            learned = {name: start[name][peer] - value for name, value in local.items()}
            header = Header(bytes(32), bytes(8), number, bytes(32))
            compression = Compression(cell.density, cell.bits)
            lengths.append(len(encode(learned, header=header, compression=compression)))
        cut(number, last=last)

    simulation.exchange.cut = measured  # type: ignore[method-assign]
    numbers = result(simulation)
    assert numbers["bytes_of_own_blobs"] == round(sum(lengths) / cell.replicas)
    assert numbers["bytes_sent_per_peer"] == round(2 * sum(lengths) / cell.replicas)


def test_without_compression_a_round_is_the_mean(text: Text) -> None:
    cell = replace(TINY, bits=EXACT, density=1.0, steps=2, optimizer="adamw")
    simulation = Simulation(cell, text)
    plain = Simulation(replace(cell, every=3, steps=3), text)  # no round within two steps
    plain.cell = cell
    simulation.step(), simulation.step()
    plain.cuts = {}
    plain.step(), plain.step()
    for name, weight in simulation.exchange.result().items():
        torch.testing.assert_close(weight, plain.weights[name].mean(0))


def test_the_grid_has_equal_tokens_and_enough() -> None:
    names = [cell.name for cell in CELLS]
    assert len(set(names)) == len(names)
    for cell in CELLS:
        tokens = cell.steps * cell.peers * cell.rows * cell.length
        assert cell.method == "alone" or tokens >= 20 * cell.shape.parameters, cell.name
        assert cell.why, cell.name


def done(name: str, loss: float, ratio: float | None, **changes: Any) -> dict[str, Any]:
    cell = replace(Cell(name, "sparseloco", 0.02), **changes)
    return {
        "name": name, "loss": loss, "bytes_ratio": ratio, "settings": cell.settings(),
        "bytes_sent_per_peer": 1, "bytes_received_per_peer": 1,
    }  # fmt: skip


def test_points_compare_with_the_best_baseline_of_their_seed() -> None:
    cells = [
        done("dp-a", 1.6, 1.0, method="data_parallel"),
        done("dp-b", 1.5, 1.0, method="data_parallel"),
        done("dp-b-seed1", 1.4, 1.0, method="data_parallel", seed=1),
        done("ours", 1.65, 40.5),
        done("ours-seed1", 1.54, 40.5, seed=1),
        done("alone-850", 2.0, None, method="alone"),
        done("alone-1700", 1.8, None, method="alone", steps=1700),
        done("alone-3400", 1.5, None, method="alone", steps=3400),
    ]
    found = {point["name"]: point for point in report.points(cells)}
    assert found["ours"]["loss_ratio_muon"] == pytest.approx(1.1)
    assert found["ours"]["loss_ratio"] is None
    assert found["ours"]["seeds"] == [0, 1]
    assert found["ours"]["best"]
    assert not found["dp-a"]["best"]
    assert 2 < found["ours"]["speedup"] < 4
    required = report.summary(list(found.values()))
    at_40 = next(row for row in required if row["bytes_ratio"] == 40)
    assert (at_40["cell"], at_40["met"]) == ("ours", False)
    assert all(row["cell"] is None for row in required if row["bytes_ratio"] > 40)


def test_a_speedup_is_read_off_the_runs_of_one_replica() -> None:
    alone = [
        done(f"alone-{steps}", loss, None, method="alone", steps=steps)
        for steps, loss in ((850, 2.0), (1700, 1.8), (3400, 1.6))
    ]
    settings = Cell("x", "sparseloco", 0.02).settings()
    assert report.speedup(1.8, settings, alone) == 2
    assert report.speedup(2.2, settings, alone) == 0.5
    assert report.speedup(1.1, settings, alone) == 4
    assert report.speedup(1.8, settings, alone[:1]) is None


@pytest.mark.slow  # two programs that import torch
def test_several_cells_at_once_and_one_that_fails_stops_no_other(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "values.py").write_text("value = 1 + 1\n" * 9000, encoding="utf-8")
    options = Namespace(jobs=2, device="cpu", text=tmp_path, state=tmp_path / "state")
    impossible = replace(TINY, name="impossible", power=0.3)
    other = replace(TINY, name="other", share_tables=0.2, ahead=0.5)
    found = list(frontier.run_all([impossible, TINY, other], options))
    assert sorted(each["name"] for each in found) == ["other", "tiny"]
    assert all(each["loss"] < 5.6 and each["ran_on"] for each in found)
    assert "impossible failed: ValueError" in capfd.readouterr().err


def test_an_ended_cell_is_kept_and_not_run_again(
    text: Text, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cell = replace(TINY, steps=3)
    out = tmp_path / "frontier.json"
    assert not frontier.is_done(cell, frontier.load_done(out))
    numbers = run_cell(cell, text, folder=tmp_path / "state")
    assert not list((tmp_path / "state").iterdir())
    settings = cell.settings()
    ended = {cell.name: {"name": cell.name, "text": text.hash, **numbers, "settings": settings}}
    frontier.write_result(out, ended, {}, cells=[cell])
    assert frontier.is_done(cell, frontier.load_done(out))
    assert not frontier.is_done(replace(cell, rate=0.5), frontier.load_done(out))
    assert not frontier.is_done(cell, frontier.load_done(out), text="another library")
    assert out.with_suffix(".png").stat().st_size > 0
    with pytest.raises(SystemExit):
        frontier.main(["--only", "no-such-cell"])
    assert "there is no cell no-such-cell" in capsys.readouterr().err
