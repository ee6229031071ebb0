"""Finds installed packages that do not meet this package's requirements, as its metadata lists
them."""

from __future__ import annotations

import functools
import importlib.metadata

from packaging.requirements import Requirement


def unmet() -> list[str]:
    """A line for each requirement that is not met, with the command that fixes it; empty if this
    package itself is not installed."""
    try:
        lines = importlib.metadata.requires("hiveminer") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    return [problem for line in lines if (problem := _problem(line)) is not None]


def explained(error: ImportError) -> str | None:
    """An ImportError with the packages that may cause it; None when all requirements are met."""
    wrong = "; ".join(unmet())
    return f"{error}; {wrong}" if wrong else None


@functools.cache
def _problem(line: str) -> str | None:
    required = Requirement(line)
    if required.marker is not None and not required.marker.evaluate({"extra": ""}):
        return None
    try:
        version = importlib.metadata.version(required.name)
        if required.specifier.contains(version, prereleases=True):
            return None
        found = f"{required.name} {version} is installed"
    except importlib.metadata.PackageNotFoundError:
        found = f"{required.name} is missing"
    # pip writes the parts of a range in any order.
    wanted = ",".join(sorted(str(required.specifier).split(","), key=lambda part: part[:1] != ">"))
    return (
        f"{found}, and {wanted or 'any version'} is wanted: pip install '{required.name}{wanted}'"
    )
