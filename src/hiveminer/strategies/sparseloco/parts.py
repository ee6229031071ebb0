"""What both the strategy and the observer are built from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hiveminer.config.run import OptimizerSection
from hiveminer.strategies.sparseloco.apply import State
from hiveminer.strategies.sparseloco.follower import Fetcher, RoundChain
from hiveminer.strategies.sparseloco.link import Link
from hiveminer.strategies.sparseloco.log import Log
from hiveminer.strategies.sparseloco.plan import Plan
from hiveminer.strategies.sparseloco.replica import Replica
from hiveminer.strategies.sparseloco.shelf import Shelf


@dataclass(frozen=True, kw_only=True)
class Parts:
    """See `Follower`. section: the inner optimizer's. hotkey: 32 bytes. link: to the peer."""

    section: OptimizerSection
    plan: Plan
    hotkey: bytes
    chain: RoundChain
    exchange: Fetcher
    log: Log
    shelf: Shelf
    link: Link = field(default_factory=Link)
    poll_seconds: float | None = None

    def replica(self, start: State) -> Replica:
        return Replica(self.plan, hotkey=self.hotkey, start=start)

    def for_follower(self, start: State) -> dict[str, Any]:
        """A follower's arguments besides its replica."""
        return {
            "chain": self.chain,
            "exchange": self.exchange,
            "log": self.log,
            "shelf": self.shelf,
            "start_state": start,
            "poll_seconds": self.poll_seconds,
        }
