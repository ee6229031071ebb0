"""A neuron's membership of the swarm: its peer, connected with the registered ones."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection

from hiveminer.config.settings import Settings
from hiveminer.errors import OperatorError
from hiveminer.runtime.addresses import EVERY_ADDRESS, port_is_free, ports_to_try
from hiveminer.runtime.events import tell
from hiveminer.swarm.discovery import Discovery
from hiveminer.swarm.identity import Identity
from hiveminer.swarm.peer import DialResult, Peer, PortTaken
from hiveminer.swarm.processes import ChildProcesses

logger = logging.getLogger(__name__)

Names = Callable[[], Collection[str]]


class Membership:
    """A started peer, whom it admits and dials, and the `children` that it needs.

    registered: the hotkeys to admit now. addresses: of other peers. commit: publishes this peer's
    own. The defaults are for a peer without a chain.
    """

    def __init__(
        self,
        peer: Peer,
        *,
        registered: Names = tuple,
        addresses: Names = tuple,
        commit: Callable[[bytes], None] = lambda _: None,
    ):
        self.peer = peer
        self.discovery = Discovery(peer)
        self._commit = commit
        self._registered = registered
        self._addresses = addresses
        self.children = ChildProcesses()
        self.children.watch("the DHT's process", peer.dht.pid)

    def join(self) -> None:
        """Publish this peer's address, and dial the others."""
        self._commit(self.peer.commitment.encode())
        self.sync()

    def sync(self) -> DialResult | None:
        """Admit the registered hotkeys, and dial other peers if that is due."""
        self.peer.admit(self._registered())
        return self.discovery.meet(self._addresses())

    def close(self) -> None:
        """Stop the peer and its processes."""
        self.peer.close()
        self.children.end()


def announced_ip(settings: Settings, public_ip: Callable[[], str]) -> str | None:
    """The address to announce to peers; None for the one listened on."""
    if settings.dht.external_ip is None and settings.dht_ip in EVERY_ADDRESS:
        return public_ip()
    return settings.dht.external_ip


def start_peer(
    settings: Settings,
    *,
    identity: Identity,
    admitted: Collection[str],
    announce_ip: str | None = None,
) -> Peer:
    """Start a peer on the configured port, or on the next free one where none was configured.

    announce_ip: from `announced_ip`.
    """
    free = settings.embedded and not settings.given("dht.port")
    ip = settings.dht_ip
    for port in ports_to_try(settings.dht.port, free=free):
        try:
            if port and not port_is_free(ip, port):
                raise PortTaken(f"--dht.port {port}: in use on {ip}; choose another")
            peer = Peer(
                ip=ip,
                port=port,
                announce_ip=announce_ip,
                announce_port=settings.dht.external_port,
                identity=identity,
                admitted=admitted,
                quic=not settings.embedded,
            )
        except PortTaken as error:
            if free:
                continue
            tell(logger, "peer_start", str(error).partition(";")[0], level=logging.ERROR)
            raise
        if port not in (settings.dht.port, 0):
            logger.info("port %d is in use: the swarm's peer takes %d", settings.dht.port, port)
        return peer
    raise OperatorError(f"no free port from {settings.dht.port} on; choose with --dht.port")
