"""Writes a run as the text of a `run.toml`, with or without a comment above each key."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator

from pydantic import BaseModel

from hiveminer.config.run import Run

HEAD = """\
# The run: what everybody who trains together agrees on. Its hash is part of the run id.
# Give the same file to every miner and validator: --neuron.run run.toml
# A key that is left out has the default that is written here.
"""


def to_toml(run: Run, *, comments: bool = False) -> str:
    """The run as TOML, every key of it but the section of a strategy that it does not use.

    comments: with what each key means, for people to edit.
    """
    lines = [*([HEAD] if comments else []), *_keys(run, comments=comments)]
    for name in type(run).model_fields:
        section = getattr(run, name)
        if isinstance(section, BaseModel) and (name != "sparseloco" or run.strategy == name):
            lines += ["", f"[{name}]", *_keys(section, comments=comments)]
    return "\n".join(lines) + "\n"


def _keys(section: BaseModel, *, comments: bool) -> Iterator[str]:
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if not isinstance(value, BaseModel):
            if comments:
                words = textwrap.wrap(field.description or "", 90)
                yield from (f"# {line}" for line in words)
            # TOML writes strings, numbers, booleans and lists as JSON does.
            text = json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
            yield f"{name} = {text}"
