"""The chain: the embedded network through the SDK's own calls, wallets, and `Chain`."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bittensor as bt
import pytest
from bittensor.keyfiles import Keypair
from chain_worker import Keys, new_keys
from embedded_network import RAO, VALIDATOR_STAKE, Network, code_of, refused

from hiveminer.chain import EmbeddedSubstrate
from hiveminer.chain.embedded.schema import FAUCET_RAO


@pytest.fixture
def network(tmp_path: Path) -> Iterator[Network]:
    made = Network(tmp_path / "chain.sqlite3")
    yield made
    made.run(made.client.close())


# A neuron's life -----------------------------------------------------------------


def test_the_life_of_a_neuron_through_the_sdk(network: Network) -> None:
    validator, miner = network.join(tao=VALIDATOR_STAKE), network.join()
    assert (network.uid(validator), network.uid(miner)) == (0, 1)
    assert network.balance(miner) == FAUCET_RAO - 1 * RAO
    assert network.balance(validator) == FAUCET_RAO - (1 + 2000) * RAO
    network.clock.blocks(10)
    assert network.serve(miner, "127.0.0.1", 8091).success
    assert network.commit(miner, {"Raw6": "0x" + b"peer-a".hex()}).success
    assert network.execute(bt.SetWeights(netuid=1, weights={1: 0.5}), validator).success

    graph = network.metagraph()
    first, second = graph.neurons
    assert (first.hotkey, first.validator_permit) == (validator.hotkey.ss58_address, True)
    assert first.tao_stake.tao == first.total_stake.amount == VALIDATOR_STAKE
    assert (second.coldkey, second.validator_permit) == (miner.coldkey.ss58_address, False)
    assert second.axon == "127.0.0.1:8091"
    assert (second.commitment.data, second.commitment.block) == ("peer-a", 11)
    assert (second.incentive, second.dividends) == (1.0, 0.0)
    assert (first.incentive, first.dividends, first.last_update) == (0.0, 1.0, 11)
    assert (graph.block, graph.num_uids, graph.max_uids) == (11, 2, 256)
    assert network.run(network.client.read("weights", netuid=1)) == {0: {1: 1.0}}


def test_the_sdks_other_reads_and_calls(network: Network) -> None:
    keys = network.join()
    client, hotkey = network.client, keys.hotkey.ss58_address
    network.clock.blocks(3)

    async def ask() -> None:
        assert (await client.block(), await client.finalized_block()) == (4, 2)
        assert (await client.timestamp()).timestamp() == network.clock.seconds
        assert (await client.timestamp(block=2)).timestamp() == network.clock.seconds - 2
        assert await client.block_time() == 1.0
        limits = await client.read("subnet_hyperparameters", netuid=1)
        assert (limits["weights_rate_limit"], limits["registration_allowed"]) == (5, True)
        assert await client.subnets.metagraph(7) is None
        assert await client.read("subnet_hyperparameters", netuid=7) is None
        intent = bt.AddStake(hotkey_ss58=hotkey, netuid=1, amount_tao=5)
        (await client.execute(intent, keys)).raise_for_failure()

    network.run(ask())
    assert network.metagraph().neuron(0).total_stake.amount == 5
    assert network.balance(keys) == FAUCET_RAO - 6 * RAO


def test_the_state_can_be_read_as_of_an_earlier_block(network: Network) -> None:
    client, first = network.client, network.join(tao=VALIDATOR_STAKE)
    network.commit(first, {"Raw1": "0x01"}).raise_for_failure()
    network.clock.blocks(1)
    second = network.join()
    network.commit(first, {"Raw1": "0x02"}).raise_for_failure()
    network.clock.blocks(3)

    async def ask(block: int | None) -> tuple[int, list[str], dict[int, Any]]:
        graph = await (await client.at(block)).subnets.metagraph(1)
        assert graph is not None
        said = {uid: each.fields for uid, each in graph.commitments.items()}
        return graph.block, [n.hotkey for n in graph], said

    one, two = (keys.hotkey.ss58_address for keys in (first, second))
    assert network.run(ask(0)) == (0, [], {})
    assert network.run(ask(1)) == (1, [one], {0: [{"Raw1": "0x01"}]})
    for block in (2, 3, 4, 5):
        assert network.run(ask(block)) == (block, [one, two], {0: [{"Raw1": "0x02"}]})
    network.clock.blocks(257)
    network.commit(first, {"Raw1": "0x03"}).raise_for_failure()
    with pytest.raises(bt.ChainError, match="not kept"):
        network.run(ask(5))
    with pytest.raises(bt.ChainError):
        network.run(ask(263))
    assert network.run(ask(6)) == (6, [one, two], {0: [{"Raw1": "0x02"}]})


def test_what_is_kept_of_the_past_is_bounded(network: Network) -> None:
    keys = network.join()
    network.substrate.set_hyperparameters(1, tempo=1)
    for number in range(300):
        network.clock.blocks(1)
        network.commit(keys, {"Raw1": f"0x{number % 256:02x}"}).raise_for_failure()
        network.run(network.client.finalized_block())
    with contextlib.closing(sqlite3.connect(network.path)) as db:
        for table in ("blocks", "history"):
            assert db.execute(f"SELECT COUNT(*) FROM {table}").fetchone()[0] <= 258


def test_a_final_block_is_sealed_and_its_hash_is_drawn_then(network: Network) -> None:
    client, keys = network.client, network.join()

    async def hash_of(block: int) -> Any:
        return await client.query(("System", "BlockHash"), [block])

    network.clock.blocks(4)
    before = network.run(hash_of(3))
    assert network.run(client.finalized_block()) == 3
    assert network.run(hash_of(3)) != before
    assert network.run(hash_of(3)) == network.run(hash_of(3))
    assert len({network.run(hash_of(block)) for block in range(4)}) == 4
    network.clock.blocks(-3)  # a process that was stopped, or a clock that was set back
    network.commit(keys, {"Raw1": "0x01"}).raise_for_failure()
    network.clock.blocks(4)
    assert network.metagraph().commitments[0].block == 4


def test_a_process_stopped_in_mid_write_holds_finality_up(network: Network) -> None:
    network.run(network.client.finalized_block())
    network.clock.blocks(5)
    with network.substrate._ledger.writing() as (_, block):
        assert block == 6
        network.clock.blocks(5)
        other = EmbeddedSubstrate(network.path, clock=network.clock)
        other._ledger.connection().execute("PRAGMA busy_timeout = 50")
        with pytest.raises(bt.RpcConnectionError):
            asyncio.run(other.finalized_block_number())
    assert network.run(network.client.finalized_block()) == 9


def test_a_file_of_the_version_before_is_upgraded(network: Network) -> None:
    keys = network.join()
    network.run(network.client.close())
    with contextlib.closing(sqlite3.connect(network.path)) as db:
        db.executescript(
            "DROP TABLE blocks; DROP TABLE history; DROP TABLE written; PRAGMA user_version = 1"
        )
    network.clock.blocks(500)
    assert network.uid(keys) == 0
    network.commit(keys, {"Raw1": "0x01"}).raise_for_failure()
    assert network.run(network.client.finalized_block()) == 499


def test_connecting_leaves_the_users_own_cache_alone(network: Network) -> None:
    network.run(network.client.connect())
    with pytest.raises(bt.ChainError, match="has no SubtensorModule"):
        network.run(network.client.query_map(("SubtensorModule", "TokenSymbol")))


# What is refused -----------------------------------------------------------------


def test_strangers_are_refused(network: Network) -> None:
    keys = new_keys()
    code = bt.ErrorCode.NOT_REGISTERED
    network.join()
    refused(network.serve(keys), "HotKeyNotRegisteredInNetwork")
    refused(network.weigh(keys, {0: 1}), "HotKeyNotRegisteredInSubNet")
    refused(network.commit(keys, {"Raw1": "0x00"}), "AccountNotAllowedCommit")
    refused(network.stake(keys, 1), "HotKeyAccountNotExists")
    with pytest.raises(bt.ChainError) as raised:
        network.execute(bt.SetWeights(netuid=1, weights={0: 1.0}), keys)
    assert raised.value.code is code
    # Nothing of it stays: whoever was refused has never been seen.
    assert network.balance(keys) == FAUCET_RAO


def test_registration_is_paid_for_and_happens_once(network: Network) -> None:
    keys = network.join()
    refused(network.register(keys), "HotKeyAlreadyRegisteredInSubNet")
    refused(network.register(keys, 7), "SubnetNotExists")
    refused(network.register(keys, 0), "RegistrationNotPermittedOnRootSubnet")
    refused(network.stake(keys, 999_999.5), "NotEnoughBalanceToStake")
    assert network.stake(keys, 999_998.5).success
    other = Keys(new_keys().hotkey, keys.coldkey)
    refused(network.register(other), "NotEnoughBalanceToStake")
    network.substrate.set_hyperparameters(1, registration_allowed=0)
    refused(network.register(new_keys()), "SubNetRegistrationDisabled")
    assert len(network.metagraph()) == 1


def test_only_the_right_key_signs(network: Network) -> None:
    keys, other = network.join(tao=VALIDATOR_STAKE), network.join()
    network.clock.blocks(10)

    class Claims:
        """Says that it is `keys`' hotkey, and signs with its own."""

        ss58_address = keys.hotkey.ss58_address
        public_key = bytes(keys.hotkey.public_key)
        crypto_type = 1

        def sign(self, payload: bytes) -> bytes:
            return bytes(other.hotkey.sign(payload))

    refused(network.weigh(Claims(), {0: 1}), "BadProof")
    public = Keypair(ss58_address=keys.hotkey.ss58_address)
    with pytest.raises(bt.ChainError, match="cannot sign"):
        network.weigh(public, {0: 1})
    # A coldkey where a hotkey signs, and the other way round.
    refused(network.weigh(keys.coldkey, {0: 1}), "HotKeyNotRegisteredInSubNet")
    target = new_keys().hotkey.ss58_address
    register = bt.calls.SubtensorModule.burned_register(netuid=1, hotkey=target)
    refused(network.submit(register, keys, signer="hotkey"), "NonAssociatedColdKey")
    # Another's hotkey cannot be registered, even when it has lost its uid.
    network.substrate.deregister(keys.hotkey.ss58_address, netuid=1)
    stolen = Keys(keys.hotkey, other.coldkey)
    refused(network.register(stolen), "NonAssociatedColdKey")
    assert network.metagraph().by_hotkey(keys.hotkey.ss58_address) is None


