"""Who is in the run, and how far the epoch has come: hivemind's progress tracker."""

from __future__ import annotations

from hivemind.optim.progress_tracker import ProgressTracker


class SampleTracker(ProgressTracker):  # type: ignore[misc]
    """The stock progress tracker, but an epoch ends by rows, never by the clock's guess, so
    a slow moment does not turn into an epoch of one step."""

    @property
    def ready_to_update_epoch(self) -> bool:
        progress = self.global_progress
        return bool(
            self.global_epoch > self.local_progress.epoch
            or progress.samples_accumulated >= self.target_batch_size
        )
