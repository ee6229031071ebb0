"""Checkpoints: what a neuron resumes from after a restart, one folder each.

`checkpoint-000012` holds `state.safetensors` (unless there are no tensors) and
`checkpoint.json`: metadata, its SHA-256, and the length and SHA-256 of the tensors. It is written
to a draft folder, synced and renamed, so that it is complete or absent. A corrupt checkpoint is
skipped in favor of the previous one. Nothing is unpickled. A full disk is logged, and never ends
the training.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hiveminer.errors import one_line
from hiveminer.runtime import events
from hiveminer.runtime.files import sync, write_atomically

logger = logging.getLogger(__name__)

FORMAT = 1
"""Version of the manifest; any other is refused."""

MANIFEST, STATE = "checkpoint.json", "state.safetensors"

STATE_FOLDER, SCORES_FOLDER = "checkpoints", "scores"
"""Where a miner and a validator keep their checkpoints within the neuron's folder."""

MAX_MANIFEST_BYTES = 4 * 1024 * 1024

DRAFT = ".draft-"
"""Prefix of folders that are being written."""

SERIAL_NUMBERS = 32768
"""PyTorch uses only the calling thread up to this size; more threads would compete with
training."""

Accept = Callable[[dict[str, Any]], str | None]
"""Returns why a checkpoint with this metadata is refused, or None."""


@dataclass(frozen=True)
class Checkpoint:
    """A valid checkpoint; tensors: on the CPU."""

    name: str
    metadata: dict[str, Any]
    tensors: dict[str, Tensor]


class _Refused(Exception):
    """The checkpoint is not used."""


class Checkpoints:
    """The last `keep` checkpoints of one neuron, in one folder that only one process writes to.

    Drafts of a writer that was killed are removed on construction.
    """

    def __init__(self, folder: Path, *, keep: int = 3):
        self.folder = folder
        self.keep = keep
        self.newest: str | None = None
        """Name of the last one written; None if that failed."""
        self._write_lock = threading.Lock()
        self._start_lock = threading.Lock()
        self._writers: list[threading.Thread] = []
        self._closed = False
        self._last_error = ""
        for draft in folder.glob(f"{DRAFT}*"):
            shutil.rmtree(draft, ignore_errors=True)

    @property
    def writing(self) -> bool:
        """Whether a checkpoint is being written now."""
        return any(writer.is_alive() for writer in self._writers)

    def save(self, tensors: Mapping[str, Tensor] | None, metadata: Mapping[str, Any]) -> str | None:
        """Write a checkpoint, remove the oldest, and return the new one's name.

        tensors: dense, by name; None for metadata alone. metadata: JSON without NaN and
        infinity. Returns None, and logs why, if it could not be written or the tensors are not
        finite.
        """
        with self._write_lock:
            began = time.monotonic()
            try:
                name = self._write(dict(tensors or {}), metadata)
            except Exception as error:  # noqa: BLE001 - no disk problem may end the training
                self.newest = None
                reason = f"no checkpoint could be written to {self.folder}: {_reason(error)}"
                if reason != self._last_error:  # once for as long as it is the same problem
                    self._last_error = reason
                    _report(reason)
                return None
            self._last_error, self.newest = "", name
            for number in _numbers(self.folder)[: -self.keep]:
                # What is left of one that cannot be removed goes after the next one.
                shutil.rmtree(self.folder / _name(number), ignore_errors=True)
        logger.debug("%s written in %.2f s", name, time.monotonic() - began)
        return name

    def save_later(
        self,
        tensors: Mapping[str, Tensor] | None,
        metadata: Mapping[str, Any],
        *,
        must: bool = False,
    ) -> bool:
        """Write a checkpoint in a background thread; returns whether that was started.

        The caller must no longer change the tensors. While another one is being written this one
        is skipped, or waits if it `must` be written.
        """
        with self._start_lock:
            if self._closed or (self.writing and not must):
                return False
            writer = threading.Thread(
                target=self.save, args=(tensors, metadata), name="checkpoint", daemon=True
            )
            writer.start()
            self._writers = [*(other for other in self._writers if other.is_alive()), writer]
            return True

    def load(self, accept: Accept = lambda _metadata: None) -> Checkpoint | None:
        """The newest valid checkpoint that is accepted; each newer one is logged as refused."""
        return newest(self.folder, accept=accept, refuse=_report)

    def close(self, timeout_seconds: float) -> bool:
        """Start no more writes and wait for the running ones; whether they ended in time."""
        self._closed = True
        deadline = time.monotonic() + timeout_seconds
        for writer in self._writers:
            writer.join(max(0.0, deadline - time.monotonic()))
        return not self.writing

    def _write(self, tensors: dict[str, Tensor], metadata: Mapping[str, Any]) -> str:
        if not _finite(tensors.values()):
            raise ValueError("the state holds numbers that are not finite")
        self.folder.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=DRAFT, dir=self.folder))
        try:
            state = None
            if tensors:
                save_file(tensors, draft / STATE)
                sync(draft / STATE)
                state = _length_and_hash(draft / STATE)
            number = 1 + max(_numbers(self.folder), default=0)
            content = {"format": FORMAT, "number": number, "facts": dict(metadata), "state": state}
            content["sha256"] = _content_hash(content)
            text = json.dumps(content, allow_nan=False).encode()
            if len(text) > MAX_MANIFEST_BYTES:
                raise ValueError(f"the metadata is longer than {MAX_MANIFEST_BYTES} bytes")
            write_atomically(draft / MANIFEST, text)
            draft.rename(self.folder / _name(number))
            sync(self.folder)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise
        return _name(number)


