"""Checkpoints of a test, and how they are found."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hiveminer.training.checkpoint import Checkpoint, Checkpoints, newest


def tensors(number: int) -> dict[str, Tensor]:
    """What checkpoint `number` of a test holds."""
    return {"a": torch.full((4, 3), float(number)), "b": torch.tensor(0.1 * number)}


def written(folder: Path, *, count: int = 2) -> Checkpoints:
    """A folder with this many checkpoints; `n` in their metadata is their number."""
    kept = Checkpoints(folder)
    for number in range(1, count + 1):
        assert kept.save(tensors(number), {"n": number}) == f"checkpoint-{number:06d}"
    return kept


def is_number(found: Checkpoint | None, number: int) -> bool:
    """Whether this is checkpoint `number`, each bit of it."""
    if found is None or found.metadata != {"n": number} or found.tensors.keys() != {"a", "b"}:
        return False
    return all(torch.equal(found.tensors[name], value) for name, value in tensors(number).items())


def look_in(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """What is found, and the reasons why newer ones were refused."""
    refused: list[str] = []
    return newest(folder, refuse=refused.append), refused


def the_one_before(folder: Path, words: str = "") -> None:
    """The newest of two is refused with these words, in one line, and the first is used."""
    found, refused = look_in(folder)
    assert is_number(found, 1)
    assert len(refused) == 1
    assert refused[0].startswith("checkpoint-000002 is refused: ")
    assert words in refused[0], refused
    assert "\n" not in refused[0]


def length_and_hash(path: Path) -> dict[str, Any]:
    """What a manifest says of its tensors' file."""
    content = path.read_bytes()
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def rewrite(path: Path, **changes: Any) -> None:
    """Change a manifest, with the hash that belongs to it."""
    content = json.loads(path.read_bytes()) | changes
    del content["sha256"]
    content["sha256"] = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    path.write_text(json.dumps(content))
