"""The embedded network: a chain in one SQLite file, as a `bittensor.Substrate`."""
