"""What a neuron asks of a chain, as one suite for everything that is a chain here.

It runs against the embedded network always, and against a live node when
`BT_CHAIN_ENDPOINT` names one: `BT_CHAIN_ENDPOINT=ws://127.0.0.1:9944 scripts/test -m localnet`.
The node must be the official local one or another whose `//Alice` is rich: the suite
registers throwaway hotkeys on subnet `BT_CHAIN_NETUID` (1) and pays with her key. What only
an embedded network can be put through (many processes at once, kill -9 in mid write) stands
in test_chain.py.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import bittensor as bt
import pytest
from bittensor.keyfiles import Keypair
from chain_worker import Keys

from hiveminer.chain import Chain, open_chain, snapshot
from hiveminer.errors import ChainError, NotRegistered, OperatorError
from programs import wait_for

NETUID = int(os.environ.get("BT_CHAIN_NETUID", "1"))
STAKE_RAO = 2000 * 10**9


class Network:
    """A chain to test: opens doors to it for as many wallets as a test wants."""

    def __init__(self, network: str, path: Path, coldkey: Keypair):
        self.network = network
        self.path = path
        self.coldkey = coldkey
        self.opened: list[Chain] = []

    def open(self, *, netuid: int = NETUID) -> Chain:
        """A door for a new hotkey."""
        hotkey = Keypair.create_from_seed(secrets.token_bytes(32))
        chain = open_chain(
            network=self.network,
            netuid=netuid,
            wallet=Keys(hotkey, self.coldkey),
            path=self.path,
            block_seconds=0.05,
        )
        self.opened.append(chain)
        return chain

    def join(self, *, staked: bool = False) -> Chain:
        """A door for a hotkey that is registered."""
        chain = self.open()
        subtensor = bt.calls.SubtensorModule
        chain.submit_as_coldkey(
            "registering", subtensor.burned_register(netuid=NETUID, hotkey=chain.hotkey)
        )
        if staked:
            call = subtensor.add_stake(hotkey=chain.hotkey, netuid=NETUID, amount_staked=STAKE_RAO)
            chain.submit_as_coldkey("staking", call)
        return chain


@pytest.fixture(
    params=["embedded", pytest.param("live", marks=pytest.mark.localnet)],
)
def network(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Network]:
    if request.param == "embedded":
        seed = secrets.token_bytes(32)
        made = Network("embedded", tmp_path / "chain.sqlite", Keypair.create_from_seed(seed))
    else:
        endpoint = os.environ.get("BT_CHAIN_ENDPOINT")
        if not endpoint:
            pytest.skip("BT_CHAIN_ENDPOINT names no live node")
        made = Network(endpoint, tmp_path / "none", Keypair.create_from_uri("//Alice"))
    yield made
    for chain in made.opened:
        chain.close()


def wait_blocks(chain: Chain, count: int) -> None:
    """Until so many blocks have come, each within a minute."""
    end = chain.block() + count
    wait_for(lambda: chain.block() >= end, seconds=60 * count, about="blocks")


def test_blocks_come_and_have_a_length(network: Network) -> None:
    chain = network.open()
    assert chain.block_seconds() > 0
    wait_blocks(chain, 2)


def test_a_subnet_has_settings_and_a_price(network: Network) -> None:
    chain = network.open()
    settings = chain.hyperparameters()
    for name in (
        "activity_cutoff",
        "commit_reveal_weights_enabled",
        "immunity_period",
        "max_weights_limit",
        "weights_rate_limit",
        "weights_version",
    ):
        assert int(settings[name]) >= 0, name
    assert chain.price() >= 0


def test_a_subnet_that_is_not_there_is_told(network: Network) -> None:
    with pytest.raises(OperatorError, match="has no subnet 60000"):
        network.open(netuid=60000).metagraph()


def test_a_stranger_is_told_apart(network: Network) -> None:
    chain = network.open()
    assert chain.uid() is None
    assert chain.metagraph().by_hotkey(chain.hotkey) is None
    with pytest.raises(NotRegistered, match=chain.hotkey):
        chain.commit(b"x")
    with pytest.raises(NotRegistered, match=chain.hotkey):
        chain.set_weights({0: 1.0})


def test_who_registers_has_a_uid_in_the_metagraph(network: Network) -> None:
    chain = network.join()
    ours = chain.metagraph().by_hotkey(chain.hotkey)
    assert ours is not None
    assert ours.uid == chain.uid()
    assert ours.block_at_registration <= chain.block()
    assert ours.axon is None


def test_an_axon_is_served_where_it_says(network: Network) -> None:
    chain = network.join()
    chain.serve_axon("93.184.216.34", 8091)
    wait_blocks(chain, 1)
    ours = chain.metagraph().by_hotkey(chain.hotkey)
    assert ours is not None
    assert ours.axon == "93.184.216.34:8091"


@pytest.mark.parametrize("size", [1, 128, 512])
def test_a_commitment_comes_back_byte_for_byte(network: Network, size: int) -> None:
    chain, data = network.join(), secrets.token_bytes(size)
    chain.commit(data)
    wait_blocks(chain, 1)
    graph = chain.metagraph()
    assert chain.commitments(graph)[chain.hotkey] == data


def test_the_metagraph_survives_a_night_on_disk(network: Network, tmp_path: Path) -> None:
    chain = network.join()
    chain.commit(b"/ip4/192.0.2.1/tcp/8009/p2p/12D3KooW")
    wait_blocks(chain, 1)
    graph = chain.metagraph()
    snapshot.save(graph, tmp_path / "kept.json")
    kept = snapshot.load(tmp_path / "kept.json")
    assert kept is not None
    assert kept.neurons == graph.neurons
    assert chain.commitments(kept) == chain.commitments(graph)


def test_weights_without_stake_are_refused_by_the_chain(network: Network) -> None:
    miner, other = network.join(), network.join()
    wait_blocks(miner, int(miner.hyperparameters()["weights_rate_limit"]) + 1)
    uid = other.uid()
    assert uid is not None
    with pytest.raises(ChainError) as raised:
        miner.set_weights({uid: 1.0})
    assert raised.value.refused
    assert not raised.value.may_stand


def test_weights_of_a_validator_are_set_and_limited(network: Network) -> None:
    validator, miner = network.join(staked=True), network.join()
    settings = validator.hyperparameters()
    limit, tempo = int(settings["weights_rate_limit"]), int(settings["tempo"])
    # A real chain gives permits out at the end of a tempo.
    wait_blocks(validator, max(limit, 0 if validator.embedded else tempo) + 2)
    before, target = validator.metagraph().by_hotkey(validator.hotkey), miner.uid()
    assert before is not None
    assert target is not None
    if not before.validator_permit:
        pytest.skip("this stake is not enough for a permit here")
    validator.set_weights({target: 1.0}, valid_blocks=16)
    after = validator.metagraph().by_hotkey(validator.hotkey)
    assert after is not None
    assert after.last_update > before.last_update
    if not settings["commit_reveal_weights_enabled"]:
        assert list(validator.weights_of(after.uid)) == [target]
    if limit > 1:
        with pytest.raises(ChainError) as raised:
            validator.set_weights({target: 1.0})
        assert raised.value.refused == "RATE_LIMITED"
