"""A peer of the swarm: a libp2p daemon and a DHT node.

A peer starts alone, and then dials all known addresses at once. Starting and healing a split are
the same operation, so a dead address never keeps a peer from starting.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import ipaddress
import logging
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import hivemind
from hivemind.p2p import P2PDaemonError, PeerID
from hivemind.utils.multiaddr import Multiaddr

from hiveminer.errors import OperatorError, SwarmError, first_line
from hiveminer.runtime.events import tell
from hiveminer.runtime.locks import Held, hold
from hiveminer.swarm.identity import Authorizer, Identity, change_admitted, guard, identify
from hiveminer.swarm.processes import (
    before_fork,
    detach_from_parent,
    guard_tasks,
    mark_temporary_folder,
    start_shared_memory,
    sweep,
)
from hiveminer.swarm.records import SignedRecords, protect_records

logger = logging.getLogger(__name__)

QUIC_WORD = " quic"

START_SECONDS = 30.0
DIAL_SECONDS = 10.0
ADMIT_SECONDS = 10.0

MESSAGE_CHARACTERS = 2048
"""Limit of one message to the DHT's process: all threads and processes write into the same pipe
without a lock, and only writes of up to 4,096 bytes are atomic."""

START_CURES = (
    ("address already in use", "another program uses the port: choose another with --dht.port"),
    ("cannot assign requested", "this machine has no such address: choose one with --dht.ip"),
    ("permission denied", "ports below 1024 need privileges: choose another with --dht.port"),
    ("binary", "reinstall hivemind: pip install --force-reinstall --no-deps hivemind"),
    ("failed to start in", "this machine is too busy: check what else runs on it, and start again"),
    (
        "its process ended",
        "the system may have killed it for lack of memory: free some, and start again",
    ),
)
"""Remedies when the daemon does not start, by its error."""

SILENCES = (
    ("peer id mismatch", "another peer is at its address now"),
    ("connection refused", "connection refused, nothing is listening there"),
    ("failed to negotiate", "something other than a peer is listening there"),
    ("no such host", "its host name cannot be resolved"),
    ("dial backoff", "a recent attempt failed"),
)
"""Why a peer does not answer, by libp2p's error; the most specific first."""

UNREACHED = "no answer: it is down, or a firewall blocks the connection"
FOREIGN = "it is reachable but does not talk to us: another run, one not registered, or it hangs"
LOST = "it answered before but no longer does"
HELD, JOINED = "held", "joined"


@dataclass(frozen=True)
class DialResult:
    """The result of dialing peers, by peer id.

    joined: those that answered and were not in our part of the DHT before. silent: why the others
    did not answer.
    """

    answered: frozenset[str] = frozenset()
    joined: frozenset[str] = frozenset()
    silent: Mapping[str, str] = field(default_factory=dict)

    @property
    def tried(self) -> frozenset[str]:
        return self.answered | self.silent.keys()


class PortTaken(OperatorError):
    """The port is in use."""


class _Node(hivemind.DHT):  # type: ignore[misc]
    """The stock DHT node, whose process ends with its parent."""

    def run(self) -> None:
        detach_from_parent(self._parent_pid)
        super().run()

    def run_in_background(self, **kwargs: Any) -> None:
        before_fork()
        super().run_in_background(**kwargs)

    def wait_until_ready(self, timeout: float | None = None) -> None:
        """As in the base class, but with a deadline, and only while the process is alive."""
        deadline = time.monotonic() + (timeout or 2 * START_SECONDS)
        while True:
            try:
                super().wait_until_ready(0.5)
            except concurrent.futures.TimeoutError:
                if not self.is_alive():
                    raise RuntimeError(f"its process ended with {self.exitcode}") from None
                if time.monotonic() > deadline:
                    raise RuntimeError("its process failed to start in time") from None
            else:
                return


