"""The DHT's records: short-lived dictionary entries, each signed by its writer.

Hivemind's DHT accepts any value under any key, for any time. Here a record's subkey is its
writer's peer id (or the RSA key that the peer id follows from). Its value carries the writer's
token, in which a registered hotkey vouches for that key, and the key's signature over the whole
record, so it can be verified wherever it came from. A record expires within two minutes, and an
invalid entry is dropped without its neighbors.
"""

from __future__ import annotations

import functools
import hashlib
import math
import re
import struct
from collections import OrderedDict
from typing import Any

from hivemind.dht.crypto import RSASignatureValidator
from hivemind.dht.protocol import DHTProtocol
from hivemind.dht.storage import DictionaryDHTValue
from hivemind.dht.validation import DHTRecord, RecordValidatorBase
from hivemind.p2p import PeerID
from hivemind.proto.auth_pb2 import AccessToken
from hivemind.utils.crypto import RSAPublicKey
from hivemind.utils.timed_storage import ValueWithExpiration, get_dht_time

from hiveminer.swarm.identity import LIFETIME_SECONDS, Authorizer
from hiveminer.swarm.keys import peer_id_of_key

LONGEST_SECONDS = 120.0
"""How far in the future a record may expire."""

MAX_RECORD_BYTES = 8192
MAX_SUBKEY_BYTES = 1024
MAX_CACHED = 4096
"""Verified records to remember; each is read many times."""

DOMAIN = b"hiveminer record 1\n"
OWNER = re.compile(RSASignatureValidator.PUBLIC_KEY_REGEX)

_LENGTHS = struct.Struct(">HH")
"""At the end of a signed value: the lengths of the token and the signature before it."""


class SignedRecords(RecordValidatorBase):  # type: ignore[misc]
    """Signs our records, and verifies all; lives in the DHT's process. authorizer: the DHT's."""

    def __init__(self, authorizer: Authorizer):
        self._authorizer = authorizer
        self._token: Any = None
        self._renew_at = 0.0
        self._checked: OrderedDict[bytes, None] = OrderedDict()

    @property
    def priority(self) -> int:
        """Above Hivemind's own: signs last, and verifies first."""
        return 20

    def sign_value(self, record: DHTRecord) -> bytes:
        token = self._own_token().SerializeToString()
        statement = _statement(record, record.value, token)
        signature = self._authorizer.identity.private_key.sign(statement)
        lengths = _LENGTHS.pack(len(token), len(signature))
        signed: bytes = record.value + token + signature + lengths
        return signed

    def strip_value(self, record: DHTRecord) -> bytes:
        value = bytes(record.value)
        parts = _split(value)
        return value if parts is None else parts[0]

    def validate(self, record: DHTRecord) -> bool:
        if not 0 < record.expiration_time - get_dht_time() <= LONGEST_SECONDS:  # not NaN either
            return False
        if record.subkey in DHTProtocol.RESERVED_SUBKEYS or len(record.value) > MAX_RECORD_BYTES:
            return False
        parts = _split(record.value)
        if parts is None:
            return False
        value, raw_token, signature = parts
        try:
            token = AccessToken.FromString(raw_token)
        except Exception:  # noqa: BLE001 - the parser raises whatever it meets
            return False
        if token != self._token and self._authorizer.refusal(token) is not None:
            return False
        name = hashlib.sha256(_statement(record, value, raw_token) + signature).digest()
        if name in self._checked:
            self._checked.move_to_end(name)
            return True
        if owner_of(record.subkey) != peer_id_of_key(token.public_key):
            return False
        key = RSAPublicKey.from_bytes(token.public_key)
        if not key.verify(_statement(record, value, raw_token), signature):
            return False
        self._checked[name] = None
        if len(self._checked) > MAX_CACHED:
            self._checked.popitem(last=False)
        return True

    def _own_token(self) -> Any:
        now = get_dht_time()
        if self._token is None or not now < self._renew_at < now + LIFETIME_SECONDS:
            self._renew_at = now + LIFETIME_SECONDS / 2
            self._token = self._authorizer.identity.endorse(expires=now + LIFETIME_SECONDS)
        return self._token


def owner_of(subkey: bytes) -> str | None:
    """The peer id that a serialized subkey is, or that the RSA key in it belongs to."""
    if len(subkey) > MAX_SUBKEY_BYTES:
        return None
    try:
        name = DHTProtocol.serializer.loads(subkey)
        if not isinstance(name, bytes):
            return None
        key = OWNER.fullmatch(name)
        return peer_id_of_key(key[1]) if key is not None else str(PeerID(name))
    except Exception:  # noqa: BLE001 - the parsers raise whatever they meet
        return None


async def protect_records(_dht: Any, node: Any) -> None:
    """Runs in the DHT's process at its start: judge dictionaries entry by entry.

    Hivemind refuses a whole dictionary for one bad entry, so that anybody could hide everybody's,
    and believes the expiry that the sender states for it.
    """
    protocol = node.protocol
    stock = protocol.call_find

    async def call_find(peer: Any, keys: Any) -> Any:
        results = await stock(peer, keys)
        for key, (found, nearest) in list((results or {}).items()):
            if found is not None and isinstance(found.value, DictionaryDHTValue):
                expires = found.value.latest_expiration_time
                results[key] = ValueWithExpiration(found.value, expires), nearest
        return results

    protocol.call_find = call_find
    protocol._validate_dictionary = functools.partial(keep_valid, protocol.record_validator)


def keep_valid(validator: Any, key: bytes, entries: Any) -> bool:
    """Drop a dictionary's invalid entries; returns whether any is left."""
    for subkey, (value, expires) in list(entries.data.items()):
        name = DHTProtocol.serializer.dumps(subkey)
        if not validator.validate(DHTRecord(key, name, value, expires)):
            del entries[subkey]
    entries.maxsize = math.inf
    left = [entry.expiration_time for entry in entries.data.values()]
    entries.latest_expiration_time = max(left, default=-math.inf)
    return bool(left)


def _statement(record: DHTRecord, value: bytes, token: bytes) -> bytes:
    """What a writer signs: each part with its length."""
    parts = (record.key, record.subkey, struct.pack(">d", record.expiration_time), value, token)
    return DOMAIN + b"".join(len(part).to_bytes(4, "big") + bytes(part) for part in parts)


def _split(data: bytes) -> tuple[bytes, bytes, bytes] | None:
    """Value, token and signature; None if it is not signed."""
    if len(data) < _LENGTHS.size:
        return None
    body = bytes(data[: -_LENGTHS.size])
    token, signature = _LENGTHS.unpack(data[-_LENGTHS.size :])
    end = len(body) - token - signature
    if end < 0 or not token or not signature:
        return None
    return body[:end], body[end : end + token], body[end + token :]
