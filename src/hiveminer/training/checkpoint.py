"""Checkpoints: what a neuron goes on from after a restart, one folder each.

`checkpoint-000012` holds `state.safetensors` (tensors; left out where there are none) and
`checkpoint.json`: facts, the length and SHA-256 of the tensors, and the hotkey's signature
over all of it. It is written as a draft, forced to disk and renamed, so that it is there
whole or not at all. What is torn, changed, moved to another number or signed by another key
is refused, and the one before it is used. Nothing is unpickled, and nothing is read that is
longer than it may be. The price is a copy of the tensors in memory while they are written,
and `keep` of them on disk.

A disk that is full or cannot be written to costs a line in the log, and never the training.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from bittensor import CRYPTO_SR25519
from bittensor.keyfiles import Keypair
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hiveminer.runtime import events

logger = logging.getLogger(__name__)

FORMAT = 1
"""Of the manifest; another is refused."""

MANIFEST, STATE = "checkpoint.json", "state.safetensors"

STATE_FOLDER, SCORES_FOLDER = "checkpoints", "scores"
"""Where a miner's checkpoints lie in its neuron's folder, and a validator's."""

MAX_MANIFEST_BYTES = 4 * 1024 * 1024
READ_BYTES = 1024 * 1024

DOMAIN = b"hiveminer checkpoint\n"
"""Comes before what is signed, so that no other signature of the hotkey fits."""

DRAFT = ".draft-"
"""How the names of folders begin that are being written or removed."""

SERIAL_NUMBERS = 32768
"""So many numbers PyTorch goes through in the calling thread: with more it takes all of its
threads, beside those that train."""

Sign = Callable[[bytes], bytes]
Verify = Callable[[bytes, bytes], bool]
Accept = Callable[[dict[str, Any]], str | None]
"""The facts of a checkpoint to the reason why it is of no use here, or None."""


@dataclass(frozen=True)
class Checkpoint:
    """A sound checkpoint: its name, what it says, and its tensors by name, on the CPU."""

    name: str
    facts: dict[str, Any]
    tensors: dict[str, Tensor]


class _Refused(Exception):
    """A checkpoint is not used; the message says why."""


