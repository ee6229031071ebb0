"""Hivemind's DHT and peer-to-peer transport, whatever the strategy."""
