"""Blobs and states over real peers: who is answered, and what liars and dead peers achieve."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest

from hiveminer.strategies.sparseloco.streams import MAX_STREAMS, MAX_STREAMS_PER_PEER, Streams
from programs import started

SCRIPT = """
import asyncio, contextlib, hashlib, itertools, json, logging, os, sys, threading, time
from functools import partial
import torch
from hivemind import DHT
from hivemind.p2p import P2P, PeerID
from hivemind.utils.timed_storage import get_dht_time

sys.path.insert(0, sys.argv[1])
from identities import hotkey, who
from tiny import tiny_model
from hiveminer.strategies.sparseloco.apply import State
from hiveminer.strategies.sparseloco.exchange import Exchange
from hiveminer.strategies.sparseloco.pieces import piece_bytes, read_manifest
from hiveminer.strategies.sparseloco.rounds import Contribution
from hiveminer.strategies.sparseloco.streams import REQUEST
from hiveminer.swarm.peer import Peer
from hiveminer.swarm.announced import AnnouncedAddresses

torch.set_num_threads(1)
logging.basicConfig(level=logging.INFO)
RUN, RUN_ID = b"12345678", "exchange-a-b-c"
names = ("alice", "bob", "liar", "broken", "fetcher", "stranger")
hotkeys = [hotkey(name).ss58_address for name in names if name != "stranger"]


class Files:
    def __init__(self):
        self.rounds, self.files, self.asked = {}, {}, 0

    def have(self, number):
        return self.rounds.get(number, ())

    def get(self, digest):
        self.asked += 1
        return self.files.get(digest)


def sha(data):
    return hashlib.sha256(data).digest()


def contribution(uid, blob):
    return Contribution(uid, bytes([uid]) * 32, len(blob), sha(blob))


peers = {name: Peer(identity=who(name, run_id=RUN_ID), admitted=hotkeys) for name in names}
sources = {name: Files() for name in names}
exchanges = {
    name: Exchange(peers[name].dht, run=RUN, source=sources[name])
    for name in names if name != "broken"
}
addresses = [peer.address for peer in peers.values()]
met = {name: len(peer.dial(addresses).answered) for name, peer in peers.items()}
told = {"met": met}

# Peers find each other's addresses in the DHT, and nobody writes for another.
subkeys = {name: PeerID.from_base58(peer.peer_id).to_bytes() for name, peer in peers.items()}
junk = {"liar": peers["alice"].address, "alice": peers["liar"].address, "fetcher": "/ip4/1.2.3.4"}
for name, text in junk.items():
    peers["liar"].dht.store(
        f"addresses.{RUN_ID}", subkey=subkeys[name], value=text,
        expiration_time=get_dht_time() + 110,
    )
clocks = {name: itertools.count() for name in ("alice", "bob", "fetcher")}
books = {
    name: AnnouncedAddresses(peers[name], run=RUN_ID, clock=partial(next, clock))
    for name, clock in clocks.items()
}
expected = {name: {peers[other].address for other in books if other != name} for name in books}
found, deadline = {}, time.monotonic() + 60
while found != expected and time.monotonic() < deadline:
    found = {name: set(book()) for name, book in books.items()}
    time.sleep(0.2)
told["announced"] = found == expected
fetcher, got = exchanges["fetcher"], {}


def fetch(number, wanted, *, seconds=30, by=fetcher):
    got.clear()
    by.fetch_blobs(
        number, wanted, keep=lambda who, blob: got.update({who.uid: blob}), timeout_seconds=seconds
    )
    return sorted(got)


# Two holders of different blobs, larger than one chunk.
blobs = {uid: os.urandom(700_000 + uid) for uid in (3, 200)}
for name, uid in (("alice", 3), ("bob", 200)):
    sources[name].rounds[7] = {uid}
    sources[name].files[sha(blobs[uid])] = blobs[uid]
wanted = [contribution(uid, blob) for uid, blob in blobs.items()]
told["both"] = fetch(7, wanted) == [3, 200] and got == blobs

# A liar claims all uids, and sends bytes of the right length.
real = os.urandom(400_000)
target = contribution(5, real)
sources["liar"].rounds[8] = set(range(256))
sources["liar"].files[target.blob_hash] = os.urandom(400_000)
told["lie"] = fetch(8, [target], seconds=3) == [] and got == {}
sources["alice"].rounds[8] = {5}
sources["alice"].files[target.blob_hash] = real
told["truth"] = fetch(8, [target]) == [5] and got == {5: real}
asked = sources["liar"].asked
told["truth again"] = fetch(8, [target]) == [5]
told["liar is shunned"] = sources["liar"].asked == asked

