"""The file of a peer's key."""

from __future__ import annotations

import functools
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bittensor
import pytest
from bittensor.keyfiles import Keypair
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa
from hivemind.p2p import P2P, PeerID
from hivemind.proto import crypto_pb2
from identities import RUN, hotkey

from hiveminer.errors import OperatorError
from hiveminer.swarm.identity import Identity

# The key's file


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_the_key_is_kept_for_its_user_alone(tmp_path: Path) -> None:
    path = tmp_path / "neuron" / "peer.key"
    first = Identity(hotkey("Alice"), run_id=RUN, key_path=path)
    assert mode(path) == 0o600
    assert [file.name for file in path.parent.iterdir()] == ["peer.key"]
    assert str(PeerID.from_identity(path.read_bytes())) == first.peer_id
    again = Identity(hotkey("Alice"), run_id=RUN, key_path=path)
    assert again.peer_id == first.peer_id


@pytest.mark.parametrize("was", [0o400, 0o644, 0o666])
def test_a_key_that_hivemind_wrote_goes_on_working(tmp_path: Path, was: int) -> None:
    path = tmp_path / "peer.key"
    P2P.generate_identity(str(path))
    path.chmod(was)
    one = Identity(hotkey("Alice"), run_id=RUN, key_path=path)
    assert mode(path) == 0o600
    assert str(PeerID.from_identity(path.read_bytes())) == one.peer_id


def wrapped(key: Any, *, form: Any = serialization.PrivateFormat.TraditionalOpenSSL) -> bytes:
    der = key.private_bytes(serialization.Encoding.DER, form, serialization.NoEncryption())
    message = crypto_pb2.PrivateKey(key_type=crypto_pb2.RSA, data=der)
    written: bytes = message.SerializeToString()
    return written


@functools.cache
def good() -> bytes:
    return wrapped(rsa.generate_private_key(65537, 2048))


@pytest.mark.parametrize(
    "data",
    [
        lambda: b"",
        lambda: b"not a key\n",
        lambda: good()[:-1],
        lambda: good()[: len(good()) // 2],
        lambda: good() * 10,
        lambda: wrapped(rsa.generate_private_key(65537, 1024)),
        lambda: wrapped(
            ed25519.Ed25519PrivateKey.generate(), form=serialization.PrivateFormat.PKCS8
        ),
        # Python reads it, and libp2p does not.
        lambda: wrapped(
            rsa.generate_private_key(65537, 2048), form=serialization.PrivateFormat.PKCS8
        ),
    ],
    ids=["empty", "text", "cut", "half", "long", "short key", "no rsa", "other format"],
)
def test_a_file_that_is_no_key_is_told_in_one_line(
    tmp_path: Path, data: Callable[[], bytes]
) -> None:
    path = tmp_path / "peer.key"
    written = data()
    path.write_bytes(written)
    with pytest.raises(OperatorError, match=r"is not a peer's key; .* or remove it") as raised:
        Identity(hotkey("Alice"), run_id=RUN, key_path=path)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)
    assert path.read_bytes() == written


def test_a_place_where_no_key_can_be_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file" / "peer.key"):
        with pytest.raises(OperatorError, match=r"the peer's key .* cannot be used: "):
            Identity(hotkey("Alice"), run_id=RUN, key_path=path)


def test_a_hotkey_of_another_kind_is_the_operators_mistake(tmp_path: Path) -> None:
    key = Keypair.create_from_uri("//Alice", crypto_type=bittensor.CRYPTO_ED25519)
    with pytest.raises(OperatorError, match="not sr25519"):
        Identity(key, run_id=RUN, key_path=tmp_path / "peer.key")
