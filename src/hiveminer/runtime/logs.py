"""The log's one configuration: lines of ours, of Bittensor and of Hivemind, to stderr."""

from __future__ import annotations

import json
import logging
import sys

from hiveminer.config.settings import Settings


def configure_logging(settings: Settings, name: str) -> None:
    """Send the lines of all three to stderr, as the settings say; each names the neuron."""
    level = getattr(logging, settings.logging.level.upper())
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        JsonFormatter(name)
        if settings.logging.format == "json"
        else logging.Formatter(f"%(asctime)s {name} %(levelname)s %(message)s", "%H:%M:%S")
    )
    root = logging.getLogger()
    for old in list(root.handlers):
        if getattr(old, "hiveminer", False):
            root.removeHandler(old)
    if level > logging.DEBUG:
        handler.addFilter(_brief)
    handler.hiveminer = True  # type: ignore[attr-defined]
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    logging.getLogger("hiveminer").setLevel(level)
    # Theirs are chatty at info, and worth reading when something is wrong.
    for name in ("bittensor", "hivemind"):
        logging.getLogger(name).setLevel(max(level, logging.WARNING))


def _brief(record: logging.LogRecord) -> bool:
    """Cut what hivemind says of a peer's trouble to a line: it logs the whole traceback of
    what it has caught, such as a download from a peer that is gone."""
    if record.name.startswith("hivemind") and record.exc_info:
        error = record.exc_info[1]
        first = (record.getMessage().strip().splitlines() or [""])[0]
        record.msg, record.args = f"{first[:200]} ({type(error).__name__})", ()
        record.exc_info = record.exc_text = None
    return True


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, neuron, logger, event if it is one, message."""

    def __init__(self, neuron: str):
        super().__init__()
        self.neuron = neuron

    def format(self, record: logging.LogRecord) -> str:
        said = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "neuron": self.neuron,
            "logger": record.name,
            "message": record.getMessage(),
        }
        event = getattr(record, "event", None)
        if event is not None:
            said["event"] = event
        if record.exc_info:
            said["error"] = self.formatException(record.exc_info)
        return json.dumps(said)
