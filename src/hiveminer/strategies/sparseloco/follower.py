"""Follows the chain round by round in a background thread: reads, decides, fetches, applies.

Miners, which cut and commit records, and validators, which check blobs and commit marks, share
it. Only final blocks are read. Whatever fails (the chain, a peer, the disk) is retried at the next
poll; a deadline that passes in the meantime costs one round, and nothing else.
"""

from __future__ import annotations

import logging
import threading
from abc import ABC, abstractmethod
from collections import deque

from hiveminer.errors import ChainError, HiveminerError
from hiveminer.strategies.sparseloco.apply import State
from hiveminer.strategies.sparseloco.download import FETCH_BYTES, FETCH_SECONDS, Downloads
from hiveminer.strategies.sparseloco.log import EVERY_ROUNDS
from hiveminer.strategies.sparseloco.onchain import read_marks, read_records
from hiveminer.strategies.sparseloco.parts import Parts
from hiveminer.strategies.sparseloco.replay import apply_logged, does_not_follow, rebuild
from hiveminer.strategies.sparseloco.replica import Replica
from hiveminer.strategies.sparseloco.rounds import Decision, Facts, decide, next_action

logger = logging.getLogger(__name__)

COUNTED_ROUNDS = 24
"""A miner's pay is its share of this many rounds."""

EMPTY_ROUNDS = 3
"""Empty rounds in a row before a warning is logged."""

KEPT_BLOCKS = 256
"""Blocks whose state a pruned node keeps."""

CLOSE_SECONDS = 5.0
"""How long `close` waits for the thread."""


