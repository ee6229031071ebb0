"""`python -m hiveminer` is `hiveminer`."""

from __future__ import annotations

import sys

from hiveminer.cli import main

if __name__ == "__main__":
    sys.exit(main())
