# SPDX-License-Identifier: MIT
"""A subnet's own validator: neighbouring rows for each miner, and no mercy for a bad fit.

Run: python examples/validator.py
"""

from hiveminer import Evidence, Validator


class StrictValidator(Validator):
    def assign(self, hotkey: str) -> list[int]:
        """A block of neighbouring rows, at a random place, instead of rows from all over."""
        first = min(super().assign(hotkey))
        return list(range(first, first + self.settings.validator.rows))

    def score(self, evidence: Evidence) -> float:
        """As usual, but an answer that fits badly is worth nothing at all."""
        return super().score(evidence) if evidence.fit > 0.9 else 0.0


if __name__ == "__main__":
    with StrictValidator() as validator:
        validator.run()
