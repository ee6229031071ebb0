"""The strategy `hivemind`: local steps and averaged parameters, made safe among strangers."""

from hiveminer.strategies.hivemind.observer import Observer, SwarmState
from hiveminer.strategies.hivemind.optimizer import Round, Swarm

__all__ = ["Observer", "Round", "Swarm", "SwarmState"]