# A peer that never answers delays nobody: it would take longer than this by itself.
NAME, ALICE = f"sparseloco.1.{RUN.hex()}", PeerID.from_base58(peers["alice"].peer_id)


def p2p_of(name):
    return P2P.replicate(peers[name].dht.run_coroutine(DHT._get_p2p_daemon_listen_maddr))


async def hang(info, reader, writer):
    await asyncio.sleep(60)


async def serve_nothing():
    p2p = await p2p_of("broken")
    await p2p.add_binary_stream_handler(NAME, hang)
    return p2p


loop = asyncio.new_event_loop()
threading.Thread(target=loop.run_forever, daemon=True).start()
broken = asyncio.run_coroutine_threadsafe(serve_nothing(), loop).result(60)
sources["alice"].rounds[12] = {3}
told["beside one that hangs"] = fetch(12, wanted[:1], seconds=6) == [3]


# A stranger is not answered, and has nothing to say.
async def as_stranger():
    p2p = await p2p_of("stranger")
    _, reader, writer = await p2p.call_binary_stream_handler(ALICE, NAME)
    writer.write(REQUEST.pack(2, wanted[0].blob_hash, 0))
    answer = await asyncio.wait_for(reader.read(), 20)
    await p2p.shutdown()
    return answer


answer = asyncio.run_coroutine_threadsafe(as_stranger(), loop).result(60)
told["no answer"] = answer == b""
told["stranger"] = fetch(7, wanted, seconds=3, by=exchanges["stranger"])
state = State.of(tiny_model("llama"))
shapes = {name: value.shape for name, value in state.weights.items()}
manifest = read_manifest(state.manifest, shapes)
sources["bob"].files[state.hash()] = state.manifest
for piece in manifest.pieces:
    sources["bob"].files[piece.hash] = piece_bytes(state, piece)
no_state = exchanges["stranger"].fetch_state(state.hash(), shapes, timeout_seconds=3)
told["no state"] = no_state is None
# Who has not answered is asked last: it would take longer than this by itself.
loaded = fetcher.fetch_state(state.hash(), shapes, timeout_seconds=9)
told["state"] = loaded is not None and loaded.hash() == state.hash()
told["unknown state"] = fetcher.fetch_state(bytes(32), shapes, timeout_seconds=2) is None

# A blob appears while it is being looked for.
def appear():
    time.sleep(2)
    sources["bob"].rounds[9] = {9}
threading.Thread(target=appear).start()
blob = os.urandom(1000)
late = contribution(9, blob)
sources["bob"].files[late.blob_hash] = blob
told["late"] = fetch(9, [late]) == [9]

# The only other holder dies.
sources["alice"].rounds[10] = sources["bob"].rounds[10] = {9}
sources["alice"].files[late.blob_hash] = blob
exchanges["bob"].close()
peers["bob"].close()
told["one died"] = fetch(10, [late]) == [9]
for exchange in exchanges.values():
    exchange.close()
    exchange.close()
for peer in peers.values():
    peer.close()
asyncio.run_coroutine_threadsafe(broken.shutdown(), loop).result(60)
told["closed"] = fetch(10, [late]) == []
print("told", json.dumps(told), flush=True)
"""


@pytest.mark.timeout(240)
def test_registered_peers_exchange_blobs_and_states(tmp_path: Path) -> None:
    here = str(Path(__file__).resolve().parent)
    with started(SCRIPT, here, folder=tmp_path / "log") as peers:
        words = peers.says("told {", seconds=200)
        told = json.loads(words.partition("told ")[2].splitlines()[0])
        assert peers.process.wait(60) == 0, words
    assert told.pop("met").pop("stranger") == 0, words
    assert told.pop("stranger") == [], words
    assert all(told.values()), words


def test_a_few_peers_cannot_take_all_streams() -> None:
    streams = Streams()
    with contextlib.ExitStack() as served:
        taken = [
            served.enter_context(streams.of(name)) for name in "abc" for _ in range(MAX_STREAMS)
        ]
        assert taken.count(True) == MAX_STREAMS
        assert taken[:MAX_STREAMS].count(True) == MAX_STREAMS_PER_PEER
        with streams.of("d") as first, streams.of("d") as second:
            assert first
            assert not second
    with streams.of("d") as first, streams.of("d") as second:
        assert first
        assert second
