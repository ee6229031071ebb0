"""Real peers with identities, and a stranger among them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from identities import OTHER_RUN, RUN

from programs import Network, started

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
    return NAMED[within(60, lambda: one.hotkey_of(other.peer_id))]

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
say("shared", within(60, lambda: store(alice.dht, "shared")))
say("read", *(within(60, lambda: get(one.dht, "shared")) for one in (bob, charlie)))
validator = peer("Dave", client_only=True)
say("client met", meets(validator, alice), within(60, lambda: get(validator.dht, "shared")))
say("alice knows", *(name_of(alice, one) for one in (alice, bob, charlie, validator)))
stray = peer("Ferdie", run_id=OTHER_RUN)
found = counts(stray.dial([alice.address, bob.address]))
say("other run", found, NAMED[alice.hotkey_of(stray.peer_id)])

staying = [key.ss58_address for name, key in HOTKEYS.items() if name != "Charlie"]
alice.admit(staying)
bob.admit(staying)
say("still shared", within(60, lambda: store(alice.dht, "later")))
say("still read", within(60, lambda: get(bob.dht, "later")))
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
    say("shared", within(60, lambda: store(first.dht, "shared")))
    say("read", within(60, lambda: get(second.dht, "shared")))
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
        assert program.process.wait(60) == 0, words
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
            assert guest.process.wait(60) == 0, words
    for line in ("let in True", "put out True", "stores False"):
        assert f"# {line}\n" in words, words
