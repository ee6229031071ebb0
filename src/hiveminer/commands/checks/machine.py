"""Doctor's checks of this machine: Python, packages, limits, disk, ports and wandb."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import netrc
import os
import platform
import shutil
import sys

from hiveminer.commands.checks.base import Check, Examination, failed, gigabytes, passed, warned
from hiveminer.runtime import dependencies, machine
from hiveminer.runtime.addresses import port_is_free

PYTHONS = ((3, 11), (3, 14))
SHOWN = ("bittensor", "hivemind", "torch", "transformers", "datasets")
"""The packages whose versions are listed."""


def python(exam: Examination) -> Check:
    version = platform.python_version()
    if not PYTHONS[0] <= sys.version_info[:2] < PYTHONS[1]:
        return failed(version, "install Python 3.11, 3.12 or 3.13")
    return passed(version)


def packages(exam: Examination) -> Check:
    wrong = dependencies.unmet()
    if wrong:
        return failed("; ".join(wrong), "install what this version was written for")
    return passed(", ".join(f"{name} {importlib.metadata.version(name)}" for name in SHOWN))


def limits(exam: Examination) -> Check:
    folder = machine.check_temporary_folder()
    return passed(f"temporary files in {folder}, {machine.check_descriptors()} may be open")


def disk(exam: Examination) -> Check:
    place = exam.settings.neuron.path
    existing = next(p for p in (place.absolute(), *place.absolute().parents) if p.exists())
    if not os.access(existing, os.W_OK | os.X_OK):
        return failed(
            f"{existing} cannot be written to", "choose another folder with --neuron.path"
        )
    free = shutil.disk_usage(existing).free
    said = f"{gigabytes(free)} free at {existing}"
    if free < 200e6:
        return failed(said, "free some space, or choose another folder with --neuron.path")
    if free < 2e9:
        return warned(said, "logs and metrics grow: keep 2 GB free")
    return passed(said)


def ports(exam: Examination) -> Check:
    settings = exam.settings
    wanted = [
        ("--axon.port", settings.axon_ip, settings.axon.port),
        ("--dht.port", settings.dht_ip, settings.dht.port),
        ("--axon.metrics_port", "127.0.0.1", settings.axon.metrics_port or 0),
    ]
    taken = [(flag, port) for flag, ip, port in wanted if port and not port_is_free(ip, port)]
    said = ", ".join(f"{flag} {port or 'any'}" for flag, _, port in wanted if port) or "any"
    if not taken:
        return passed(f"free: {said}")
    names = ", ".join(f"{flag} {port}" for flag, port in taken)
    if settings.embedded and not any(settings.given(flag[2:]) for flag, _ in taken):
        return passed(f"in use: {names}; a miner takes the next free ones")
    return failed(f"in use: {names}", "stop what listens there (your miner?), or choose others")


def wandb(exam: Examination) -> Check:
    mode = exam.settings.wandb.mode
    if mode == "disabled":
        return passed("disabled; numbers go to metrics.jsonl")
    if importlib.util.find_spec("wandb") is None:
        return failed(f"{mode}, and the package is missing", "pip install wandb")
    if mode == "online" and not _has_wandb_key(exam):
        return warned("online, but without an API key: it stays offline", "run: wandb login")
    return passed(mode)


def _has_wandb_key(exam: Examination) -> bool:
    if exam.environ.get("WANDB_API_KEY"):
        return True
    with contextlib.suppress(OSError, netrc.NetrcParseError):
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    return False
