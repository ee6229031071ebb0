"""`hivemind.Optimizer` with local updates, with this package's averager and tracker."""

from __future__ import annotations

import logging
from typing import Any

import hivemind

from hiveminer.runtime.events import tell
from hiveminer.strategies.hivemind.averager import SwarmAverager
from hiveminer.strategies.hivemind.records import Shapes
from hiveminer.strategies.hivemind.tracker import SampleTracker

logger = logging.getLogger(__name__)


class SwarmOptimizer(hivemind.Optimizer):  # type: ignore[misc]
    """Also loads the swarm's state when this peer is a single epoch behind it."""

    reloads: int = 0
    """How often a step was discarded because this peer had fallen behind."""

    def _make_state_averager(self, **kwargs: Any) -> SwarmAverager:
        self.dht.add_validators([Shapes(self.run_id)])
        try:
            return SwarmAverager(
                dht=self.dht,
                run_id=self.run_id,
                min_matchmaking_time=self.matchmaking_time,
                allreduce_timeout=self.allreduce_timeout,
                start=True,
                **kwargs,
            )
        except BaseException:
            self.tracker.stop()  # its threads would keep the program alive
            raise

    def _make_progress_tracker(self, target_batch_size: int, **kwargs: Any) -> SampleTracker:
        return SampleTracker(
            dht=self.dht,
            prefix=self.run_id,
            target_batch_size=target_batch_size,
            start=True,
            **kwargs,
        )

    def _should_load_state_from_peers(self) -> bool:
        """The stock one lets a peer that is one epoch behind average with those ahead of it."""
        return bool(super()._should_load_state_from_peers() or self.tracker.is_left_behind)

    def load_state_from_peers(self, **kwargs: Any) -> None:
        """As in the base class; whoever is ahead and hands out no sound state is left out."""
        self.reloads += 1
        epoch = self.local_epoch
        super().load_state_from_peers(**kwargs)
        loaded = bool(self.state_averager.loaded)
        for peer in sorted(self.tracker.note_download(epoch=epoch, loaded=loaded)):
            cause = f"peer {peer} says that it is ahead, and gave no state that can be used"
            tell(logger, "state_download", f"{cause}: it is left out for a while")
