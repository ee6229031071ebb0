"""The life of a neuron, whatever it does.

`Neuron` is what every neuron holds: a hotkey, the chain, the metagraph kept fresh, signals
and a shutdown. `BaseMinerNeuron` adds an axon and Bittensor's override points; training is
left to its subclass.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from bittensor import Metagraph, MetagraphNeuron

from hiveminer.__version__ import __version__
from hiveminer.chain import (
    Chain,
    embedded_wallet,
    join_embedded,
    named_embedded_wallet,
    open_chain,
    open_wallet,
    snapshot,
)
from hiveminer.chain.publish import Publisher
from hiveminer.config.run import Run
from hiveminer.config.settings import MinerSettings, Settings
from hiveminer.errors import (
    ChainError,
    HiveminerError,
    NotRegistered,
    NotYetRegistered,
    OperatorError,
)
from hiveminer.protocol import IsAlive, Synapse, Train
from hiveminer.rpc.axon import Axon
from hiveminer.rpc.blacklist import Policy, Standing, refusal
from hiveminer.rpc.connections import PortInUse
from hiveminer.rpc.queue import WorkQueue
from hiveminer.runtime import addresses, dependencies, machine
from hiveminer.runtime.events import tell
from hiveminer.runtime.locks import Held, hold
from hiveminer.runtime.logs import configure_logging
from hiveminer.runtime.metrics import Metrics, open_metrics
from hiveminer.runtime.signals import SHUTDOWN_SECONDS, Signals
from hiveminer.runtime.watchdog import watch
from hiveminer.swarm import Identity, addresses_in
from hiveminer.swarm.processes import log_to_root
from hiveminer.training.checkpoint import Checkpoints

logger = logging.getLogger(__name__)

SYNC_BLOCKS = 4
"""Blocks between two readings of the metagraph: a neuron that is no longer registered has to
lose its access within a minute."""

KEPT_SECONDS = 10.0
"""Seconds between two copies of the metagraph on disk, at least."""

GRACE_SECONDS = 120.0
"""Grace after a request's timeout before it is reported as stuck: loading the global state,
and a last averaging, come on top."""

IDLE_SECONDS = 180.0
"""The same for what a miner does between requests: an averaging, at most."""


class Neuron:
    """What every neuron holds.

    settings: the operator's.
    role: "miner" or "validator"; names throwaway keys and log lines.
    stake: TAO that a neuron of this role stakes on the embedded network (where it is free).
    chain: another door to a chain than the settings say; for tests.

    Raises OperatorError or ChainError when it cannot take its place on the subnet.
    """

    def __init__(
        self, settings: Settings, *, role: str, stake: float = 0.0, chain: Chain | None = None
    ):
        self.settings = settings
        self.role = role
        self.stopping = threading.Event()
        self.signals = Signals(self.stopping)
        self._on_sync: list[Callable[[], None]] = []
        self._kept_at = 0.0
        self._by_hotkey: dict[str, MetagraphNeuron] = {}
        self._thread = threading.Thread(target=self._sync, name="metagraph", daemon=True)
        configure_logging(settings, role)
        log_to_root()
        machine.check_temporary_folder()
        machine.check_descriptors()
        # Before anything else is built: an exception out of a signal, in the middle of a
        # library's own start, leaves half of it behind. `go_on` looks instead.
        self.signals.take()
        # The network's thread gets its turn ten times sooner than Python would give it
        # beside a training thread: answers take a few milliseconds.
        sys.setswitchinterval(0.0005)
        with contextlib.ExitStack() as parts:
            parts.callback(self.signals.give_back)
            self.key_name: str | None = None
            if chain is None:
                wallet, self.key_name = self._open_wallet(parts)
            else:
                wallet = chain.wallet
            self.hotkey = str(wallet.hotkey.ss58_address)
            # From here on, and in the processes that hivemind forks, each line says whose it is.
            configure_logging(settings, self.name)
            self.folder = subnet_folder(settings) / self.hotkey
            parts.callback(self._take_folder().release)
            self.chain = chain or open_chain(
                network=settings.subtensor.network,
                netuid=settings.netuid,
                wallet=wallet,
                path=settings.subtensor.path / "chain.sqlite",
                block_seconds=settings.subtensor.block_seconds,
                must_connect=not self._snapshot.exists(),
            )
            parts.callback(self.chain.close)
            self._take_place(stake)
            self._parts = parts.pop_all()
        self.publisher = Publisher(self.chain)
        self._introduce()

    @property
    def uid(self) -> int | None:
        """Our uid, by the metagraph as last read; None when we have lost it."""
        neuron = self._by_hotkey.get(self.hotkey)
        return neuron.uid if neuron is not None else None

    @property
    def name(self) -> str:
        """Role and key, as log lines name them: "miner-0" for a throwaway key, else such as
        "miner 5F3sa2TJ"."""
        key = self.key_name or self.hotkey[:8]
        return key if key.startswith(f"{self.role}-") else f"{self.role} {key}"

    @property
    def network(self) -> str:
        return self.settings.subtensor.network

    @property
    def threads(self) -> int | None:
        """CPU threads that PyTorch is to use; None for its own choice."""
        return self.settings.neuron.threads or (1 if self.settings.embedded else None)

    def open_metrics(self, run: Run) -> Metrics:
        """Where this neuron's numbers go, unless told otherwise."""
        return open_metrics(
            self.folder / "metrics.jsonl",
            wandb=self.settings.wandb,
            name=f"{self.role}-{self.hotkey[:8]}",
            config={"run": run.model_dump(mode="json"), "hotkey": self.hotkey},
        )

    @property
    def _snapshot(self) -> Path:
        return self.folder / "metagraph.json"

    @property
    def registered(self) -> frozenset[str]:
        """The hotkeys registered on the subnet, by the metagraph as last read."""
        return frozenset(self._by_hotkey)

    def identity(self, run_id: str) -> Identity:
        """Who we are to the peers of this run: our hotkey, and a key of our own folder."""
        hotkey = self.chain.wallet.hotkey
        return Identity(hotkey, run_id=run_id, key_path=self.folder / "peer.key")

    def checkpoints(self, folder: str) -> Checkpoints:
        """Checkpoints in a subfolder of this neuron's."""
        return Checkpoints(self.folder / folder)

    def check_registered(self) -> None:
        """Raise NotRegistered, with what to do, when we have lost our uid."""
        if self.uid is None:
            cure = "start it again to join anew" if self.chain.embedded else self._registration()
            raise NotRegistered(
                f"hotkey {self.hotkey} has lost its uid on subnet {self.settings.netuid} of "
                f"{self.network}: another took its place, so this {self.role} takes no more work; "
                f"{cure}"
            )

    def _registration(self) -> str:
        """The line that registers, and the price of it now."""
        price = ""
        with contextlib.suppress(HiveminerError):
            price = f" (it costs {self.chain.price():.4f} TAO now)"
        return self.chain.registration() + price

    def standing(self, hotkey: str) -> Standing:
        """Where a hotkey stands on the subnet, by the metagraph as last read."""
        neuron = self._by_hotkey.get(hotkey)
        if neuron is None:
            return Standing(uid=None, registered=False, validator_permit=False, stake=0.0)
        return Standing(
            uid=neuron.uid,
            registered=True,
            validator_permit=neuron.validator_permit,
            stake=float(neuron.total_stake.amount),
        )

    def peer_addresses(self) -> frozenset[str]:
        """Addresses to meet the swarm at: `--dht.initial_peers`, or what the registered
        neurons have committed (ours left out), as last read while the chain does not answer."""
        if self.settings.dht.initial_peers:
            return frozenset(self.settings.dht.initial_peers)
        try:
            commitments = self.chain.commitments()
        except ChainError as error:
            logger.debug("the peers' addresses are those last read: %s", error)
            commitments = self.chain.commitments(self.metagraph)
        committed = (said for who, said in commitments.items() if who != self.hotkey)
        texts = (said.decode(errors="replace") for said in committed)
        return frozenset(address for text in texts for address in addresses_in(text))

    def keep_in_sync(self, on_sync: Callable[[], None] | None = None) -> None:
        """Read the metagraph every few blocks in a thread of its own, from now on.

        `on_sync` is called after each reading. A chain that stutters changes nothing:
        what was last read stays, and the log says so.
        """
        if on_sync is not None:
            self._on_sync.append(on_sync)
        if self._thread.ident is None:
            self._thread.start()

    def read_metagraph(self) -> None:
        """Read the metagraph now, and keep it on disk. Raises ChainError."""
        self._know(self.chain.metagraph())
        if time.monotonic() - self._kept_at < KEPT_SECONDS and self._kept_at:
            return
        self._kept_at = time.monotonic()
        try:
            snapshot.save(self.metagraph, self._snapshot)
        except OSError as error:
            logger.warning("the metagraph could not be kept on disk: %s", error)

    def _know(self, metagraph: Metagraph) -> None:
        self.metagraph = metagraph
        self._by_hotkey = {neuron.hotkey: neuron for neuron in metagraph}

    def sync(self) -> None:
        """Read the metagraph, publish what is missing in it, and call whoever follows it.
        Raises ChainError."""
        self.read_metagraph()
        self.publisher.sync(self.metagraph)
        for callback in self._on_sync:
            callback()

    def keep_committed(self, data: bytes) -> None:
        """Keep this commitment beside our hotkey on chain."""
        self.publisher.add(
            "commitment",
            self.metagraph,
            is_there=lambda graph: self.chain.commitments(graph).get(self.hotkey) == data,
            put=lambda: self.chain.commit(data),
        )

    def check_address(self, flag: str, ip: str) -> None:
        """Raise OperatorError for an address that nobody can call us at; warn of a doubtful
        one. The embedded network takes any."""
        problem = None if self.chain.embedded else addresses.check(ip)
        if problem is None:
            return
        words = f"{problem.words}; give the public address with {flag}"
        if problem.kind == "refused":
            raise OperatorError(words)
        logger.warning("%s", words)

    def go_on(self) -> None:
        """To be asked between the steps of a start: raises KeyboardInterrupt when told to stop."""
        if self.stopping.is_set():
            raise KeyboardInterrupt

    def close(self) -> None:
        """Let go of the chain and of the hotkey."""
        self.stopping.set()
        if self._thread.ident is not None:
            self._thread.join(timeout=2)
        self._parts.close()

    def _take_folder(self) -> Held:
        """Our own folder, in which one neuron at a time keeps its key, its state and what it
        has seen: two with one hotkey would spoil each other's."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            held = hold(self.folder / "lock")
        except OSError as error:
            raise OperatorError(
                f"--neuron.path: {self.folder} cannot be used: {error.strerror}; choose another"
            ) from None
        if isinstance(held, str):
            raise OperatorError(
                f"hotkey {self.hotkey} is in use by process {held} on subnet "
                f"{self.settings.netuid}; stop that, or choose another with --wallet.hotkey"
            )
        return held

    def _take_place(self, stake: float) -> None:
        """Find our place on the subnet, from the chain or, while it is away, from the disk."""
        try:
            if self.chain.embedded:
                join_embedded(self.chain, stake_tao=stake)
            self.read_metagraph()
        except ChainError as error:
            known = None if error.refused else snapshot.load(self._snapshot)
            if known is None:
                raise
            logger.warning(
                "%s; going on with the metagraph of block %d from the disk", error, known.block
            )
            self._know(known)
        if self.uid is None:
            raise NotYetRegistered(
                f"hotkey {self.hotkey} is not registered on subnet {self.settings.netuid} of "
                f"{self.network}; {self._registration()}"
            )

    def _open_wallet(self, parts: contextlib.ExitStack) -> tuple[Any, str | None]:
        """Our wallet, and the name of its hotkey where it is one of this machine's network."""
        wallet = self.settings.wallet
        if self.settings.subtensor.network != "embedded":
            return open_wallet(wallet.name, wallet.hotkey or "default", wallet.path), None
        place = self.settings.subtensor.path
        if wallet.hotkey is not None:
            claim = named_embedded_wallet(place, wallet.name, wallet.hotkey)
        else:
            claim = embedded_wallet(place, prefix=self.role)
        parts.callback(claim.release)
        return claim.wallet, claim.hotkey_name

    def _introduce(self) -> None:
        if self.chain.embedded:
            place = self.settings.subtensor.path
            cause = f"This is the embedded network: a chain in {place}, on this machine alone"
            tell(logger, "embedded_chain", cause, level=logging.INFO)
        key = f" (key {self.key_name})" if self.key_name is not None else ""
        logger.info(
            "%s %s: uid %s on subnet %d of %s, hotkey %s%s",
            self.role, __version__, self.uid, self.settings.netuid, self.network, self.hotkey, key,
        )  # fmt: skip
        for each in dependencies.unmet():
            tell(logger, "dependencies", str(each))

    def _sync(self) -> None:
        pause = 1.0 if self.chain.embedded else min(60.0, SYNC_BLOCKS * self._block_seconds())
        began = time.monotonic()
        # What is done at a sync may wait for others; the next one is not to be late for that.
        while not self.stopping.wait(max(1.0, began + pause - time.monotonic())):
            began = time.monotonic()
            try:
                self.sync()
            except ChainError as error:
                logger.warning("the metagraph could not be read, keeping the last: %s", error)
            except HiveminerError as error:
                logger.error("%s", error)
            except Exception:
                logger.exception("reading the metagraph failed")

    def _block_seconds(self) -> float:
        with contextlib.suppress(HiveminerError):
            return self.chain.block_seconds()
        return 12.0


