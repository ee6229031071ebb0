"""A chain that fails on purpose: the neuron lives, weights are set once, nobody inherits."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bittensor as bt
import pytest
from chain_worker import Keys, new_keys
from flaky_subnet import Subnet, address, earned
from flaky_substrate import FlakySubstrate, refusal
from small_neurons import SmallMiner, miner_settings, running

from hiveminer.chain import Chain, join_embedded, snapshot
from hiveminer.errors import ChainError, NotRegistered
from programs import wait_for


@pytest.fixture
def subnet(tmp_path: Path) -> Iterator[Subnet]:
    made = Subnet(tmp_path)
    yield made
    made.close()


# Each fault: a miner that answers, and weights that are set once ------------------------------

# In the words of the SDK (11.3), which raises this as a refusal.
DROPPED = refusal(
    "Connection dropped while an extrinsic submission was in flight; the transaction may already "
    "be in the pool or on chain. Verify chain state before retrying."
)

FAULTS: dict[str, dict[str, Any]] = {
    "drops": {"reads_to_drop": 2},
    "many drops": {"reads_to_drop": 8},
    "delays": {"delay_seconds": 0.05},
    "hangs for a while": {"delay_seconds": 60.0, "for_seconds": 1.0},
    "is down for a while": {"down": True, "for_seconds": 1.0},
    "wrong nonce": {"wrong_nonces": 2},
    "rate limit": {"refusals": 2 * [refusal("too fast", name="SettingWeightsTooFast")]},
    "success false": {"refusals": [refusal("for no reason at all")]},
    "stale block": {"stale_blocks": 900, "for_seconds": 0.5},
    "request lost": {"requests_to_lose": 1},
    "answer lost": {"answers_to_lose": 1},
    "included late": {"calls_to_hold": 1, "for_seconds": 0.4},
    "dropped in flight": {"calls_to_hold": 1, "held_as": DROPPED, "for_seconds": 0.4},
    "in the pool for ever": {"calls_to_hold": 1},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_miner_lives_and_weights_are_set_once(
    subnet: Subnet, tmp_path: Path, fault: str
) -> None:
    flaky = subnet.new_substrate()
    miner = subnet.chain(flaky)
    with running(miner_settings(tmp_path), miner) as program:
        program.endpoint()
        wait_for(lambda: subnet.validator.metagraph().neuron(1).axon, seconds=60)
        subnet.clock.blocks(1000)
        subnet.substrate.fail(**FAULTS[fault])
        flaky.fail(**FAULTS[fault])
        sent = wait_for(
            lambda: (
                program.alive(subnet.validator.wallet)
                and subnet.setter.set_if_due(earned({miner.hotkey: 2.0}))
            ),
            seconds=60,
        )
        assert sent.shares == {1: 1.0}
        assert program.alive(subnet.validator.wallet)
        for _ in range(3):  # not due again, whatever is asked
            assert subnet.setter.set_if_due(earned({miner.hotkey: 2.0})) is None
        assert subnet.substrate.weights_set == 1
        assert subnet.shares() == {miner.hotkey: 1.0}
    assert program.error is None


def test_the_weights_survive_what_happens_to_the_validator_in_between(subnet: Subnet) -> None:
    """The answer is lost, the validator is killed and comes again: still once."""
    miner = subnet.join()
    subnet.clock.blocks(1000)
    subnet.substrate.answers_to_lose = 1
    subnet.stopping.set()  # so it does not wait to see them
    assert subnet.setter.set_if_due(earned({address(miner): 1.0})) is None
    assert subnet.substrate.weights_set == 1
    subnet.stopping = threading.Event()
    again = subnet.new_setter()
    assert again.set_if_due(earned({address(miner): 1.0})) is None
    assert subnet.substrate.weights_set == 1


# Uids change hands -----------------------------------------------------------------------------


def test_no_score_is_inherited_with_a_uid(subnet: Subnet) -> None:
    good, other = subnet.join(), subnet.join()
    subnet.clock.blocks(1000)
    newcomer = subnet.substrate.give_away(address(good))
    sent = subnet.setter.set_if_due(earned({address(good): 9.0, address(other): 1.0}))
    assert sent is not None
    assert sent.hotkeys == {2: address(other)}
    assert subnet.shares() == {address(other): 1.0}
    assert address(newcomer) in subnet.validator.metagraph().hotkeys


@pytest.mark.parametrize("alone", [False, True])
def test_a_uid_given_away_on_the_way_is_put_right_at_once(
    subnet: Subnet, caplog: pytest.LogCaptureFixture, *, alone: bool
) -> None:
    """The uid changes hands after the setter has read the metagraph, before its call lands."""
    good, other = subnet.join(), subnet.join()
    table = {address(good): 9.0} | ({} if alone else {address(other): 1.0})
    subnet.clock.blocks(1000)
    newcomers: list[Keys] = []
    subnet.substrate.before_weights = lambda: newcomers.append(
        subnet.substrate.give_away(address(good))
    )
    assert subnet.setter.set_if_due(earned(table)) is not None
    assert "changed hands" in caplog.text
    subnet.clock.blocks(6)  # the subnet's rate limit
    assert subnet.setter.set_if_due(earned(table)) is not None
    shares = subnet.shares()
    assert address(newcomers[0]) not in shares
    assert shares == {subnet.validator.hotkey if alone else address(other): 1.0}
    assert subnet.setter.set_if_due(earned(table)) is None
    assert subnet.substrate.weights_set == 2


def ours(chain: Chain) -> bt.MetagraphNeuron:
    found = chain.metagraph().by_hotkey(chain.hotkey)
    assert found is not None
    return found


def test_a_miner_that_loses_its_uid_says_so_and_ends(subnet: Subnet, tmp_path: Path) -> None:
    flaky = subnet.new_substrate()
    miner = subnet.chain(flaky)
    with running(miner_settings(tmp_path), miner) as program:
        program.endpoint()
        wait_for(lambda: ours(miner).axon, seconds=60, about="its address on the chain")
        flaky.give_away(miner.hotkey)
        wait_for(lambda: not program.thread.is_alive(), seconds=60)
    assert isinstance(program.error, NotRegistered)
    assert program.error.exit_code == 3
    assert "has lost its uid" in str(program.error)


# The metagraph on disk ----------------------------------------------------------------------


def test_an_outage_at_start_changes_nothing_for_neurons_already_known(
    subnet: Subnet, tmp_path: Path
) -> None:
    keys, settings = new_keys(), miner_settings(tmp_path)
    with running(settings, subnet.chain(subnet.new_substrate(), keys)) as program:
        port = program.endpoint().port
    flaky = subnet.new_substrate()
    flaky.down = True
    away = subnet.chain(flaky, keys, must_connect=False)
    with running(miner_settings(tmp_path, axon={"port": port}), away) as program:
        # The validator is known from the disk, a stranger is not.
        assert wait_for(lambda: program.alive(subnet.validator.wallet), seconds=60)
        assert not program.alive(new_keys())
        assert program.miner.neuron.uid == 1
        flaky.down = False
        newcomer = subnet.join()
        wait_for(lambda: program.alive(newcomer), seconds=60, about="the chain is back")
    assert program.error is None


def test_an_address_that_changed_in_an_outage_is_put_there_later(
    subnet: Subnet, tmp_path: Path
) -> None:
    keys = new_keys()
    with running(miner_settings(tmp_path), subnet.chain(subnet.new_substrate(), keys)) as program:
        program.endpoint()
    flaky = subnet.new_substrate()
    flaky.down = True
    moved = miner_settings(tmp_path, axon={"external_port": 4242})
    with running(moved, subnet.chain(flaky, keys, must_connect=False)) as program:
        program.endpoint()
        flaky.down = False
        wait_for(
            lambda: subnet.validator.metagraph().neuron(1).axon == "127.0.0.1:4242", seconds=60
        )


def test_what_a_reorganisation_took_is_put_there_again(subnet: Subnet, tmp_path: Path) -> None:
    chain = subnet.chain(subnet.new_substrate())
    with running(miner_settings(tmp_path), chain) as program:
        program.miner.neuron.keep_committed(b"mine")
        axon = f"127.0.0.1:{program.endpoint().port}"
        wait_for(lambda: subnet.validator.metagraph().neuron(1).axon == axon, seconds=60)
        with contextlib.closing(sqlite3.connect(subnet.path)) as db:
            db.execute("UPDATE neurons SET ip = '0', port = 0 WHERE uid = 1")
            db.execute("DELETE FROM commitments")
            db.commit()
        wait_for(lambda: subnet.validator.metagraph().neuron(1).axon == axon, seconds=60)
        wait_for(lambda: subnet.validator.commitments() == {chain.hotkey: b"mine"}, seconds=60)


def test_without_a_snapshot_an_outage_at_start_is_one_line(subnet: Subnet, tmp_path: Path) -> None:
    flaky = subnet.new_substrate()
    flaky.down = True
    chain = subnet.chain(flaky, must_connect=False)
    with pytest.raises(ChainError, match="the node is away"):
        SmallMiner(miner_settings(tmp_path), chain=chain)
    with pytest.raises(ChainError, match="connecting on embedded: the node is away"):
        subnet.chain(flaky)


@pytest.mark.parametrize("damage", ["", "{}", "[]", "\x00", '{"metagraph": {}, "commitments": {}}'])
def test_a_damaged_snapshot_is_none(tmp_path: Path, damage: str) -> None:
    (tmp_path / "metagraph.json").write_text(damage)
    assert snapshot.load(tmp_path / "metagraph.json") is None


def test_a_refusal_is_no_outage(subnet: Subnet, tmp_path: Path) -> None:
    """A snapshot is for when the chain is away, not for when it says no."""
    keys = new_keys()
    with running(miner_settings(tmp_path), subnet.chain(subnet.new_substrate(), keys)) as program:
        program.endpoint()
    subnet.substrate.deregister(address(keys), netuid=1)
    subnet.substrate.set_hyperparameters(1, registration_allowed=0)
    chain = subnet.chain(subnet.new_substrate(), keys)
    with pytest.raises(ChainError, match="takes no registrations"):
        SmallMiner(miner_settings(tmp_path), chain=chain)


def test_what_is_in_doubt_and_what_is_not(subnet: Subnet) -> None:
    """What the SDK says of a submission, and whether it may have arrived."""
    chain = subnet.chain(subnet.substrate)
    join_embedded(chain)
    for result, in_doubt in (
        (refusal("no close frame received or sent"), True),  # a broken connection, in its words
        (refusal("extrinsic retracted", name="Retracted"), True),
        (refusal("Transaction Already Imported"), True),
        (refusal("too fast", name="CommitmentSetRateLimitExceeded"), False),
        (refusal("Insufficient balance to pay fees", name="InsufficientBalance"), False),
    ):
        subnet.substrate.refusals = [result]
        with pytest.raises(ChainError) as raised:
            chain.commit(b"x")
        assert raised.value.may_stand is in_doubt, result
        assert bool(raised.value.refused) is not in_doubt, result
    subnet.clock.blocks(100)
    with pytest.raises(ChainError, match="All weights are zero") as raised:
        subnet.validator.set_weights({0: 0.0})
    assert raised.value.refused  # so it is not tried for an hour


class OneSession(FlakySubstrate):
    """As the SDK's own: when a reconnection has failed once, the session stays dead for good,
    until it is closed and opened anew."""

    dead = False

    async def _falter(self) -> None:
        try:
            await super()._falter()
        except bt.RpcConnectionError:
            self.dead = True
        if self.dead:
            raise bt.RpcConnectionError("the session is dead")

    async def connect(self) -> None:
        if not self.down:
            self.dead = False
        await super().connect()


def test_a_dead_session_is_followed_by_a_new_one(subnet: Subnet) -> None:
    one = OneSession(subnet.path, clock=subnet.clock)
    chain = subnet.chain(one)
    one.down = True
    for _ in range(2):
        with pytest.raises(ChainError):
            chain.block()
    one.down = False
    assert chain.block() > 0
    one.delay_seconds, one.dead = 60.0, False  # it hangs, and a call's deadline comes
    with pytest.raises(ChainError, match="no answer"):
        chain.block()
    one.delay_seconds, one.dead = 0.0, True
    assert chain.block() > 0
