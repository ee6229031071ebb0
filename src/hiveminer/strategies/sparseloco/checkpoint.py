"""What a peer resumes from, as named tensors and JSON: u, the position, and its own blobs.

    u.NAME        what was learned beyond the state, float32
    left.N.NAME   what own blob N left out, while it is needed
    blob.N        own blob N, uint8
    inner.I.KEY   the inner optimizer's state of parameter I
    weights.NAME  the global state, for export; the local weights until an update has counted

The position's two states are not included: they are recomputed from the log, or downloaded.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from hiveminer.runtime.files import write_atomically
from hiveminer.strategies.sparseloco import update
from hiveminer.strategies.sparseloco.codec import BlobError, decode
from hiveminer.strategies.sparseloco.log import as_json, from_json
from hiveminer.strategies.sparseloco.plan import Plan
from hiveminer.strategies.sparseloco.records import Record
from hiveminer.strategies.sparseloco.replica import OwnCut
from hiveminer.strategies.sparseloco.rounds import Position

logger = logging.getLogger(__name__)

JOURNAL = "cut.safetensors"


def cuts_to_tensors(cuts: Mapping[bytes, OwnCut]) -> dict[str, Tensor]:
    """Own blobs, and what they left out."""
    tensors: dict[str, Tensor] = {}
    for number, own in enumerate(cuts.values()):
        tensors[f"blob.{number}"] = torch.frombuffer(bytearray(own.blob), dtype=torch.uint8)
        tensors |= {f"left.{number}.{name}": left for name, left in own.cut.left.items()}
    return tensors


def cuts_from_tensors(tensors: Mapping[str, Tensor], plan: Plan) -> dict[bytes, OwnCut]:
    """Raises ValueError for what is not an own blob."""
    cuts = {}
    number = 0
    while (blob_tensor := tensors.get(f"blob.{number}")) is not None:
        blob = blob_tensor.numpy().tobytes()
        try:
            sent = decode(blob, shapes=plan.shapes, compression=plan.compression)
        except BlobError as error:
            raise ValueError(f"an own blob is damaged: {error}") from None
        left = {
            name: tensors[key]
            for name in plan.shapes
            if (key := f"left.{number}.{name}") in tensors
        }
        if len(left) not in (0, len(plan.shapes)):
            raise ValueError("what an own blob left out is not complete")
        digest = hashlib.sha256(blob).digest()
        header = sent.header
        record = Record(header.run, header.round, header.parent, len(blob), digest)
        cut = update.Cut({name: sent.dense(name) for name in plan.shapes}, left)
        cuts[digest] = OwnCut(record, blob, cut)
        number += 1
    return cuts


def optimizer_to_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The tensors of an inner optimizer's state. The rest follows from the run."""
    return {
        f"inner.{index}.{key}": value.detach().to("cpu", copy=True)
        for index, values in optimizer.state_dict()["state"].items()
        for key, value in values.items()
        if isinstance(value, Tensor)
    }


def optimizer_state(
    tensors: Mapping[str, Tensor], optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """The state dict to load. Raises ValueError if it does not fit the parameters."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("inner."):
            _, index, key = name.split(".", 2)
            state.setdefault(int(index), {})[key] = value
    parameters = [each for group in optimizer.param_groups for each in group["params"]]
    for number, values in state.items():
        if number >= len(parameters) or any(
            value.dim() and value.shape != parameters[number].shape for value in values.values()
        ):
            raise ValueError("the optimizer's state is of another model")
    return {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}


def exported_weights(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights to export from a checkpoint. Raises ValueError if there are none."""
    weights = {
        name.removeprefix("weights."): value
        for name, value in tensors.items()
        if name.startswith("weights.")
    }
    if not weights:
        raise ValueError("it holds no weights")
    frozen = {n: each.detach() for n, each in model.named_parameters() if not each.requires_grad}
    return frozen | weights


def write_journal(folder: Path, position: Position, cuts: Mapping[bytes, OwnCut]) -> None:
    """Save a cut before its record is committed; u is then q + e of the cut."""
    metadata = {"position": json.dumps(as_json(vars(position)))}
    write_atomically(folder / JOURNAL, save(cuts_to_tensors(cuts), metadata))


def read_journal(folder: Path, plan: Plan) -> tuple[Position, dict[bytes, OwnCut]] | None:
    """The saved cut; None if there is none, or the file is damaged."""
    path = folder / JOURNAL
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            position = from_json(Position, json.loads(file.metadata()["position"]))
        return position, cuts_from_tensors(tensors, plan)
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s cannot be used: %s", path, error)
        return None
