# SPDX-License-Identifier: MIT
"""A subnet's own validator: neighboring rows for each miner, and nothing for a bad fit.

Run: python examples/validator.py
"""

import random

from hiveminer import Evidence, Validator


class StrictValidator(Validator):
    def assign(self, hotkey: str) -> list[int]:
        """A block of neighboring rows, at a random place, instead of rows from all over."""
        rows = self.training_rows
        count = min(self.settings.validator.rows, len(rows))
        first = random.randrange(len(rows) - count + 1)
        return list(rows[first : first + count])

    def score(self, evidence: Evidence) -> float:
        """As usual, but an answer that fits badly is worth nothing at all."""
        return super().score(evidence) if evidence.fit > 0.9 else 0.0


if __name__ == "__main__":
    with StrictValidator() as validator:
        validator.run()
