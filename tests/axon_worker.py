"""A miner's axon in a process of its own, to be killed: `python axon_worker.py PORT SECONDS`.

It prints its port when it serves, and the request's name when a `Train` of //Bob's begins,
which takes SECONDS.
"""

from __future__ import annotations

import sys
import time
from types import SimpleNamespace

from bittensor.keyfiles import Keypair

from hiveminer.protocol import Train
from hiveminer.rpc.axon import Axon
from hiveminer.rpc.blacklist import STRANGER, Standing
from hiveminer.rpc.queue import WorkQueue

VALIDATOR = str(Keypair.create_from_uri("//Bob").ss58_address)


def standing(hotkey: str) -> Standing:
    if hotkey != VALIDATOR:
        return STRANGER
    return Standing(uid=0, registered=True, validator_permit=True, stake=1.0)


def main() -> None:
    port, seconds = int(sys.argv[1]), float(sys.argv[2])

    def forward(synapse: Train) -> Train:
        print(synapse.request_id, flush=True)
        time.sleep(seconds)
        synapse.samples = len(synapse.dataset_indices)
        return synapse

    queue = WorkQueue()
    queue.start()
    key = Keypair.create_from_uri("//Alice")
    wallet = SimpleNamespace(hotkey=key, coldkey=key, coldkeypub=key)
    with Axon(wallet, port=port, standing=standing).attach(forward, queue=queue) as axon:
        print(axon.port, flush=True)
        sys.stdin.read()
    queue.stop(1)


if __name__ == "__main__":
    main()
