"""Reports what hangs, with the stacks of all threads. Nothing is interrupted."""

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
    """Report an event if the block takes longer than `limit_seconds`."""
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