def newest(
    folder: Path,
    *,
    accept: Accept = lambda _metadata: None,
    refuse: Callable[[str], None] = lambda _reason: None,
) -> Checkpoint | None:
    """The newest valid checkpoint in a folder that is accepted. Changes nothing there.

    refuse: called for each newer one with one line that says why it is not used.
    """
    for number in reversed(_numbers(folder)):
        try:
            return _read(folder, number, accept)
        except _Refused as reason:
            refuse(f"{_name(number)} is refused: {reason}")
    return None


def of_run(run_id: str) -> Accept:
    """Accepts the checkpoints of this run only."""

    def why_not(metadata: dict[str, Any]) -> str | None:
        theirs = metadata.get("run_id")
        return None if theirs == run_id else f"it is of run {theirs!s:.200}, and this is {run_id}"

    return why_not


def _report(reason: str) -> None:
    events.tell(logger, "checkpoint", one_line(reason)[:500])


# Names and order ---------------------------------------------------------------------------


def _name(number: int) -> str:
    return f"checkpoint-{number:06d}"


def _numbers(folder: Path) -> list[int]:
    """Numbers of all checkpoints there, valid or not, in order."""
    name = re.compile(r"checkpoint-([0-9]{6}|[1-9][0-9]{6,14})")
    matches = (name.fullmatch(path.name) for path in folder.glob("checkpoint-*"))
    return sorted(int(match[1]) for match in matches if match is not None)


# Reading -----------------------------------------------------------------------------------


def _read(folder: Path, number: int, accept: Accept) -> Checkpoint:
    path = folder / _name(number)
    content = _manifest(path / MANIFEST)
    if content.get("format") != FORMAT:
        raise _Refused(
            f"its format is {content.get('format')!r:.20}, and this version reads {FORMAT}"
        )
    if content.get("number") != number:
        raise _Refused(f"it was written as number {content.get('number')!r:.20}")
    metadata, state = content.get("facts"), content.get("state")
    if not isinstance(metadata, dict):
        raise _Refused(f"{MANIFEST} holds no metadata")
    reason = accept(metadata)
    if reason is not None:
        raise _Refused(reason)
    return Checkpoint(path.name, metadata, {} if state is None else _tensors(path / STATE, state))


def _manifest(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as stream:
            text = stream.read(MAX_MANIFEST_BYTES + 1)
        if len(text) > MAX_MANIFEST_BYTES:
            raise _Refused(f"{path.name} is longer than {MAX_MANIFEST_BYTES} bytes")
        content = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise _Refused(f"{path.name} cannot be read ({_reason(error)})") from None
    if not isinstance(content, dict):
        raise _Refused(f"{path.name} is not a checkpoint's")
    # Checkpoints of version 0.1 carry a signature instead of the hash; it is not checked.
    if content.pop("sha256", None) != _content_hash(content) and "signature" not in content:
        raise _Refused(f"{path.name} is not what was written: its hash differs")
    return content


def _tensors(path: Path, expected: Any) -> dict[str, Tensor]:
    try:
        length = path.stat().st_size
        if length != expected["bytes"]:
            raise _Refused(f"{path.name} has {length} bytes instead of {expected['bytes']}")
        if _length_and_hash(path) != expected:
            raise _Refused(f"{path.name} is not what was written: its hash differs")
        tensors = load_file(path)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise _Refused(f"{path.name} cannot be read ({_reason(error)})") from None
    if not _finite(tensors.values()):
        raise _Refused(f"{path.name} holds numbers that are not finite")
    return tensors


def _reason(error: Exception) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return text[:200] or type(error).__name__


def _length_and_hash(path: Path) -> dict[str, int | str]:
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        return {"bytes": stream.tell(), "sha256": digest}


def _content_hash(content: Mapping[str, Any]) -> str:
    """Hex SHA-256 of a manifest's other keys, in order. Raises ValueError for NaN."""
    return hashlib.sha256(json.dumps(content, allow_nan=False).encode()).hexdigest()


def _finite(tensors: Iterable[Tensor]) -> bool:
    parts = (part for tensor in tensors for part in torch.split(tensor.reshape(-1), SERIAL_NUMBERS))
    return all(bool(torch.isfinite(part).all()) for part in parts)
