# SPDX-License-Identifier: MIT
"""A miner. Copy this file, subclass `Miner` and override what your subnet does differently.

`python miner.py` alone joins the embedded network on this machine; `--help` lists the flags.
"""

from hiveminer import Miner

if __name__ == "__main__":
    with Miner() as miner:
        miner.run()
