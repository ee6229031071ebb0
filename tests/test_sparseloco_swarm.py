"""Two miners and a validator through rounds, over real peers; blocks come from the test."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from programs import started

SCRIPT = """
import json, logging, sys, threading, time
from pathlib import Path
import torch
from bittensor.keyfiles import Keypair

sys.path.insert(0, sys.argv[1])
from memory_network import Network, NetworkView
from tiny import VOCABULARY, tiny_model
from hiveminer.config.run import OptimizerSection, SparselocoSection
from hiveminer.strategies.sparseloco.exchange import Exchange
from hiveminer.strategies.sparseloco.link import SwarmLink
from hiveminer.strategies.sparseloco.log import Log
from hiveminer.strategies.sparseloco.observer import SparselocoObserver
from hiveminer.strategies.sparseloco.parts import Parts
from hiveminer.strategies.sparseloco.plan import Plan
from hiveminer.strategies.sparseloco.replay import verify
from hiveminer.strategies.sparseloco.rounds import Neuron
from hiveminer.strategies.sparseloco.shelf import Shelf
from hiveminer.strategies.sparseloco.strategy import SparselocoStrategy
from hiveminer.swarm import Identity, Peer
from hiveminer.swarm.membership import Membership

torch.set_num_threads(1)
logging.basicConfig(level=logging.INFO)
folder, RUN_ID, ROUNDS = Path(sys.argv[2]), "swarm-a-b-c", 2
keys = [Keypair.create_from_uri(f"//{name}") for name in ("one", "two", "judge")]
hotkeys = [each.ss58_address for each in keys]
section = SparselocoSection(round_blocks=15, mark_blocks=7, cut_blocks=2, density=1.0)
network = Network(tuple(
    Neuron(uid, each.public_key, uid == 2, 100 * (uid == 2), 0) for uid, each in enumerate(keys)
))
peers = [Peer(identity=Identity(k, run_id=RUN_ID, key_path=None), admitted=hotkeys) for k in keys]
addresses = [peer.address for peer in peers]


def parts(uid):
    plan = Plan.of(section, run_id=RUN_ID, model=tiny_model("llama"))
    log = Log(folder / str(uid))
    log.begin(plan, run_id=RUN_ID)
    shelf = Shelf(log)
    exchange = Exchange(peers[uid].dht, run=plan.rules.run, source=shelf)
    membership = Membership(
        peers[uid], registered=lambda: hotkeys, addresses=lambda: addresses
    )
    return Parts(
        section=OptimizerSection(learning_rate=0.01), plan=plan, hotkey=keys[uid].public_key,
        chain=NetworkView(network, keys[uid].public_key), exchange=exchange, log=log, shelf=shelf,
        link=SwarmLink(membership, exchange), poll_seconds=0.1,
    )


miners = [SparselocoStrategy(tiny_model("llama"), parts(uid)) for uid in (0, 1)]
judge = SparselocoObserver(tiny_model("llama"), parts(2))
stop = threading.Event()


def blocks():
    while not stop.wait(0.6):
        network.advance()


def train(uid, miner):
    rows = torch.Generator().manual_seed(uid)
    miner.join()
    while not stop.wait(0.02):
        miner.zero_grad()
        first = torch.randint(2, VOCABULARY - 4, (4, 1), generator=rows)
        tokens = first + torch.arange(4)
        torch.autograd.backward(miner.model(input_ids=tokens, labels=tokens).loss)
        miner.step(batch_size=4)


threads = [threading.Thread(target=blocks)]
threads += [threading.Thread(target=train, args=each) for each in enumerate(miners)]
judge.begin()
for thread in threads:
    thread.start()


def full_rounds():
    report = verify(judge.follower.log, judge.replica.plan)
    both = [each.decision.round for each in report.rounds if len(each.decision.contributions) == 2]
    return both, report


deadline = time.monotonic() + 150
while len(full_rounds()[0]) < ROUNDS and time.monotonic() < deadline:
    time.sleep(0.5)
rounds, report = full_rounds()
told = {"rounds": rounds, "problems": report.problems}
number = rounds[-1] if rounds else 0
deadline = time.monotonic() + 30
def made():
    entries = [peer.follower.log.entry(number) for peer in (*miners, judge)]
    return [entry.made.hex() if entry and entry.made else None for entry in entries]
while len(set(made())) > 1 and time.monotonic() < deadline:
    time.sleep(0.2)
told["made"] = made()
stop.set()
for thread in threads:
    thread.join(60)
told["verified"] = [verify(m.follower.log, m.plan).verified for m in miners]
for peer in (*miners, judge):
    peer.check()
    peer.close()
    peer.close()
told["threads"] = [t.name for t in threading.enumerate() if t.name in ("rounds", "exchange")]
print("told", json.dumps(told), flush=True)
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_rounds_over_real_peers(tmp_path: Path) -> None:
    here = str(Path(__file__).resolve().parent)
    with started(SCRIPT, here, str(tmp_path / "logs"), folder=tmp_path / "log") as peers:
        words = peers.says("told {", seconds=270)
        told = json.loads(words.partition("told ")[2].splitlines()[0])
        assert peers.process.wait(60) == 0, words
    assert len(told["rounds"]) >= 2, words
    assert told["problems"] == [], words
    assert len(set(told["made"])) == 1, words
    assert told["made"][0], words
    assert told["verified"] == [True, True], words
    assert told["threads"] == [], words
