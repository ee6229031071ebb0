"""Metrics: JSON lines always, Weights & Biases if configured, and progress bars.

Training never waits for a metric, and never ends because one could not be written: a full disk
or a broken connection costs one warning.
"""

from __future__ import annotations

import json
import logging
import math
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from tqdm import tqdm

from hiveminer.config.settings import WandbSettings
from hiveminer.errors import OperatorError, one_line

logger = logging.getLogger(__name__)


class Metrics(Protocol):
    """A sink of metrics. Safe to call from any thread; `log` never raises."""

    def log(self, kind: str, fields: Mapping[str, Any]) -> None:
        """Write one event: its kind ("train", "epoch") and its fields (JSON values)."""

    def close(self) -> None:
        """Flush; nothing may be logged afterwards."""


class JsonLines:
    """One JSON object per line: `time` (Unix seconds), `kind`, and the fields.

    Each line is one write to a file opened for appending, so that processes can share it. A
    number that is not finite becomes null. Raises OperatorError if the file cannot be opened.
    """

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time):
        self.path = path
        self._clock = clock
        self._lock = threading.Lock()
        self._failed = False
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+b", buffering=0)
        except OSError as error:
            raise OperatorError(
                f"cannot write to {path}: {error.strerror}; choose another folder"
            ) from error

    def log(self, kind: str, fields: Mapping[str, Any]) -> None:
        assert not {"time", "kind"} & set(fields), "time and kind are the sink's own"
        event = {"time": round(self._clock(), 3), "kind": kind, **fields}
        line = json.dumps(_finite(event), default=str).encode() + b"\n"
        with self._lock:
            if not self._file.closed:
                self._write(line)

    def _write(self, line: bytes) -> None:
        try:
            if self._file.write(line) == len(line):
                return
            reason = "no space left"
        except OSError as error:
            reason = error.strerror or "an error"
        if not self._failed:
            logger.warning("numbers are being lost: cannot write to %s: %s", self.path, reason)
        self._failed = True

    def close(self) -> None:
        with self._lock:
            self._file.close()


def _finite(value: Any) -> Any:
    match value:
        case float():
            return value if math.isfinite(value) else None
        case Mapping():
            return {str(key): _finite(part) for key, part in value.items()}
        case list() | tuple():
            return [_finite(part) for part in value]
    return value


class Wandb:
    """Weights & Biases, beside `lines`: an event's numbers as `kind/field`.

    `online` without an API key becomes `offline`: the run is stored in `folder`, for `wandb
    sync`. After an error, which is reported once, nothing more is sent.
    """

    def __init__(
        self,
        settings: WandbSettings,
        lines: JsonLines,
        *,
        folder: Path,
        name: str,
        config: Mapping[str, Any],
        wandb: ModuleType | None = None,
    ):
        self._lines = lines
        self._run: Any = None
        try:
            if wandb is None:
                import wandb as real  # 1 s to import, so only for those who asked for it

                wandb = real
            mode = settings.mode
            if mode == "online" and not wandb.api.api_key:
                logger.warning("wandb has no API key and stays offline; `wandb login` sets one")
                mode = "offline"
            folder.mkdir(parents=True, exist_ok=True)
            self._run = wandb.init(
                mode=mode,
                project=settings.project,
                entity=settings.entity,
                name=name,
                config=dict(config),
                dir=str(folder),
                settings=wandb.Settings(silent=True, console="off", init_timeout=30.0),
            )
        except Exception as error:  # noqa: BLE001 - a foreign service may raise anything
            self._give_up(error)

    def log(self, kind: str, fields: Mapping[str, Any]) -> None:
        self._lines.log(kind, fields)
        numbers = {
            f"{kind}/{name}": value
            for name, value in fields.items()
            if isinstance(value, int | float)
        }
        run = self._run
        if run is None or not numbers:
            return
        try:
            run.log(numbers)
        except Exception as error:  # noqa: BLE001 - as above
            self._give_up(error)

    def close(self) -> None:
        self._lines.close()
        run, self._run = self._run, None
        if run is None:
            return
        # Without a network, finish() waits for one.
        finish = threading.Thread(target=self._finish, args=(run,), daemon=True)
        finish.start()
        finish.join(5.0)
        if finish.is_alive():
            logger.warning("wandb did not finish in time; `wandb sync` sends what is left")

    def _finish(self, run: Any) -> None:
        try:
            run.finish()
        except Exception as error:  # noqa: BLE001 - as above
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._run = None
        logger.warning("wandb gets no more numbers: %s", one_line(error))


def open_metrics(
    path: Path, wandb: WandbSettings, *, name: str, config: Mapping[str, Any]
) -> Metrics:
    """Metrics to `path` (JSON lines), and to wandb if configured, as a run of this name.

    Raises OperatorError if `path` cannot be written.
    """
    lines = JsonLines(path)
    if wandb.mode == "disabled":
        return lines
    return Wandb(wandb, lines, folder=path.parent, name=name, config=config)


def progress_bar(*, title: str, total: float, unit: str, shown: bool) -> tqdm[Any]:
    """A progress bar on stderr to `update`; none unless it is `shown` and stderr is a terminal."""
    return tqdm(
        desc=title,
        total=total,
        unit=unit,
        leave=False,
        disable=not (shown and sys.stderr is not None and sys.stderr.isatty()),
        dynamic_ncols=True,
    )
