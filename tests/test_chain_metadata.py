"""Every call that is made and every storage item that is read, against the real chain's types.

The calls and reads are those that `Chain` really makes of a network that writes them down. They
are then encoded by the SDK's codec with the metadata of mainnet and of testnet, without a node;
tests/data/README.md says where that comes from.
"""

from __future__ import annotations

import gzip
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import bittensor as bt
import pytest
from bittensor._transport.codec import RuntimeCodec, StorageEntry
from bittensor._transport.errors import StorageFunctionNotFound
from chain_worker import new_keys

from hiveminer.chain import Chain, EmbeddedSubstrate
from hiveminer.chain.client import join_embedded
from hiveminer.chain.embedded import reads, rules
from hiveminer.errors import ChainError
from hiveminer.strategies.sparseloco.onchain import SubnetRounds
from programs import wait_for

DATA = Path(__file__).parent / "data"
ADDRESS = "5GrwvaEF5zXb26Fz9rcQpDWS57CtERHpNehXCPcNoHGKutQY"
RAW_BYTES = (1, 81, 93, 128)
"""Of commitments: a record has 81 and a mark 93."""

NEWER = {
    ("Commitments", "MaxSpace"),
    ("Commitments", "RevealedCommitments"),
    ("Commitments", "UsedSpaceOf"),
    ("SubtensorModule", "LastEpochBlock"),
    ("SubtensorModule", "PendingEpochAt"),
    ("SubtensorModule", "SubnetEpochConsensus"),
    ("SubtensorModule", "SubnetEpochIndex"),
    ("SubtensorModule", "TokenSymbol"),
    ("SubtensorModule", "TotalHotkeyAlpha"),
    ("SubtensorModule", "add_stake"),  # the old one has no netuid
    ("SubtensorModule", "set_mechanism_weights"),
}
"""What today's chain has and the metadata may lack. None of it is read or called in a round."""

UNUSED = {("SubtensorModule", "add_stake_limit"), ("SubtensorModule", "set_weights")}
"""Calls of other clients that the embedded network takes too."""

Name = tuple[str, str]


@dataclass
class Made:
    """By pallet and name, the parameters that were given."""

    calls: list[tuple[Name, dict[str, Any]]] = field(default_factory=list)
    reads: dict[Name, list[Any]] = field(default_factory=dict)


class Recorder(EmbeddedSubstrate):
    """The embedded network, which writes down what it is asked for."""

    def __init__(self, path: Path, made: Made):
        super().__init__(path, block_seconds=0.05)
        self.made = made

    async def compose(self, call: Any) -> Any:
        composed = await super().compose(call)
        self.made.calls.append(((composed.module, composed.function), composed.params))
        return composed

    async def query(self, module: str, name: str, params: Any = None, *rest: Any, **_: Any) -> Any:
        self.made.reads[module, name] = list(params or [])
        return await super().query(module, name, params, *rest, **_)

    async def query_map(
        self, module: str, name: str, params: Any = None, *rest: Any, **_: Any
    ) -> Any:
        self.made.reads[module, name] = list(params or [])
        return await super().query_map(module, name, params, *rest, **_)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """All that a neuron asks of a chain in its life."""
    made = Made()
    path = tmp_path_factory.mktemp("chain") / "chain.sqlite"
    substrate = Recorder(path, made)
    client = bt.Client("local", substrate=substrate)
    with Chain(network="embedded", netuid=1, wallet=new_keys(), client=client) as chain:
        substrate.set_hyperparameters(1, weights_rate_limit=0)
        uid = join_embedded(chain, stake_tao=2000)
        chain.serve_axon("192.0.2.1", 8091)
        for size in RAW_BYTES:
            chain.commit(bytes(range(size)))
        chain.set_weights({uid: 1.0}, version_key=7, valid_blocks=20)
        chain.commitments()
        chain.weights_of(uid)
        chain.hyperparameters()
        assert chain.commitment_space() == rules.MAX_COMMITMENT_SPACE
        chain.price()
        chain.block_seconds()
        chain.read("reading the time", lambda client: client.timestamp())
        rounds = SubnetRounds(chain)
        rounds.commitments(wait_for(rounds.final_head, seconds=60))
        rounds.snapshot(rounds.final_head())
        # Commit-reveal needs a beacon, which this network has not: only its reads are made.
        substrate.set_hyperparameters(1, commit_reveal_weights_enabled=1)
        with pytest.raises(ChainError):
            chain.set_weights({uid: 1.0}, version_key=7, valid_blocks=20)
    return made


@pytest.fixture(scope="module", params=["mainnet-219", "testnet-224"])
def codec(request: pytest.FixtureRequest) -> RuntimeCodec:
    blob = gzip.decompress((DATA / f"{request.param}.scale.gz").read_bytes())
    version = int(request.param.rpartition("-")[2])
    return RuntimeCodec(blob, spec_version=version, transaction_version=1)


def test_every_call_comes_back_from_its_bytes(codec: RuntimeCodec, made: Made) -> None:
    names = [name for name, _ in made.calls]
    assert set(names) == rules.CALLS.keys() - UNUSED
    assert names.count(("Commitments", "set_commitment")) == len(RAW_BYTES)
    for name, params in made.calls:
        if name in NEWER:
            continue
        call = codec.decode_call(codec.compose_call(*name, params).data)
        assert (call["call_module"], call["call_function"]) == name
        assert {each["name"]: each["value"] for each in call["call_args"]} == params


def test_every_storage_key_can_be_built(codec: RuntimeCodec, made: Made) -> None:
    assert {("Commitments", "CommitmentOf"), ("System", "BlockHash")} <= made.reads.keys()
    assert ("SubtensorModule", "RevealPeriodEpochs") in made.reads
    for name in {*made.reads, *reads.ITEMS, *reads.MAPS}:
        try:
            entry = codec.storage_entry(*name)
        except StorageFunctionNotFound:
            assert name in NEWER
            continue
        params = made.reads.get(name, [])
        assert codec.storage_key(entry, params).startswith(codec.storage_key(entry, []))
        whole = [*params, *_more(codec, entry, len(params))]
        key = codec.storage_key(entry, whole)
        assert codec.decode_storage_key_params(entry, key, fixed=0) == whole


def _more(codec: RuntimeCodec, entry: StorageEntry, given: int) -> list[Any]:
    """Values for the other parameters of a key: an account's address, or a small number."""
    return [
        codec.decode(kind, codec.encode(kind, ADDRESS if kind == "scale_info::0" else 3))
        for kind in entry.param_types[given:]
    ]
