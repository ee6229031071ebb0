"""Who is in the run, and how far the epoch has come: hivemind's progress tracker."""

from __future__ import annotations

import asyncio
import logging
import re
import statistics
from collections.abc import Callable, Mapping
from time import monotonic
from typing import Any

from hivemind.dht.crypto import RSASignatureValidator
from hivemind.optim.progress_tracker import ProgressTracker
from hivemind.p2p import PeerID

from hiveminer.swarm.identity import peer_id_of_key

logger = logging.getLogger(__name__)

OWNER = re.compile(RSASignatureValidator.PUBLIC_KEY_REGEX)

REPORT_SECONDS = 8.0
"""A peer that has not reported for so long is no longer counted; it reports twice as often,
in a thread of its own, however long its steps are."""

LAST_SECONDS = 1.0
"""What the thread is still asked for when it ends has so long to end as well."""

BELIEVED_EPOCHS = 2
"""An epoch further ahead of the others' than this is believed only if two peers report it."""


class Reports:
    """The peers' reports, as they were last read, without those that do not count.

    signed: only those that are signed with the key of the peer that they are of count; the
        DHT has checked the signature itself.

    seconds, epochs: when each peer made its report, by its own clock, and the epoch that it
        is in, by peer id.
    """

    def __init__(self, *, signed: bool = False, clock: Callable[[], float] = monotonic):
        self.seconds: dict[str, float] = {}
        self.epochs: dict[str, int] = {}
        self._gone: dict[str, float] = {}
        self._shunned: dict[str, float] = {}
        self._clock = clock
        self._signed = signed

    @property
    def gone(self) -> set[str]:
        """Peers that are left out until they report anew."""
        return set(self._gone)

    def others_of(self, peer: str) -> dict[str, int]:
        """The epochs of all peers but this one."""
        return {other: epoch for other, epoch in self.epochs.items() if other != peer}

    def leave_out(self, peer: str) -> None:
        """Count this peer no longer, unless it reports anew."""
        self.epochs.pop(peer, None)
        self._gone[peer] = self.seconds.pop(peer, 0.0)

    def shun(self, peer: str, *, seconds: float) -> None:
        """Count this peer no longer for so long, whatever it reports."""
        self._shunned[peer] = self._clock() + seconds
        self.leave_out(peer)

    def read(self, entries: Mapping[Any, Any]) -> dict[Any, Any]:
        """The entries of the DHT that count; each has a `value`, a report or None."""
        kept: dict[Any, Any] = {}
        seconds: dict[str, float] = {}
        epochs: dict[str, int] = {}
        for key, entry in entries.items():
            if not isinstance(entry.value, dict):
                continue  # a goodbye
            try:
                peer = str(PeerID(bytes(entry.value["peer_id"])))
                time, epoch = float(entry.value["time"]), int(entry.value["epoch"])
            except (KeyError, TypeError, ValueError):
                continue
            if self._signed and _signer(key) != peer:
                continue
            if time <= self._gone.get(peer, float("-inf")):
                continue
            if self._clock() < self._shunned.get(peer, 0.0):
                continue
            self._gone.pop(peer, None)
            kept[key], seconds[peer], epochs[peer] = entry, time, epoch
        self.seconds, self.epochs = seconds, epochs
        return _believed(kept)


class SampleTracker(ProgressTracker):  # type: ignore[misc]
    """The stock progress tracker, but an epoch ends by rows, never by the clock's guess, so
    a slow moment does not turn into an epoch of one step; peers that are known to be gone
    are not counted; and a single peer cannot claim an epoch far ahead of all."""

    def __init__(self, *args: Any, **kwargs: Any):
        self.reports = Reports(signed=kwargs.get("private_key") is not None)
        super().__init__(*args, **kwargs)

    def run(self) -> None:
        """The stock one, whose thread leaves tasks behind: Python would log each as an error."""
        super().run()
        loop = asyncio.get_event_loop()
        left = asyncio.all_tasks(loop)
        for task in left:
            task.cancel()
        if left:
            loop.run_until_complete(asyncio.wait(left, timeout=LAST_SECONDS))

    @property
    def ready_to_update_epoch(self) -> bool:
        progress = self.global_progress
        return bool(
            self.global_epoch > self.local_progress.epoch
            or progress.samples_accumulated >= self.target_batch_size
        )

    @property
    def companions(self) -> set[str]:
        """The other live peers that are in our epoch."""
        ours = self.local_progress.epoch
        return {peer for peer, epoch in self._others.items() if epoch == ours}

    @property
    def is_left_behind(self) -> bool:
        """Whether all other live peers have ended our epoch: nobody averages with us in it."""
        ours, others = self.local_progress.epoch, self._others
        return bool(others) and all(epoch > ours for epoch in others.values())

    @property
    def _others(self) -> dict[str, int]:
        return self.reports.others_of(str(self.dht.peer_id))

    def leave_out(self, peer: str, *, shun_seconds: float = 0.0) -> None:
        """Count this peer no longer, unless it reports anew after so long."""
        if shun_seconds:
            self.reports.shun(peer, seconds=shun_seconds)
        else:
            self.reports.leave_out(peer)
        # Until the reports are read again; in a round they are not.
        progress = self.global_progress
        progress.num_peers = max(1, progress.num_peers - 1)

    def refresh(self, *, timeout_seconds: float) -> set[str] | None:
        """Read the reports now, even in the middle of a round: the peers that are there, this
        one included; None when the DHT does not answer in time."""
        future = self.dht.get(self.training_progress_key, latest=True, return_future=True)
        try:
            found = future.result(timeout=timeout_seconds)
        except Exception:  # noqa: BLE001 - a look that fails is made again
            return None
        self.reports.read(found.value if found and isinstance(found.value, dict) else {})
        return set(self.reports.seconds)

    def _parse_swarm_progress_data(self, metadata: Any) -> Any:
        if isinstance(metadata, dict):
            metadata = self.reports.read(metadata)
        return super()._parse_swarm_progress_data(metadata)


def _signer(key: Any) -> str | None:
    """The peer whose RSA key an entry of the DHT is bound to, and so is signed with."""
    found = OWNER.fullmatch(key) if isinstance(key, bytes) else None
    return peer_id_of_key(found[1]) if found is not None else None


def _believed(entries: dict[Any, Any]) -> dict[Any, Any]:
    """Without a single peer's claim to be far ahead of everybody."""
    epochs = sorted(entry.value["epoch"] for entry in entries.values())
    if len(epochs) < 3:  # of two, nobody can say who is right
        return entries
    usual = statistics.median(epochs) + BELIEVED_EPOCHS
    if epochs[-1] <= usual or epochs[-2] >= epochs[-1] - BELIEVED_EPOCHS:
        return entries
    logger.debug("a peer reports epoch %d, and the others %s", epochs[-1], epochs[:-1])
    return {key: entry for key, entry in entries.items() if entry.value["epoch"] <= usual}
