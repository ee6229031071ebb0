"""A place in the DHT: one libp2p daemon, one DHT node, and the neighbours it has met.

A peer starts alone and is then told of others, all known addresses at once. Starting and
healing a split are the same act, so a dead address never keeps a peer from starting, and
two peers that started in the same second still find each other at the next look.
"""

from __future__ import annotations

import asyncio
import fcntl
import ipaddress
import logging
import os
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import hivemind
from hivemind.p2p import P2PDaemonError, PeerID
from hivemind.utils.multiaddr import Multiaddr

from hiveminer.errors import OperatorError, SwarmError
from hiveminer.swarm.processes import settle, start_shared_memory, sweep

logger = logging.getLogger(__name__)

QUIC_WORD = " quic"

START_SECONDS = 30.0
MEET_SECONDS = 10.0


class _Node(hivemind.DHT):  # type: ignore[misc]
    """The stock DHT node, whose process ends with its parent."""

    def run(self) -> None:
        settle(self._parent_pid)
        super().run()


class Peer:
    """A started DHT node.

    ip, port: where it listens for other peers (TCP; port 0 for any).
    announce_ip: the address that others are told, when it is not `ip`.
    identity_path: the file with its private key; made when missing. The peer id follows
        from it.
    client_only: dial out, listen for nobody (a validator needs no open port).
    quic: listen on the same number of a UDP port as well, for QUIC.

    Raises OperatorError when the port is taken or the daemon does not start.
    """

    def __init__(
        self,
        *,
        ip: str = "127.0.0.1",
        port: int = 0,
        announce_ip: str | None = None,
        announce_port: int | None = None,
        identity_path: Path | None = None,
        client_only: bool = False,
        quic: bool = False,
    ):
        swept = sweep()
        if swept:
            logger.info("removed %d files that dead processes had left", swept)
        start_shared_memory()
        self._claim = _claim_port(port)
        family = "ip6" if ipaddress.ip_address(ip).version == 6 else "ip4"
        self.quic = quic and port != 0 and not client_only
        options: dict[str, Any] = {
            "host_maddrs": self._places(f"/{family}/{ip}", port),
            "startup_timeout": START_SECONDS,
            # Asking a router to forward ports is the operator's decision, not ours.
            "nat_port_map": False,
            "use_relay": False,
            "auto_nat": False,
        }
        if client_only:
            options |= {"client_mode": True, "no_listen": True}
            options.pop("host_maddrs")
        elif announce_ip is not None:
            told = "ip6" if ipaddress.ip_address(announce_ip).version == 6 else "ip4"
            options["announce_maddrs"] = self._places(
                f"/{told}/{announce_ip}", announce_port or port
            )
        if identity_path is not None:
            identity_path.parent.mkdir(parents=True, exist_ok=True)
            options["identity_path"] = str(identity_path)
        try:
            self.dht = _Node(start=True, **options)
        except (P2PDaemonError, RuntimeError, ValueError, OSError) as error:
            self._release_port()
            reason = _first_line(error)
            raise OperatorError(
                f"the swarm's peer does not start on {ip} port {port}: {reason}; is the port "
                "taken? choose another with --dht.port"
            ) from error
        self.peer_id = str(self.dht.peer_id)
        self._met: set[str] = set()

    def _places(self, host: str, port: int) -> list[str]:
        return [f"{host}/tcp/{port}"] + [f"{host}/udp/{port}/quic-v1"] * self.quic

    @property
    def commitment(self) -> str:
        """What a neuron puts on the chain: its address, and QUIC where it listens so (at most
        128 bytes, so the second address is not written out: `addresses_in` does)."""
        return self.address + QUIC_WORD * self.quic

    @property
    def address(self) -> str:
        """The multiaddress that others reach this peer at over TCP, with its peer id."""
        visible = [str(address) for address in self.dht.get_visible_maddrs()]
        if not visible:
            raise SwarmError("the peer has no address that others could reach")
        # One address goes into the commitment: the announced one, else the first of TCP.
        tcp = [address for address in visible if "/tcp/" in address]
        return (tcp or visible)[0]

    def meet(
        self, addresses: Sequence[str], *, timeout_seconds: float = MEET_SECONDS
    ) -> tuple[int, int]:
        """Dial all of these peers at once: (how many answered, how many were tried).

        Addresses with the same peer id are ways to the same peer. Malformed addresses and
        our own are passed over. Peers met before are tried again only when the DHT has lost
        them.
        """
        wanted: dict[str, list[str]] = {}
        for address in addresses:
            peer_id = peer_id_of(address)
            if peer_id is None:
                logger.warning("not a peer's address, passed over: %.100s", address)
            elif peer_id != self.peer_id:
                wanted.setdefault(peer_id, []).append(address)
        if not wanted:
            return 0, 0
        task = partial(_meet, peers=wanted, timeout_seconds=timeout_seconds)
        future = self.dht.run_coroutine(task, return_future=True)
        try:
            answered: set[str] = future.result(timeout=timeout_seconds + 5)
        except Exception as error:  # noqa: BLE001 - no peer met is no reason to end
            logger.warning("looking for peers failed: %s", _first_line(error))
            return 0, len(wanted)
        for peer_id in sorted(answered - self._met):
            logger.info("met peer %s", peer_id)
        self._met |= answered
        return len(answered), len(wanted)

    def close(self) -> None:
        """Stop the DHT node and its daemon."""
        if self.dht.is_alive():
            self.dht.shutdown()
            self.dht.join(timeout=5)
        sweep()  # the daemon's clients do not remove their sockets
        self._release_port()

    def _release_port(self) -> None:
        if self._claim is not None:
            os.close(self._claim)
            self._claim = None


