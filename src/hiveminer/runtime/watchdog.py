"""Reports what does not end in its time, with the calls that all threads are in.

A hang writes nothing into the log by itself. Nothing is interrupted: to do that in somebody
else's code would break more than it mends.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import threading
import time
from collections.abc import Iterator

from hiveminer.runtime.events import tell

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def watch(what: str, *, limit_seconds: float) -> Iterator[None]:
    """Around what has to end within `limit_seconds`; one event if it does not."""
    began, late = time.monotonic(), threading.Event()
    timer = threading.Timer(limit_seconds, _report, (what, limit_seconds, late))
    timer.name, timer.daemon = "watchdog", True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        if late.is_set():
            logger.info("%s has ended after all, after %.0f s", what, time.monotonic() - began)


def _report(what: str, limit_seconds: float, late: threading.Event) -> None:
    late.set()
    tell(
        logger, "stall",
        f"{what} has not ended in {limit_seconds:.0f} s; the calls of each thread follow",
    )  # fmt: skip
    with contextlib.suppress(OSError, ValueError):
        faulthandler.dump_traceback(2)