class Peer:
    """A started DHT node.

    ip, port: where it listens for other peers (TCP; port 0 for any).
    announce_ip: the address to announce, if it is not `ip`.
    identity: the hotkey that vouches for this peer, and its run: only peers of admitted hotkeys
        in the same run are accepted.
    admitted: the hotkeys to admit at first; `admit` changes them.
    client_only: dial out without listening (a validator needs no open port).
    quic: also listen on the UDP port of the same number, for QUIC.

    Raises OperatorError when the port is in use or the daemon does not start.
    """

    def __init__(
        self,
        *,
        identity: Identity,
        ip: str = "127.0.0.1",
        port: int = 0,
        announce_ip: str | None = None,
        announce_port: int | None = None,
        admitted: Collection[str] = (),
        client_only: bool = False,
        quic: bool = False,
    ):
        swept = sweep()
        if swept:
            logger.info("removed %d files that dead processes had left", swept)
        start_shared_memory()
        mark_temporary_folder()
        self._claim = _claim_port(port)
        self.client_only = client_only
        self.quic = quic and port != 0 and not client_only
        authorizer = Authorizer(identity)  # nobody is admitted before the handlers are guarded
        options: dict[str, Any] = {
            "identity_path": str(identity.key_path),
            "authorizer": authorizer,
            "record_validators": [SignedRecords(authorizer)],
            "startup_timeout": START_SECONDS,
            # Asking a router to forward ports is the operator's decision, not ours.
            "nat_port_map": False,
            "use_relay": False,
            "auto_nat": False,
        }
        if client_only:
            options |= {"client_mode": True, "no_listen": True}
        else:
            options["host_maddrs"] = self._places(ip, port)
        if announce_ip is not None and not client_only:
            options["announce_maddrs"] = self._places(announce_ip, announce_port or port)
        self.identity = identity
        self._admitted: frozenset[str] = frozenset()
        try:
            self.dht = _Node(start=True, **options)
        except (P2PDaemonError, RuntimeError, ValueError, OSError) as error:
            self._release_port()
            raise self._failure(ip, port, first_line(error)) from error
        self.peer_id = str(self.dht.peer_id)
        self._met: set[str] = set()
        try:
            self._ask(_guard, timeout_seconds=START_SECONDS)
            self.admit(admitted)
        except BaseException:
            self.close()
            raise

    def _failure(self, ip: str, port: int, reason: str) -> OperatorError:
        cause = f"the swarm's peer does not start on {ip} port {port}: {reason}"
        if "address already in use" in reason:
            return PortTaken(f"{cause}; {start_cure(reason)}")
        tell(logger, "peer_start", cause, level=logging.ERROR)
        return OperatorError(f"{cause}; {start_cure(reason)}")

    def _ask(self, what: Callable[..., Any], *, timeout_seconds: float) -> Any:
        """Run a coroutine in the DHT's process, and wait for its result."""
        return self.dht.run_coroutine(what, return_future=True).result(timeout=timeout_seconds)

    def admit(self, hotkeys: Collection[str]) -> None:
        """Accept the peers of these hotkeys, and no others.

        Only the changes are sent to the DHT's process, removals first; what it does not confirm
        in time is sent again by the next call.
        """
        wanted = frozenset(hotkeys)
        try:
            for part in _parts({name: name for name in self._admitted - wanted}):
                self._ask(partial(change_admitted, dropped=[*part]), timeout_seconds=ADMIT_SECONDS)
                self._admitted -= part.keys()
            for part in _parts({name: name for name in wanted - self._admitted}):
                self._ask(partial(change_admitted, added=[*part]), timeout_seconds=ADMIT_SECONDS)
                self._admitted |= part.keys()
        except Exception as error:  # noqa: BLE001 - the next call makes up for it
            logger.warning("the DHT was not told who is registered: %s", first_line(error))

    def hotkey_of(self, peer_id: str, *, timeout_seconds: float = 5.0) -> str | None:
        """The admitted hotkey that a peer id has proved; an unknown peer is asked. None when it
        proved none in time."""
        what = partial(identify, peer_id=peer_id, timeout_seconds=timeout_seconds)
        try:
            found: str | None = self._ask(what, timeout_seconds=timeout_seconds + 5)
        except Exception as error:  # noqa: BLE001 - whoever cannot be asked has proved nothing
            logger.warning("a peer could not be identified: %s", first_line(error))
            return None
        return found

    def _places(self, ip: str, port: int) -> list[str]:
        host = f"/ip{ipaddress.ip_address(ip).version}/{ip}"
        return [f"{host}/tcp/{port}"] + [f"{host}/udp/{port}/quic-v1"] * self.quic

    @property
    def commitment(self) -> str:
        """What a neuron commits on chain: its address, and a marker for QUIC (the second address,
        which `addresses_in` derives, would not fit into 128 bytes)."""
        return self.address + QUIC_WORD * self.quic

    @property
    def address(self) -> str:
        """This peer's visible multiaddress over TCP, with its peer id."""
        visible = [str(address) for address in self.dht.get_visible_maddrs()]
        if not visible:
            raise SwarmError("the peer has no address that others could reach")
        tcp = [address for address in visible if "/tcp/" in address]
        return (tcp or visible)[0]

    def dial(
        self, addresses: Sequence[str], *, timeout_seconds: float = DIAL_SECONDS
    ) -> DialResult:
        """Dial all of these peers at once. Malformed addresses and our own are skipped; peers that
        are in the DHT are only pinged."""
        wanted: dict[str, list[str]] = {}
        for address in addresses:
            peer_id = peer_id_of(address)
            if peer_id is None:
                logger.warning("not a peer's address, passed over: %.100s", address)
            elif peer_id != self.peer_id:
                wanted.setdefault(peer_id, []).append(address)
        if not wanted:
            return DialResult()
        found = dict.fromkeys(wanted, "our own DHT node did not dial it in time")
        try:
            for answers in self._dial_all(wanted, timeout_seconds=timeout_seconds):
                found |= answers
            if HELD in found.values() or JOINED in found.values():
                learn = partial(_learn, timeout_seconds=timeout_seconds)
                self._ask(learn, timeout_seconds=timeout_seconds + 5)
        except Exception as error:  # noqa: BLE001 - no peer met is no reason to end
            logger.warning("looking for peers failed: %s", first_line(error))
        joined = frozenset(name for name, how in found.items() if how == JOINED)
        answered = joined | {name for name, how in found.items() if how == HELD}
        for peer_id in sorted(answered - self._met):
            logger.info("met peer %s", peer_id)
        self._met |= answered
        silent = {name: how for name, how in found.items() if name not in answered}
        return DialResult(answered=answered, joined=joined, silent=silent)

    def answering(self, peers: Collection[str], *, timeout_seconds: float) -> set[str]:
        """Which of these peers (ids) answer a ping now; none when our own node does not."""
        try:
            found = self._dial_all(dict.fromkeys(peers, ()), timeout_seconds=timeout_seconds)
            answers = [one for part in found for one in part.items()]
        except Exception as error:  # noqa: BLE001 - asked again soon
            logger.debug("peers could not be pinged: %r", error)
            return set()
        return {name for name, how in answers if how in (HELD, JOINED)}

    def _dial_all(
        self, peers: Mapping[str, Sequence[str]], *, timeout_seconds: float
    ) -> Iterator[dict[str, str]]:
        """The answers as from `_dial`, in parts; all peers are dialed at once."""
        tasks = [
            partial(_dial, peers=part, timeout_seconds=timeout_seconds) for part in _parts(peers)
        ]
        calls = [self.dht.run_coroutine(task, return_future=True) for task in tasks]
        deadline = time.monotonic() + timeout_seconds + 2
        for call in calls:
            yield call.result(timeout=max(0.0, deadline - time.monotonic()))

    def close(self) -> None:
        """Stop the DHT node and its daemon."""
        if self.dht.is_alive():
            self.dht.shutdown()
            self.dht.join(timeout=5)
        sweep()  # the daemon's clients do not remove their sockets
        self._release_port()

    def _release_port(self) -> None:
        if self._claim is not None:
            self._claim.release()


