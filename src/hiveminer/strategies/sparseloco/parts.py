"""What strategy and observer are built from."""

from __future__ import annotations

from dataclasses import dataclass

from hiveminer.config.run import OptimizerSection
from hiveminer.strategies.sparseloco.exchange import Exchange
from hiveminer.strategies.sparseloco.log import Log
from hiveminer.strategies.sparseloco.onchain import SubnetRounds
from hiveminer.strategies.sparseloco.plan import Plan
from hiveminer.strategies.sparseloco.shelf import Shelf
from hiveminer.swarm.membership import Membership


@dataclass(frozen=True, kw_only=True)
class Parts:
    """section: the inner optimizer's. hotkey: 32 bytes. poll_seconds: how often the chain is read;
    by default twice per block."""

    section: OptimizerSection
    plan: Plan
    hotkey: bytes
    chain: SubnetRounds
    membership: Membership
    exchange: Exchange
    log: Log
    shelf: Shelf
    poll_seconds: float | None = None
