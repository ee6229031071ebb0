"""From cells to points: ratios to data-parallel training, speedups, and what is met."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

Done = Mapping[str, Any]
"""A cell that has ended: its name, numbers and settings."""

REQUIRED = (
    ("loss_ratio_muon", 40, 1.04), ("loss_ratio_muon", 100, 1.08),
    ("loss_ratio_muon", 250, 1.09), ("loss_ratio_muon", 500, 1.12), ("loss_ratio", 500, 0.84),
    ("speedup", 40, 2.9), ("speedup", 150, 2.4), ("speedup", 500, 1.9),
)  # fmt: skip
"""At 0.2M parameters: the metric, at how many times fewer bytes or more, and its bound."""
AIMS = {"loss_ratio_muon": {"40": 1.02, "100": 1.04, "250": 1.06, "500": 1.08}}
SETTING = ("size", "replicas", "rows", "length", "steps")
"""What two cells must share for their losses to be compared."""
USUAL = ("0.2M", 4, 8, 128, 850)


def points(cells: Sequence[Done]) -> list[dict[str, Any]]:
    """One point per cell and its repetitions with other seeds (`NAME-seed1`), by bytes."""
    baselines = {name: _best_data_parallel(cells, name) for name in ("adamw", "muon")}
    by_name: dict[str, list[Done]] = defaultdict(list)
    for cell in cells:
        if cell["settings"]["method"] != "alone" and cell["loss"] is not None:
            by_name[cell["name"].partition("-seed")[0]].append(cell)
    found = [_point(name, group, cells, baselines) for name, group in by_name.items()]
    found.sort(key=lambda point: (point["size"], point["bytes_ratio"], point["loss"]))
    for point in found:
        point["best"] = not any(
            other["loss"] < point["loss"] and other["bytes_ratio"] >= point["bytes_ratio"]
            for other in found
            if all(other[key] == point[key] for key in SETTING)
        )
    return found


def _point(
    name: str, group: Sequence[Done], cells: Sequence[Done], baselines: Mapping[str, Any]
) -> dict[str, Any]:
    settings = group[0]["settings"]
    mean = float(np.mean([cell["loss"] for cell in group]))
    return {
        "name": name,
        "bytes_ratio": group[0]["bytes_ratio"],
        "loss": round(mean, 4),
        "loss_ratio": _ratio(group, baselines["adamw"]),
        "loss_ratio_muon": _ratio(group, baselines["muon"]),
        "speedup": speedup(mean, settings, cells),
        "bytes_sent_per_peer": group[0]["bytes_sent_per_peer"],
        "bytes_received_per_peer": group[0]["bytes_received_per_peer"],
        "seeds": [cell["settings"]["seed"] for cell in group],
        "losses": [round(cell["loss"], 4) for cell in group],
        **{key: settings[key] for key in SETTING},
        "settings": settings,
    }


def _best_data_parallel(cells: Iterable[Done], optimizer: str) -> dict[tuple[Any, ...], float]:
    """The lowest loss of the grid by setting and seed."""
    best: dict[tuple[Any, ...], float] = {}
    for cell in cells:
        settings = cell["settings"]
        if (settings["method"], settings["optimizer"]) == ("data_parallel", optimizer):
            key = _key(cell)
            if cell["loss"] is not None:
                best[key] = min(best.get(key, math.inf), cell["loss"])
    return best


def _key(cell: Done) -> tuple[Any, ...]:
    return (*(cell["settings"][key] for key in SETTING), cell["settings"]["seed"])


def _ratio(group: Iterable[Done], baseline: Mapping[tuple[Any, ...], float]) -> float | None:
    """The mean over the seeds for which there is a baseline."""
    ratios = [cell["loss"] / baseline[_key(cell)] for cell in group if _key(cell) in baseline]
    return round(float(np.mean(ratios)), 4) if ratios else None


def speedup(loss: float, settings: Mapping[str, Any], cells: Iterable[Done]) -> float | None:
    """Steps that one replica alone needs for this loss over the swarm's, at most N.

    The steps are interpolated in their logarithm between the best runs of one replica, by
    their length; below the shortest the first two are extended.
    """
    best: dict[int, float] = {}
    for cell in cells:
        other = cell["settings"]
        alike = all(other[key] == settings[key] for key in ("size", "rows", "length"))
        if other["method"] == "alone" and alike and cell["loss"] is not None:
            best[other["steps"]] = min(best.get(other["steps"], math.inf), cell["loss"])
    if len(best) < 2:
        return None
    lengths = sorted(best)
    steps = np.log(lengths)
    losses = np.minimum.accumulate([best[length] for length in lengths])
    if loss > losses[0]:
        slope = (steps[1] - steps[0]) / (losses[1] - losses[0])
        needed = float(steps[0] + slope * (loss - losses[0]))
    else:
        needed = float(np.interp(-loss, -losses, steps))
    return round(min(math.exp(needed) / settings["steps"], settings["replicas"]), 2)


def summary(found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each required figure, and the best point that has as many times fewer bytes."""
    ours = [
        point
        for point in found
        if tuple(point[key] for key in SETTING) == USUAL
        and point["settings"]["method"] == "sparseloco"
    ]
    rows = []
    for metric, ratio, bound in REQUIRED:
        sign = -1 if metric == "speedup" else 1
        fit = [p for p in ours if p["bytes_ratio"] >= ratio and p[metric] is not None]
        best = min(fit, key=lambda point: sign * point[metric], default=None)
        rows.append(
            {
                "metric": metric, "bytes_ratio": ratio, "required": bound,
                "measured": best and best[metric], "cell": best and best["name"],
                "met": best is not None and sign * best[metric] <= sign * bound,
            }
        )  # fmt: skip
    return rows


