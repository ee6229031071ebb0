"""The embedded network's file and wallets, with several processes at once."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

import bittensor as bt
import pytest
from chain_worker import Keys, new_keys
from embedded_network import VALIDATOR_STAKE, Network, network_at

from hiveminer.chain import (
    EmbeddedSubstrate,
    embedded_wallet,
    named_embedded_wallet,
    open_chain,
    open_wallet,
)
from hiveminer.errors import OperatorError
from programs import Program

WORKER = Path(__file__).with_name("chain_worker.py")


@pytest.fixture
def network(tmp_path: Path) -> Iterator[Network]:
    made = Network(tmp_path / "chain.sqlite3")
    yield made
    made.run(made.client.close())


# The file ---------------------------------------------------------------------------


def worker(name: str, what: str, path: Path, *words: str) -> Program:
    return Program([str(WORKER), what, str(path), *words], folder=path.parent / name)


def sound(path: Path) -> bool:
    with contextlib.closing(sqlite3.connect(path)) as db:
        return bool(db.execute("PRAGMA integrity_check").fetchone() == ("ok",))


def test_three_processes_at_once_on_a_file_that_none_of_them_finds(tmp_path: Path) -> None:
    path = tmp_path / "new" / "chain.sqlite3"
    with contextlib.ExitStack() as stack:
        programs = [
            stack.enter_context(worker(name, "cycles", path, "15")) for name in ("a", "b", "c")
        ]
        assert [program.process.wait(120) for program in programs] == [0, 0, 0]
    uids = sorted(int(uid) for program in programs for uid in program.words.split())
    assert uids == list(range(45))
    assert sound(path)
    assert [p.name for p in path.parent.iterdir() if p.name.startswith(".")] == []


def test_kill_9_in_mid_write_leaves_the_file_sound(network: Network) -> None:
    network.clock.seconds = time.time()
    network.substrate.set_hyperparameters(1, weights_rate_limit=0, serving_rate_limit=0)
    keys = network.join(tao=VALIDATOR_STAKE)
    with worker("stays", "stay-in-mid-write", network.path) as program:
        program.says("writing")
        assert network.uid(keys) == 0  # readers do not wait, and see none of it
    assert network.uid(keys) == 0
    assert network.serve(keys).success  # the lock went with its holder
    with worker("writes", "write-for-ever", network.path) as program:
        program.says("\n9")
    network.clock.seconds = time.time()
    assert sound(network.path)
    before = len(network.metagraph())
    network.join()
    assert len(network.metagraph()) == before + 1 >= 12


def test_the_files_own_block_length_wins(tmp_path: Path) -> None:
    path = tmp_path / "chain.sqlite3"
    for asked in (0.5, 3.0):
        substrate = EmbeddedSubstrate(path, block_seconds=asked)
        assert asyncio.run(substrate.block_time()) == 0.5
        asyncio.run(substrate.close())


def test_a_file_that_is_not_ours_is_refused_in_one_line(tmp_path: Path) -> None:
    keys, path = new_keys(), tmp_path / "chain.sqlite3"

    def opened() -> str:
        with pytest.raises(OperatorError) as raised:
            open_chain(network="embedded", netuid=1, wallet=keys, path=path)
        message = str(raised.value)
        assert str(path) in message
        assert "\n" not in message
        return message

    path.write_bytes(b"")
    assert "not an embedded network" in opened()
    path.write_bytes(b"garbage" * 1000)
    assert "cannot be read" in opened()
    path.unlink()
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE other (x)")
    assert "not an embedded network" in opened()
    path.unlink()
    asyncio.run(EmbeddedSubstrate(path).connect())
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA user_version = 99")
    assert "version 99" in opened()
    path = tmp_path / "folder"
    path.mkdir()
    opened()


# Wallets ------------------------------------------------------------------------------


def test_the_next_process_takes_the_next_key_and_kill_9_frees_one(tmp_path: Path) -> None:
    place = tmp_path / "network"
    with worker("first", "claim", place) as first, worker("second", "claim", place) as second:
        owners = {}
        for program in (first, second):
            name, address, _ = program.says("miner-").split()
            owners[name] = (program, address)
        assert sorted(owners) == ["miner-0", "miner-1"]
        holder, address = owners["miner-0"]
        with pytest.raises(OperatorError, match=f"in use by process {holder.process.pid};"):
            named_embedded_wallet(place, "embedded", "miner-0")
        holder.end()
        with embedded_wallet(place, prefix="miner") as mine:
            assert mine.wallet.hotkey_str == "miner-0"
            assert mine.wallet.hotkey.ss58_address == address


def test_a_forked_child_that_outlives_its_parent_does_not_keep_the_key(tmp_path: Path) -> None:
    place = tmp_path / "network"
    with worker("parent", "claim-and-fork", place) as program:
        name, _, child = program.says("miner-").split()
        try:
            program.process.kill()
            program.process.wait(60)
            with embedded_wallet(place, prefix="miner") as mine:
                assert mine.wallet.hotkey_str == name == "miner-0"
        finally:
            os.kill(int(child), signal.SIGKILL)


def test_wallets_are_made_in_silence_and_kept(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with (
        embedded_wallet(tmp_path, prefix="miner") as a,
        embedded_wallet(tmp_path, prefix="validator") as b,
    ):
        assert (a.wallet.hotkey_str, b.wallet.hotkey_str) == ("miner-0", "validator-0")
        assert a.wallet.coldkeypub.ss58_address == b.wallet.coldkeypub.ss58_address
        hotkey = a.wallet.hotkey.ss58_address
        with embedded_wallet(tmp_path, prefix="miner") as c:
            assert c.wallet.hotkey_str == "miner-1"
    with named_embedded_wallet(tmp_path, "embedded", "miner-0") as again:
        assert again.wallet.hotkey.ss58_address == hotkey
    with named_embedded_wallet(tmp_path, "mine", "default") as named:
        assert named.wallet.coldkeypub.ss58_address != again.wallet.coldkeypub.ss58_address
    assert capfd.readouterr() == ("", "")
    file = tmp_path / "wallets" / "embedded" / "hotkeys" / "miner-0"
    assert file.stat().st_mode & 0o077 == 0
    assert open_wallet("embedded", "miner-0", tmp_path / "wallets").hotkey.ss58_address == hotkey


def test_bad_names_and_places_are_refused(tmp_path: Path) -> None:
    for name in ("../x", "a/b", "", ".x", "x" * 65, "a b"):
        with pytest.raises(OperatorError, match=r"--wallet\.hotkey"):
            named_embedded_wallet(tmp_path, "w", name)
        with pytest.raises(OperatorError, match=r"--wallet\.name"):
            open_wallet(name, "h", tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OperatorError, match="cannot be kept"):
        embedded_wallet(tmp_path / "file", prefix="miner")


def test_a_real_wallet_needs_its_hotkey_and_no_coldkey(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(OperatorError) as raised:
        open_wallet("cold", "hot", tmp_path)
    assert str(tmp_path / "cold" / "hotkeys" / "hot") in str(raised.value)
    assert "btcli wallet new-hotkey --wallet cold --wallet-hotkey hot" in str(raised.value)
    made = bt.Wallet("cold", "hot", str(tmp_path)).create_new_hotkey(suppress=True)
    wallet = open_wallet("cold", "hot", tmp_path)
    assert wallet.hotkey.ss58_address == made.hotkey.ss58_address
    # All that a neuron does works without a coldkey; another's pays for the registration.
    path, payer = tmp_path / "chain.sqlite3", new_keys()
    with network_at(path) as network:
        network.register(Keys(wallet.hotkey, payer.coldkey)).raise_for_failure()
    with open_chain(network="embedded", netuid=1, wallet=wallet, path=path) as chain:
        chain.serve_axon("127.0.0.1", 8091)
        chain.commit(b"me")
        assert chain.uid() == 0
    (tmp_path / "cold" / "hotkeys" / "hot").write_text("not a key")
    with pytest.raises(OperatorError, match="cannot be read"):
        open_wallet("cold", "hot", tmp_path)
    assert capfd.readouterr() == ("", "")
