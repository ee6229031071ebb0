"""A copy of the metagraph on disk, for when the chain does not answer.

Plain JSON of the metagraph's own fields without the runtime's raw record, so that nothing in the
file is executed. A file that cannot be used is ignored, whatever the reason.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import bittensor as bt

from hiveminer.runtime.files import write_atomically

MAX_BYTES = 32 * 1024 * 1024
_LEFT_OUT = ("raw", "commitment", "commitments", "unregistered_commitments")


def save(graph: bt.Metagraph, path: Path) -> None:
    """Write a metagraph atomically. Raises OSError."""
    content = {
        "metagraph": _fields(graph) | {"neurons": [_fields(neuron) for neuron in graph]},
        "commitments": {str(uid): _fields(found) for uid, found in graph.commitments.items()},
    }
    write_atomically(path, json.dumps(content, default=_plain).encode())


def load(path: Path) -> bt.Metagraph | None:
    """The saved metagraph; None if the file is missing or cannot be used."""
    try:
        if path.stat().st_size > MAX_BYTES:
            return None
        return _metagraph(json.loads(path.read_text(encoding="utf-8"), object_hook=_value))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _fields(record: Any) -> dict[str, Any]:
    names = [field.name for field in dataclasses.fields(record) if field.name not in _LEFT_OUT]
    return {name: getattr(record, name) for name in names}


def _plain(amount: bt.Balance) -> dict[str, int]:
    return {"rao": int(amount.rao), "netuid": int(amount.netuid)}


def _value(content: dict[str, Any]) -> Any:
    if content.keys() == {"rao", "netuid"}:
        return bt.Balance.from_rao(int(content["rao"]), int(content["netuid"]))
    return content


def _metagraph(content: dict[str, Any]) -> bt.Metagraph:
    commitments = {
        int(uid): bt.NeuronCommitment(**fields) for uid, fields in content["commitments"].items()
    }
    neurons = [
        bt.MetagraphNeuron(**neuron, commitment=commitments.get(neuron["uid"]))
        for neuron in content["metagraph"].pop("neurons")
    ]
    return bt.Metagraph(
        **content["metagraph"],
        neurons=neurons,
        commitments=commitments,
        unregistered_commitments={},
        raw={},
    )
