"""The tree is what the design says: imports run down, and whatever is imported is declared."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "hiveminer"

# A module may import what stands in a row below its own, or further right in its own.
ROWS = [
    ["__main__"],
    ["cli", "scoring"],
    ["commands"],
    ["miner", "validator"],
    ["base_miner", "neuron"],
    ["validation"],
    ["strategies"],
    ["swarm"],
    ["chain"],
    ["training"],
    ["rpc"],
    ["runtime"],
    ["config"],
    ["protocol", "errors", "__version__"],
]
ORDER = {name: (depth, i) for depth, row in enumerate(ROWS) for i, name in enumerate(row)}

# Names of packages that differ from the names that are imported.
DISTRIBUTIONS = {"prometheus_client": "prometheus-client", "pydantic_settings": "pydantic-settings"}
DISTRIBUTIONS |= {"annotated_types": "annotated-types"}


def _files() -> list[Path]:
    return sorted(path for path in SOURCE.rglob("*.py") if path != SOURCE / "__init__.py")


def _room(path: Path) -> str:
    """The module, or the folder that it is a part of: chain/embedded.py is chain."""
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _rooms_imported(path: Path) -> Iterator[str]:
    for name in _imports(path):
        package, _, rest = name.partition(".")
        if package == "hiveminer" and rest != "__version__":
            yield rest.partition(".")[0]


def test_every_module_has_its_row() -> None:
    rooms = {_room(path) for path in _files()}
    assert rooms - set(ORDER) == set(), "give the new module its row in ROWS and in the README"


@pytest.mark.parametrize("path", _files(), ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_run_down(path: Path) -> None:
    room = _room(path)
    for other in _rooms_imported(path):
        assert other in ORDER, f"{room} imports {other}, which is no module of its own"
        assert other == room or ORDER[other] > ORDER[room], f"{room} imports {other}, above it"


@pytest.mark.parametrize("name", ["miner.py", "validator.py"])
def test_what_people_copy_imports_the_package_only(name: str) -> None:
    path = ROOT / name
    assert all(found.partition(".")[0] == "hiveminer" for found in _imports(path))
    assert path.read_text(encoding="utf-8").startswith("# SPDX-License-Identifier: MIT\n")


def test_what_is_imported_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {re.split(r"[^a-z0-9-]", line)[0] for line in project["dependencies"]}
    packages = {name.partition(".")[0] for path in _files() for name in _imports(path)}
    packages -= {"hiveminer", *sys.stdlib_module_names}
    assert {DISTRIBUTIONS.get(name, name) for name in packages} <= declared
