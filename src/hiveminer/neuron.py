"""What miners and validators share: a hotkey, the chain, a current metagraph, signals and a
shutdown."""

from __future__ import annotations

import contextlib
import logging
import math
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bittensor import Metagraph

from hiveminer.__version__ import __version__
from hiveminer.chain import (
    Chain,
    embedded_wallet,
    join_embedded,
    named_embedded_wallet,
    open_subnet,
    open_wallet,
    snapshot,
)
from hiveminer.chain.publish import Publisher
from hiveminer.config.run import Run
from hiveminer.config.settings import Settings
from hiveminer.errors import (
    ChainError,
    HiveminerError,
    NotRegistered,
    NotYetRegistered,
    OperatorError,
)
from hiveminer.rpc.blacklist import STRANGER, Standing
from hiveminer.runtime import addresses, dependencies, machine
from hiveminer.runtime.events import tell
from hiveminer.runtime.locks import Held, hold
from hiveminer.runtime.logs import configure_logging
from hiveminer.runtime.metrics import Metrics, open_metrics
from hiveminer.runtime.signals import Signals
from hiveminer.swarm.identity import Identity
from hiveminer.swarm.peer import addresses_in
from hiveminer.swarm.processes import log_to_root

logger = logging.getLogger(__name__)

SYNC_BLOCKS = 4
"""Blocks between two readings of the metagraph: a deregistered neuron loses its access within
a minute."""

SAVE_SECONDS = 10.0
"""Least seconds between two copies of the metagraph on disk. Free memory is returned as often."""