def test_a_nonce_out_of_turn_is_refused(network: Network) -> None:
    keys = network.join()
    address = keys.coldkey.ss58_address
    call = bt.calls.SubtensorModule.add_stake(
        hotkey=keys.hotkey.ss58_address, netuid=0, amount_staked=1
    )

    async def submit(nonce: int) -> bt.ExtrinsicResult:
        composed = await network.substrate.compose(call)
        return await network.substrate.submit(composed, keys.coldkey, nonce=nonce)

    assert network.run(network.substrate.account_next_index(address)) == 1
    assert network.run(submit(0)).error.name == "Stale"
    assert network.run(submit(2)).error.name == "Future"
    assert network.run(submit(1)).success


def test_weights_need_stake_a_permit_time_and_the_version(network: Network) -> None:
    network.substrate.set_hyperparameters(
        1, max_validators=2, weights_rate_limit=10, weights_version=3
    )
    poor, small, *large = (network.join(tao=tao) for tao in (999, 1500, 2000, 2500))
    refused(network.weigh(poor, {0: 1}, 3), "NotEnoughStakeToSetWeights")
    refused(network.weigh(large[0], {0: 1}, 3), "SettingWeightsTooFast")
    network.clock.blocks(10)
    refused(network.weigh(large[0], {0: 1}, 2), "IncorrectWeightVersionKey")
    refused(network.weigh(small, {0: 1}, 3), "NeuronNoValidatorPermit")
    assert network.weigh(small, {1: 1}, 3).success  # on itself only
    intent = bt.SetWeights(netuid=1, weights={0: 0.25, 1: 0.75}, version_key=3)
    assert network.execute(intent, large[0]).success
    with pytest.raises(bt.ChainError, match="rate limit is 10 blocks") as raised:
        network.execute(intent, large[0])
    assert raised.value.code is bt.ErrorCode.RATE_LIMITED
    network.clock.blocks(10)
    assert network.execute(intent, large[0]).success
    # More stake takes the permit from whoever has least of those that hold one.
    network.stake(small, 1000).raise_for_failure()
    assert network.weigh(small, {0: 1}, 3).success
    assert [n.validator_permit for n in network.metagraph()] == [False, True, False, True]


