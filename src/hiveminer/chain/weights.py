"""Sets a validator's weights on chain, and checks that they arrived.

- Uids are recycled, so they are looked up at the last moment. If reading the weights back shows
  that a uid has changed hands, they are set again as soon as the chain allows.
- Weights are set once every live miner was replayed, or `FILL_SECONDS` after the start.
- If nobody has earned any, all weight goes to the subnet owner's uid, and the chain burns it. If
  the owner has no uid, nothing is set.
- Weights older than the activity cutoff are ignored, so the last ones are sent again before that.
- A write without an answer may have arrived: the chain's `last_update` is checked, and nothing is
  sent again until the first call has expired.

The SDK fits weights to the subnet's limits and chooses between plain and commit-reveal.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event

import bittensor as bt
from bittensor.intents.weights import clip_to_max_weight
from packaging.version import Version

from hiveminer.__version__ import __version__
from hiveminer.chain import Chain
from hiveminer.chain.retry import across_outage
from hiveminer.errors import ChainError, HiveminerError
from hiveminer.runtime.files import write_atomically

logger = logging.getLogger(__name__)

FILL_SECONDS = 600.0
"""How long weights wait for the first replay of every live miner."""

EMBEDDED_FILL_SECONDS = 30.0

VALID_BLOCKS = 16
"""Blocks after which the signed call expires."""

Choose = Callable[[bt.Metagraph], Mapping[str, float] | None]
"""The weights that are earned now, by hotkey: empty if nobody has, None if it is too early."""


@dataclass(frozen=True)
class Sent:
    """Weights that were sent: shares and hotkeys by uid, and the block."""

    shares: dict[int, float]
    hotkeys: dict[int, str]
    update_before: int
    block: int
    burnt: bool = False


def version_key(version: str) -> int:
    """The number by which the chain compares versions: 1.2.3 is 1023."""
    major, minor, patch = Version(version).release[:3]
    return 1000 * major + 10 * minor + patch


@dataclass(eq=False)
class WeightSetter:
    """Sets a validator's weights. Use it from one thread at a time.

    path: the file that keeps the last good weights across restarts.
    every_seconds: how often; the subnet's rate limit and activity cutoff take precedence.
    stopping: ends all waiting.
    """

    chain: Chain
    path: Path
    every_seconds: float
    stopping: Event
    version: str = __version__
    first_pause_seconds: float = 1.0
    _in_doubt: Sent | None = field(default=None, init=False)
    _again: bool = field(default=False, init=False)
    _told: str = field(default="", init=False)

    def set_if_due(self, choose: Choose) -> Sent | None:
        """Set the weights of `choose` if they are due, retrying across an outage.

        None when nothing was set: not due, too early, or refused, which is logged.
        """
        try:
            sent = across_outage(
                lambda: self._attempt(choose),
                stopping=self.stopping,
                first_pause_seconds=self.first_pause_seconds,
            )
        except ChainError:
            return None
        if sent is not None:
            self._told = ""
            self._keep(sent)
            self._look(sent)
        return sent

    def _attempt(self, choose: Choose) -> Sent | None:
        try:
            return self._set(choose)
        except ChainError as error:
            self._tell(f"weights were not set: {error}")
            raise

    def _set(self, choose: Choose) -> Sent | None:
        graph, limits = self.chain.metagraph(), self.chain.hyperparameters()
        ours = graph.by_hotkey(self.chain.hotkey)
        if ours is None:
            return None  # the neuron reports that, and ends
        doubt = self._in_doubt
        if doubt is not None:
            if ours.last_update > doubt.update_before:
                self._in_doubt = None
                return doubt
            if graph.block <= doubt.block + VALID_BLOCKS:
                raise ChainError(
                    f"the weights sent at block {doubt.block} are not on the chain yet"
                )
            self._in_doubt = None
        if not self._due(graph.block - ours.last_update, limits):
            return None
        wanted, key = int(limits.get("weights_version", 0)), version_key(self.version)
        if key < wanted:
            self._tell(
                f"weights are not set: the subnet requires version key {wanted}, and version "
                f"{self.version} has {key}; update hiveminer"
            )
            return None
        urgent = graph.block - ours.last_update >= _before_cutoff(limits)
        chosen = self._chosen(graph, choose, urgent=urgent)
        limit = int(limits.get("max_weights_limit", 65535)) / 65535
        return self._send(graph, ours.last_update, chosen, limit=limit) if chosen else None

    def _due(self, age: int, limits: Mapping[str, int]) -> bool:
        allowed = int(limits.get("weights_rate_limit", 0))
        wanted = 0 if self._again else math.ceil(self.every_seconds / self.chain.block_seconds())
        return age >= max(allowed, min(wanted, _before_cutoff(limits)))

    def _chosen(self, graph: bt.Metagraph, choose: Choose, *, urgent: bool) -> dict[str, float]:
        """The weights to set, by hotkey, for registered hotkeys only; empty to set nothing."""
        registered = {neuron.hotkey for neuron in graph}
        earned = choose(graph)
        if earned and (good := _of(earned, registered)):
            return good
        if earned is not None and graph.owner_hotkey in registered:
            return {graph.owner_hotkey: 1.0}
        if (urgent or self._again) and (kept := _of(self._kept(), registered)):
            logger.info("sending the last good weights again")
            return kept
        if self._again:
            # The weights on chain pay a newcomer for another's work: rather pay nobody.
            return {self.chain.hotkey: 1.0}
        if earned is not None:
            self._tell(
                "nobody has earned weight, and the subnet's owner has no uid: no weights are set"
            )
        return {}

    def _send(
        self, graph: bt.Metagraph, update_before: int, chosen: Mapping[str, float], *, limit: float
    ) -> Sent:
        uids = {neuron.hotkey: neuron.uid for neuron in graph}
        total = sum(chosen.values())
        shares = [weight / total for weight in chosen.values()]
        if limit < 1:
            # The SDK clips as well, but rounds afterwards, which may end just above the limit.
            shares = clip_to_max_weight(shares, 0.999 * limit)
        sent = Sent(
            shares={uids[who]: share for who, share in zip(chosen, shares, strict=True)},
            hotkeys={uids[who]: who for who in chosen},
            update_before=update_before,
            block=graph.block,
            burnt=set(chosen) == {graph.owner_hotkey},
        )
        self._again = False
        try:
            self.chain.set_weights(
                sent.shares, version_key=version_key(self.version), valid_blocks=VALID_BLOCKS
            )
        except ChainError as error:
            if error.may_stand:
                self._in_doubt = sent
            raise
        return sent

    # Afterwards ----------------------------------------------------------------------

    def _look(self, sent: Sent) -> None:
        """Read the weights back, and compare them."""
        try:
            graph = self.chain.metagraph()
            ours = graph.by_hotkey(self.chain.hotkey)
            hidden = self.chain.hyperparameters().get("commit_reveal_weights_enabled")
            found = {} if hidden or ours is None else self.chain.weights_of(ours.uid)
        except HiveminerError as error:
            logger.warning("the weights could not be read back: %s", error)
            return
        now = {neuron.uid: neuron.hotkey for neuron in graph}
        moved = sorted(uid for uid, who in sent.hotkeys.items() if now.get(uid) != who)
        if moved:
            self._again = True
            logger.warning(
                "uids %s changed hands while weights were being set: they are set again as soon as "
                "the chain allows",
                moved,
            )
        if hidden:
            logger.info("the weights are committed, and the chain reveals them later")
        elif not same(found, sent.shares):
            logger.warning(
                "the weights on the chain differ from those that were sent: %s, sent %s",
                found, sent.shares,
            )  # fmt: skip

    def _keep(self, sent: Sent) -> None:
        weights = {sent.hotkeys[uid]: share for uid, share in sent.shares.items()}
        text = json.dumps({"block": sent.block, "weights": weights})
        try:
            write_atomically(self.path, text.encode())
        except OSError as error:
            logger.error("the weights could not be saved: %s", error)

    def _kept(self) -> dict[str, float]:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            said = json.loads(self.path.read_text(encoding="utf-8"))["weights"]
            weights = {str(who): float(weight) for who, weight in said.items()}
            if all(0 < weight <= 1 for weight in weights.values()):
                return weights
        return {}

    def _tell(self, words: str) -> None:
        """Log a problem once, not at every attempt."""
        told = re.sub(r"\d+", "N", words)  # such as blocks to wait
        if told != self._told:
            logger.warning("%s", words)
        self._told = told


def _of(weights: Mapping[str, float], hotkeys: Collection[str]) -> dict[str, float]:
    return {who: weight for who, weight in weights.items() if weight > 0 and who in hotkeys}


def same(found: Mapping[int, float], sent: Mapping[int, float]) -> bool:
    """Whether weights on the chain have the shares that were sent, up to a hundredth."""
    total = sum(found.values())
    if not total or not set(found) <= set(sent):
        return False
    return all(abs(found.get(uid, 0) / total - share) <= 0.01 for uid, share in sent.items())


def _before_cutoff(limits: Mapping[str, int]) -> int:
    """The age in blocks at which weights are sent again: a tenth before the activity cutoff."""
    return math.floor(int(limits.get("activity_cutoff", 5000)) * 0.9)
