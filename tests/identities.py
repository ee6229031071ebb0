"""Identities and authorizers of a few hotkeys, and the requests between them."""

from __future__ import annotations

import asyncio
import functools
import os
import time
from pathlib import Path
from typing import Any

from bittensor.keyfiles import Keypair
from hivemind.proto import dht_pb2

from hiveminer.swarm.identity import Authorizer, Identity

RUN = "embedded-11aa-22bb-33cc"
OTHER_RUN = "embedded-99ff-22bb-33cc"


@functools.cache
def hotkey(name: str) -> Any:
    return Keypair.create_from_uri(f"//{name}")


@functools.cache
def who(name: str, *, run_id: str = RUN, key: int = 0) -> Identity:
    """This hotkey's identity in this process, with the `key`-th of its RSA keys."""
    # In the tests' own home, which pytest removes: a program that is killed removes nothing.
    keys = Path.home() / "keys" / str(os.getpid())
    return Identity(hotkey(name), run_id=run_id, key_path=keys / f"{name} {run_id} {key}.key")


NAMES = ("Alice", "Bob", "Charlie")
EVERYBODY = tuple(str(hotkey(name).ss58_address) for name in NAMES)
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
