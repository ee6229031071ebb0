# SPDX-License-Identifier: MIT
"""A validator. Copy this file, subclass `Validator` and override `assign` and `score`.

`python validator.py` alone joins the embedded network on this machine; `--help` lists the flags.
"""

from hiveminer import Validator

if __name__ == "__main__":
    with Validator() as validator:
        validator.run()
