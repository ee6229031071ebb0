"""Who may speak in the swarm: tokens, key files, and real peers with a stranger among them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa
from hivemind.p2p import PeerID
from hivemind.proto import dht_pb2
from identities import (
    ALICE,
    BOB,
    CHARLIE,
    EVERYBODY,
    OTHER_RUN,
    RUN,
    authorizer,
    copied,
    forget,
    hotkey,
    passes,
    signed,
    token_of,
    who,
)

from hiveminer.errors import SwarmError
from hiveminer.swarm import identity
from hiveminer.swarm.identity import Authorizer, Identity
from hiveminer.swarm.keys import peer_id_of_key

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


def test_a_request_passes_once_and_as_it_was_signed() -> None:
    alice, bob = authorizer("Alice"), authorizer("Bob")
    request = signed(alice)
    request.validate = True
    assert not passes(bob, request)
    assert bob.hotkey_of(who("Alice").peer_id) is None
    request.validate = False
    assert [passes(bob, request), passes(bob, request)] == [True, False]


def test_a_response_to_another_request_does_not_pass() -> None:
    alice, bob = authorizer("Alice"), authorizer("Bob")
    response = dht_pb2.PingResponse()
    asyncio.run(bob.sign_response(response, signed(alice)))
    assert not asyncio.run(alice.validate_response(response, signed(alice)))
    assert alice.hotkey_of(who("Bob").peer_id) is None


def changed(request: Any, **fields: object) -> Any:
    """Alice's request with other fields, which she signs too."""
    for field, value in fields.items():
        setattr(request.auth, field, value)
    request.auth.signature = b""
    request.auth.signature = who("Alice").private_key.sign(request.SerializeToString())
    return request


@pytest.mark.parametrize(
    ("field", "value"),
    [("time", float("nan")), ("time", float("inf")), ("nonce", b""), ("nonce", b"n" * 33)],
)
def test_a_request_that_could_be_replayed_or_hoarded_does_not_pass(
    field: str, value: object
) -> None:
    alice, bob = authorizer("Alice"), authorizer("Bob")
    assert not passes(bob, changed(signed(alice), **{field: value}))


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
    seconds: float, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    alice, bob = authorizer("Alice"), authorizer("Bob")
    requests = [changed(signed(alice), time=time.time() + seconds) for _ in range(2)]
    with caplog.at_level(logging.WARNING):
        assert not any(passes(bob, request) for request in requests)
    assert caplog.text.count(words) == 1
    assert ALICE in caplog.text


# Tokens


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


@pytest.mark.parametrize(
    ("field", "changed"),
    [
        ("public_key", lambda _: who("Eve").public_key),
        ("signature", lambda signature: signature[:-1] + bytes([signature[-1] ^ 1])),
        ("username", lambda _: f"{CHARLIE} {RUN}"),
        ("username", lambda _: f"{ALICE} {OTHER_RUN}"),
        ("expiration_time", lambda seconds: f"{float(seconds) + 1:.3f}"),
    ],
)
def test_a_token_with_one_field_changed_is_refused(
    field: str, changed: Callable[[Any], Any]
) -> None:
    bob, token = authorizer("Bob"), token_of(who("Alice"))
    assert bob.refusal(token) is None
    setattr(token, field, changed(getattr(token, field)))
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
def test_what_has_not_a_tokens_shape_costs_no_cryptography(field: str, value: object) -> None:
    bob, token = authorizer("Bob"), token_of(who("Alice"))
    setattr(token, field, value)
    assert bob.refusal(token) == "no token of ours"


def test_only_rsa_keys_of_a_sane_length_count() -> None:
    def public(key: Any) -> bytes:
        written: bytes = key.public_key().public_bytes(
            serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
        )
        return written

    for nonsense in (b"", b"ssh-rsa", b"ssh-rsa AAAA", b"\xff" * 100):
        assert peer_id_of_key(nonsense) is None
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
    token.signature = bytes(64)
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


def test_a_proof_ends_with_its_token() -> None:
    later = 0.0
    bob = Authorizer(who("Bob"), admitted=EVERYBODY, clock=lambda: time.time() + later)
    assert passes(bob, signed(authorizer("Alice")))
    later = 601.0
    assert bob.hotkey_of(who("Alice").peer_id) is None


def test_our_own_token_is_made_anew_in_time() -> None:
    late = 0.0
    alice = Authorizer(who("Alice"), admitted=EVERYBODY, clock=lambda: time.time() + late)
    bob = authorizer("Bob")

    def later(seconds: float) -> Any:
        nonlocal late
        late = seconds
        return signed(alice)

    tokens = [later(seconds).auth.client_access_token for seconds in (0, 290, 310, 320, -5000)]
    assert tokens[0] == tokens[1] != tokens[2] == tokens[3] != tokens[4]
    assert passes(bob, later(0))


def test_a_token_is_proved_once() -> None:
    proved, count = [], identity.REMEMBERED_TOKENS + 1

    def prove(token: Any, hotkey: str) -> bool:
        proved.append(token)
        return identity.is_signed(token, hotkey)

    bob = Authorizer(who("Bob"), admitted=EVERYBODY, is_signed=prove)
    first, *others = [token_of(who("Alice"), seconds=300 + n / 8) for n in range(count)]
    assert bob.refusal(first) is bob.refusal(first) is None
    assert len(proved) == 1
    assert not any(bob.refusal(token) for token in others)
    assert bob.refusal(first) is None
    assert len(proved) == count + 1, "the longest unused was to be forgotten"


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


def test_a_stranger_and_who_passes_on_a_request_of_another_are_refused() -> None:
    bob, eve, request = authorizer("Bob"), authorizer("Eve"), signed(authorizer("Alice"))
    passed_on = [(request, caller) for caller in (who("Charlie").peer_id, who("Eve").peer_id, "")]
    own = [(each, who("Eve").peer_id) for each in (dht_pb2.PingRequest(), signed(eve))]
    for refused, caller in passed_on + own:
        with pytest.raises(SwarmError, match="not a registered peer of this run"):
            call(bob, refused, caller=caller)
    assert call(bob, request, caller=who("Alice").peer_id).available
    assert eve.hotkey_of(who("Eve").peer_id) is None


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
