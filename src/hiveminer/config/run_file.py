"""Writes a run as the text of a `run.toml`, with or without a comment above each key."""

from __future__ import annotations

import ast
import inspect
import json
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from hiveminer.config.run import Run

HEAD = """\
# The run: what everybody who trains together agrees on. Its hash is part of the run id.
# Give the same file to every miner and validator: --neuron.run run.toml
# A key that is left out has the default that is written here.
"""


def to_toml(run: Run) -> str:
    """The run as TOML, every key of it."""
    table = run.model_dump(include={*_sections(run)})
    return "".join(f"{line}\n" for line in _plain(table))


def commented_toml(run: Run) -> str:
    """The run as TOML with every key and what it means; for people to edit."""
    lines = list(_commented(run))
    for name in _sections(run):
        section = getattr(run, name)
        if isinstance(section, BaseModel):
            lines += ["", f"[{name}]", *_commented(section)]
    return HEAD + "\n" + "\n".join(lines) + "\n"


def _sections(run: Run) -> list[str]:
    """The keys of the run, without the section of a strategy that it does not use."""
    return [
        name
        for name in type(run).model_fields
        if name != "sparseloco" or run.strategy == "sparseloco"
    ]


def _plain(tree: Mapping[str, Any]) -> Iterator[str]:
    sections = {name: value for name, value in tree.items() if isinstance(value, dict)}
    for name, value in tree.items():
        if name not in sections:
            yield f"{name} = {_value(value)}"
    for name, section in sections.items():
        yield f"[{name}]"
        yield from _plain(section)


def _commented(section: BaseModel) -> Iterator[str]:
    comments = _docstrings(type(section))
    for name in type(section).model_fields:
        value = getattr(section, name)
        if not isinstance(value, BaseModel):
            yield from (f"# {line}" for line in textwrap.wrap(comments.get(name, ""), 90))
            yield f"{name} = {_value(value)}"


def _value(value: Any) -> str:
    """A TOML value; JSON's strings, numbers, booleans and lists are written the same way."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _docstrings(section: type[BaseModel]) -> dict[str, str]:
    """The sentence below each field in the source."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(section)))
    body = tree.body[0]
    assert isinstance(body, ast.ClassDef)
    found: dict[str, str] = {}
    for field, below in zip(body.body, body.body[1:], strict=False):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(below, ast.Expr)
            and isinstance(below.value, ast.Constant)
            and isinstance(below.value.value, str)
        ):
            found[field.target.id] = " ".join(below.value.value.split())
    return found
