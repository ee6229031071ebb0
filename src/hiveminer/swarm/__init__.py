"""The swarm: hivemind, behind one door.

`Peer` is this machine's place in the DHT, `Swarm` a miner's optimizer over it, and
`Observer` what a validator sees of it.
"""

from hiveminer.swarm.adamw import build_optimizer
from hiveminer.swarm.identity import Identity
from hiveminer.swarm.neighbours import Neighbours
from hiveminer.swarm.observer import Observer, SwarmState
from hiveminer.swarm.optimizer import Round, Swarm
from hiveminer.swarm.peer import Look, Peer, PortTaken, addresses_in

__all__ = [
    "Identity",
    "Look",
    "Neighbours",
    "Observer",
    "Peer",
    "PortTaken",
    "Round",
    "Swarm",
    "SwarmState",
    "addresses_in",
    "build_optimizer",
]
