"""Real peers with identities, and a stranger among them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from identities import OTHER_RUN, RUN

from programs import Network, started

PEERS = """
import functools, logging, sys, time
logging.basicConfig(level=logging.INFO)
import torch
torch.set_num_threads(1)
import hivemind
from hivemind.p2p import PeerID
from hiveminer.swarm.peer import Peer
from identities import OTHER_RUN, RUN, hotkey, who
from programs import wait_for

NAMES = ("Alice", "Bob", "Charlie", "Dave", "Ferdie")
HOTKEYS = {name: hotkey(name).ss58_address for name in NAMES}

def peer(name, run_id=RUN, **options):
    return Peer(identity=who(name, run_id=run_id), admitted=HOTKEYS.values(), **options)

def store(dht, key):
    "Into others' storage: a node alone stores with itself, and is content."
    own = dht.peer_id.to_bytes()
    return dht.store(key, key, time.time() + 100, subkey=own, exclude_self=True)

def get(dht, key):
    found = dht.get(key, latest=True)
    return found and next(entry.value for entry in found.value.values())

def nobody_of(result, count):
    return (len(result.answered), len(result.tried)) == (0, count)

# On a busy machine one call may come too late, so what is to succeed is tried again.
def surely(what):
    return wait_for(what, seconds=60)

def meets(one, *others):
    addresses = [other.address for other in others]
    surely(lambda: len(one.dial(addresses).answered) == len(others))
"""

GUEST = (
    PEERS
    + """
from hiveminer.neuron import Neuron
from hiveminer.chain import EmbeddedSubstrate
from hiveminer.config.flags import parse
from hiveminer.config.settings import ValidatorSettings

neuron = Neuron(parse(sys.argv[2:], cls=ValidatorSettings, prog="guest"), role="validator")
guest = Peer(client_only=True, identity=neuron.identity(sys.argv[1]), admitted=neuron.registered)

def let_in():
    guest.admit(neuron.registered)
    guest.dial(sorted(neuron.peer_addresses()))
    neuron.sync()
    return store(guest.dht, "of the guest")

def is_out():
    return not any(guest.dial(sorted(neuron.peer_addresses())).answered for _ in range(3))

surely(let_in)
settings = neuron.settings
EmbeddedSubstrate(settings.subtensor.path / "chain.sqlite").deregister(
    neuron.hotkey, netuid=settings.netuid
)
# It still knows everybody itself, so it is the miner that does not let it in.
surely(is_out)
assert not store(guest.dht, "of the guest")
guest.close()
neuron.close()
print("closed")
"""
)

REGISTERED = (
    PEERS
    + """
alice, bob, charlie = peer("Alice"), peer("Bob"), peer("Charlie")
meets(bob, alice, charlie)
meets(charlie, alice)
surely(lambda: store(alice.dht, "shared"))
validator = peer("Dave", client_only=True)
meets(validator, alice)
for one in (bob, charlie, validator):
    assert surely(lambda: get(one.dht, "shared")) == "shared"
for name, one in (("Alice", alice), ("Bob", bob), ("Charlie", charlie), ("Dave", validator)):
    assert surely(lambda: alice.hotkey_of(one.peer_id)) == HOTKEYS[name]
stray = peer("Ferdie", run_id=OTHER_RUN)
assert nobody_of(stray.dial([alice.address, bob.address]), 2)
assert alice.hotkey_of(stray.peer_id) is None

staying = [key for name, key in HOTKEYS.items() if name != "Charlie"]
alice.admit(staying)
bob.admit(staying)
surely(lambda: store(alice.dht, "later"))
assert surely(lambda: get(bob.dht, "later")) == "later"
assert not store(charlie.dht, "of the dropped")
assert get(charlie.dht, "later") is None
assert nobody_of(charlie.dial([alice.address, bob.address]), 2)
for one in (alice, bob):
    assert one.hotkey_of(charlie.peer_id) is None
    assert get(one.dht, "of the dropped") is None

charlie.close()
alice.admit(HOTKEYS.values())
assert alice.hotkey_of(charlie.peer_id, timeout_seconds=3) is None
for one in (alice, bob, validator, stray):
    one.close()
print("closed")
"""
)

INTRUDER = (
    PEERS
    + """
async def knock(_, node, peer_id):
    return await node.protocol.call_ping(PeerID.from_base58(peer_id)) is not None

def intrude(first, second, *, succeeds):
    "A stock node, and what it tries on these two."
    surely(lambda: store(first, "shared"))
    assert surely(lambda: get(second, "shared")) == "shared"
    stranger = hivemind.DHT(
        initial_peers=[*first.get_visible_maddrs(), *second.get_visible_maddrs()],
        start=True,
        ensure_bootstrap_success=False,
    )
    knocks = (functools.partial(knock, peer_id=str(one.peer_id)) for one in (first, second))
    attempts = [
        *(functools.partial(stranger.run_coroutine, each) for each in knocks),
        lambda: store(stranger, "strange"),
        lambda: get(stranger, "shared") == "shared",
        lambda: get(first, "strange") == "strange",
        lambda: get(second, "strange") == "strange",
    ]
    for attempt in attempts:
        if succeeds:
            surely(attempt)
        else:
            assert not any(attempt() for _ in range(3))
    return stranger

alice, bob = peer("Alice"), peer("Bob")
meets(alice, bob)
stranger = intrude(alice.dht, bob.dht, succeeds=False)
assert alice.hotkey_of(str(stranger.peer_id)) is None
stock = hivemind.DHT(start=True)
other = hivemind.DHT(start=True, initial_peers=stock.get_visible_maddrs())
for each in (intrude(stock, other, succeeds=True), stock, other, stranger):
    each.shutdown()
for one in (alice, bob):
    one.close()
print("closed")
"""
)


def words_of(script: str, *words: str, folder: Path) -> str:
    """The log of a script that came to its end."""
    with started(script, *words, folder=folder) as program:
        program.says("closed", seconds=150)
        assert program.process.wait(60) == 0, program.words
        return program.words


@pytest.mark.timeout(240)
def test_registered_peers_share_a_dht_and_who_leaves_is_out(tmp_path: Path) -> None:
    words = words_of(REGISTERED, folder=tmp_path)
    assert f"it is in run {OTHER_RUN}, we are in {RUN}; " in words
    assert words.count("[other_run]") == 3, "one line of each of the two, and one of the stray"


@pytest.mark.timeout(240)
def test_a_stock_hivemind_node_gets_nothing_and_leaves_nothing(tmp_path: Path) -> None:
    assert "Traceback" not in words_of(INTRUDER, folder=tmp_path)


@pytest.mark.timeout(320)
def test_a_miner_lets_in_who_is_registered_and_puts_out_who_is_no_longer(tmp_path: Path) -> None:
    with Network(tmp_path / "net") as network:
        miner = network.start("miner").says("serving on", seconds=120)
        run = re.search(r"run (\S+): \d+ parameters", miner)
        assert run is not None, miner
        words_of(GUEST, run[1], *network.flags, folder=tmp_path / "guest")