def _claim_port(port: int) -> int | None:
    """Lock a port among the peers of this machine; None for port 0.

    The daemon listens with SO_REUSEPORT, so two that start together would both have the
    port, and share its callers by chance. Raises OperatorError when a peer holds it.
    """
    if port == 0:
        return None
    path = os.path.join(tempfile.gettempdir(), f"hiveminer-peer-{port}.lock")
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise OperatorError(f"--dht.port {port}: {error}; choose another") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise OperatorError(
            f"--dht.port {port}: another peer on this machine has it; choose another"
        ) from None
    return descriptor


def addresses_in(committed: str) -> list[str]:
    """The multiaddresses that a neuron's commitment stands for; none if it is no peer's."""
    address = committed.removesuffix(QUIC_WORD)
    if not address.startswith("/"):
        return []
    if address == committed or "/tcp/" not in address:
        return [address]
    host, _, rest = address.partition("/tcp/")
    port, _, peer = rest.partition("/")
    return [address, f"{host}/udp/{port}/quic-v1/{peer}"]


def peer_id_of(address: str) -> str | None:
    """The peer id in a multiaddress; None when it is malformed or has none."""
    if len(address) > 512:
        return None
    try:
        return str(PeerID.from_base58(Multiaddr(address)["p2p"]))
    except Exception:  # noqa: BLE001 - the parsers raise whatever they meet
        return None


async def _meet(
    _dht: Any, node: Any, *, peers: dict[str, list[str]], timeout_seconds: float
) -> set[str]:
    """Runs in the DHT's process: connect, ping, and let the routing table learn of us."""

    async def meet_one(name: str, addresses: list[str]) -> str | None:
        peer_id = PeerID.from_base58(name)
        if node.protocol.routing_table.get(peer_id=peer_id) is None:
            places = [Multiaddr(address.rsplit("/p2p/", 1)[0]) for address in addresses]
            # The daemon's connect has no public door in hivemind; initial_peers alone
            # would do at the start, and never again.
            await node.p2p._client.connect(peer_id, places)
        answered = await node.protocol.call_ping(peer_id)
        return name if answered is not None else None

    async def bounded(name: str, addresses: list[str]) -> str | None:
        try:
            return await asyncio.wait_for(meet_one(name, addresses), timeout_seconds)
        except Exception:  # noqa: BLE001 - unreachable, gone, or somebody else's address
            return None

    met = await asyncio.gather(*(bounded(name, places) for name, places in peers.items()))
    answered = {peer for peer in met if peer}
    if answered:
        nearest = node.find_nearest_nodes([node.node_id])
        await asyncio.wait({asyncio.ensure_future(nearest)}, timeout=timeout_seconds)
    return answered


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
