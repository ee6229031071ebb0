"""What every miner does, whatever it trains: a neuron, an axon, a worker, and Bittensor's
override points."""

from __future__ import annotations

import contextlib
import functools
import logging
import socket
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, Self

from bittensor import Metagraph

from hiveminer.chain import Chain
from hiveminer.config.settings import MinerSettings
from hiveminer.errors import OperatorError
from hiveminer.neuron import Neuron
from hiveminer.protocol import IsAlive, Synapse, Train
from hiveminer.rpc.axon import Axon
from hiveminer.rpc.blacklist import refusal
from hiveminer.rpc.connections import PortInUse, bind
from hiveminer.rpc.queue import WorkQueue
from hiveminer.rpc.route import Route
from hiveminer.runtime import addresses
from hiveminer.runtime.processes import require_alive
from hiveminer.runtime.signals import SHUTDOWN_SECONDS
from hiveminer.runtime.watchdog import watch

logger = logging.getLogger(__name__)

IDLE_SECONDS = 180.0
"""What a miner does between requests (an averaging, at most) is reported as stuck after this."""


class BaseMinerNeuron(ABC):
    """A neuron with an axon, and methods to override.

    The axon calls `blacklist`, `priority`, `accept` and `is_alive` on the server's thread, so
    they must return at once; `forward` and `idle` run in the one worker thread.
    """

    grace_seconds: ClassVar[float] = 120.0
    """Grace after a request's timeout before it is reported as stuck: loading the global state
    and a last averaging come on top."""

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
        self.queue = WorkQueue(capacity=settings.axon.max_waiting, idle=self._idle)
        self.neuron = Neuron(settings, role="miner", chain=chain)
        with contextlib.ExitStack() as unfinished:
            unfinished.callback(self.neuron.close)
            for name in ("axon", "dht"):
                given = getattr(settings, name).external_ip
                if given is not None:
                    self.neuron.check_address(f"--{name}.external_ip", given)
            unfinished.pop_all()

    def blacklist(self, synapse: Synapse) -> tuple[bool, str]:
        """(refuse?, why): asked before the body is read, so only `synapse.dendrite` is filled."""
        reason = refusal(
            self.neuron.standing(synapse.dendrite.hotkey),
            self.settings.blacklist,
            needs_permit=isinstance(synapse, Train),
        )
        return reason is not None, reason or ""

    def accept(self, synapse: Train) -> None:  # noqa: B027 - optional
        """Raise Refused for a request that is not worth a place in the queue; called once the
        caller is authenticated and the request parsed."""

    def priority(self, synapse: Synapse) -> float:
        """Requests with a higher priority are served first: the caller's stake, in TAO."""
        return self.neuron.standing(synapse.dendrite.hotkey).stake

    @abstractmethod
    def is_alive(self, synapse: IsAlive) -> IsAlive:
        """Report readiness; must not wait for anything."""

    @abstractmethod
    def forward(self, synapse: Train) -> Train:
        """Do the work; one request at a time."""

    def idle(self) -> None:  # noqa: B027 - optional
        """Called in the worker thread about once a second while there is no work."""

    def check(self) -> None:  # noqa: B027 - optional
        """Called in the main thread about once a second; raise a HiveminerError to end."""

    def _forward(self, synapse: Train) -> Train:
        what = f"request {synapse.request_id[:8]} of {synapse.dendrite.hotkey[:8]}"
        with watch(what, limit_seconds=synapse.timeout_seconds + self.grace_seconds):
            return self.forward(synapse)

    def _idle(self) -> None:
        with watch("the work between requests", limit_seconds=IDLE_SECONDS):
            self.idle()

    def run(self) -> None:
        """Serve until Ctrl-C or SIGTERM. Raises NotRegistered when our uid is lost, and
        HiveminerError when a thread has died."""
        self.neuron.go_on()
        self.queue.start()
        self.axon = self._start_axon()
        self._announce(self.axon)
        self.neuron.keep_in_sync()
        logger.info("serving on %s port %d", self.settings.axon_ip, self.axon.port)
        while not self.neuron.stopping.wait(1.0):
            self.neuron.check_registered()
            require_alive(self.axon.thread, self.queue.thread)
            self.axon.silence.check()
            self.check()

    def close(self) -> None:
        """Stop serving, let the running job finish its batch, and release everything."""
        if self._closed:
            return
        self._closed = True
        self.neuron.stopping.set()
        # The queue first: waiting callers get an answer, and the running job's still goes out.
        dropped = self.queue.stop(SHUTDOWN_SECONDS / 2)
        if self.axon is not None:
            self.axon.stop(1.0)
        if dropped:
            logger.info("dropped %d requests: %s", len(dropped), ", ".join(dropped))
        self.release()
        self.neuron.close()
        logger.info("stopped")

    def release(self) -> None:  # noqa: B027 - optional
        """Release what a subclass holds; called once, after serving has stopped."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _start_axon(self) -> Axon:
        route = functools.partial(Route, blacklist=self.blacklist, priority=self.priority)
        axon = Axon(
            self.neuron.chain.wallet,
            self._listen(),
            [
                route(IsAlive, self.is_alive),
                route(Train, self._forward, check=self.accept, queue=self.queue),
            ],
            standing=self.neuron.standing,
            metrics_port=self.settings.axon.metrics_port,
        )
        axon.start()
        return axon

    def _listen(self) -> socket.socket:
        """At the configured port, or the next free one where none was configured."""
        first = self.settings.axon.port
        free = self.neuron.chain.embedded and not self.settings.given("axon.port")
        for port in addresses.ports_to_try(first, free=free):
            try:
                listener = bind(self.settings.axon_ip, port)
            except PortInUse:
                if not free:
                    raise
                continue
            if port != first:
                logger.info("port %d is in use: the axon takes %d", first, port)
            return listener
        raise OperatorError(f"no free port from {first} on; choose with --axon.port")

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
        """The address published on chain: the one given, the one listened on unless it is a
        wildcard, or the one seen from the internet. Raises OperatorError when unknown."""
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
            logger.warning("%s; keeping %s, which is on the chain", error, before)
            return before