def _claim_port(port: int) -> Held | None:
    """Lock a port among the peers of this machine; None for port 0. Raises OperatorError.

    The daemon listens with SO_REUSEPORT, so two that start together would share the port.
    """
    if port == 0:
        return None
    try:
        held = hold(Path(tempfile.gettempdir()) / f"hiveminer-peer-{port}.lock")
    except OSError as error:
        raise OperatorError(f"--dht.port {port}: {error}; choose another") from None
    if isinstance(held, str):
        raise PortTaken(f"--dht.port {port}: the peer of process {held} has it; choose another")
    return held


def addresses_in(committed: str) -> list[str]:
    """The multiaddresses in a neuron's commitment; none if it is not a peer's."""
    address = committed.removesuffix(QUIC_WORD)
    if not address.startswith("/"):
        return []
    if address == committed or "/tcp/" not in address:
        return [address]
    host, _, rest = address.partition("/tcp/")
    port, _, peer = rest.partition("/")
    return [address, f"{host}/udp/{port}/quic-v1/{peer}"]


def peer_id_of(address: str) -> str | None:
    """The peer id in a multiaddress, or None."""
    if len(address) > 512:
        return None
    try:
        return str(PeerID.from_base58(Multiaddr(address)["p2p"]))
    except Exception:  # noqa: BLE001 - the parsers raise whatever they meet
        return None


