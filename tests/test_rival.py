"""A registered peer without permit or stake cannot stop the others: real peers, its own code.

The rival is let into the DHT and the groups like everybody. Its node has no check of records, so
that it asks the others to store whatever it likes, and hands out the same.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from programs import started

SCRIPT = '''
import secrets, threading, time
import torch
from hivemind.dht.crypto import RSASignatureValidator
from hivemind.utils import get_dht_time
from hiveminer.config.run import Run
from hiveminer.strategies.hivemind.records import (
    averager_prefix, donors_key, group_key, progress_key,
)
from hiveminer.strategies.hivemind.strategy import HivemindStrategy
from hiveminer.swarm.peer import Peer
from hiveminer.swarm.membership import Membership
from identities import RUN as RUN_ID, hotkey, who
from tiny import VOCABULARY, tiny_model

torch.set_num_threads(1)
run = Run.model_validate({"swarm": {"epoch_samples": 32, "matchmaking_seconds": 2.0}})
names = ("one", "two", "rival", "late")
hotkeys = [hotkey(name).ss58_address for name in names]
PREFIX = averager_prefix(RUN_ID)
YEAR = get_dht_time() + 365 * 86400


def peer_of(name):
    return Peer(identity=who(name), admitted=hotkeys)


def strategy_of(peer, on_round=lambda ended: None):
    model = tiny_model("gpt2")
    return HivemindStrategy(
        model, membership=Membership(peer), run=run, run_id=RUN_ID, on_round=on_round
    )


async def forget_checks(_dht, node):
    node.protocol.record_validator._validators.clear()


rounds = []
peers = [peer_of(name) for name in names[:2]]
swarms = [
    strategy_of(peer, lambda ended, name=name: rounds.append((name, ended.group_size)))
    for name, peer in enumerate(peers)
]
rival = peer_of("rival")
rival.dht.run_coroutine(forget_checks)
for peer in (peers[1], rival):
    assert len(peer.dial([each.address for each in peers]).answered) >= 1
stop = threading.Event()


def train(name, swarm):
    rows = torch.Generator().manual_seed(name)
    while not stop.wait(0.25):
        swarm.zero_grad()
        tokens = torch.randint(2, VOCABULARY, (4, 8), generator=rows)
        torch.autograd.backward(swarm.model(input_ids=tokens, labels=tokens).loss)
        swarm.step(batch_size=4)


def more_rounds(count):
    """The sizes of the next rounds, until each had so many with the other: a minute at most."""
    begin, end = len(rounds), time.monotonic() + 60
    while time.monotonic() < end:
        new = rounds[begin:]
        if all(new.count((name, 2)) >= count for name in (0, 1)):
            break
        time.sleep(0.1)
    return [size for _, size in rounds[begin:]]


def write(key, value, **options):
    rival.dht.store(key, value, expiration_time=YEAR, **options)


def attack():
    others = [peer.dht.peer_id.to_bytes() for peer in peers]
    for key in (group_key(PREFIX), donors_key(PREFIX), progress_key(RUN_ID)):
        write(key, b"x")
        write(key, {"x": 1})
    for other in others:
        write(group_key(PREFIX), False, subkey=other)
        write(donors_key(PREFIX), None, subkey=other)
    for _ in range(8):
        invented = b"\\x12\\x20" + secrets.token_bytes(32)
        write(group_key(PREFIX), True, subkey=invented)
        write(donors_key(PREFIX), 1e300, subkey=invented)
    signer = RSASignatureValidator(rival.identity.private_key)
    report = dict(
        peer_id=rival.dht.peer_id.to_bytes(), epoch=10**9, samples_accumulated=10**9,
        samples_per_second=1e9, time=float("nan"), client_mode=False,
    )
    for value in (report, report | {"time": get_dht_time()}):
        write(progress_key(RUN_ID), value, subkey=signer.local_public_key)


threads = [
    threading.Thread(target=train, args=each, daemon=True) for each in enumerate(swarms)
]
for thread in threads:
    thread.start()
assert more_rounds(2).count(2) >= 4, rounds
attack()
# With records that nobody checks, the next round alone took half a minute.
after = more_rounds(3)
assert after.count(2) >= 6, rounds
assert after.count(2) > after.count(1), rounds
assert max(swarm.epoch for swarm in swarms) < 1000
late = peer_of("late")
assert len(late.dial([each.address for each in (*peers, rival)]).answered) == 3
joiner = strategy_of(late)
joiner.optimizer.load_state_from_peers()
assert joiner.optimizer.state_averager.loaded
stop.set()
for thread in threads:
    thread.join(60)
for swarm in (joiner, *swarms):
    swarm.close()
print("closed", flush=True)
'''


@pytest.mark.timeout(300)
def test_records_of_a_rival_stop_no_round(tmp_path: Path) -> None:
    with started(SCRIPT, folder=tmp_path / "log") as peers:
        peers.says("closed", seconds=270)
