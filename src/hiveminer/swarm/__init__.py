"""Hivemind's DHT and peer-to-peer transport, whatever the strategy."""

from hiveminer.swarm.discovery import Discovery
from hiveminer.swarm.identity import Identity
from hiveminer.swarm.peer import DialResult, Peer, PortTaken, addresses_in

__all__ = ["Identity", "DialResult", "Discovery", "Peer", "PortTaken", "addresses_in"]