def plot(found: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Loss over the bytes' ratio, a color per method; the best of each number of bytes joined."""
    figure = Figure(figsize=(9, 6), layout="constrained")
    axis = figure.subplots()
    usual = [point for point in found if tuple(point[key] for key in SETTING) == USUAL]
    for label in sorted({_label(point) for point in usual}):
        these = [point for point in usual if _label(point) == label]
        axis.scatter(
            [p["bytes_ratio"] for p in these], [p["loss"] for p in these], s=18, label=label
        )
    best = [point for point in usual if point["best"]]
    axis.plot(
        [p["bytes_ratio"] for p in best], [p["loss"] for p in best], color="gray", linewidth=0.8
    )
    axis.set_xscale("log")
    axis.set_xlabel("times fewer bytes than data-parallel training in float32")
    axis.set_ylabel("held-out loss, nats per byte")
    axis.set_title("Four peers, equal tokens, 0.17M parameters")
    axis.grid(visible=True, alpha=0.3)
    if usual:
        axis.legend()
    figure.savefig(path, dpi=100)


def _label(point: Mapping[str, Any]) -> str:
    settings = point["settings"]
    method, inner = settings["method"], settings["optimizer"]
    if method == "sparseloco":
        return method
    if method == "diloco" and inner == "muon":
        return "MuLoCo"
    names = {"data_parallel": "data-parallel", "float16": "Float16 averaging", "diloco": "DiLoCo"}
    return f"{names[method]}, {'Muon' if inner == 'muon' else 'AdamW'}"


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """The points as a Markdown table."""
    lines = [
        "| cell | bytes_ratio | loss | loss_ratio | loss_ratio_muon | speedup | seeds |",
        "|---|---|---|---|---|---|---|",
    ]
    for point in found:
        values = [point[key] for key in ("loss_ratio", "loss_ratio_muon", "speedup")]
        shown = ["" if value is None else f"{value:.3f}" for value in values]
        name = f"**{point['name']}**" if point["best"] else point["name"]
        lines.append(
            f"| {name} | {point['bytes_ratio']} | {point['loss']:.4f} | {' | '.join(shown)} "
            f"| {len(point['seeds'])} |"
        )
    return "\n".join(lines)
