"""Hivemind's DHT and peer-to-peer transport, whatever the strategy."""

from hiveminer.swarm.discovery import Neighbours
from hiveminer.swarm.identity import Identity
from hiveminer.swarm.peer import Look, Peer, PortTaken, addresses_in

__all__ = ["Identity", "Look", "Neighbours", "Peer", "PortTaken", "addresses_in"]
