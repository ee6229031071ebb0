"""RSA keys of peers: the peer id that follows from one, and the file that one is kept in."""

from __future__ import annotations

import functools
import hashlib
import os
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from hivemind.p2p import PeerID
from hivemind.proto import crypto_pb2
from hivemind.utils.crypto import RSAPrivateKey

from hiveminer.errors import OperatorError
from hiveminer.runtime.files import write_atomically

MAX_PUBLIC_KEY = 800
"""Bytes; an RSA key of 4,096 bits has 724."""
MAX_KEY_FILE = 8192
RSA_BITS = range(2048, 4097)
MAX_CACHED = 1024


def peer_id_of_key(public_key: bytes) -> str | None:
    """The libp2p peer id that belongs to an RSA public key in OpenSSH's format; None when it
    is no such key, or of a size that nobody needs."""
    return _peer_id_of_key(public_key) if len(public_key) <= MAX_PUBLIC_KEY else None


@functools.lru_cache(maxsize=MAX_CACHED)
def _peer_id_of_key(public_key: bytes) -> str | None:
    try:
        key = serialization.load_ssh_public_key(public_key)
    except Exception:  # noqa: BLE001 - the parser raises whatever it meets
        return None
    if not isinstance(key, rsa.RSAPublicKey) or key.key_size not in RSA_BITS:
        return None
    der = key.public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    message = crypto_pb2.PublicKey(key_type=crypto_pb2.RSA, data=der).SerializeToString()
    # https://github.com/libp2p/specs/blob/master/peer-ids/peer-ids.md: a multihash, whose
    # first bytes say SHA-256 and 32 bytes.
    return str(PeerID(b"\x12\x20" + hashlib.sha256(message).digest()))


def load_or_make(path: Path) -> Any:
    """The RSA key in this file; a new one when there is no such file."""
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            key = RSAPrivateKey()
            message = crypto_pb2.PrivateKey(key_type=crypto_pb2.RSA, data=key.to_bytes())
            write_atomically(path, message.SerializeToString(), mode=0o600)
            return key
        with path.open("rb") as stream:
            # hivemind made it 400, and a copy from elsewhere may be open to all.
            os.fchmod(stream.fileno(), 0o600)
            data = stream.read(MAX_KEY_FILE + 1)
    except OSError as error:
        raise OperatorError(
            f"the peer's key {path} cannot be used: {error.strerror}; it must be a file of "
            "this user's"
        ) from None
    key = parse(data)
    if key is None:
        raise OperatorError(
            f"{path} is not a peer's key; put the right file there, or remove it to get a new "
            "key and peer id"
        )
    return key


def parse(data: bytes) -> Any:
    """The key in a file of hivemind's format, libp2p's protobuf around PKCS #1; None if it is
    not one."""
    if len(data) > MAX_KEY_FILE:
        return None
    try:
        message = crypto_pb2.PrivateKey.FromString(data)
        key = RSAPrivateKey.__new__(RSAPrivateKey)
        # The way in that hivemind has for pickle; there is no other for bytes.
        key.__setstate__({"_private_key": message.data})
        same = message.key_type == crypto_pb2.RSA and key.to_bytes() == message.data
        return key if same and peer_id_of_key(key.get_public_key().to_bytes()) else None
    except Exception:  # noqa: BLE001 - the parsers raise whatever they meet
        return None
