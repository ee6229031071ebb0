"""Configures logging of this package, Bittensor and Hivemind to stderr.

With `--logging.format json` every line of the process is a JSON object, whoever writes it: a
library's own handler, a warning, a traceback, a C library, a child process.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import subprocess
import sys
import threading
from typing import Any, TextIO

from hiveminer.config.settings import Settings
from hiveminer.runtime import json_filter

HANDLER = "hiveminer"
"""The name of our handler; configuring again replaces it."""


def configure_logging(settings: Settings, name: str) -> None:
    """Log to stderr as the settings say; each line contains `name`."""
    level = getattr(logging, settings.logging.level.upper())
    as_json = settings.logging.format == "json"
    handler: logging.Handler = logging.NullHandler()
    if as_json:
        handler = logging.StreamHandler(_json_output.start(name))
        handler.setFormatter(JsonFormatter(name))
    elif sys.stderr is not None:  # as after `2>&-`
        handler = logging.StreamHandler()
        text = f"%(asctime)s {name} %(levelname)s %(message)s"
        handler.setFormatter(logging.Formatter(text, "%H:%M:%S"))
    root = logging.getLogger()
    for old in list(root.handlers):
        if old.name == HANDLER:
            root.removeHandler(old)
    if level > logging.DEBUG:
        handler.addFilter(_brief)
    handler.set_name(HANDLER)
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    logging.getLogger("hiveminer").setLevel(level)
    for library in ("bittensor", "hivemind"):
        logging.getLogger(library).setLevel(max(level, logging.WARNING))
    if as_json or not (settings.logging.bars and sys.stderr is not None and sys.stderr.isatty()):
        _hide_bars()


def report(words: str) -> None:
    """Print a program's last line to stderr, or to the log if that is JSON."""
    if _json_output.filter is not None:
        logging.getLogger("hiveminer").critical("%s", words)
    else:
        with contextlib.suppress(OSError):  # a full disk or a closed pipe
            print(f"hiveminer: {words}", file=sys.stderr or sys.__stdout__, flush=True)


class _JsonOutput:
    """Redirects stdout and stderr of this process through `json_filter`."""

    def __init__(self) -> None:
        self._stream: TextIO | None = None
        self.filter: subprocess.Popen[bytes] | None = None

    def start(self, neuron: str) -> TextIO:
        """Start, or restart with a new name; returns the stream for JSON lines."""
        if self._stream is None:
            self._stream = os.fdopen(os.dup(2), "w", buffering=1, errors="replace")
            atexit.register(self._stop, os.getpid())
            logging.captureWarnings(True)
            sys.excepthook = _log_uncaught
            threading.excepthook = _log_thread
        self._flush()
        self.filter = subprocess.Popen(
            [sys.executable, "-I", "-S", json_filter.__file__, neuron],
            stdin=subprocess.PIPE,
            stdout=self._stream,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        assert self.filter.stdin is not None
        for descriptor in (1, 2):
            os.dup2(self.filter.stdin.fileno(), descriptor)
        self.filter.stdin.close()
        return self._stream

    def _stop(self, owner: int) -> None:
        """Flush the last lines."""
        if os.getpid() != owner or self.filter is None or self._stream is None:
            return
        self._flush()
        for descriptor in (1, 2):
            os.dup2(self._stream.fileno(), descriptor)
        with contextlib.suppress(subprocess.TimeoutExpired):  # a child of ours still writes
            self.filter.wait(2.0)

    def _flush(self) -> None:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                stream.flush()


_json_output = _JsonOutput()


def _log_uncaught(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    logging.getLogger("hiveminer").critical(
        "%s", str(error) or kind.__name__, exc_info=(kind, error, trace)
    )


def _log_thread(args: threading.ExceptHookArgs) -> None:
    if args.exc_value is not None and not issubclass(args.exc_type, SystemExit):
        _log_uncaught(args.exc_type, args.exc_value, args.exc_traceback)


def _hide_bars() -> None:
    """Disable the libraries' progress bars; those not imported yet read the environment."""
    for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
        os.environ[name] = "1"
    for module, function in (
        ("huggingface_hub.utils", "disable_progress_bars"),
        ("datasets.utils", "disable_progress_bars"),
        ("transformers.utils.logging", "disable_progress_bar"),
    ):
        if module in sys.modules:
            getattr(sys.modules[module], function)()


def _brief(record: logging.LogRecord) -> bool:
    """Shorten Hivemind's tracebacks of handled errors, such as a lost peer, to one line."""
    if record.name.startswith("hivemind") and record.exc_info:
        error = record.exc_info[1]
        first = (record.getMessage().strip().splitlines() or [""])[0]
        record.msg, record.args = f"{first[:200]} ({type(error).__name__})", ()
        record.exc_info = record.exc_text = None
    return True


class JsonFormatter(logging.Formatter):
    """One JSON object per line: time, level, neuron, logger, message, perhaps event and error."""

    def __init__(self, neuron: str):
        super().__init__()
        self.neuron = neuron

    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "neuron": self.neuron,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if hasattr(record, "event"):
            fields["event"] = record.event
        if record.exc_info:
            fields["error"] = self.formatException(record.exc_info)
        return json.dumps(fields)
