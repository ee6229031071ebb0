"""Creates the strategy or the observer of a neuron, with its peer, exchange, chain and log."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

from hiveminer.errors import ChainError, OperatorError
from hiveminer.strategies.base import Context, Observer, Strategy
from hiveminer.strategies.sparseloco.exchange import Exchange
from hiveminer.strategies.sparseloco.log import LOG_FOLDER, Log
from hiveminer.strategies.sparseloco.observer import SparselocoObserver
from hiveminer.strategies.sparseloco.onchain import SubnetRounds, public_key
from hiveminer.strategies.sparseloco.parts import Parts
from hiveminer.strategies.sparseloco.plan import Plan
from hiveminer.strategies.sparseloco.schedule import Schedule, latency_of, schedule_problems
from hiveminer.strategies.sparseloco.shelf import Shelf
from hiveminer.strategies.sparseloco.strategy import SparselocoStrategy
from hiveminer.swarm.announced import AnnouncedAddresses
from hiveminer.swarm.axons import AxonAddresses
from hiveminer.swarm.membership import Membership, announced_ip, start_peer

logger = logging.getLogger(__name__)


def open_sparseloco(context: Context) -> Strategy:
    """Start a peer and the strategy on it, for a miner. Raises OperatorError."""
    with _parts(context) as parts:
        return SparselocoStrategy(context.task.model, parts, on_round=context.on_round)


def open_sparseloco_observer(context: Context) -> Observer:
    """Start a peer and the observer on it. It follows the rounds from now on, and marks if its
    hotkey has a validator permit. Raises OperatorError."""
    with _parts(context) as parts:
        observer = SparselocoObserver(context.task.model, parts)
        observer.follower.begin()
        return observer


@contextlib.contextmanager
def _parts(context: Context) -> Iterator[Parts]:
    """The parts of both; closed if the body raises."""
    host, task = context.host, context.task
    settings, run_id = host.settings, str(task.run_id)
    plan = Plan.of(task.run.sparseloco, run_id=run_id, model=task.model)
    check_schedule(plan.rules.schedule, context)
    log = Log(host.folder / LOG_FOLDER / run_id)
    try:
        log.begin(plan, run_id=run_id)
    except OSError as error:
        raise OperatorError(f"--neuron.path: {log.folder} cannot be used: {error}") from None
    ip = announced_ip(settings, context.public_ip)
    host.check_address("--dht.external_ip", ip or settings.dht_ip)
    with contextlib.ExitStack() as unfinished:
        peer = start_peer(
            settings,
            identity=host.identity(run_id),
            admitted=host.registered,
            announce_ip=ip,
        )
        given = frozenset(settings.dht.initial_peers)
        asked = AxonAddresses(host.chain.wallet, hotkey=host.hotkey, neurons=lambda: host.metagraph)
        announced = AnnouncedAddresses(peer, run=run_id)  # also of validators, which have no axon
        membership = Membership(
            peer,
            registered=lambda: host.registered,
            addresses=lambda: (given or asked()) | announced(),
        )
        unfinished.callback(membership.close)
        host.go_on()
        shelf = Shelf(log)
        exchange = Exchange(peer.dht, run=plan.rules.run, source=shelf)
        unfinished.callback(exchange.close)
        membership.children.watch_thread("the exchange", exchange.thread)
        yield Parts(
            section=task.run.optimizer,
            plan=plan,
            hotkey=public_key(host.hotkey),
            chain=SubnetRounds(host.chain),
            membership=membership,
            exchange=exchange,
            log=log,
            shelf=shelf,
        )
        unfinished.pop_all()


def check_schedule(schedule: Schedule, context: Context) -> None:
    """Raise OperatorError when the run's schedule does not work on this subnet."""
    chain = context.host.chain
    try:
        tempo, space = int(chain.hyperparameters()["tempo"]), chain.commitment_space()
    except ChainError as error:
        logger.warning("cannot check [sparseloco] of run.toml against the subnet: %s", error)
        return
    latency = latency_of(embedded=chain.embedded)
    problems = schedule_problems(schedule, tempo=tempo, roles=1, latency=latency, space_bytes=space)
    if problems:
        raise OperatorError(f"[sparseloco] of run.toml: {problems[0]}")
