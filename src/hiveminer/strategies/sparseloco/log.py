"""The log of rounds on disk: what decided each round, the blobs, and some of the states.

    plan.json                    the run id, rules and shapes, so that the log can be read alone
    rounds/0000000123.json       the final blocks of a round as they were read, with raw records
                                 and marks, and the hash of the state that was computed
    blobs/HASH                   a blob
    states/0000000120-HASH       the parent state of every eighth round

Each later state can be computed from a state and the blobs since (`replay`), so that a restarted
peer finds its own, and anyone can check all hashes. The size is bounded: blobs are kept since the
second newest state on disk, rounds up to a number. Files are not trusted: one that does not match
its hash counts as missing. Each JSON file holds the SHA-256 of its own content.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, astuple, dataclass, is_dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import torch

from hiveminer.runtime.files import write_atomically
from hiveminer.strategies.sparseloco.apply import OuterStep, State, tensor_bytes
from hiveminer.strategies.sparseloco.pieces import (
    StateBuilder,
    StateError,
    manifest_length,
    read_manifest,
)
from hiveminer.strategies.sparseloco.plan import Plan
from hiveminer.strategies.sparseloco.records import decode_record, run_prefix
from hiveminer.strategies.sparseloco.rounds import Facts, Rules
from hiveminer.strategies.sparseloco.tensor import Compression

logger = logging.getLogger(__name__)

FORMAT = 1
PLAN = "plan.json"

LOG_FOLDER = "rounds"
"""The folder within a neuron's; contains the log of each run, by run id."""

_UNREADABLE = (OSError, KeyError, TypeError, AttributeError, ValueError, RecursionError)
_HASH = re.compile(r"[0-9a-f]{64}")
_BLOCKS = ("first_block", "records_block", "marks_block")
_kinds = functools.cache(get_type_hints)

EVERY_ROUNDS = 8
"""The parent state of every eighth round is kept on disk."""

KEEP_STATES = 2
KEEP_ROUNDS = 4096
MAX_BYTES = 32 * 2**30
"""Limit of blobs and states together; above it, only one state and the blobs since are kept."""


@dataclass(frozen=True)
class Entry:
    """A logged round. made: hash of the state after it, if this peer has computed it."""

    facts: Facts
    made: bytes | None


