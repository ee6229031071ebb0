"""The DHT's keys of a run, and what an entry under each may be.

Another peer's node may return anything, so an entry is checked when it is stored and again when it
is read; an invalid one is skipped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeGuard

from hivemind.dht.protocol import DHTProtocol
from hivemind.dht.routing import DHTID
from hivemind.dht.validation import DHTRecord, RecordValidatorBase
from hivemind.p2p import PeerID

from hiveminer.swarm.keys import peer_id_of_key
from hiveminer.swarm.records import OWNER

MAX_COUNT = 2**53
"""No epoch and no number of rows is larger."""


def averager_prefix(run_id: str) -> str:
    return f"{run_id}_state_averager"


def donors_key(prefix: str) -> str:
    """The key of the peers that serve their state."""
    return f"{prefix}.all_averagers"


def group_key(prefix: str) -> str:
    """The key of the peers that look for a group."""
    return f"{prefix}.0b"


def progress_key(run_id: str) -> str:
    return f"{run_id}_progress"


def is_count(value: object) -> TypeGuard[int]:
    """Whether this is an epoch, or a number of rows."""
    return type(value) is int and 0 <= value <= MAX_COUNT


class Report(NamedTuple):
    """A peer's report: its epoch, its rows in it, and the time by its own clock."""

    peer: str
    epoch: int
    rows: int
    rows_per_second: float
    time: float


def read_report(value: object) -> Report | None:
    """A report in Hivemind's format, or None."""
    if not isinstance(value, dict) or set(value) != {
        "peer_id", "epoch", "samples_accumulated", "samples_per_second", "time", "client_mode",
    }:  # fmt: skip
        return None
    name, time, speed = value["peer_id"], value["time"], value["samples_per_second"]
    counts = (value["epoch"], value["samples_accumulated"])
    if not isinstance(name, bytes) or not 0 < len(name) <= 64:
        return None
    if not all(map(is_count, counts)):
        return None
    if not all(type(number) is float and math.isfinite(number) for number in (time, speed)):
        return None
    if speed < 0 or type(value["client_mode"]) is not bool:
        return None
    return Report(str(PeerID(name)), *counts, speed, time)


def signer_of(subkey: object) -> str | None:
    """The peer whose RSA key an entry under the progress key is bound to."""
    key = OWNER.fullmatch(subkey) if isinstance(subkey, bytes) else None
    return peer_id_of_key(key[1]) if key is not None else None


def donors_in(entries: Mapping[Any, Any]) -> set[PeerID]:
    """The peers that serve their state."""
    found = entries.items()
    return {PeerID(name) for name, entry in found if _is_peer_id(name) and _is_number(entry.value)}


def reporters_in(entries: Mapping[Any, Any]) -> set[PeerID]:
    """The peers that report."""
    reports = [read_report(entry.value) for entry in entries.values()]
    return {PeerID.from_base58(report.peer) for report in reports if report is not None}


class Shapes(RecordValidatorBase):  # type: ignore[misc]
    """Refuses entries under a run's keys that are not in Hivemind's format."""

    def __init__(self, run_id: str):
        prefix = averager_prefix(run_id)
        keys = {
            group_key(prefix): _is_search,
            donors_key(prefix): _is_donor,
            progress_key(run_id): _is_progress,
        }
        self._checks = {DHTID.generate(source=key).to_bytes(): keys[key] for key in keys}

    @property
    def priority(self) -> int:
        """Below Hivemind's signature validator, which strips the signature first."""
        return 5

    def validate(self, record: DHTRecord) -> bool:
        check = self._checks.get(record.key)
        if check is None:
            return True
        try:
            name = DHTProtocol.serializer.loads(record.subkey)
            return check(name, DHTProtocol.serializer.loads(record.value))
        except Exception:  # noqa: BLE001 - the parser raises whatever it meets
            return False


def _is_search(name: object, value: object) -> bool:
    return _is_peer_id(name) and type(value) is bool


def _is_donor(name: object, value: object) -> bool:
    return _is_peer_id(name) and (value is None or _is_number(value))


def _is_progress(name: object, value: object) -> bool:
    signer = signer_of(name)
    if value is None:  # a goodbye
        return signer is not None
    report = read_report(value)
    return report is not None and report.peer == signer


def _is_peer_id(name: object) -> bool:
    """As raw bytes: a multihash, whose first bytes say SHA-256 and 32 bytes."""
    return isinstance(name, bytes) and len(name) == 34 and name.startswith(b"\x12\x20")


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]
