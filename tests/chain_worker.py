"""A process of its own for the chain's tests: `python chain_worker.py WHAT PATH ...`.

It prints one line when it is where the test wants it.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import bittensor as bt
from bittensor.keyfiles import Keypair

from hiveminer.chain import EmbeddedSubstrate, embedded_wallet
from hiveminer.chain.embedded.ledger import Ledger


@dataclass(frozen=True)
class Keys:
    """A wallet in memory."""

    hotkey: Keypair
    coldkey: Keypair

    @property
    def coldkeypub(self) -> Keypair:
        return self.coldkey


def new_keys() -> Keys:
    return Keys(*(Keypair.create_from_seed(os.urandom(32)) for _ in range(2)))


async def cycle(client: bt.Client) -> int:
    """Register, stake, serve, commit, set weights, and find oneself in the metagraph."""
    keys = new_keys()
    hotkey = keys.hotkey.ss58_address
    calls = bt.calls
    register = calls.SubtensorModule.burned_register(netuid=1, hotkey=hotkey)
    (await client.submit_call(register, keys)).raise_for_failure()
    stake = calls.SubtensorModule.add_stake(hotkey=hotkey, netuid=0, amount_staked=2000 * 10**9)
    (await client.submit_call(stake, keys)).raise_for_failure()
    axon = bt.ServeAxon(netuid=1, ip="127.0.0.1", port=8091)
    (await client.execute(axon, keys)).raise_for_failure()
    info = {"fields": [{"Raw4": "0x" + b"here".hex()}]}
    commit = calls.Commitments.set_commitment(netuid=1, info=info)
    (await client.submit_call(commit, keys, signer="hotkey")).raise_for_failure()
    uid = await client.neurons.uid(hotkey_ss58=hotkey, netuid=1)
    assert uid is not None
    weights = bt.SetWeights(netuid=1, weights={0: 1.0, uid: 2.0})
    (await client.execute(weights, keys)).raise_for_failure()
    graph = await client.subnets.metagraph(1)
    assert graph is not None
    me = graph.neuron(uid)
    assert me.commitment is not None
    assert (me.hotkey, me.axon, me.commitment.data) == (hotkey, "127.0.0.1:8091", "here")
    assert me.validator_permit
    return uid


async def cycles(path: Path, count: int) -> None:
    substrate = EmbeddedSubstrate(path, block_seconds=0.05)
    async with bt.Client("local", substrate=substrate) as client:
        substrate.set_hyperparameters(
            1, weights_rate_limit=0, serving_rate_limit=0, max_validators=256
        )
        print(*[await cycle(client) for _ in range(count)])


def stay_in_mid_write(path: Path) -> None:
    ledger = Ledger(path, block_seconds=1.0, clock=time.time)
    with ledger.writing() as (db, _):
        db.execute("DELETE FROM neurons")
        db.execute("DELETE FROM owners")
        print("writing", flush=True)
        time.sleep(60)


async def write_for_ever(path: Path) -> None:
    async with bt.Client("local", substrate=EmbeddedSubstrate(path)) as client:
        for count in range(1_000_000):
            await cycle(client)
            print(count, flush=True)


def claim(path: Path, *, and_fork: bool) -> None:
    claimed = embedded_wallet(path, prefix="miner")
    child = os.fork() if and_fork else -1
    if child == 0:
        time.sleep(60)
        os._exit(0)
    print(claimed.wallet.hotkey_str, claimed.wallet.hotkey.ss58_address, child, flush=True)
    time.sleep(60)


def main() -> None:
    what, path = sys.argv[1], Path(sys.argv[2])
    match what:
        case "cycles":
            asyncio.run(cycles(path, int(sys.argv[3])))
        case "stay-in-mid-write":
            stay_in_mid_write(path)
        case "write-for-ever":
            asyncio.run(write_for_ever(path))
        case "claim":
            claim(path, and_fork=False)
        case "claim-and-fork":
            claim(path, and_fork=True)


if __name__ == "__main__":
    main()
