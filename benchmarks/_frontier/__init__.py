"""The parts of `scripts/bench frontier`: model, exchange, cells, runner and report."""
