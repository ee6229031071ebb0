"""Who may speak in the swarm: tokens, key files, and real peers with a stranger among them."""

from __future__ import annotations

import asyncio
import functools
import logging
import re
import stat
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bittensor
import pytest
from bittensor.keyfiles import Keypair
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa
from hivemind.p2p import P2P, PeerID
from hivemind.proto import crypto_pb2, dht_pb2
from hivemind.utils import auth

from hiveminer.errors import OperatorError, SwarmError
from hiveminer.swarm import Identity, identity
from hiveminer.swarm.identity import Authorizer
from hiveminer.swarm.keys import peer_id_of_key
from programs import Network, started

RUN = "embedded-11aa-22bb-33cc"
OTHER_RUN = "embedded-99ff-22bb-33cc"


@functools.cache
def hotkey(name: str) -> Any:
    return Keypair.create_from_uri(f"//{name}")


@functools.cache
def who(name: str, *, run_id: str = RUN, key: int = 0) -> Identity:
    """This hotkey's identity, with the `key`-th of its RSA keys."""
    return Identity(hotkey(name), run_id=run_id, key_path=None)


EVERYBODY = tuple(str(hotkey(name).ss58_address) for name in ("Alice", "Bob", "Charlie"))
ALICE, BOB, CHARLIE = EVERYBODY


def authorizer(name: str, **options: Any) -> Authorizer:
    return Authorizer(who(name, **options), admitted=EVERYBODY)


def signed(sender: Authorizer, **fields: Any) -> Any:
    """A request as the sender's DHT sends it."""
    request = dht_pb2.PingRequest(**fields)
    asyncio.run(sender.sign_request(request, None))
    return request


def copied(message: Any) -> Any:
    """hivemind's check takes the signature out of what it checks."""
    copy = type(message)()
    copy.CopyFrom(message)
    return copy


def passes(receiver: Authorizer, request: Any) -> bool:
    return asyncio.run(receiver.validate_request(copied(request)))


def token_of(one: Identity, *, seconds: float = 500.0) -> Any:
    return one.endorse(expires=time.time() + seconds)


def forget(receiver: Authorizer) -> None:
    """As if all had been told long ago."""
    receiver._tell_again_at.clear()


# Requests and responses


def test_registered_peers_pass_and_are_known_by_their_hotkeys() -> None:
    alice, bob = authorizer("Alice"), authorizer("Bob")
    request = signed(alice)
    assert bob.hotkey_of(who("Alice").peer_id) is None
    assert passes(bob, request)
    assert bob.hotkey_of(who("Alice").peer_id) == ALICE
    response = dht_pb2.PingResponse(available=True)
    asyncio.run(bob.sign_response(response, request))
    assert asyncio.run(alice.validate_response(copied(response), request))
    assert alice.hotkey_of(who("Bob").peer_id) == BOB
    assert alice.hotkey_of(who("Alice").peer_id) == ALICE


def test_a_request_passes_once() -> None:
    alice, bob = authorizer("Alice"), authorizer("Bob")
    request = signed(alice)
    assert [passes(bob, request), passes(bob, request)] == [True, False]


def test_a_request_with_one_byte_changed_does_not_pass() -> None:
    alice, bob = authorizer("Alice"), authorizer("Bob")
    request = signed(alice)
    request.validate = True
    assert not passes(bob, request)
    assert bob.hotkey_of(who("Alice").peer_id) is None


def test_a_response_to_another_request_does_not_pass() -> None:
    alice, bob = authorizer("Alice"), authorizer("Bob")
    response = dht_pb2.PingResponse()
    asyncio.run(bob.sign_response(response, signed(alice)))
    assert not asyncio.run(alice.validate_response(response, signed(alice)))
    assert alice.hotkey_of(who("Bob").peer_id) is None


