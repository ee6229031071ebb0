"""What the DHT stores and believes: each entry is short-lived, and its writer's own."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest
from hivemind.dht.crypto import RSASignatureValidator
from hivemind.dht.protocol import DHTProtocol
from hivemind.dht.routing import DHTID
from hivemind.dht.storage import DictionaryDHTValue
from hivemind.dht.validation import DHTRecord
from hivemind.p2p import PeerID
from hivemind.utils.crypto import RSAPrivateKey
from identities import EVERYBODY, RUN, who

from hiveminer.strategies.hivemind.records import (
    Shapes,
    averager_prefix,
    donors_key,
    group_key,
    progress_key,
)
from hiveminer.swarm.identity import Authorizer
from hiveminer.swarm.records import SignedRecords, keep_valid

pack = DHTProtocol.serializer.dumps


class Node:
    """A peer's validator; `write` gives an entry as its DHT would sign it."""

    def __init__(self, name: str, **options: Any):
        self.identity = who(name, **options)
        self.peer_id = PeerID.from_base58(self.identity.peer_id).to_bytes()
        self.records = SignedRecords(Authorizer(self.identity, admitted=EVERYBODY))

    def write(
        self, value: object = True, *, subkey: object = None, key: bytes = b"k", seconds: float = 9
    ) -> DHTRecord:
        name = pack(self.peer_id if subkey is None else subkey)
        record = DHTRecord(key, name, pack(value), time.time() + seconds)
        return changed(record, value=self.records.sign_value(record))


def changed(record: DHTRecord, **changes: Any) -> DHTRecord:
    return DHTRecord(**{**vars(record), **changes})


@pytest.fixture(scope="module")
def a() -> Node:
    return Node("Alice")


@pytest.fixture(scope="module")
def b() -> Node:
    return Node("Bob")


def test_an_entry_under_the_writers_own_peer_id_is_believed(a: Node, b: Node) -> None:
    record = a.write({"x": 1})
    assert [b.records.validate(record), b.records.validate(record)] == [True, True]
    assert a.records.validate(record)
    assert DHTProtocol.serializer.loads(b.records.strip_value(record)) == {"x": 1}
    owner = RSASignatureValidator(a.identity.private_key).local_public_key
    assert b.records.validate(a.write(subkey=owner))


def test_nobody_writes_for_another(a: Node, b: Node) -> None:
    owner = RSASignatureValidator(a.identity.private_key).local_public_key
    for subkey in (a.peer_id, owner, owner + owner, b"x" + owner, b"", "x", 1, None, b.peer_id[1:]):
        record = b.write(subkey=b"" if subkey is None else subkey)
        assert not a.records.validate(record), subkey


@pytest.mark.parametrize("seconds", [121.0, 365 * 86400.0, math.inf, math.nan, -1.0])
def test_nothing_lives_longer_than_two_minutes(a: Node, b: Node, seconds: float) -> None:
    assert not b.records.validate(a.write(seconds=seconds))


def test_a_plain_value_and_a_whole_dictionary_are_no_entries(a: Node, b: Node) -> None:
    for tag in DHTProtocol.RESERVED_SUBKEYS:
        record = changed(a.write(), subkey=tag)
        resigned = changed(record, value=a.records.sign_value(changed(record, value=pack(1))))
        assert not b.records.validate(resigned)


def test_an_entry_with_one_part_changed_is_not_believed(a: Node, b: Node) -> None:
    record = a.write({"x": 1})
    flipped = bytearray(record.value)
    flipped[2] ^= 1
    for change in (
        {"key": b"other"}, {"expiration_time": record.expiration_time + 1},
        {"value": bytes(flipped)}, {"value": b""}, {"value": record.value[:-1]},
        {"value": pack(True)}, {"value": b"\xff" * 3000}, {"value": record.value + b"\0" * 9000},
        {"subkey": pack(b.peer_id)},
    ):  # fmt: skip
        assert not b.records.validate(changed(record, **change)), change
    assert b.records.validate(record)


def test_a_stranger_and_an_invented_peer_write_nothing(a: Node) -> None:
    stranger, other_run = Node("Eve"), Node("Bob", run_id="another-run")
    assert not a.records.validate(stranger.write())
    assert not a.records.validate(other_run.write())
    inventor = Node("Bob", key=1)
    inventor.records._own_token()  # of its hotkey, for its own key
    inventor.identity.private_key = RSAPrivateKey()
    assert not a.records.validate(inventor.write())


def test_a_bad_entry_is_dropped_and_the_others_stay(a: Node, b: Node) -> None:
    good, junk = a.write(), b.write(subkey=a.peer_id + b"x")
    entries = DictionaryDHTValue(1)
    entries.maxsize = math.inf
    for record in (good, junk):
        name = DHTProtocol.serializer.loads(record.subkey)
        entries.store(name, record.value, record.expiration_time)
    entries.latest_expiration_time = time.time() + 365 * 86400
    assert keep_valid(b.records, b"k", entries)
    assert list(entries.data) == [a.peer_id]
    assert entries.latest_expiration_time == good.expiration_time
    nothing = DictionaryDHTValue()
    nothing.store(b.peer_id, b"junk", time.time() + 9)
    assert not keep_valid(b.records, b"k", nothing)


PREFIX = averager_prefix(RUN)
PEER = b"\x12\x20" + b"p" * 32


def fits(key: str, name: object, value: object) -> bool:
    raw = DHTID.generate(source=key).to_bytes()
    return Shapes(RUN).validate(DHTRecord(raw, pack(name), pack(value), time.time() + 9))


def test_entries_have_the_shape_that_hivemind_gives_them(a: Node) -> None:
    assert fits(group_key(PREFIX), PEER, True)
    assert fits(group_key(PREFIX), PEER, False)
    assert fits(donors_key(PREFIX), PEER, 5.0)
    assert fits(donors_key(PREFIX), PEER, 5)
    assert fits(donors_key(PREFIX), PEER, None)
    owner = RSASignatureValidator(a.identity.private_key).local_public_key
    report = {
        "peer_id": a.peer_id, "epoch": 5, "time": 1.0, "samples_accumulated": 0,
        "samples_per_second": 1.0, "client_mode": False,
    }  # fmt: skip
    assert fits(progress_key(RUN), owner, report)
    assert fits(progress_key(RUN), owner, None)
    assert not fits(progress_key(RUN), owner, report | {"time": math.nan})
    assert not fits(progress_key(RUN), owner, report | {"peer_id": PEER})
    assert not fits(progress_key(RUN), a.peer_id, report)


@pytest.mark.parametrize("value", [None, 1, "x", b"x", [], {}, math.nan])
def test_other_shapes_are_refused(value: object) -> None:
    assert not fits(group_key(PREFIX), PEER, value)
    for name in (b"", b"x" * 34, "x", 1, PEER + b"x"):
        assert not fits(group_key(PREFIX), name, True)
        assert not fits(donors_key(PREFIX), name, 5.0)
    if value not in (None, 1):
        assert not fits(donors_key(PREFIX), PEER, value)