class Checkpoints:
    """The checkpoints of one neuron in one folder, the last `keep` of them.

    sign: the hotkey's signature of some bytes. verify: whether a signature is the hotkey's.

    One process at a time may write there: what a writer that was killed has left of its
    drafts is swept now.
    """

    def __init__(self, folder: Path, *, sign: Sign, verify: Verify, keep: int = 3):
        self.folder = folder
        self.keep = keep
        self._sign = sign
        self._verify = verify
        self._turn = threading.Lock()
        self._beginning = threading.Lock()
        self._writers: list[threading.Thread] = []
        self._closed = False
        self.newest: str | None = None
        """The name of the last one that was written; None if that failed."""
        self._told = ""
        for left in _entries(folder):
            if left.name.startswith(DRAFT):
                shutil.rmtree(left, ignore_errors=True)

    @property
    def writing(self) -> bool:
        """Whether one is being written now."""
        return any(writer.is_alive() for writer in self._writers)

    def save(self, tensors: Mapping[str, Tensor] | None, facts: Mapping[str, Any]) -> str | None:
        """Write a checkpoint and remove the oldest; its name.

        tensors: dense ones by name; None for a checkpoint of facts alone. facts: whatever
        JSON holds, without NaN and infinity. None when it could not be written, or the
        tensors are not finite: that is told in the log, and changes nothing that was there.
        """
        with self._turn:
            began = time.monotonic()
            try:
                name = self._write(dict(tensors or {}), facts)
            except Exception as error:  # noqa: BLE001 - no disk's trouble may end the training
                self.newest = None
                self._complain(f"no checkpoint could be written to {self.folder}: {_reason(error)}")
                return None
            self._told, self.newest = "", name
            for number in _numbers(self.folder)[: -self.keep]:
                self._remove(_name(number))
        logger.debug("%s written in %.2f s", name, time.monotonic() - began)
        return name

    def save_later(
        self, tensors: Mapping[str, Tensor] | None, facts: Mapping[str, Any], *, must: bool = False
    ) -> bool:
        """Write it in a thread of its own; whether that was begun.

        The tensors are given away: nobody may change them any more. While another is still
        being written nothing is begun, unless it `must`: then it is written after that one.
        """
        with self._beginning:
            if self._closed or (self.writing and not must):
                return False
            writer = threading.Thread(
                target=self.save, args=(tensors, facts), name="checkpoint", daemon=True
            )
            writer.start()
            self._writers = [*(other for other in self._writers if other.is_alive()), writer]
            return True

    def load(self, accept: Accept = lambda _facts: None) -> Checkpoint | None:
        """The newest sound checkpoint that is accepted; each newer one is told with its reason."""
        return newest(self.folder, verify=self._verify, accept=accept, refuse=_tell)

    def close(self, timeout_seconds: float) -> bool:
        """Begin no more, and wait for what is being written; whether it was written in time."""
        self._closed = True
        deadline = time.monotonic() + timeout_seconds
        for writer in self._writers:
            writer.join(max(0.0, deadline - time.monotonic()))
        return not self.writing

    def _write(self, tensors: dict[str, Tensor], facts: Mapping[str, Any]) -> str:
        if not _finite(tensors.values()):
            raise ValueError("the state holds numbers that are not finite")
        self.folder.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=DRAFT, dir=self.folder))
        try:
            state = None
            if tensors:
                save_file(tensors, draft / STATE)
                _sync(draft / STATE)
                length, digest = _measure(draft / STATE)
                state = {"bytes": length, "sha256": digest}
            number = 1 + max(_numbers(self.folder), default=0)
            said = {"format": FORMAT, "number": number, "facts": dict(facts), "state": state}
            with (draft / MANIFEST).open("xb") as stream:
                stream.write(self._signed(said))
            _sync(draft / MANIFEST)
            _sync(draft)
            draft.rename(self.folder / _name(number))
            _sync(self.folder)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise
        return _name(number)

    def _signed(self, said: dict[str, Any]) -> bytes:
        signature = self._sign(DOMAIN + _canonical(said))
        text = _canonical(said | {"signature": signature.hex()})
        if len(text) > MAX_MANIFEST_BYTES:
            raise ValueError(f"the facts take {len(text)} bytes, more than {MAX_MANIFEST_BYTES}")
        return text

    def _remove(self, name: str) -> None:
        """Under another name first: what is half removed is no checkpoint any more."""
        going = self.folder / f"{DRAFT}{name}"
        with contextlib.suppress(OSError):
            (self.folder / name).rename(going)
            if going.is_symlink():
                going.unlink()
            else:
                shutil.rmtree(going, ignore_errors=True)

    def _complain(self, cause: str) -> None:
        """Once for as long as it is the same trouble."""
        if cause != self._told:
            self._told = cause
            _tell(cause)


def newest(
    folder: Path,
    *,
    verify: Verify,
    accept: Accept = lambda _facts: None,
    refuse: Callable[[str], None] = lambda _cause: None,
) -> Checkpoint | None:
    """The newest sound checkpoint in a folder that is accepted. Changes nothing there.

    refuse: told of each newer one and why, in one line.
    """
    for number in reversed(_numbers(folder)):
        try:
            return _read(folder, number, verify=verify, accept=accept)
        except _Refused as reason:
            refuse(f"{_name(number)} is refused: {reason}")
    return None


def signed_by(hotkey: str) -> Verify:
    """Checks signatures of this hotkey, by its address alone."""

    def verify(data: bytes, signature: bytes) -> bool:
        try:
            key = Keypair(ss58_address=hotkey, crypto_type=CRYPTO_SR25519)
            return bool(key.verify(data, signature))
        except ValueError:  # no address, or no signature
            return False

    return verify


def of_run(run_id: str) -> Accept:
    """Accepts the checkpoints of this run alone."""

    def why_not(facts: dict[str, Any]) -> str | None:
        theirs = facts.get("run_id")
        return None if theirs == run_id else f"it is of run {theirs!s:.200}, and this is {run_id}"

    return why_not


def _tell(cause: str) -> None:
    events.tell(logger, "checkpoint", " ".join(cause.split())[:500])


# Names and order ---------------------------------------------------------------------------


