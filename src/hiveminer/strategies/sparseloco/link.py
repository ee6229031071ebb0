"""Connects a strategy or an observer with its peer: join, sync, check, close."""

from __future__ import annotations

from hiveminer.strategies.sparseloco.exchange import Exchange
from hiveminer.swarm.membership import Membership


class Link:
    """The link of a peer that is alone. `SwarmLink` is the real one."""

    address = ""
    """This peer's address, for `IsAlive`."""

    def join(self) -> None:
        """Connect with other peers."""

    def sync(self) -> None:
        """Called after each reading of the metagraph."""

    def check(self) -> None:
        """Raise SwarmError if a process or a thread has ended."""

    def close(self) -> None:
        """Leave the swarm. Idempotent."""


class SwarmLink(Link):
    """A peer in the DHT and the exchange that runs on it; `close` closes both."""

    def __init__(self, membership: Membership, exchange: Exchange):
        self.membership = membership
        self.exchange = exchange
        self.address = membership.peer.commitment
        membership.watch_thread("the exchange", exchange.thread)

    def join(self) -> None:
        self.membership.join()

    def sync(self) -> None:
        self.membership.sync()

    def check(self) -> None:
        self.membership.check()

    def close(self) -> None:
        self.exchange.close()
        self.membership.close()
