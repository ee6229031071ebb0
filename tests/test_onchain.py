"""The rounds' view of a subnet, on an embedded network."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from chain_worker import new_keys
from small_neurons import miner_settings, running

from hiveminer.chain import Chain, join_embedded, open_chain
from hiveminer.chain.turns import Turns
from hiveminer.errors import ChainError
from hiveminer.protocol import IsAlive
from hiveminer.strategies.sparseloco.onchain import SubnetRounds
from hiveminer.swarm.axons import AxonAddresses
from programs import wait_for


@pytest.fixture
def chain(tmp_path: Path) -> Iterator[Chain]:
    path = tmp_path / "chain.sqlite"
    with open_chain(
        network="embedded", netuid=1, wallet=new_keys(), path=path, block_seconds=0.05
    ) as chain:
        yield chain


def test_final_blocks_say_who_was_there_and_what_was_committed(chain: Chain) -> None:
    rounds = SubnetRounds(chain)
    join_embedded(chain, stake_tao=2000)
    rounds.commit(b"one")
    committed = rounds.head()
    with pytest.raises(ChainError, match="not final yet"):
        rounds.commitments(rounds.head())
    wait_for(lambda: rounds.final_head() >= committed, seconds=60)
    rounds.commit(b"two")

    block, neurons = rounds.snapshot(committed)
    key = chain.wallet.hotkey.public_key
    assert [(n.uid, n.hotkey, n.permit, n.stake) for n in neurons] == [(0, key, True, 2000 * 10**9)]
    assert rounds.commitments(committed) == (block, {key: b"one"})
    assert block.number == committed
    assert len(block.hash) == 32
    assert rounds.snapshot(0)[1] == ()
    assert rounds.snapshot(0)[0].hash != block.hash
    assert rounds.block_seconds == 0.05


def test_axons_say_where_their_peers_are(tmp_path: Path) -> None:
    place = "/ip4/127.0.0.1/tcp/1/p2p/QmfDcxsjEXMbNy9iV6qy5ZKA5Qu2iCx2UFVnipsEmru1Q2"
    assert "peer" not in IsAlive().model_dump_json()  # earlier versions do not know it
    with running(miner_settings(tmp_path)) as program:
        endpoint, wallet = program.endpoint(), program.miner.neuron.chain.wallet
        served = SimpleNamespace(hotkey=endpoint.hotkey, axon=f"{endpoint.ip}:{endpoint.port}")
        now = [0.0]
        ask = AxonAddresses(wallet, hotkey="", neurons=lambda: [served], clock=lambda: now[0])
        assert ask() == frozenset()
        program.miner.peer = place
        assert ask() == frozenset()  # it is not asked again so soon
        now[0] += 1
        assert ask() == {place}
        program.miner.peer = "no address"
        now[0] += 60
        assert ask() == {place}
        served.axon = None
        assert ask() == frozenset()


def test_writes_take_turns_and_the_urgent_one_comes_first() -> None:
    turns, order = Turns(), list[str]()
    holds, may_end = threading.Event(), threading.Event()

    def act(name: str, *, urgent: bool) -> None:
        with turns.take(urgent=urgent, timeout_seconds=10):
            order.append(name)
            holds.set()
            may_end.wait(10)

    threads = [
        threading.Thread(target=act, args=(name,), kwargs={"urgent": name == "mark"})
        for name in ("first", "weights", "mark")
    ]
    threads[0].start()
    assert holds.wait(10)
    for count, thread in enumerate(threads[1:], 1):
        thread.start()
        wait_for(lambda count=count: len(turns._waiting) == count, seconds=60)
    with pytest.raises(ChainError), turns.take(timeout_seconds=0.01):
        pass
    may_end.set()
    for thread in threads:
        thread.join(60)
    assert order == ["first", "mark", "weights"]
