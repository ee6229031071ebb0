"""When weights are set, what they are, and what is compared afterwards."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bittensor as bt
import pytest
from flaky_subnet import BLOCK_SECONDS, Subnet, address, earned
from small_neurons import Recorded, small_validator

from hiveminer.chain.weights import same, version_key
from hiveminer.validation.scores import DOUBTS, ScoreTable
from hiveminer.validator import weights_of


@pytest.fixture
def subnet(tmp_path: Path) -> Iterator[Subnet]:
    made = Subnet(tmp_path)
    yield made
    made.close()


# When, and when not ----------------------------------------------------------------------------


def test_the_rate_limit_and_the_interval_are_respected(subnet: Subnet) -> None:
    table = earned({address(subnet.join()): 1.0})
    assert subnet.setter.set_if_due(table) is None  # just registered
    subnet.clock.blocks(501)
    assert subnet.setter.set_if_due(table) is not None
    subnet.clock.blocks(400)
    assert subnet.setter.set_if_due(table) is None
    subnet.substrate.set_hyperparameters(1, weights_rate_limit=2000)
    subnet.clock.blocks(1000)
    assert subnet.setter.set_if_due(table) is None
    subnet.clock.blocks(1000)
    assert subnet.setter.set_if_due(table) is not None
    assert subnet.substrate.submitted == 2 + 2  # the validator registered and staked


def test_weights_are_sent_again_before_they_stop_counting(subnet: Subnet) -> None:
    """Also from a table that has become half empty, and after a restart."""
    miner, gone = subnet.join(), subnet.join()
    subnet.clock.blocks(1000)
    assert subnet.setter.set_if_due(earned({address(miner): 1.0, address(gone): 1.0}))
    subnet.substrate.set_hyperparameters(1, activity_cutoff=1000)
    subnet.substrate.give_away(address(gone))
    restarted = subnet.new_setter()
    subnet.clock.blocks(800)
    assert restarted.set_if_due(lambda graph: None) is None
    subnet.clock.blocks(150)
    sent = restarted.set_if_due(lambda graph: None)
    assert sent is not None
    assert subnet.shares() == {address(miner): 1.0}
    # However rarely the operator wants weights: the cutoff comes first.
    rare = subnet.new_setter(every_seconds=86400.0)
    subnet.clock.blocks(950)
    assert rare.set_if_due(earned({address(miner): 1.0})) is not None


@pytest.mark.parametrize("text", ["", "[]", '{"weights": {"a": 2}}', '{"weights": [1]}'])
def test_damaged_last_weights_are_none(subnet: Subnet, text: str) -> None:
    subnet.setter.path.write_text(text)
    subnet.clock.blocks(4900)
    assert subnet.setter.set_if_due(lambda graph: None) is None


def test_what_nobody_earned_is_burnt_to_the_owner(
    subnet: Subnet, caplog: pytest.LogCaptureFixture
) -> None:
    owner = subnet.join()
    subnet.clock.blocks(1000)
    for _ in range(3):
        assert subnet.setter.set_if_due(earned({})) is None
    assert caplog.text.count("the subnet's owner has no uid") == 1
    subnet.substrate.create_subnet(1, owner_hotkey=address(owner))
    sent = subnet.setter.set_if_due(earned({}))
    assert sent is not None
    assert sent.burnt
    assert subnet.shares() == {address(owner): 1.0}


def test_a_half_filled_table_sets_nothing(subnet: Subnet) -> None:
    subnet.join()
    subnet.clock.blocks(1000)
    assert subnet.setter.set_if_due(lambda graph: None) is None
    assert subnet.substrate.weights_set == 0
    table = ScoreTable()
    table.add_score("a", 1.0)
    table.add_work("a", 10)
    for live in ({"a", "b"}, set[str]()):
        assert weights_of(table, live, waited_seconds=1, patience=600) is None
        assert weights_of(table, live, waited_seconds=601, patience=600) == {"a": 1.0}
    table.add_score("b", 0.0)
    assert weights_of(table, {"a", "b"}, waited_seconds=1, patience=600) == {"a": 1.0}


def test_an_old_version_is_told_and_sends_nothing(
    subnet: Subnet, caplog: pytest.LogCaptureFixture
) -> None:
    table = earned({address(subnet.join()): 1.0})
    subnet.clock.blocks(1000)
    subnet.substrate.set_hyperparameters(1, weights_version=2000)
    assert version_key("1.2.3") == 1023
    before = subnet.substrate.submitted
    for _ in range(3):
        assert subnet.new_setter(version="1.9.9").set_if_due(table) is None
    assert "requires version key 2000, and version 1.9.9 has 1099; update" in caplog.text
    assert subnet.substrate.submitted == before
    assert subnet.new_setter(version="2.0.0").set_if_due(table) is not None


def test_weights_are_clipped_and_what_is_read_back_is_compared(
    subnet: Subnet, caplog: pytest.LogCaptureFixture
) -> None:
    first, second, third = (address(subnet.join()) for _ in range(3))
    subnet.clock.blocks(1000)
    subnet.substrate.set_hyperparameters(1, max_weights_limit=32768)
    assert subnet.setter.set_if_due(earned({first: 8.0, second: 1.5, third: 0.5}))
    assert subnet.shares() == pytest.approx({first: 0.5, second: 0.375, third: 0.125}, abs=0.01)
    assert "differ from those" not in caplog.text
    # As after a reorganization: the call was included, and the weights are the former ones.
    subnet.clock.blocks(1000)
    subnet.substrate.refusals.append(bt.ExtrinsicResult(success=True, message="Success"))
    assert subnet.setter.set_if_due(earned({third: 1.0, second: 1.0}))
    assert "differ from those that were sent" in caplog.text


@pytest.mark.parametrize(
    ("found", "sent", "is_same"),
    [
        ({1: 65535}, {1: 1.0}, True),
        ({1: 65535, 2: 21845}, {1: 0.75, 2: 0.25}, True),
        ({1: 65535, 2: 65535}, {1: 0.75, 2: 0.25}, False),
        ({1: 65535, 3: 1}, {1: 1.0}, False),
        ({1: 21845, 2: 65535}, {1: 0.75, 2: 0.25}, False),
        ({2: 65535}, {1: 1.0}, False),
        ({}, {1: 1.0}, False),
        ({1: 65535}, {1: 0.99999, 2: 0.00001}, True),  # too small to be kept
    ],
)
def test_what_is_the_same(found: dict[int, int], sent: dict[int, float], *, is_same: bool) -> None:
    assert same(found, sent) is is_same


def test_commit_reveal_which_this_network_lacks_is_told(
    subnet: Subnet, caplog: pytest.LogCaptureFixture
) -> None:
    table = earned({address(subnet.join()): 1.0})
    subnet.clock.blocks(1000)
    subnet.substrate.set_hyperparameters(1, commit_reveal_weights_enabled=1)
    assert subnet.setter.set_if_due(table) is None
    assert "weights were not set" in caplog.text


# The validator -------------------------------------------------------------------------------


def test_the_validator_brings_its_table_to_the_chain(subnet: Subnet, tmp_path: Path) -> None:
    miner, idle = address(subnet.join()), address(subnet.join())
    metrics = Recorded()
    options = {"validator": {"weights_seconds": 500 * BLOCK_SECONDS}, "chain": subnet.validator}
    with small_validator(tmp_path, metrics=metrics, **options) as made:
        subnet.clock.blocks(1000)

        def tick() -> list[dict[str, Any]]:
            asyncio.run(made._set_weights([miner, idle]))
            return metrics.of("weights")

        made.table.add_work(miner, 100)
        made.table.add_score(miner, 0.5)
        assert tick() == []  # the other one was not replayed yet
        made.table.add_work(idle, 100)
        made.table.add_score(idle, 0.0)
        assert tick() == [{"weights": {"1": 1.0}, "burnt": False}]
        assert made.table.of(miner).tokens == pytest.approx(90.0)
        assert len(tick()) == 1
        subnet.substrate.give_away(miner)
        subnet.substrate.create_subnet(1, owner_hotkey=idle)
        subnet.clock.blocks(1000)
        assert tick()[1:] == [{"weights": {"2": 1.0}, "burnt": True}]
    saved = made.scores.load()
    assert miner not in saved.standings
    assert idle in saved.standings


def test_a_miner_that_is_never_replayed_holds_weights_up_for_a_while_only() -> None:
    table = ScoreTable()
    table.add_work("silent", 10)
    assert weights_of(table, {"silent"}, waited_seconds=29, patience=30) is None
    assert weights_of(table, {"silent"}, waited_seconds=30, patience=30) == {}
    for _ in range(DOUBTS):
        table.add_unjudged("silent")
    assert weights_of(table, {"silent"}, waited_seconds=0, patience=30) == {"silent": 1.0}
