"""Hivemind's progress tracker: the peers of the run, and the progress of the epoch."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from time import monotonic
from typing import Any

from hivemind.optim.progress_tracker import ProgressTracker

from hiveminer.strategies.hivemind.records import Report, read_report, signer_of

logger = logging.getLogger(__name__)

REPORT_SECONDS = 8.0
"""A peer that has not reported for this long is no longer counted; it reports twice as often, in a
background thread, however long its steps are."""

LAST_SECONDS = 1.0
"""Timeout for the tasks that the thread leaves behind."""

SPEED_RATIO = 4.0
"""No peer is counted as faster than this many times the fastest other one, which bounds how early
a peer that only claims to train can end an epoch."""

SLOWEST_SPEED = 1e-6
"""Rows per second; Hivemind's value for a peer that has not trained yet is below it."""

AHEAD_SECONDS = 30.0
MAX_AHEAD_SECONDS = 480.0
"""How long a peer that claims to be ahead, and does not serve a valid state, is left out; doubled
each time."""


@dataclass
class Counted:
    """A peer's last report: when we read it, its epoch, and its rows in it."""

    at: float
    epoch: int
    rows: float


class Reports:
    """The peers' last reports, without those that are not counted.

    A report counts under the key of the peer that it names, whose signature the DHT has verified.
    own: our peer id. seconds, epochs: by peer id, a report's time by the peer's own clock, and its
    epoch.
    """

    def __init__(self, *, own: str = "", clock: Callable[[], float] = monotonic):
        self.seconds: dict[str, float] = {}
        self.epochs: dict[str, int] = {}
        self._own = own
        self._clock = clock
        self._gone: dict[str, float] = {}
        self._shunned_until: dict[str, float] = {}
        self._counted: dict[str, Counted] = {}
        self._times_ahead: dict[str, int] = {}
        self._epoch = -1, 0.0  # ours, and when it was first seen
        self._lock = threading.Lock()

    @property
    def others(self) -> dict[str, int]:
        """The epochs of all peers but ours."""
        return {peer: epoch for peer, epoch in self.epochs.items() if peer != self._own}

    def leave_out(self, peer: str, *, seconds: float = 0.0) -> None:
        """Do not count this peer for this long, whatever it reports, nor until its next report."""
        if seconds:
            self._shunned_until[peer] = self._clock() + seconds
        self.epochs.pop(peer, None)
        self._gone[peer] = self.seconds.pop(peer, 0.0)

    def note_download(self, *, epoch: int, loaded: bool) -> set[str]:
        """Called after asking for a state later than this epoch. If none was loaded, peers that
        claim to be more than one epoch ahead (the next round makes up for one) are left out for a
        while; returns them."""
        if loaded:
            self._times_ahead.clear()
            return set()
        ahead = {peer for peer, theirs in self.others.items() if theirs > epoch + 1}
        for peer in ahead:
            times = self._times_ahead[peer] = self._times_ahead.get(peer, -1) + 1
            self.leave_out(peer, seconds=min(AHEAD_SECONDS * 2**times, MAX_AHEAD_SECONDS))
        return ahead

    def read(self, entries: Mapping[Any, Any], *, own_epoch: int = 0) -> dict[Any, Any]:
        """The DHT's entries that are counted, in Hivemind's format: one per peer, none of an epoch
        that most peers have not reached, and no more rows than can have been trained."""
        found: dict[str, tuple[Any, Report, Any]] = {}
        for key, entry in entries.items():
            report = read_report(entry.value)
            if report is None or not self._counts(key, report):
                continue
            if report.peer not in found or found[report.peer][1].time < report.time:
                found[report.peer] = key, report, entry
        reports = [report for _, report, _ in found.values()]
        with self._lock:  # the failure detector reads them too, in its thread
            for peer in found:
                self._gone.pop(peer, None)
            self.seconds = {report.peer: report.time for report in reports}
            self.epochs = {report.peer: report.epoch for report in reports}
            if own_epoch != self._epoch[0]:
                self._epoch = own_epoch, self._clock()
            rows = self._count_rows(reports)
        limit = max(own_epoch, swarm_epoch(self.others.values(), own=own_epoch))
        return {
            key: type(entry)(
                value=entry.value | {"samples_accumulated": rows[report.peer]},
                expiration_time=entry.expiration_time,
            )
            for key, report, entry in found.values()
            if report.epoch <= limit
        }

    def _counts(self, key: Any, report: Report) -> bool:
        if signer_of(key) != report.peer:
            return False
        if report.time <= self._gone.get(report.peer, float("-inf")):
            return False
        return self._clock() >= self._shunned_until.get(report.peer, 0.0)

    def _count_rows(self, reports: list[Report]) -> dict[str, int]:
        """Each peer's rows, limited to what it can have trained since its last report."""
        now, before, self._counted = self._clock(), self._counted, {}
        for report in reports:
            last = before.get(report.peer) or Counted(now - REPORT_SECONDS, report.epoch, 0)
            others = [one.rows_per_second for one in reports if one.peer != report.peer]
            fastest = max(others, default=0.0)
            rows = float(report.rows)
            if fastest > SLOWEST_SPEED:
                known, since = last.rows, last.at
                if last.epoch != report.epoch:
                    known = 0.0
                    if report.epoch == self._epoch[0]:  # nobody trains during a round
                        since = max(since, self._epoch[1])
                rows = min(rows, known + SPEED_RATIO * fastest * (now - since))
            self._counted[report.peer] = Counted(now, report.epoch, rows)
        return {peer: int(counted.rows) for peer, counted in self._counted.items()}