def test_weights_out_of_shape_are_refused(network: Network) -> None:
    keys = network.join(tao=VALIDATOR_STAKE)
    network.join()
    network.clock.blocks(10)
    code = bt.ErrorCode.INVALID_ARGUMENT

    def weigh(uids: list[int], values: Any) -> bt.ExtrinsicResult:
        call = bt.calls.SubtensorModule.set_weights(
            netuid=1, dests=uids, weights=values, version_key=0
        )
        return network.submit(call, keys, signer="hotkey")

    refused(weigh([0, 1], [1]), "WeightVecNotEqualSize")
    refused(weigh([1, 1], [1, 1]), "DuplicateUids")
    refused(weigh([1, 2], [1, 1]), "UidVecContainInvalidOne")
    refused(weigh([0, 1, 2], [1, 1, 1]), "UidsLengthExceedUidsInSubNet")
    refused(weigh([], []), "WeightVecLengthIsLow")
    refused(weigh([1], [0]), "WeightVecLengthIsLow")
    for values in ([-1], [65536], [True], ["1"], list(range(5000))):
        assert code_of(weigh([1], values)) is code
    network.substrate.set_hyperparameters(1, min_allowed_weights=2, max_weights_limit=40000)
    refused(weigh([1], [1]), "WeightVecLengthIsLow")
    refused(weigh([0, 1], [1, 9]), "MaxWeightExceeded")
    # The SDK clips to the limit by itself.
    assert network.execute(bt.SetWeights(netuid=1, weights={0: 0.1, 1: 0.9}), keys).success
    network.substrate.set_hyperparameters(1, commit_reveal_weights_enabled=1)
    refused(weigh([0, 1], [1, 1]), "CommitRevealEnabled")