@pytest.mark.parametrize(
    ("field", "value"),
    [("time", float("nan")), ("time", float("inf")), ("nonce", b""), ("nonce", b"n" * 33)],
)
def test_a_request_that_could_be_replayed_or_hoarded_does_not_pass(
    field: str, value: object
) -> None:
    alice, bob = authorizer("Alice"), authorizer("Bob")
    request = signed(alice)
    setattr(request.auth, field, value)
    request.auth.signature = b""
    request.auth.signature = who("Alice").private_key.sign(request.SerializeToString())
    assert not passes(bob, request)


def test_a_stolen_token_is_of_no_use_without_its_key() -> None:
    thief, bob = authorizer("Charlie"), authorizer("Bob")
    thief._local_access_token = token_of(who("Alice"))
    assert not passes(bob, signed(thief))
    assert bob.hotkey_of(who("Alice").peer_id) is None


def test_a_hotkey_cannot_claim_the_key_of_another() -> None:
    alice, bob, charlie = authorizer("Alice"), authorizer("Bob"), authorizer("Charlie")
    assert passes(bob, signed(alice))
    token = token_of(who("Charlie"), seconds=599)
    token.public_key = who("Alice").public_key
    token.signature = hotkey("Charlie").sign(identity._statement(token))
    charlie._local_access_token = token
    assert not passes(bob, signed(charlie))
    assert bob.hotkey_of(who("Alice").peer_id) == ALICE
    assert passes(bob, signed(alice))


@pytest.mark.parametrize(
    ("seconds", "words"), [(-90.0, "90 s behind ours"), (90.0, "90 s ahead of ours")]
)
def test_whose_clock_is_wrong_is_told(
    seconds: float,
    words: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    alice, bob = authorizer("Alice"), authorizer("Bob")
    with monkeypatch.context() as patch:
        for module in (auth, identity):
            patch.setattr(module, "get_dht_time", lambda: time.time() + seconds)
        requests = [signed(alice), signed(alice)]
    with caplog.at_level(logging.WARNING):
        assert not any(passes(bob, request) for request in requests)
    assert caplog.text.count(words) == 1
    assert ALICE in caplog.text


# Tokens


def test_a_token_of_a_registered_hotkey_is_good() -> None:
    assert authorizer("Bob").refusal(token_of(who("Alice"))) is None


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(-1.0, "counts for -1 s"), (3600.0, "counts for 3600 s"), (1e300, "no token of ours")],
    ids=["expired", "too long", "absurd"],
)
def test_a_token_counts_for_a_while(seconds: float, words: str) -> None:
    bob, token = authorizer("Bob"), token_of(who("Alice"), seconds=seconds)
    assert words in str(bob.refusal(token))
    assert not bob.is_token_valid(token)


def test_a_hotkey_that_is_not_registered_is_refused() -> None:
    assert authorizer("Bob").refusal(token_of(who("Eve"))) == (
        f"hotkey {hotkey('Eve').ss58_address} is not registered"
    )


def other_key(token: Any) -> None:
    token.public_key = who("Eve").public_key


def cut_signature(token: Any) -> None:
    token.signature = token.signature[:-1] + bytes([token.signature[-1] ^ 1])


def other_hotkey(token: Any) -> None:
    token.username = f"{CHARLIE} {RUN}"


def other_run(token: Any) -> None:
    token.username = f"{ALICE} {OTHER_RUN}"


def longer_life(token: Any) -> None:
    token.expiration_time = f"{float(token.expiration_time) + 1:.3f}"


@pytest.mark.parametrize("tamper", [other_key, cut_signature, other_hotkey, other_run, longer_life])
def test_a_token_with_one_field_changed_is_refused(tamper: Callable[[Any], None]) -> None:
    bob, token = authorizer("Bob"), token_of(who("Alice"))
    assert bob.refusal(token) is None
    tamper(token)
    assert str(bob.refusal(token)).startswith("the token is not signed by ")