class SampleTracker(ProgressTracker):  # type: ignore[misc]
    """The stock progress tracker, with three differences.

    An epoch ends by rows, never by an estimated time. Peers that are known to be gone are not
    counted. And no single peer decides which epoch the swarm is in, or when it ends.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        self.reports = Reports(own=str(kwargs["dht"].peer_id))
        periods = {
            "min_refresh_period": 0.2, "max_refresh_period": 1.0, "default_refresh_period": 1.0,
        }  # fmt: skip
        super().__init__(*args, metadata_expiration=REPORT_SECONDS, **periods | kwargs)

    def run(self) -> None:
        """As in the base class, and cancel the tasks that it leaves behind."""
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
        return {peer for peer, epoch in self.reports.others.items() if epoch == ours}

    @property
    def is_left_behind(self) -> bool:
        """Whether all other live peers have ended our epoch."""
        ours, others = self.local_progress.epoch, self.reports.others
        return bool(others) and all(epoch > ours for epoch in others.values())

    def leave_out(self, peer: str, *, seconds: float = 0.0) -> None:
        """See `Reports.leave_out`."""
        self.reports.leave_out(peer, seconds=seconds)
        # Until the reports are read again, which does not happen in a round.
        progress = self.global_progress
        progress.num_peers = max(1, progress.num_peers - 1)

    def note_download(self, *, epoch: int, loaded: bool) -> set[str]:
        """See `Reports.note_download`."""
        left_out = self.reports.note_download(epoch=epoch, loaded=loaded)
        progress = self.global_progress
        progress.num_peers = max(1, progress.num_peers - len(left_out))
        return left_out

    def stop(self, *, timeout_seconds: float = 5.0) -> None:
        """End the thread without `shutdown`'s last report to the others."""
        self.shutdown_triggered.set()
        self.should_report_progress.set()
        self.global_state_updated.set()
        self.shutdown_complete.wait(timeout_seconds)

    def refresh(self, *, timeout_seconds: float) -> set[str] | None:
        """Read the reports now, even during a round. Returns the peers that report, including this
        one; None when the DHT does not answer in time."""
        future = self.dht.get(self.training_progress_key, latest=True, return_future=True)
        try:
            record = future.result(timeout=timeout_seconds)
        except Exception:  # noqa: BLE001 - it is asked again soon
            return None
        entries = record.value if record and isinstance(record.value, dict) else {}
        self.reports.read(entries, own_epoch=self.local_progress.epoch)
        return set(self.reports.seconds)

    def _parse_swarm_progress_data(self, metadata: Any) -> Any:
        if not isinstance(metadata, dict):
            return super()._parse_swarm_progress_data(metadata)
        kept = self.reports.read(metadata, own_epoch=self.local_progress.epoch)
        progress = super()._parse_swarm_progress_data(kept)
        progress.num_peers = len(self.reports.epochs)  # also those of another epoch
        return progress


def swarm_epoch(others: Iterable[int], *, own: int) -> int:
    """The last epoch that most of the other peers have reached; 0 without others.

    If that is not later than ours, and nobody else is in ours, it is the latest epoch: peers whose
    rounds failed may each be in another one, and would never meet again.
    """
    epochs = sorted(others)
    if not epochs:
        return 0
    most = epochs[(len(epochs) - 1) // 2]
    return epochs[-1] if most <= own and own not in epochs else most