def test_an_axon_has_a_host_a_port_and_a_rate_limit(network: Network) -> None:
    keys = network.join()
    code = bt.ErrorCode.INVALID_ARGUMENT
    network.substrate.set_hyperparameters(1, serving_rate_limit=10)
    refused(network.serve(keys, port=0), "InvalidPort")
    refused(network.serve(keys, "255.255.255.255"), "InvalidIpAddress")
    assert code_of(network.serve(keys, port=70000)) is code
    assert network.serve(keys, "::1", 8091).success
    assert network.metagraph().neuron(0).axon == "[::1]:8091"
    network.clock.blocks(9)
    refused(network.serve(keys), "ServingRateLimitExceeded")
    network.clock.blocks(1)
    assert network.execute(bt.ResetAxon(netuid=1), keys).success
    assert network.metagraph().neuron(0).axon is None


def test_a_commitment_has_a_size(network: Network) -> None:
    keys = network.join()
    code = bt.ErrorCode.INVALID_ARGUMENT
    assert network.commit(keys, {"Raw128": "0x" + "ab" * 128}).success
    assert network.commit(keys, {"BigRaw": "0x" + "ab" * 512}).success
    for field in (
        {"Raw129": "0x" + "ab" * 129},
        {"Raw2": "0xabab" + "ab"},
        {"BigRaw": "0x" + "ab" * 513},
        {"BigRaw": "0x" + "ab" * 100_000},
        {"Raw1": "0xzz"},
        {"Sha256": "0x" + "ab" * 32},
        "None",
    ):
        assert code_of(network.commit(keys, field)) is code
    refused(
        network.commit(keys, {"Raw1": "0x00"}, {"Raw1": "0x00"}), "TooManyFieldsInCommitmentInfo"
    )
    assert network.metagraph().commitments[0].fields == [{"BigRaw": "0x" + "ab" * 512}]
    results = [network.commit(keys, {"BigRaw": "0x" + "ab" * 512}) for _ in range(5)]
    refused(results[-1], "SpaceLimitExceeded")
    network.clock.blocks(360)
    assert network.commit(keys, {"Raw0": "0x"}).success


def test_what_makes_no_sense_here_says_so(network: Network) -> None:
    keys, substrate, client = network.join(), network.substrate, network.client
    for ask in (
        lambda: client.execute(bt.BurnedRegister(netuid=1), new_keys()),
        lambda: client.submit_call(bt.calls.Balances.transfer_all(dest="x", keep_alive=True), keys),
        lambda: client.multisig([keys.hotkey.ss58_address], 1),
        lambda: client.wait_for_block(10**9),
        lambda: client.decode_scale("u8", "0x00"),
        lambda: client.query(("SubtensorModule", "Bonds"), [1]),
        lambda: client.runtime(("Other", "method"), []),
        lambda: client.constant(("Other", "Constant")),
        lambda: substrate.sign_extrinsic(None, None, nonce=0, period=0),
        lambda: substrate.prepare(None, address=""),
        lambda: substrate.find_extrinsic("0x", "0x"),
    ):
        with pytest.raises(bt.ChainError, match="embedded network"):
            network.run(ask())


