"""A miner's axon in a process of its own, to be killed: `python axon_worker.py PORT SECONDS`.

It prints its port when it serves, and the request's name when a `Train` begins, which takes
SECONDS.
"""

from __future__ import annotations

import sys
import time

from serving import serving

from hiveminer.protocol import Train


def main() -> None:
    port, seconds = int(sys.argv[1]), float(sys.argv[2])

    def forward(synapse: Train) -> Train:
        print(synapse.request_id, flush=True)
        time.sleep(seconds)
        return synapse

    with serving(port=port, train={"forward": forward}) as served:
        print(served.axon.port, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