def _parts(items: Mapping[str, Iterable[str]]) -> Iterator[dict[str, Any]]:
    """Split into parts that each fit into one message to the DHT's process."""
    part: dict[str, Any] = {}
    room = MESSAGE_CHARACTERS
    for name, value in items.items():
        size = len(name) + sum(map(len, value)) + 16
        if part and size > room:
            yield part
            part, room = {}, MESSAGE_CHARACTERS
        part[name] = value
        room -= size
    if part:
        yield part


def start_cure(reason: str) -> str:
    """The remedy when a peer does not start for this reason."""
    for words, cure in START_CURES:
        if words in reason:
            return cure
    return "see that nothing else has the port (--dht.port), and start again"


def why_silent(error: BaseException) -> str:
    """Why a dial failed, in words."""
    return next((why for words, why in SILENCES if words in str(error)), UNREACHED)


async def _guard(dht: Any, node: Any) -> None:
    """Runs in the DHT's process at its start, before anybody is admitted."""
    guard_tasks(node.p2p)
    await protect_records(dht, node)
    await guard(dht, node)


async def _dial(
    _dht: Any, node: Any, *, peers: dict[str, list[str]], timeout_seconds: float
) -> dict[str, str]:
    """Runs in the DHT's process: connect, where there are addresses, and ping all at once. By
    peer: HELD, JOINED, or why it did not answer."""

    async def dial_one(name: str, addresses: list[str]) -> str:
        peer_id = PeerID.from_base58(name)
        held = node.protocol.routing_table.get(peer_id=peer_id) is not None
        if addresses and not held:
            places = [Multiaddr(address.rsplit("/p2p/", 1)[0]) for address in addresses]
            # Hivemind has no public method to connect after the start.
            await node.p2p._client.connect(peer_id, places)
        if await node.protocol.call_ping(peer_id) is None:
            return LOST if held else FOREIGN
        return HELD if held else JOINED

    async def bounded(name: str, addresses: list[str]) -> str:
        try:
            return await asyncio.wait_for(dial_one(name, addresses), timeout_seconds)
        except Exception as error:  # noqa: BLE001 - unreachable, gone, or somebody else's address
            return why_silent(error)

    found = await asyncio.gather(*(bounded(name, places) for name, places in peers.items()))
    return dict(zip(peers, found, strict=True))


async def _learn(_dht: Any, node: Any, *, timeout_seconds: float) -> None:
    """Runs in the DHT's process: refresh the routing table."""
    nearest = node.find_nearest_nodes([node.node_id])
    await asyncio.wait({asyncio.ensure_future(nearest)}, timeout=timeout_seconds)