class Log:
    """Reads and writes the log in a folder that only one process writes to.

    Raises OSError when it cannot be written.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._rounds, self._blobs = folder / "rounds", folder / "blobs"
        self._states = folder / "states"

    # Writing ----------------------------------------------------------------------

    def begin(self, plan: Plan, *, run_id: str) -> None:
        """Create the folders and the plan."""
        for folder in (self._rounds, self._blobs, self._states):
            folder.mkdir(parents=True, exist_ok=True)
        content = {"format": FORMAT, "run_id": run_id} | _plan_to_json(plan)
        _write_json(self.folder / PLAN, content)

    def add_blob(self, blob: bytes) -> bytes:
        """Save a blob, and return its hash."""
        digest = hashlib.sha256(blob).digest()
        if self.blob(digest) is None:
            write_atomically(self._blobs / digest.hex(), blob)
        return digest

    def add_state(self, number: int, state: State) -> None:
        """Save the parent state of a round."""
        path = self._state_path(number, state.hash())
        if not path.exists():
            tensors = (tensor_bytes(state.weights[name]) for name in sorted(state.weights))
            write_atomically(path, b"".join([state.manifest, *tensors]))

    def add_round(self, facts: Facts, *, made: bytes | None = None) -> None:
        """Save a round; again with `made` once the state after it was computed."""
        content = _facts_to_json(facts.of_registered()) | {"made": made.hex() if made else None}
        _write_json(self._rounds / f"{facts.round:010d}.json", content)

    def prune(self, *, keep_blobs: Collection[bytes] = ()) -> None:
        """Remove what is no longer needed. keep_blobs: those of rounds still to be decided."""
        for number in self.rounds()[:-KEEP_ROUNDS]:
            (self._rounds / f"{number:010d}.json").unlink(missing_ok=True)
        kept = KEEP_STATES if self._size() <= MAX_BYTES else 1
        states = self.states()
        for number, digest in states[:-kept]:
            self._state_path(number, digest).unlink(missing_ok=True)
        first = states[-kept:][0][0] if states else 0
        wanted = {digest.hex() for digest in keep_blobs}
        for number in self.rounds():
            if number >= first and (entry := self.entry(number)):
                records = map(decode_record, entry.facts.records.values())
                wanted |= {each.blob_hash.hex() for each in records if each is not None}
        for path in self._blobs.iterdir():
            if path.name not in wanted:
                path.unlink(missing_ok=True)

    # Reading ----------------------------------------------------------------------

    def plan(self) -> tuple[str, Plan]:
        """The run id and the plan. Raises ValueError if the file is missing or invalid."""
        try:
            content = _read_json(self.folder / PLAN)
            if content["format"] != FORMAT:
                raise ValueError(f"it is of format {content['format']}, not {FORMAT}")
            run_id, plan = str(content["run_id"]), _plan_from_json(content)
            if plan.rules.run != run_prefix(run_id):
                raise ValueError("its records are of another run id")
            return run_id, plan
        except _UNREADABLE as error:
            raise ValueError(f"{self.folder / PLAN} cannot be used: {_words(error)}") from None

    def rounds(self) -> list[int]:
        """Numbers of the logged rounds, ascending."""
        return sorted(int(path.stem) for path in self._rounds.glob("*.json") if path.stem.isdigit())

    def read(self, number: int) -> Entry:
        """A round. Raises FileNotFoundError, and ValueError if the file is damaged."""
        try:
            content = _read_json(self._rounds / f"{number:010d}.json")
            made = content["made"]
            entry = Entry(_facts_from_json(content), None if made is None else bytes.fromhex(made))
            if entry.facts.round != number:
                raise ValueError(f"it is that of round {entry.facts.round}")
            return entry
        except FileNotFoundError:
            raise
        except _UNREADABLE as error:
            raise ValueError(f"the file is damaged: {_words(error)}") from None

    def entry(self, number: int) -> Entry | None:
        """A round; None if there is none, or the file is damaged."""
        try:
            return self.read(number)
        except FileNotFoundError:
            return None
        except ValueError as error:
            logger.warning("round %d: %s", number, error)
            return None

    def blobs(self) -> list[bytes]:
        """The hashes of the blobs on disk, by their names, damaged or not."""
        names = sorted(path.name for path in self._blobs.glob("[0-9a-f]*"))
        return [bytes.fromhex(name) for name in names if _HASH.fullmatch(name)]

    def blob(self, digest: bytes) -> bytes | None:
        """A blob by its hash; None if it is missing or damaged."""
        try:
            data = (self._blobs / digest.hex()).read_bytes()
        except OSError:
            return None
        return data if hashlib.sha256(data).digest() == digest else None

    def states(self) -> list[tuple[int, bytes]]:
        """Round and hash of the states on disk, ascending."""
        found = []
        for path in self._states.iterdir() if self._states.is_dir() else ():
            number, _, digest = path.name.partition("-")
            if number.isdigit() and _HASH.fullmatch(digest):
                found.append((int(number), bytes.fromhex(digest)))
        return sorted(found)

    def state(self, number: int, digest: bytes, shapes: Mapping[str, torch.Size]) -> State | None:
        """The parent state of a round, as `states` lists it; None if it is damaged."""
        path = self._state_path(number, digest)
        try:
            with path.open("rb") as stream:
                raw = stream.read(manifest_length(shapes))
                if hashlib.sha256(raw).digest() != digest:
                    raise StateError("the manifest does not have its hash")
                builder = StateBuilder(read_manifest(raw, shapes), shapes)
                for piece in builder.manifest.pieces:
                    builder.add(piece, stream.read(piece.length))
                if stream.read(1):
                    raise StateError("the file is longer than the state")
                return builder.build()
        except (OSError, StateError) as error:
            logger.warning("%s cannot be used: %s", path, error)
            return None

    def _state_path(self, number: int, digest: bytes) -> Path:
        return self._states / f"{number:010d}-{digest.hex()}"

    def _size(self) -> int:
        folders = (self._blobs, self._states)
        return sum(path.stat().st_size for folder in folders for path in folder.iterdir())


def logs_below(folder: Path) -> list[Log]:
    """The logs of all neurons below this folder."""
    return [Log(plan.parent) for plan in sorted(folder.glob(f"**/{LOG_FOLDER}/*/{PLAN}"))]


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    text = json.dumps(dict(content) | {"sha256": _sha256(content)}, separators=(",", ":"))
    write_atomically(path, text.encode())


def _read_json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if content.pop("sha256") != _sha256(content):
        raise ValueError("its content does not have its hash")
    return content


def _sha256(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, separators=(",", ":"), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _words(error: Exception) -> str:
    """An error's message for people: a KeyError's is only the key."""
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    return str(error) if type(error) is ValueError else "it is not what a log has"


def as_json(value: Any) -> Any:
    """Bytes become hex digits, and dataclasses lists of their fields, also within tuples and
    mappings."""
    if isinstance(value, bytes):
        return value.hex()
    if is_dataclass(value) and not isinstance(value, type):
        return as_json(astuple(value))
    if isinstance(value, tuple):
        return [as_json(each) for each in value]
    if isinstance(value, Mapping):
        return {as_json(key): as_json(each) for key, each in value.items()}
    return value


def from_json(form: Any, content: Any) -> Any:
    """A value of type `form`, of which `as_json` made `content`; a dataclass also from a mapping
    of its fields. Raises TypeError, ValueError or KeyError for anything else."""
    if form is bytes:
        return bytes.fromhex(content)
    if type(content) is form:
        return content
    inner = get_args(form)
    if type(None) in inner:
        return None if content is None else from_json(inner[0], content)
    if get_origin(form) is tuple:
        return tuple(from_json(inner[0], each) for each in content)
    if get_origin(form) is Mapping:
        return {from_json(inner[0], key): from_json(inner[1], content[key]) for key in content}
    kinds = _kinds(form)
    if not kinds:  # not a dataclass
        raise TypeError(f"{content!r} is not of type {form.__name__}")
    values = [content[name] for name in kinds] if isinstance(content, dict) else content
    return form(*(from_json(*each) for each in zip(kinds.values(), values, strict=True)))


def _facts_to_json(facts: Facts) -> dict[str, Any]:
    content = as_json(vars(facts))
    content["blocks"] = [content.pop(name) for name in _BLOCKS]
    return content  # type: ignore[no-any-return]


def _facts_from_json(content: Mapping[str, Any]) -> Facts:
    blocks = dict(zip(_BLOCKS, content["blocks"], strict=True))
    return from_json(Facts, {**content, **blocks})  # type: ignore[no-any-return]


def _plan_to_json(plan: Plan) -> dict[str, Any]:
    rules = plan.rules
    return as_json(vars(rules)) | {  # type: ignore[no-any-return]
        "schedule": asdict(rules.schedule),
        "quorum": str(rules.quorum),
        "compression": asdict(plan.compression),
        "step": asdict(plan.step),
        "rho": plan.keep,
        "shapes": {name: list(shape) for name, shape in plan.shapes.items()},
    }


def _plan_from_json(content: Mapping[str, Any]) -> Plan:
    return Plan(
        from_json(Rules, {**content, "quorum": Fraction(content["quorum"])}),
        Compression(**content["compression"]),
        OuterStep(**content["step"]),
        float(content["rho"]),
        {str(name): torch.Size(shape) for name, shape in content["shapes"].items()},
    )
