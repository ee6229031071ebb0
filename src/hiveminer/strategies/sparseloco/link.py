"""What connects a strategy or an observer with its peer: joining, following, leaving."""

from __future__ import annotations

from hiveminer.strategies.sparseloco.exchange import Exchange
from hiveminer.swarm.membership import Membership


class Link:
    """A swarm of one: there is nobody to meet. `SwarmLink` is the real one."""

    address = ""
    """Where this peer is, as it states it in `IsAlive`."""

    def join(self) -> None:
        """Meet the others."""

    def sync(self) -> None:
        """Follow the metagraph: who is registered, and where peers are."""

    def check(self) -> None:
        """Raise SwarmError when something that is needed has ended."""

    def close(self) -> None:
        """Leave the swarm. May be called again."""


class SwarmLink(Link):
    """A peer in the DHT, and the exchange that runs on it. Closing it closes both."""

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
