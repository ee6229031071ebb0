"""Finds installed packages that do not meet this package's requirements, as its metadata lists
them."""

from __future__ import annotations

import functools
import importlib.metadata
from dataclasses import dataclass

from packaging.requirements import InvalidRequirement, Requirement


@dataclass(frozen=True)
class Unmet:
    """A package that is missing, or of a version outside the range."""

    name: str
    found: str | None
    wanted: str

    def __str__(self) -> str:
        found = (
            f"{self.name} {self.found} is installed" if self.found else f"{self.name} is missing"
        )
        return f"{found}, and {self.wanted or 'any version'} is wanted: {self.pip}"

    @property
    def pip(self) -> str:
        """The command that fixes it."""
        return f"pip install '{self.name}{self.wanted}'"


def unmet(distribution: str = "hiveminer") -> list[Unmet]:
    """Unmet requirements of this distribution; empty if it is not installed itself."""
    try:
        lines = importlib.metadata.requires(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        return []
    checked = [_check(line) for line in lines]
    return [each for each in checked if each is not None]


def explained(error: ImportError) -> str | None:
    """An ImportError with the packages that may cause it; None when all requirements are met."""
    wrong = "; ".join(map(str, unmet()))
    return f"{error}; {wrong}" if wrong else None


@functools.cache
def _check(line: str) -> Unmet | None:
    try:
        wanted = Requirement(line)
    except InvalidRequirement:
        return None
    if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
        return None
    # pip writes the parts of a range in any order.
    parts = sorted(str(wanted.specifier).split(","), key=lambda part: part[:1] != ">")
    try:
        found = importlib.metadata.version(wanted.name)
    except importlib.metadata.PackageNotFoundError:
        return Unmet(wanted.name, None, ",".join(parts))
    if wanted.specifier.contains(found, prereleases=True):
        return None
    return Unmet(wanted.name, found, ",".join(parts))