class BaseMinerNeuron(ABC):
    """The life of any miner: a neuron, an axon, and four methods to override.

    `blacklist` and `priority` are asked by the axon; `is_alive` is answered at once, on
    the server's thread; `forward` runs in the one worker thread, whatever it does.
    """

    def __init__(
        self,
        settings: MinerSettings,
        *,
        chain: Chain | None = None,
        ask_outside: Callable[[], str] = addresses.ask_outside,
    ):
        self.settings = settings
        self._ask_outside = ask_outside
        self._closed = False
        self.axon: Axon | None = None
        self.policy = Policy(
            allow_non_registered=settings.blacklist.allow_non_registered,
            force_validator_permit=settings.blacklist.force_validator_permit,
            min_stake=settings.blacklist.min_stake,
        )
        self.queue = WorkQueue(capacity=settings.axon.max_waiting, idle=self._idle)
        self.neuron = Neuron(settings, role="miner", chain=chain)
        with contextlib.ExitStack() as unfinished:
            unfinished.callback(self.abandon)
            for name in ("axon", "dht"):
                given = getattr(settings, name).external_ip
                if given is not None:
                    self.neuron.check_address(f"--{name}.external_ip", given)
            unfinished.pop_all()

    def blacklist(self, synapse: Synapse) -> tuple[bool, str]:
        """(refuse?, why): asked before the body is read, so only `synapse.dendrite` is filled."""
        reason = refusal(
            self.neuron.standing(synapse.dendrite.hotkey),
            self.policy,
            needs_permit=isinstance(synapse, Train),
        )
        return (reason is not None, reason or "")

    def accept(self, synapse: Train) -> None:  # noqa: B027 - nothing to refuse, unless overridden
        """Raise Refused for a request that is not worth a place in the queue; asked on the
        server's thread, once the caller is proved and the request parsed."""

    def priority(self, synapse: Synapse) -> float:
        """Who is served first: the caller's stake, in TAO."""
        return self.neuron.standing(synapse.dendrite.hotkey).stake

    @abstractmethod
    def is_alive(self, synapse: IsAlive) -> IsAlive:
        """Answer at once; runs on the server's thread, so it must not wait for anything."""

    @abstractmethod
    def forward(self, synapse: Train) -> Train:
        """Do the work; runs in the worker thread, one request at a time."""

    def idle(self) -> None:  # noqa: B027 - nothing to do, unless overridden
        """Called in the worker thread about once a second while there is no work."""

    def check(self) -> None:  # noqa: B027 - nothing to look after, unless overridden
        """Called in the main thread about once a second; raise a HiveminerError to end."""

    def _forward(self, synapse: Train) -> Train:
        what = f"request {synapse.request_id[:8]} of {synapse.dendrite.hotkey[:8]}"
        limit = synapse.timeout_seconds + GRACE_SECONDS
        with watch(what, limit_seconds=limit):
            return self.forward(synapse)

    def _idle(self) -> None:
        with watch("what is done between requests", limit_seconds=IDLE_SECONDS):
            self.idle()

    def run(self) -> None:
        """Serve until Ctrl-C or SIGTERM. Raises NotRegistered when our uid is lost."""
        self.neuron.go_on()
        self.queue.start()
        self.axon = self._start_axon()
        self._announce(self.axon)
        self.neuron.keep_in_sync()
        logger.info("serving on %s port %d", self.settings.axon_ip, self.axon.port)
        while not self.neuron.stopping.wait(1.0):
            self.neuron.check_registered()
            self.check()

    def close(self) -> None:
        """Stop serving, let the running job come to a batch's edge, let go of everything."""
        self._end(self.release)

    def abandon(self) -> None:
        """Let go of everything where a construction failed, without `release`."""
        self._end(lambda: None)

    def _end(self, release: Callable[[], None]) -> None:
        if self._closed:
            return
        self._closed = True
        self.neuron.stopping.set()
        # The queue first: who waits is told so, and the running job's answer still goes out.
        dropped = self.queue.stop(SHUTDOWN_SECONDS / 2)
        if self.axon is not None:
            self.axon.stop(1.0)
        if dropped:
            logger.info("dropped %d requests: %s", len(dropped), ", ".join(dropped))
        release()
        self.neuron.close()
        logger.info("stopped")

    def release(self) -> None:  # noqa: B027 - nothing to let go of, unless overridden
        """Let go of what a subclass holds; called once, when nothing is served any more."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _start_axon(self) -> Axon:
        """Bind the axon's port: the one asked for, or the next free one where none was."""
        settings = self.settings
        free = self.neuron.chain.embedded and not settings.given("axon.port")
        for port in addresses.ports_to_try(settings.axon.port, free=free):
            axon = Axon(
                self.neuron.chain.wallet,
                host=settings.axon_ip,
                port=port,
                standing=self.neuron.standing,
                policy=self.policy,
                metrics_port=settings.axon.metrics_port,
            )
            axon.attach(self.is_alive, self.blacklist, self.priority, synapse=IsAlive)
            axon.attach(
                self._forward,
                self.blacklist,
                self.priority,
                synapse=Train,
                queue=self.queue,
                check_fn=self.accept,
            )
            try:
                axon.bind()
            except PortInUse:
                if not free:
                    raise
                continue
            axon.start()
            if port not in (settings.axon.port, 0):
                logger.info("port %d is in use: the axon takes %d", settings.axon.port, axon.port)
            return axon
        raise OperatorError(f"no free port from {settings.axon.port} on; choose with --axon.port")

    def _announce(self, axon: Axon) -> None:
        """Publish our address on chain."""
        ip, port = self.public_ip, self.settings.axon.external_port or axon.port
        self.neuron.check_address("--axon.external_ip", ip)
        address = f"[{ip}]:{port}" if ":" in ip else f"{ip}:{port}"

        def is_there(graph: Metagraph) -> bool:
            ours = graph.by_hotkey(self.neuron.hotkey)
            return ours is not None and ours.axon == address

        self.neuron.publisher.add(
            "axon's address",
            self.neuron.metagraph,
            is_there=is_there,
            put=lambda: self.neuron.chain.serve_axon(ip, port),
        )

    @functools.cached_property
    def public_ip(self) -> str:
        """The address to be called at: the one given, the one listened on if it is one, or
        what the internet sees, asked for once. Raises OperatorError when it is not known."""
        settings = self.settings
        given = settings.axon.external_ip or settings.axon_ip
        if given not in addresses.EVERY_ADDRESS:
            return given
        try:
            return self._ask_outside()
        except OperatorError as error:
            ours = self.neuron.metagraph.by_hotkey(self.neuron.hotkey)
            if ours is None or not ours.axon:
                raise
            before = str(ours.axon).rpartition(":")[0].strip("[]")
            logger.warning("%s; keeping %s, which stands on the chain", error, before)
            return before


def subnet_folder(settings: Settings) -> Path:
    """The folder that holds one of each neuron of this machine on this subnet, by hotkey."""
    network = settings.subtensor.network.replace("/", "_")
    return settings.neuron.path / network / str(settings.netuid)