def _name(number: int) -> str:
    return f"checkpoint-{number:06d}"


def _numbers(folder: Path) -> list[int]:
    """Of all checkpoints there, sound or not, the oldest first."""
    names = {path.name for path in _entries(folder)}
    found = (re.fullmatch(r"checkpoint-(\d{6,15})", name) for name in names)
    numbers = (int(match[1]) for match in found if match is not None)
    return sorted(number for number in numbers if _name(number) in names)


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:  # not made yet, or not ours to read
        return []


# Reading: nothing is believed before its signature ------------------------------------------


def _read(folder: Path, number: int, *, verify: Verify, accept: Accept) -> Checkpoint:
    place = folder / _name(number)
    if place.is_symlink() or not place.is_dir():
        raise _Refused("it is no folder")
    said = _manifest(place / MANIFEST, verify=verify)
    if said.get("format") != FORMAT:
        raise _Refused(f"its format is {said.get('format')!r:.20}, and this version reads {FORMAT}")
    if said.get("number") != number:
        raise _Refused(f"it was written as number {said.get('number')!r:.20}")
    facts, state = said["facts"], said["state"]
    reason = accept(facts)
    if reason is not None:
        raise _Refused(reason)
    tensors = {} if state is None else _tensors(place / STATE, state)
    return Checkpoint(place.name, facts, tensors)


def _manifest(path: Path, *, verify: Verify) -> dict[str, Any]:
    """What a manifest says, its signature taken off; refused unless each byte is as written."""
    try:
        with _open(path) as stream:
            text = stream.read(MAX_MANIFEST_BYTES + 1)
        if len(text) > MAX_MANIFEST_BYTES:
            raise _Refused(f"{path.name} is longer than {MAX_MANIFEST_BYTES} bytes")
        said = json.loads(text)
        if not isinstance(said, dict) or _canonical(said) != text:
            raise _Refused(f"{path.name} is not as it was written")
        signature = str(said.pop("signature", ""))
        if bytes.fromhex(signature).hex() != signature:
            raise _Refused(f"{path.name} is not as it was written")
    except (OSError, ValueError, RecursionError) as error:
        raise _Refused(f"{path.name} cannot be read ({_reason(error)})") from None
    if not verify(DOMAIN + _canonical(said), bytes.fromhex(signature)):
        raise _Refused(f"{path.name} is not signed by this hotkey")
    return said


def _tensors(path: Path, state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a file that is as long as it should be and has the right hash."""
    try:
        with _open(path) as stream:
            length = os.fstat(stream.fileno()).st_size
        if length != state["bytes"]:
            raise _Refused(f"{path.name} has {length} bytes instead of {state['bytes']}")
        if _measure(path) != (state["bytes"], state["sha256"]):
            raise _Refused(f"{path.name} is not what was written: its hash differs")
        tensors = load_file(path)
    except (OSError, ValueError, SafetensorError) as error:
        raise _Refused(f"{path.name} cannot be read ({_reason(error)})") from None
    if not _finite(tensors.values()):
        raise _Refused(f"{path.name} holds numbers that are not finite")
    return tensors


def _reason(error: Exception) -> str:
    words = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return words[:200] or type(error).__name__


def _open(path: Path) -> BinaryIO:
    """A regular file to read: no link, and nothing that would keep the reader waiting."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{path.name} is no file")
    return os.fdopen(descriptor, "rb")


def _measure(path: Path) -> tuple[int, str]:
    """Length in bytes and hex SHA-256."""
    digest, length = hashlib.sha256(), 0
    with _open(path) as stream:
        while part := stream.read(READ_BYTES):
            digest.update(part)
            length += len(part)
    return length, digest.hexdigest()


def _canonical(said: Mapping[str, Any]) -> bytes:
    """JSON in the one way that is signed. Raises ValueError for NaN and infinity."""
    text = json.dumps(said, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return text.encode("ascii") + b"\n"


def _finite(tensors: Iterable[Tensor]) -> bool:
    parts = (part for tensor in tensors for part in torch.split(tensor.reshape(-1), SERIAL_NUMBERS))
    return all(bool(torch.isfinite(part).all()) for part in parts)


def _sync(path: Path) -> None:
    """Force a file, or a folder's names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
