"""What a program needs of this machine (temporary files, descriptors), and gives back (memory)."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
from collections.abc import Mapping
from pathlib import Path

from hiveminer.errors import OperatorError

TEMPORARY = ("TMPDIR", "TMP", "TEMP", "TEMPDIR")
"""Variables that name torch's temporary folder, in this order; Python uses the first three."""

SOCKET = "/torch-shm-dir-XXXXXX/manager.sock"
"""The longest socket path below it: of torch's shared-memory manager."""

MAX_SOCKET_BYTES = 103
"""The longest path of a Unix socket: 103 on macOS, 107 on Linux."""

NEEDED_DESCRIPTORS = 256
"""A miner with a few peers and callers has about half of these open."""

WANTED_DESCRIPTORS = 4096


def check_temporary_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """The folder of temporary files. Raises OperatorError if it cannot be used."""
    name = next((name for name in TEMPORARY if environ.get(name)), None)
    folder = environ[name] if name else "/tmp"
    what = f"the temporary folder {folder[:120]}" + (f" ({name})" if name else "")
    remedy = f"set {name or 'TMPDIR'} to another, such as /tmp"
    if not os.path.isdir(folder):
        raise OperatorError(f"{what} does not exist; make it, or {remedy}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OperatorError(f"{what} cannot be written to; {remedy}")
    most = MAX_SOCKET_BYTES - len(SOCKET)
    if len(os.fsencode(folder)) > most:
        raise OperatorError(
            f"{what} has a path longer than {most} bytes, too long for a socket in it; {remedy}"
        )
    return Path(folder)


def check_descriptors() -> int:
    """Raise the limit of open files as far as useful and allowed, and return it.

    Raises OperatorError if it is too low.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = WANTED_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, WANTED_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < limit:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
        soft = limit
    if soft != resource.RLIM_INFINITY and soft < NEEDED_DESCRIPTORS:
        raise OperatorError(
            f"only {soft} files and sockets may be open, and {NEEDED_DESCRIPTORS} are needed; "
            "raise the limit: ulimit -n 4096 (systemd: LimitNOFILE=, Docker: --ulimit nofile=4096)"
        )
    return soft


def return_free_memory() -> None:
    """Return memory that was freed to the system, where the C library is glibc.

    Each thread allocates from an arena of its own. Batches differ in size, so free pieces pile
    up in the arenas: 40 MB more in ten minutes of training, with nothing that uses them.
    """
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def keep_freed_memory() -> None:
    """Keep memory that is freed for what is allocated next, where the C library is glibc.

    The arenas of threads other than the main one give everything back as soon as it is free. A
    training step in such a thread would get each page of its gradients anew from the system: a
    twentieth of its CPU time on a small model. `return_free_memory` still returns it.
    """
    with contextlib.suppress(AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 32 * 2**20)  # M_MMAP_THRESHOLD of malloc.h
        mallopt(-1, 2**30)  # M_TRIM_THRESHOLD
        mallopt(-2, 64 * 2**20)  # M_TOP_PAD
