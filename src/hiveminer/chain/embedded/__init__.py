"""The embedded network: a chain in one SQLite file, as a `bittensor.Substrate`."""

from hiveminer.chain.embedded.substrate import EmbeddedSubstrate

__all__ = ["EmbeddedSubstrate"]
