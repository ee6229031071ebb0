"""Who may call: pure rules over what the chain says of a hotkey. No network in here.

Registration costs something, so it is asked of everybody; the validator permit is asked
only where a call costs us work. Stake is a floor, not a price: it orders the queue, and
`min_stake` only keeps out who has none.
"""

from __future__ import annotations

from dataclasses import dataclass

from hiveminer.config.settings import BlacklistSettings


@dataclass(frozen=True)
class Standing:
    """What the metagraph says of one hotkey. `stake` is in TAO."""

    registered: bool
    validator_permit: bool
    stake: float


STRANGER = Standing(registered=False, validator_permit=False, stake=0.0)
"""A hotkey that the subnet does not know."""


def refusal(standing: Standing, policy: BlacklistSettings, *, needs_permit: bool) -> str | None:
    """Why this hotkey is turned down, in one line, or None if it may call.

    `needs_permit` says that the call costs work (`Train`), not a glance (`IsAlive`).
    """
    if not standing.registered and not policy.allow_non_registered:
        return "this hotkey is not registered on the subnet"
    if not needs_permit:
        return None
    if policy.force_validator_permit and not standing.validator_permit:
        return "this hotkey holds no validator permit"
    if standing.stake < policy.min_stake:
        return f"this hotkey's stake of {standing.stake:g} TAO is below {policy.min_stake:g}"
    return None