def test_a_byte_of_one_field_is_not_taken_for_the_next_ones() -> None:
    bob, token = authorizer("Bob"), token_of(who("Alice"))
    token.public_key += b" 1"  # OpenSSH's format has room for a comment
    token.signature = hotkey("Alice").sign(identity._statement(token))
    assert bob.refusal(token) is None
    token.public_key, token.expiration_time = token.public_key[:-1], f"1{token.expiration_time}"
    assert str(bob.refusal(token)).startswith("the token is not signed by ")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("username", f"{ALICE} {'r' * 129}"),
        ("username", f"{'5' * 65} {RUN}"),
        ("username", ALICE),
        ("username", f"{ALICE} a b"),
        ("username", f"{ALICE} run\n"),
        ("username", f"{ALICE} rün"),
        ("username", "5" * 100_000),
        ("public_key", b"k" * 801),
        ("expiration_time", "9" * 21),
        ("expiration_time", "nan"),
        ("expiration_time", ""),
        ("expiration_time", "soon"),
        ("signature", b""),
        ("signature", b"s" * 65),
    ],
)
def test_what_has_not_a_tokens_shape_costs_no_cryptography(
    field: str, value: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    def touched(*_: object, **__: object) -> None:
        raise AssertionError("cryptography was used")

    bob, token = authorizer("Bob"), token_of(who("Alice"))
    setattr(token, field, value)
    for name in ("_is_signed", "peer_id_of_key"):
        monkeypatch.setattr(identity, name, touched)
    assert bob.refusal(token) == "no token of ours"


@pytest.mark.parametrize("public_key", [b"", b"ssh-rsa", b"ssh-rsa AAAA", b"\xff" * 100])
def test_what_is_no_key_belongs_to_no_peer(public_key: bytes) -> None:
    assert peer_id_of_key(public_key) is None


def test_only_rsa_keys_of_a_sane_length_count() -> None:
    def public(key: Any) -> bytes:
        written: bytes = key.public_key().public_bytes(
            serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
        )
        return written

    assert peer_id_of_key(public(ed25519.Ed25519PrivateKey.generate())) is None
    assert peer_id_of_key(public(rsa.generate_private_key(65537, 1024))) is None
    assert peer_id_of_key(public(rsa.generate_private_key(65537, 2048))) is not None


def test_a_peer_of_another_run_is_refused_aloud(caplog: pytest.LogCaptureFixture) -> None:
    bob, stray = authorizer("Bob"), authorizer("Alice", run_id=OTHER_RUN)
    with caplog.at_level(logging.WARNING):
        assert not passes(bob, signed(stray))
        assert not passes(bob, signed(stray))
    [line] = caplog.records
    assert line.__dict__["event"] == "other_run"
    assert f"hotkey {ALICE}" in line.getMessage()
    assert f"it is in run {OTHER_RUN}, we are in {RUN}" in line.getMessage()
    assert bob.hotkey_of(who("Alice", run_id=OTHER_RUN).peer_id) is None
    forget(bob)
    assert not passes(bob, signed(stray))
    assert len(caplog.records) == 2


def test_a_stranger_cannot_make_us_say_anything(caplog: pytest.LogCaptureFixture) -> None:
    bob, token = authorizer("Bob"), token_of(who("Alice", run_id=OTHER_RUN))
    cut_signature(token)
    with caplog.at_level(logging.WARNING):
        assert bob.refusal(token) is not None
        assert bob.refusal(token_of(who("Eve", run_id=OTHER_RUN))) is not None
    assert caplog.records == []


def test_who_is_no_longer_admitted_is_out_at_once() -> None:
    alice, bob = authorizer("Alice"), authorizer("Bob")
    assert passes(bob, signed(alice))
    bob.admit([BOB, CHARLIE])
    assert bob.hotkey_of(who("Alice").peer_id) is None
    assert not passes(bob, signed(alice))
    bob.admit(EVERYBODY)
    assert bob.hotkey_of(who("Alice").peer_id) is None
    assert passes(bob, signed(alice))
    assert bob.hotkey_of(who("Alice").peer_id) == ALICE


def test_who_is_not_registered_itself_speaks_and_is_not_heard() -> None:
    eve, bob = authorizer("Eve"), authorizer("Bob")
    assert not passes(bob, signed(eve))
    assert eve.hotkey_of(who("Eve").peer_id) is None


def test_a_hotkey_has_one_peer_id_and_the_newest_token_says_which() -> None:
    first, second, bob = who("Alice"), who("Alice", key=1), authorizer("Bob")
    assert first.peer_id != second.peer_id

    def speaks(one: Identity, *, seconds: float) -> bool:
        speaker = Authorizer(one, admitted=EVERYBODY)
        speaker._local_access_token = token_of(one, seconds=seconds)
        return passes(bob, signed(speaker))

    assert speaks(first, seconds=400)
    assert speaks(second, seconds=500)
    assert bob.hotkey_of(second.peer_id) == ALICE
    assert bob.hotkey_of(first.peer_id) is None
    assert not speaks(first, seconds=450)
    assert speaks(second, seconds=350)  # it speaks already: an older token of its own will do
    assert speaks(first, seconds=550)
    assert bob.hotkey_of(first.peer_id) == ALICE
    assert bob.hotkey_of(second.peer_id) is None


def test_a_key_has_one_hotkey(tmp_path: Path) -> None:
    ones = [Identity(hotkey(n), run_id=RUN, key_path=tmp_path / "k") for n in ("Alice", "Charlie")]
    assert ones[0].peer_id == ones[1].peer_id
    bob = authorizer("Bob")
    for one, seconds in zip(ones, (400, 500), strict=True):
        speaker = Authorizer(one, admitted=EVERYBODY)
        speaker._local_access_token = token_of(one, seconds=seconds)
        assert passes(bob, signed(speaker))
    assert bob.hotkey_of(ones[0].peer_id) == CHARLIE


def test_a_proof_ends_with_its_token(monkeypatch: pytest.MonkeyPatch) -> None:
    alice, bob = authorizer("Alice"), authorizer("Bob")
    assert passes(bob, signed(alice))
    monkeypatch.setattr(identity, "get_dht_time", lambda: time.time() + 601)
    assert bob.hotkey_of(who("Alice").peer_id) is None


def test_our_own_token_is_made_anew_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    alice, bob = authorizer("Alice"), authorizer("Bob")

    def later(seconds: float) -> Any:
        for module in (auth, identity):
            monkeypatch.setattr(module, "get_dht_time", lambda: time.time() + seconds)
        return signed(alice)

    tokens = [later(seconds).auth.client_access_token for seconds in (0, 290, 310, 320, -5000)]
    assert tokens[0] == tokens[1] != tokens[2] == tokens[3] != tokens[4]
    assert passes(bob, later(0))


def test_a_token_is_proved_once(monkeypatch: pytest.MonkeyPatch) -> None:
    proved = []
    prove = identity._is_signed
    monkeypatch.setattr(
        identity, "_is_signed", lambda token, **k: proved.append(token) or prove(token, **k)
    )
    monkeypatch.setattr(identity, "REMEMBERED_TOKENS", 4)
    bob = authorizer("Bob")
    first, *others = [token_of(who("Alice"), seconds=300 + n) for n in range(6)]
    assert bob.refusal(first) is bob.refusal(first) is None
    assert len(proved) == 1
    assert [bob.refusal(token) for token in others] == [None] * 5
    assert bob.refusal(first) is None
    assert len(proved) == 7, "the longest unused of more than four was to be forgotten"


# The handlers


class Servicer:
    """As much of hivemind's DHT protocol as the wrapper around it sees."""

    client_mode = False

    def __init__(self, authorizer: Authorizer):
        self.authorizer = authorizer

    async def rpc_ping(self, request: Any, context: Any) -> Any:
        return dht_pb2.PingResponse(available=True)


def call(receiver: Authorizer, request: Any, *, caller: str) -> Any:
    handlers = identity._Handlers(Servicer(receiver))
    return asyncio.run(handlers.rpc_ping(copied(request), SimpleNamespace(remote_id=caller)))


def test_who_passes_on_a_request_of_another_is_refused() -> None:
    alice, bob = authorizer("Alice"), authorizer("Bob")
    request = signed(alice)
    for caller in (who("Charlie").peer_id, who("Eve").peer_id, ""):
        with pytest.raises(SwarmError, match="not a registered peer of this run"):
            call(bob, request, caller=caller)
    assert call(bob, request, caller=who("Alice").peer_id).available


def test_a_stranger_is_refused_whoever_it_says_it_is() -> None:
    bob = authorizer("Bob")
    for request in (dht_pb2.PingRequest(), signed(authorizer("Eve"))):
        with pytest.raises(SwarmError, match="not a registered peer of this run"):
            call(bob, request, caller=who("Eve").peer_id)


# Asking an unknown peer


def test_an_unknown_peer_is_asked_once_by_however_many() -> None:
    alice, bob = authorizer("Alice"), authorizer("Bob")
    asked: list[str] = []

    async def ping(peer_id: PeerID) -> None:
        asked.append(str(peer_id))
        await asyncio.sleep(0.01)
        request = dht_pb2.PingRequest()
        await alice.sign_request(request, None)
        assert await bob.validate_request(request)

    async def ask(peer_id: str) -> str | None:
        return await bob.identify(peer_id, ask=ping, timeout_seconds=5)

    async def ask_often() -> list[str | None]:
        return await asyncio.gather(*(ask(who("Alice").peer_id) for _ in range(9)))

    assert asyncio.run(ask_often()) == [ALICE] * 9
    assert asyncio.run(ask_often()) == [ALICE] * 9
    assert asked == [who("Alice").peer_id]


def test_a_peer_that_says_nothing_is_nobody_and_is_left_alone_for_a_while() -> None:
    bob = authorizer("Bob")
    asked: list[str] = []

    async def silent(peer_id: PeerID) -> None:
        asked.append(str(peer_id))
        await asyncio.Event().wait()

    async def ask() -> list[str | None]:
        names = [who("Eve").peer_id, "", "no base58: 0OIl", "1" * 100_000, who("Eve").peer_id]
        return [await bob.identify(name, ask=silent, timeout_seconds=0.01) for name in names]

    assert asyncio.run(ask()) == [None] * 5
    assert asked == [who("Eve").peer_id]

    async def failing(peer_id: PeerID) -> None:
        asked.append(str(peer_id))
        raise OSError("unreachable")

    async def ask_again() -> list[str | None]:
        bob._asking.clear()
        return [
            await bob.identify(name, ask=failing, timeout_seconds=5)
            for name in [who("Eve").peer_id, who("Charlie").peer_id]
        ]

    assert asyncio.run(ask_again()) == [None, None]
    assert asked == [who("Eve").peer_id, who("Charlie").peer_id]


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


def test_a_key_that_is_not_kept_is_on_the_disk_for_the_daemon_only() -> None:
    one = Identity(hotkey("Alice"), run_id=RUN, key_path=None)
    with one.key_file() as path:
        assert mode(path) == 0o600
        assert str(PeerID.from_identity(path.read_bytes())) == one.peer_id
    assert not path.parent.exists()


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


def test_a_hotkey_of_another_kind_is_the_operators_mistake() -> None:
    key = Keypair.create_from_uri("//Alice", crypto_type=bittensor.CRYPTO_ED25519)
    with pytest.raises(OperatorError, match="not sr25519"):
        Identity(key, run_id=RUN, key_path=None)


# Real peers

PEERS = """
import functools, logging, sys, time
logging.basicConfig(level=logging.INFO)
import torch
torch.set_num_threads(1)
import hivemind
from hivemind.p2p import PeerID
from bittensor.keyfiles import Keypair
from hiveminer.swarm import Identity, Peer

RUN, OTHER_RUN = sys.argv[1:3]
NAMES = ("Alice", "Bob", "Charlie", "Dave", "Ferdie")
HOTKEYS = {name: Keypair.create_from_uri("//" + name) for name in NAMES}
NAMED = {key.ss58_address: name for name, key in HOTKEYS.items()}
NAMED |= {"": "unchecked", None: "nobody"}

def peer(name, run_id=RUN, **options):
    identity = Identity(HOTKEYS[name], run_id=run_id, key_path=None)
    everybody = [key.ss58_address for key in HOTKEYS.values()]
    return Peer(identity=identity, admitted=everybody, **options)

def store(dht, key):
    "Into others' storage: a node alone stores with itself, and is content."
    own = dht.peer_id.to_bytes()
    return dht.store(key, key, time.time() + 100, subkey=own, exclude_self=True)

def get(dht, key):
    found = dht.get(key, latest=True)
    return found and next(entry.value for entry in found.value.values())

def counts(result):
    return len(result.answered), len(result.tried)

# On a busy machine one call may come too late, so what is to succeed is tried again.
def within(seconds, what):
    deadline = time.monotonic() + seconds
    while not (value := what()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return value

def meets(one, *others):
    addresses = [other.address for other in others]
    return within(60, lambda: len(one.dial(addresses).answered) == len(others))

def name_of(one, other):
    return NAMED[within(20, lambda: one.hotkey_of(other.peer_id))]

def say(*words):
    print("#", *words, flush=True)
"""

GUEST = (
    PEERS
    + """
from hiveminer.neuron import Neuron
from hiveminer.chain import EmbeddedSubstrate
from hiveminer.config.settings import ValidatorSettings, parse

neuron = Neuron(parse(sys.argv[3:], cls=ValidatorSettings, prog="guest"), role="validator")
guest = Peer(client_only=True, identity=neuron.identity(RUN), admitted=neuron.registered)

def let_in():
    guest.admit(neuron.registered)
    guest.dial(sorted(neuron.peer_addresses()))
    neuron.sync()
    return store(guest.dht, "of the guest")

def is_out():
    return not any(guest.dial(sorted(neuron.peer_addresses())).answered for _ in range(3))

say("let in", within(60, let_in))
settings = neuron.settings
EmbeddedSubstrate(settings.subtensor.path / "chain.sqlite").deregister(
    neuron.hotkey, netuid=settings.netuid
)
# It still knows everybody itself, so it is the miner that does not let it in.
say("put out", within(30, is_out))
say("stores", store(guest.dht, "of the guest"))
guest.close()
neuron.close()
say("closed")
"""
)

REGISTERED = (
    PEERS
    + """
alice, bob, charlie = peer("Alice"), peer("Bob"), peer("Charlie")
say("met", meets(bob, alice, charlie), meets(charlie, alice))
say("shared", within(20, lambda: store(alice.dht, "shared")))
say("read", *(within(20, lambda: get(one.dht, "shared")) for one in (bob, charlie)))
validator = peer("Dave", client_only=True)
say("client met", meets(validator, alice), within(20, lambda: get(validator.dht, "shared")))
say("alice knows", *(name_of(alice, one) for one in (alice, bob, charlie, validator)))
stray = peer("Ferdie", run_id=OTHER_RUN)
found = counts(stray.dial([alice.address, bob.address]))
say("other run", found, NAMED[alice.hotkey_of(stray.peer_id)])

staying = [key.ss58_address for name, key in HOTKEYS.items() if name != "Charlie"]
alice.admit(staying)
bob.admit(staying)
say("still shared", within(20, lambda: store(alice.dht, "later")))
say("still read", within(20, lambda: get(bob.dht, "later")))
say("dropped stores", store(charlie.dht, "of the dropped"))
say("dropped gets", get(charlie.dht, "later"))
say("dropped meets", counts(charlie.dial([alice.address, bob.address])))
say("dropped is", *(NAMED[p.hotkey_of(charlie.peer_id)] for p in (alice, bob)))
say("from the dropped", *(get(p.dht, "of the dropped") for p in (alice, bob)))

peer_id, alice_id = charlie.peer_id, alice.peer_id
charlie.close()
alice.admit([key.ss58_address for key in HOTKEYS.values()])
say("dead is", NAMED[alice.hotkey_of(peer_id, timeout_seconds=3)])
for one in (alice, bob, validator, stray):
    one.close()
say("closed")
"""
)

INTRUDER = (
    PEERS
    + """
async def knock(_, node, peer_id):
    return await node.protocol.call_ping(PeerID.from_base58(peer_id)) is not None

def intrude(first, second, *, seconds):
    say("met", meets(first, second))
    say("shared", within(20, lambda: store(first.dht, "shared")))
    say("read", within(20, lambda: get(second.dht, "shared")))
    stranger = hivemind.DHT(
        initial_peers=[first.address, second.address],
        start=True,
        ensure_bootstrap_success=False,
    )
    for one in (first, second):
        task = functools.partial(knock, peer_id=one.peer_id)
        say("stranger knocks", within(seconds, lambda: stranger.run_coroutine(task)))
    say("stranger stores", within(seconds, lambda: store(stranger, "strange")))
    say("stranger gets", within(seconds, lambda: get(stranger, "shared")))
    for one in (first, second):
        say("from the stranger", within(seconds, lambda: get(one.dht, "strange")))
    say("stranger is", NAMED[first.hotkey_of(str(stranger.peer_id))])
    stranger.shutdown()
    for one in (first, second):
        one.close()

say("with identities")
intrude(peer("Alice"), peer("Bob"), seconds=1)
say("without")
intrude(Peer(), Peer(), seconds=30)
say("closed")
"""
)


def said(script: str, folder: Path) -> tuple[str, list[str]]:
    """The whole log of a script, and the lines that it said itself."""
    with started(script, RUN, OTHER_RUN, folder=folder / "peers") as program:
        words = program.says("# closed", seconds=120)
        assert program.process.wait(20) == 0, words
    return words, [line[2:] for line in words.splitlines() if line.startswith("# ")]


@pytest.mark.timeout(180)
def test_registered_peers_share_a_dht_and_who_leaves_is_out(tmp_path: Path) -> None:
    words, lines = said(REGISTERED, tmp_path)
    assert lines == [
        "met True True",
        "shared True",
        "read shared shared",
        "client met True shared",
        "alice knows Alice Bob Charlie Dave",
        "other run (0, 2) nobody",
        "still shared True",
        "still read later",
        "dropped stores False",
        "dropped gets None",
        "dropped meets (0, 2)",
        "dropped is nobody nobody",
        "from the dropped None None",
        "dead is nobody",
        "closed",
    ], words
    assert f"it is in run {OTHER_RUN}, we are in {RUN}; " in words
    assert words.count("[other_run]") == 3, "one line of each of the two, and one of the stray"


@pytest.mark.timeout(180)
def test_a_stock_hivemind_node_gets_nothing_and_leaves_nothing(tmp_path: Path) -> None:
    words, lines = said(INTRUDER, tmp_path)
    assert lines == [
        "with identities",
        "met True",
        "shared True",
        "read shared",
        "stranger knocks False",
        "stranger knocks False",
        "stranger stores False",
        "stranger gets None",
        "from the stranger None",
        "from the stranger None",
        "stranger is nobody",
        "without",
        "met True",
        "shared True",
        "read shared",
        "stranger knocks True",
        "stranger knocks True",
        "stranger stores True",
        "stranger gets shared",
        "from the stranger strange",
        "from the stranger strange",
        "stranger is unchecked",
        "closed",
    ], words
    assert "Traceback" not in words


@pytest.mark.timeout(320)
def test_a_miner_lets_in_who_is_registered_and_puts_out_who_is_no_longer(tmp_path: Path) -> None:
    with Network(tmp_path / "net") as network:
        miner = network.start("miner").says("serving on", seconds=120)
        run = re.search(r"run (\S+): \d+ parameters", miner)
        assert run is not None, miner
        with started(GUEST, run[1], "", *network.flags, folder=tmp_path / "guest") as guest:
            words = guest.says("# closed", seconds=150)
            assert guest.process.wait(20) == 0, words
    for line in ("let in True", "put out True", "stores False"):
        assert f"# {line}\n" in words, words
