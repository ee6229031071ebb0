"""`Chain`: what a neuron asks of the chain, with deadlines, retries and one-line errors."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bittensor as bt
import pytest
from chain_worker import new_keys
from embedded_network import VALIDATOR_STAKE

from hiveminer.chain import Chain, EmbeddedSubstrate, join_embedded, open_chain
from hiveminer.errors import ChainError, NotRegistered, OperatorError
from programs import wait_for

# Chain --------------------------------------------------------------------------------


@pytest.fixture
def chain(tmp_path: Path) -> Iterator[Chain]:
    with open_chain(
        network="embedded",
        netuid=1,
        wallet=new_keys(),
        path=tmp_path / "chain.sqlite3",
        block_seconds=0.02,
        timeout_seconds=10.0,
    ) as opened:
        yield opened


def test_joining_the_embedded_network(chain: Chain) -> None:
    assert chain.embedded
    assert (chain.uid(), chain.block_seconds()) == (None, 0.02)
    with pytest.raises(NotRegistered, match=chain.hotkey):
        chain.serve_axon("127.0.0.1", 8091)
    for _ in range(2):
        assert join_embedded(chain, stake_tao=VALIDATOR_STAKE) == 0
        assert chain.metagraph().neuron(0).total_stake.amount == VALIDATOR_STAKE
    chain.commit(b"")
    assert chain.commitments() == {chain.hotkey: b""}
    with pytest.raises(ValueError, match="513"):
        chain.commit(bytes(513))


def test_mistakes_are_told_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "chain.sqlite3"
    with open_chain(network="embedded", netuid=7, wallet=new_keys(), path=path) as other:
        with pytest.raises(OperatorError, match="no subnet 7"):
            other.metagraph()
        with pytest.raises(OperatorError, match="no subnet 7"):
            join_embedded(other)


def test_commitments_that_are_not_plain_bytes_are_left_out(chain: Chain) -> None:
    join_embedded(chain)
    graph = chain.metagraph()
    fields: list[tuple[list[Any], bytes | None]] = [
        ([{"Raw2": "0x6f6b"}], b"ok"),
        ([{"Raw1": "0x6f"}, {"BigRaw": "0x6b"}], b"ok"),
        ([], None),
        (["None"], None),
        ([{"Raw2": "0xzz"}], None),
        ([{"Sha256": "0x" + "00" * 32}], None),
        ([{"TimelockEncrypted": {"reveal_round": 1}}], None),
        ([{"BigRaw": "0x" + "00" * 600}], None),
    ]
    for given, wanted in fields:
        commitment = bt.NeuronCommitment(
            "5Hot", 1, 0, 1, 1, bt.Balance.from_rao(0), "", False, None, [], given
        )
        graph.commitments[0] = commitment
        found = chain.commitments(graph)
        assert found == ({} if wanted is None else {"5Hot": wanted})


def test_a_chain_is_safe_in_threads_and_when_it_is_closed_under_way(chain: Chain) -> None:
    join_embedded(chain)
    seen: list[int] = []

    def ask() -> None:
        seen.extend(len(chain.metagraph()) for _ in range(20))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert seen == [1] * 160

    outcome: list[Exception] = []

    def wait() -> None:
        try:
            chain.read("waiting", lambda client: asyncio.sleep(600))
        except ChainError as error:
            outcome.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    wait_for(thread.is_alive, seconds=60)
    chain.close()
    chain.close()
    thread.join(60)
    assert len(outcome) == 1
    with pytest.raises(ChainError, match="closed"):
        chain.block()
    assert not any(thread.name == "chain" for thread in threading.enumerate())


def _in_a_child(chain: Chain, path: Path, results: Any) -> None:
    try:
        chain.block()
    except ChainError as error:
        results.put(str(error))
    chain.close()  # the parent's: nothing must happen to it
    with open_chain(network="embedded", netuid=1, wallet=new_keys(), path=path) as own:
        results.put(join_embedded(own))


def test_a_fork_leaves_the_parents_chain_alone(chain: Chain, tmp_path: Path) -> None:
    assert join_embedded(chain) == 0
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    child = context.Process(target=_in_a_child, args=(chain, tmp_path / "chain.sqlite3", results))
    child.start()
    assert f"belongs to process {os.getpid()}" in results.get(timeout=30)
    assert results.get(timeout=30) == 1
    child.join(30)
    assert child.exitcode == 0
    assert [n.uid for n in chain.metagraph()] == [0, 1]
    chain.commit(b"still here")


class Faulty(EmbeddedSubstrate):
    """Fails as often as it is told to, by losing the connection, or hangs."""

    failures = 0
    hangs = False

    async def _falter(self) -> None:
        if self.hangs:
            await asyncio.sleep(3600)
        if self.failures > 0:
            self.failures -= 1
            raise bt.RpcConnectionError("the connection is lost")

    async def block_number(self) -> int:
        await self._falter()
        return await super().block_number()

    async def submit(self, *arguments: Any, **named: Any) -> bt.ExtrinsicResult:
        result = await super().submit(*arguments, **named)
        await self._falter()
        return result


def test_reads_are_tried_again_writes_are_not_and_both_have_deadlines(tmp_path: Path) -> None:
    substrate = Faulty(tmp_path / "chain.sqlite3")
    client = bt.Client("local", substrate=substrate)
    with Chain(
        network="embedded", netuid=1, wallet=new_keys(), client=client, timeout_seconds=1.5
    ) as chain:
        join_embedded(chain)
        substrate.failures = 2
        assert chain.block() >= 1
        assert substrate.failures == 0
        substrate.failures = 99
        with pytest.raises(ChainError, match="the connection is lost"):
            chain.block()
        assert substrate.failures == 99 - 3
        substrate.failures = 2
        with pytest.raises(ChainError, match="the connection is lost; it may still be included"):
            chain.commit(b"once")
        assert substrate.failures == 1
        substrate.failures = 0
        substrate.hangs = True
        with pytest.raises(ChainError, match=r"no answer from embedded within 1\.5 s"):
            chain.block()
        substrate.hangs = False
        assert chain.commitments() == {chain.hotkey: b"once"}


def test_a_chain_that_cannot_be_reached_is_one_clear_error(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    threads = threading.active_count()
    with pytest.raises(ChainError) as raised:
        open_chain(
            network=f"ws://127.0.0.1:{port}", netuid=1, wallet=new_keys(), timeout_seconds=5.0
        )
    assert f"ws://127.0.0.1:{port}" in str(raised.value)
    assert "\n" not in str(raised.value)
    # One that takes the connection and never says a word.
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"ws://127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(ChainError, match=r"no answer from .* within 1 s"):
            open_chain(network=address, netuid=1, wallet=new_keys(), timeout_seconds=1.0)
    assert threading.active_count() == threads
    assert capfd.readouterr() == ("", "")
    assert [r.message for r in caplog.records if r.levelname in ("WARNING", "ERROR")] == []
