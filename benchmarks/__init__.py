"""Benchmarks: `scripts/bench NAME` runs one, results lie in `benchmarks/results`."""
