"""Paths and TOML files as people write them: with `~`, empty, or with a byte-order mark."""

from __future__ import annotations

import errno
import os
import tomllib
from pathlib import Path
from typing import Any


def expanded(path: str | Path) -> Path:
    """The path with `~` expanded. Raises ValueError, with the remedy, if it is not a path."""
    text = str(path)
    if not text.strip():
        raise ValueError("must not be empty")
    if "\0" in text:
        raise ValueError("must not contain a null character")
    if not text.startswith("~"):
        return Path(text)
    try:
        found = Path(text).expanduser()
    except RuntimeError:
        found = Path()
    own = text.split("/")[0] == "~"
    if not found.is_absolute() or (own and os.environ.get("HOME") == ""):
        raise ValueError("there is no home folder for ~: give the path in full")
    return found


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file's table. Raises OSError; ValueError when it is not TOML or not UTF-8."""
    if not path.is_file():
        path.stat()  # raises for one that is not there
        raise OSError(errno.EINVAL, "not a regular file")  # reading from a pipe may never end
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))  # with or without the mark
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise ValueError(f"not UTF-8 (byte 0x{byte:02x}); save it as UTF-8") from None
