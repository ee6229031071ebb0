"""Files of rows for tests, and how they are loaded or refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from tiny import one_line

from hiveminer.config.run import DataSection
from hiveminer.errors import OperatorError
from hiveminer.training.data import Rows, load_rows


def load(path: Path | str, **section: Any) -> Rows:
    return load_rows(DataSection(name=str(path), **section))


def all_texts(rows: Rows) -> list[str]:
    return rows.texts(range(len(rows)))


def write_lines(path: Path, texts: Sequence[str], *, column: str = "text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    records = (json.dumps({column: text, "number": i}) for i, text in enumerate(texts))
    path.write_text("\n".join(records) + "\n", encoding="utf-8")
    return path


def write_parquet(path: Path, texts: Sequence[str | None]) -> Path:
    pyarrow.parquet.write_table(pyarrow.table({"text": list(texts)}), path)
    return path


def write_rows(path: Path, texts: Sequence[str]) -> None:
    """Write a file of the kind that its suffix names; plain text has the first one only."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        write_parquet(path, texts)
    elif path.suffix == ".jsonl":
        write_lines(path, texts)
    else:
        path.write_text(texts[0])


def refused(path: Path | str, words: str, **section: Any) -> str:
    """The one line in which a path is refused."""
    with pytest.raises(OperatorError, match=words) as caught:
        load(path, **section)
    return one_line(caught)