# Who stays and who goes -------------------------------------------------------------


def test_a_full_subnet_prunes_the_lowest_outside_its_immunity(network: Network) -> None:
    network.substrate.set_hyperparameters(
        1, max_allowed_uids=3, immunity_period=100, weights_rate_limit=0
    )
    validator = network.join(tao=VALIDATOR_STAKE)
    network.clock.blocks(1)
    lazy, good = network.join(), network.join()
    refused(network.register(new_keys()), "NoNeuronIdAvailable")
    network.serve(lazy).raise_for_failure()
    network.commit(lazy, {"Raw1": "0x00"}).raise_for_failure()
    network.clock.blocks(100)
    network.weigh(validator, {2: 1}).raise_for_failure()
    new = network.join()
    assert (network.uid(lazy), network.uid(new), network.uid(good)) == (None, 1, 2)
    # The uid's new holder inherits nothing, and is immune.
    neuron = network.metagraph().neuron(1)
    assert (neuron.axon, neuron.commitment, neuron.incentive) == (None, None, 0.0)
    assert not network.metagraph().unregistered_commitments
    again = network.register(lazy)
    assert again.success  # of two that earn the same, the one that came first goes
    assert (network.uid(validator), network.uid(good), network.uid(lazy)) == (None, 2, 0)


def test_a_neuron_that_lost_its_uid_and_the_next_that_takes_it(network: Network) -> None:
    network.substrate.set_hyperparameters(1, weights_rate_limit=0)
    validator, miner = network.join(tao=VALIDATOR_STAKE), network.join()
    network.clock.blocks(1)
    network.serve(miner).raise_for_failure()
    network.weigh(validator, {1: 1}).raise_for_failure()
    assert network.metagraph().neuron(1).incentive == 1.0
    network.substrate.deregister(miner.hotkey.ss58_address, netuid=1)
    assert network.uid(miner) is None
    gone = network.metagraph()
    assert (len(gone), gone.neuron(1).axon, gone.neuron(1).incentive) == (2, None, 0.0)
    assert gone.by_hotkey(miner.hotkey.ss58_address) is None
    refused(network.serve(miner), "HotKeyNotRegisteredInNetwork")
    with pytest.raises(bt.ChainError):
        network.substrate.deregister(miner.hotkey.ss58_address, netuid=1)
    newcomer = network.join()
    assert network.uid(newcomer) == 1
    # The weight was set for the one before, so it counts for nothing until it is set anew.
    assert network.metagraph().neuron(1).incentive == 0.0
    network.clock.blocks(1)
    network.weigh(validator, {1: 1}).raise_for_failure()
    assert network.metagraph().neuron(1).incentive == 1.0
    assert network.register(miner).success
    assert network.uid(miner) == 2


def test_the_columns_follow_their_formula(network: Network) -> None:
    network.substrate.set_hyperparameters(1, activity_cutoff=100)
    large, small, *_ = [network.join(tao=tao) for tao in (3000, 1000, 0, 0)]
    network.clock.blocks(10)
    network.weigh(large, {2: 1, 3: 1}).raise_for_failure()
    network.weigh(small, {2: 1}).raise_for_failure()
    rows = list(network.metagraph())
    assert [n.incentive for n in rows] == pytest.approx([0, 0, 0.625, 0.375], abs=1e-4)
    earned = [0.75 * (0.5 * 0.625 + 0.5 * 0.375), 0.25 * 0.625]
    dividends = [earned[0] / sum(earned), earned[1] / sum(earned), 0, 0]
    assert [n.dividends for n in rows] == pytest.approx(dividends, abs=1e-4)
    assert rows[2].emission.amount == pytest.approx(360 * 0.625 / 2)
    network.clock.blocks(101)
    assert [n.incentive + n.dividends for n in network.metagraph()] == [0, 0, 0, 0]


def test_subnets_may_be_added_and_have_owners(network: Network) -> None:
    keys = network.join()
    hotkey = keys.hotkey.ss58_address
    network.substrate.create_subnet(7, owner_hotkey=hotkey)
    network.substrate.create_subnet(7, owner_hotkey=hotkey)
    assert network.register(keys, 7).success
    graph = network.run(network.client.subnets.metagraph(7))
    assert (graph.owner_hotkey, graph.owner_coldkey) == (hotkey, keys.coldkey.ss58_address)
