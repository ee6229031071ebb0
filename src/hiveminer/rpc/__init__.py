"""Signed HTTP between neurons: the axon that serves, the dendrite that calls."""