class Follower(ABC):
    """Follows the rounds with a `Replica`. A subclass adds what its role does in a round.

    start: the run's initial state.
    """

    def __init__(self, parts: Parts, *, start: State):
        self.replica = Replica(parts.plan, hotkey=parts.hotkey, start=start)
        self.plan, self.log, self.shelf = parts.plan, parts.log, parts.shelf
        self.chain = parts.chain
        self.downloads = Downloads(parts)
        self._exchange, self._membership = parts.exchange, parts.membership
        self.problem = ""
        """Why this peer does not take part, for as long as it does not."""
        self.decided = -1
        """The newest decided round, empty or not."""
        self.contributors = 0
        """How many blobs counted in the newest round that was not empty."""
        self.counted: deque[frozenset[bytes]] = deque(maxlen=COUNTED_ROUNDS)
        """The hotkeys whose blobs counted, by round that was not empty; oldest first."""
        self.committed = -1
        """The last round in which this peer committed its record or mark."""
        self.why = (-1, "")
        """A round, and why nothing was committed in it."""
        self._poll_seconds = parts.poll_seconds or max(0.1, parts.chain.block_seconds / 2)
        self._known: Facts | None = None
        self.stopping = threading.Event()
        self._told = ""
        self._empty = 0
        self._remembered = -1
        self.thread = threading.Thread(target=self._run, name="rounds", daemon=True)

    # The role -----------------------------------------------------------------------

    def before_records(self, number: int) -> None:  # noqa: B027 - optional
        """Called at each poll from the cut of round `number` until its records' deadline."""

    @abstractmethod
    def after_records(self, facts: Facts, head: int) -> None:
        """Called at each poll from when the records of the round are final until it is decided.

        facts: of the round, without marks.
        """

    def after_settling(self, facts: Facts) -> None:  # noqa: B027 - optional
        """Called after each round has been settled."""

    def commit(self, number: int, data: bytes) -> None:
        """Commit a record or a mark of a round. Raises ChainError."""
        try:
            self.chain.commit(data)
        except ChainError as error:
            self.why = number, str(error)
            raise
        self.committed = number

    # The thread ---------------------------------------------------------------------

    def begin(self) -> None:
        """Connect with other peers, and start the thread."""
        self._membership.join()
        self.thread.start()
        self._membership.children.watch_thread("the rounds", self.thread)

    def close(self) -> None:
        """Leave the swarm, and end the thread. Idempotent."""
        if self.stopping.is_set():
            return
        self.stopping.set()
        self._exchange.close()  # ends running downloads
        self._membership.close()
        if self.thread.ident is not None:
            self.thread.join(CLOSE_SECONDS)

    def _run(self) -> None:
        while not self.stopping.is_set():
            try:
                self.follow()
                self._told = ""
            except (HiveminerError, OSError) as error:
                if str(error) != self._told:  # once for as long as it is the same
                    self._told = str(error)
                    logger.warning("cannot follow the rounds: %s", error)
            self.stopping.wait(self._poll_seconds)

    def follow(self) -> None:
        """Poll the chain once, and do what is due. Raises ChainError and OSError."""
        final = self.chain.final_head()
        schedule = self.plan.rules.schedule
        newest = schedule.newest_final_round(final)
        self._settle_to(newest)
        number = newest + 1
        self._catch_up(until=schedule.cut_block(number))
        head = self.chain.head()
        if final >= schedule.records_block(number):
            self.after_records(self._records(number), head)
        elif schedule.cut_block(number) <= head < schedule.records_block(number):
            self.before_records(number)

    # Deciding -----------------------------------------------------------------------

    def _settle_to(self, newest: int) -> None:
        round_ = self.replica.position.round
        if round_ is None:
            self._join(newest)
            return
        for number in range(round_ + 1, newest + 1):
            if self.stopping.is_set():
                return
            try:
                facts = self._facts(number)
            except ChainError as error:
                if (newest + 1 - number) * self.plan.rules.schedule.round_blocks <= KEPT_BLOCKS:
                    raise
                # A pruned node no longer has it: start over with what it has.
                logger.warning("round %d can no longer be read, starting over: %s", number, error)
                self.replica.restart_as_joiner()
                self._join(newest)
                return
            self._settle(facts)

    def _join(self, newest: int) -> None:
        """Start with the newest round that is not empty, or with the initial state."""
        kept: list[Facts] = []
        for number in range(newest, -1, -1):
            try:
                kept.append(self._facts(number))
            except ChainError:
                break  # pruned, or the chain does not answer
            if decide(self.plan.rules, kept[-1]).parent is not None:
                for facts in reversed(kept):
                    self._settle(facts)
                return
        if newest >= 0 and not kept:
            raise ChainError(f"round {newest} cannot be read yet")
        self.replica.start_at(newest)
        self.log.add_state(max(0, newest + 1), self.replica.start)
        self.shelf.serve_states(self.replica.states.values())
        self.decided = newest

    def _settle(self, facts: Facts) -> None:
        decision = decide(self.plan.rules, facts)
        action = next_action(self.replica.position, decision)
        if action.differs and self._refuses(decision):
            self.replica.skip(facts.round)
        else:
            self.replica.settle(decision)
            if decision.parent is not None and not action.repairs:
                self.problem = ""
        taken = decision.parent is not None and decision.parent == self.replica.position.confirmed
        self.log.add_round(facts, made=self.replica.position.newest if taken else None)
        self.decided = facts.round
        self._remember(decision)
        if taken:
            self._save_state(facts.round)
        self._report(decision)
        self.after_settling(facts)
        self.shelf.serve_states(self.replica.states.values())
        own = {blob.blob_hash for blob in self.replica.position.own_blobs}
        self.log.prune(keep_blobs=self.shelf.blobs() | own)

    def remember_logged(self) -> None:
        """Count the rounds that were decided before a restart among the last ones."""
        for number in self.log.rounds()[-COUNTED_ROUNDS:]:
            entry = self.log.entry(number)
            if entry is not None:
                self._remember(decide(self.plan.rules, entry.facts))

    def _remember(self, decision: Decision) -> None:
        if decision.parent is not None and decision.round > self._remembered:
            self._remembered = decision.round
            self.contributors = len(decision.contributions)
            self.counted.append(frozenset(each.hotkey for each in decision.contributions))

    def _refuses(self, decision: Decision) -> bool:
        """Whether the chain names a state that does not follow from the log. One that equals ours
        within rounding is accepted; otherwise this peer keeps its own and commits nothing."""
        assert decision.parent is not None
        state = self.downloads.state(decision.parent)
        if state is not None and not self.replica.differs_from(state):
            logger.warning(
                "round %d: the chain names another state, which equals ours within rounding",
                decision.round,
            )
            self.problem = ""
            return False
        self.problem = does_not_follow(decision)
        logger.error("%s", self.problem)
        return True

    def _save_state(self, number: int) -> None:
        position = self.replica.position
        state = self.replica.states.get(position.confirmed or b"")
        kept = self.log.states()
        if state is not None and (not kept or number - kept[-1][0] >= EVERY_ROUNDS):
            self.log.add_state(number, state)

    def _report(self, decision: Decision) -> None:
        self._empty = self._empty + 1 if decision.parent is None else 0
        if decision.parent is None:
            logger.info("round %d is empty: %s", decision.round, decision.reason)
            if self._empty == EMPTY_ROUNDS:
                logger.warning(
                    "%d rounds in a row were empty (%s): until validators mark again, this peer "
                    "trains alone, and nothing that it learns is lost",
                    self._empty,
                    decision.reason,
                )
            return
        logger.info(
            "round %d: %d updates count, based on state %s%s", decision.round,
            len(decision.contributions), decision.parent.hex()[:16],
            "".join(f"; uid {uid} does not: {why}" for uid, why in decision.left_out),
        )  # fmt: skip

    # Reading ------------------------------------------------------------------------

    def _records(self, number: int) -> Facts:
        """The facts of a round without marks, once its records are final."""
        if self._known is None or self._known.round != number:
            self._known = read_records(self.chain, self.plan.rules.schedule, number)
        return self._known

    def _facts(self, number: int) -> Facts:
        """Everything that decides a round, which must be final."""
        return read_marks(self.chain, self._records(number))

    # Fetching -----------------------------------------------------------------------

    def _catch_up(self, *, until: int) -> None:
        """Fetch the confirmed state and compute the newest one if they are missing.

        until: the block by which the thread has other work; after it, each call takes at most
        one block.
        """
        replica = self.replica
        wanted = replica.position.missing_state
        if wanted is not None:
            state = rebuild(self.log, self.plan, wanted) or self.downloads.missing_state(
                wanted, replica.decision
            )
            if state is None:
                return
            replica.take_state(state)
            if replica.decision is not None:
                self._save_state(replica.decision.round)
            self.shelf.serve_states(replica.states.values())
        missing, decision = replica.position.missing_blobs, replica.decision
        if not missing or decision is None:  # not known after a restart without the log
            return
        size = sum(each.blob_bytes for each in missing)
        blocks = max(1, until - 1 - self.chain.head())
        seconds = min(FETCH_SECONDS + size / FETCH_BYTES, blocks * self.chain.block_seconds)
        self.downloads.blobs(decision.round, missing, seconds=seconds)
        applied = apply_logged(self.log, self.plan, decision, replica.state)
        if applied is None:
            logger.info("round %d: a blob that counts is still missing", decision.round)
            return
        replica.make_newest(applied.state)
        self.problem = ""
        for uid, why in applied.left_out.items():
            logger.warning("round %d: the blob of uid %d is ignored: %s", decision.round, uid, why)
        entry = self.log.entry(decision.round)
        if entry is not None:
            self.log.add_round(entry.facts, made=applied.state.hash())
        self.shelf.serve_states(replica.states.values())
