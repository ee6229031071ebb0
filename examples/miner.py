# SPDX-License-Identifier: MIT
"""A subnet's own miner: it says how long each request took. Run: python examples/miner.py"""

import time

from hiveminer import Miner, Train


class TimingMiner(Miner):
    def forward(self, synapse: Train) -> Train:
        began = time.monotonic()
        answer = super().forward(synapse)
        print(f"{answer.samples} rows in {time.monotonic() - began:.1f} s, loss {answer.loss}")
        return answer


if __name__ == "__main__":
    with TimingMiner() as miner:
        miner.run()
