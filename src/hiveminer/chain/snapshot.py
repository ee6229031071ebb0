"""The metagraph on disk: what a neuron last knew of its subnet, for when the chain is away.

Plain JSON of the metagraph's own fields, so that nothing in the file is run. The runtime's
raw record is left out. A file that does not fit, whatever the reason, is no snapshot.
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
    """Write it whole, or not at all. Raises OSError."""
    said = {
        "metagraph": _fields(graph) | {"neurons": [_fields(neuron) for neuron in graph]},
        "commitments": {str(uid): _fields(found) for uid, found in graph.commitments.items()},
    }
    write_atomically(path, json.dumps(said).encode())


def load(path: Path) -> bt.Metagraph | None:
    """What was saved there; None when there is nothing that can be used."""
    try:
        if path.stat().st_size > MAX_BYTES:
            return None
        said = json.loads(path.read_text(encoding="utf-8"))
        return _metagraph(said)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _fields(record: Any) -> dict[str, Any]:
    names = [field.name for field in dataclasses.fields(record) if field.name not in _LEFT_OUT]
    return {name: _plain(getattr(record, name)) for name in names}


def _plain(value: Any) -> Any:
    if isinstance(value, bt.Balance):
        return {"rao": int(value.rao), "netuid": int(value.netuid)}
    return value


def _value(value: Any) -> Any:
    if isinstance(value, dict) and set(value) == {"rao", "netuid"}:
        return bt.Balance.from_rao(int(value["rao"]), int(value["netuid"]))
    return value


def _record(kind: Any, said: dict[str, Any], **rest: Any) -> Any:
    return kind(**{name: _value(value) for name, value in said.items()}, **rest)


def _metagraph(said: dict[str, Any]) -> bt.Metagraph:
    commitments = {
        int(uid): _record(bt.NeuronCommitment, fields)
        for uid, fields in said["commitments"].items()
    }
    fields = dict(said["metagraph"])
    neurons = [
        _record(bt.MetagraphNeuron, neuron, commitment=commitments.get(neuron["uid"]))
        for neuron in fields.pop("neurons")
    ]
    if any(not isinstance(neuron.hotkey, str) for neuron in neurons):
        raise ValueError("a neuron without a hotkey")
    graph: bt.Metagraph = _record(
        bt.Metagraph,
        fields,
        neurons=neurons,
        commitments=commitments,
        unregistered_commitments={},
        raw={},
    )
    return graph