class Neuron:
    """A registered hotkey and its connection to the chain.

    role: "miner" or "validator"; names throwaway keys and log lines.
    stake: TAO to stake on the embedded network, where it is free.
    chain: used instead of the one that the settings name.

    Raises OperatorError or ChainError when the hotkey cannot be used on the subnet.
    """

    def __init__(
        self, settings: Settings, *, role: str, stake: float = 0.0, chain: Chain | None = None
    ):
        self.settings = settings
        self.role = role
        self.stopping = threading.Event()
        self.signals = Signals(self.stopping)
        self._on_sync: Callable[[], None] = lambda: None
        self._saved_at = -math.inf
        self._thread = threading.Thread(target=self._sync, name="metagraph", daemon=True)
        configure_logging(settings, role)
        log_to_root()
        machine.check_temporary_folder()
        machine.check_descriptors()
        # First of all: an exception raised by a signal while a library starts would leave half
        # of it behind. `go_on` polls instead.
        self.signals.take()
        # The server's thread gets its turn ten times sooner than by default beside a training
        # thread, so that answers take a few milliseconds.
        sys.setswitchinterval(0.0005)
        with contextlib.ExitStack() as parts:
            parts.callback(self.signals.give_back)
            self.key_name: str | None = None
            if chain is None:
                wallet, self.key_name = _open_wallet(settings, role, parts)
            else:
                wallet = chain.wallet
            self.hotkey = str(wallet.hotkey.ss58_address)
            # From here on, and in the processes that hivemind forks, each line says whose it is.
            configure_logging(settings, self.name)
            self.folder = subnet_folder(settings) / self.hotkey
            self._snapshot = self.folder / "metagraph.json"
            parts.callback(self._lock_folder().release)
            self.chain = chain or open_subnet(
                settings, wallet, must_connect=not self._snapshot.exists()
            )
            parts.callback(self.chain.close)
            self._take_place(stake)
            self._parts = parts.pop_all()
        self.publisher = Publisher(self.chain)
        self._introduce()

    @property
    def uid(self) -> int | None:
        """Our uid in the last metagraph; None once it is lost."""
        neuron = self._by_hotkey.get(self.hotkey)
        return neuron.uid if neuron is not None else None

    @property
    def name(self) -> str:
        """Role and key for log lines: "miner-0" for a throwaway key, else "miner 5F3sa2TJ"."""
        key = self.key_name or self.hotkey[:8]
        return key if key.startswith(f"{self.role}-") else f"{self.role} {key}"

    @property
    def threads(self) -> int | None:
        """CPU threads for PyTorch; None for its own choice."""
        return self.settings.neuron.threads or (1 if self.settings.embedded else None)

    def open_metrics(self, run: Run) -> Metrics:
        """The default metrics: a file in this neuron's folder, and wandb if it is set."""
        return open_metrics(
            self.folder / "metrics.jsonl",
            wandb=self.settings.wandb,
            name=f"{self.role}-{self.hotkey[:8]}",
            config={"run": run.model_dump(mode="json"), "hotkey": self.hotkey},
        )

    @property
    def registered(self) -> frozenset[str]:
        """The hotkeys in the last metagraph."""
        return frozenset(self._by_hotkey)

    def identity(self, run_id: str) -> Identity:
        """Our identity among the peers of this run: the hotkey, and a key in our folder."""
        hotkey = self.chain.wallet.hotkey
        return Identity(hotkey, run_id=run_id, key_path=self.folder / "peer.key")

    def check_registered(self) -> None:
        """Raise NotRegistered, with the remedy, once our uid is lost."""
        if self.uid is None:
            remedy = "restart to register again" if self.chain.embedded else self._registration()
            raise NotRegistered(
                f"hotkey {self.hotkey} has lost its uid on subnet {self.settings.netuid} of "
                f"{self.settings.subtensor.network}: another took its place, so this {self.role} "
                f"takes no more work; {remedy}"
            )

    def _registration(self) -> str:
        """The command that registers, and its current price."""
        price = ""
        with contextlib.suppress(HiveminerError):
            price = f" (it costs {self.chain.price():.4f} TAO now)"
        return self.chain.registration() + price

    def standing(self, hotkey: str) -> Standing:
        """A hotkey's uid, permit and stake in the last metagraph."""
        neuron = self._by_hotkey.get(hotkey)
        if neuron is None:
            return STRANGER
        return Standing(
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
        """Read the metagraph every few blocks in a background thread, and call `on_sync` after
        each reading. While the chain does not answer, the last metagraph is used."""
        self._on_sync = on_sync or self._on_sync
        if self._thread.ident is None:
            self._thread.start()

    def read_metagraph(self) -> None:
        """Read the metagraph now, and save a copy to disk. Raises ChainError."""
        self._know(self.chain.metagraph())
        if time.monotonic() - self._saved_at < SAVE_SECONDS:
            return
        self._saved_at = time.monotonic()
        machine.return_free_memory()
        try:
            snapshot.save(self.metagraph, self._snapshot)
        except OSError as error:
            logger.warning("the metagraph could not be saved: %s", error)

    def _know(self, metagraph: Metagraph) -> None:
        self.metagraph = metagraph
        # Looked up for each request: the metagraph's own search goes through all neurons.
        self._by_hotkey = {neuron.hotkey: neuron for neuron in metagraph}

    def sync(self) -> None:
        """Read the metagraph, publish what is missing in it, and call `on_sync`. Raises
        ChainError."""
        self.read_metagraph()
        self.publisher.sync(self.metagraph)
        self._on_sync()

    def keep_committed(self, data: bytes) -> None:
        """Keep this commitment beside our hotkey on chain."""
        self.publisher.add(
            "commitment",
            self.metagraph,
            is_there=lambda graph: self.chain.commitments(graph).get(self.hotkey) == data,
            put=lambda: self.chain.commit(data),
        )

    def check_address(self, flag: str, ip: str) -> None:
        """Raise OperatorError for an unreachable address, warn of a doubtful one. The embedded
        network accepts any."""
        if self.chain.embedded:
            return
        try:
            doubt = addresses.check(ip)
        except ValueError as error:
            raise OperatorError(f"{error}; give the public address with {flag}") from None
        if doubt:
            logger.warning("%s; give the public address with %s", doubt, flag)

    def go_on(self) -> None:
        """Called between the steps of a start: raises KeyboardInterrupt after a signal."""
        if self.stopping.is_set():
            raise KeyboardInterrupt

    def close(self) -> None:
        """Release the chain and the hotkey."""
        self.stopping.set()
        if self._thread.ident is not None:
            self._thread.join(timeout=2)
        self._parts.close()

    def _lock_folder(self) -> Held:
        """Two neurons with one hotkey would overwrite each other's key and state."""
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
        """Find our uid on the subnet: from the chain, or from disk while it does not answer."""
        try:
            if self.chain.embedded:
                join_embedded(self.chain, stake_tao=stake)
            self.read_metagraph()
        except ChainError as error:
            known = None if error.refused else snapshot.load(self._snapshot)
            if known is None:
                raise
            logger.warning(
                "%s; continuing with the metagraph of block %d from the disk", error, known.block
            )
            self._know(known)
        if self.uid is None:
            raise NotYetRegistered(
                f"hotkey {self.hotkey} is not registered on subnet {self.settings.netuid} of "
                f"{self.settings.subtensor.network}; {self._registration()}"
            )

    def _introduce(self) -> None:
        if self.chain.embedded:
            path = self.settings.subtensor.path
            cause = f"This is the embedded network: a chain in {path}, on this machine alone"
            tell(logger, "embedded_chain", cause, level=logging.INFO)
        key = f" (key {self.key_name})" if self.key_name is not None else ""
        network = self.settings.subtensor.network
        logger.info(
            "%s %s: uid %s on subnet %d of %s, hotkey %s%s",
            self.role, __version__, self.uid, self.settings.netuid, network, self.hotkey, key,
        )  # fmt: skip
        for problem in dependencies.unmet():
            tell(logger, "dependencies", problem)

    def _sync(self) -> None:
        block_seconds = 12.0
        with contextlib.suppress(HiveminerError):
            block_seconds = self.chain.block_seconds()
        pause = 1.0 if self.chain.embedded else min(60.0, SYNC_BLOCKS * block_seconds)
        began = time.monotonic()
        # A sync may wait for others; the next one is due no later because of it.
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


def subnet_folder(settings: Settings) -> Path:
    """The folder of this machine's neurons on a subnet, one subfolder per hotkey."""
    network = settings.subtensor.network.replace("/", "_")
    return settings.neuron.path / network / str(settings.netuid)


def _open_wallet(
    settings: Settings, role: str, parts: contextlib.ExitStack
) -> tuple[Any, str | None]:
    """The wallet, and its hotkey's name if it belongs to this machine's embedded network."""
    wallet, path = settings.wallet, settings.subtensor.path
    if not settings.embedded:
        return open_wallet(wallet.name, wallet.hotkey or "default", wallet.path), None
    if wallet.hotkey is not None:
        claim = named_embedded_wallet(path, wallet.name, wallet.hotkey)
    else:
        claim = embedded_wallet(path, prefix=role)
    parts.enter_context(claim)
    return claim.wallet, claim.wallet.hotkey_str
