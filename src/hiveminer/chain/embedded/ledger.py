"""The embedded network's one file: SQLite, its schema, its transactions and its clock.

Any number of processes share the file. It is written whole under another name and then
linked into place, so that the first process creates it and none ever sees half of one. It
is in WAL mode, so that readers never wait for a writer. A process killed in the middle of
a write leaves nothing of that transaction.
"""

from __future__ import annotations

import contextlib
import math
import os
import secrets
import sqlite3
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import bittensor as bt

from hiveminer.chain.embedded.consensus import RAO_PER_TAO
from hiveminer.errors import OperatorError

SCHEMA_VERSION = 1
"""Raised whenever the tables change; a file of another version is refused."""

APPLICATION_ID = 0x686D6E31
"""In the file's header: tells our files from other SQLite files ("hmn1")."""

BUSY_SECONDS = 5.0
"""How long a writer waits for another process's transaction to end."""

MAX_BLOCK_SECONDS = 3600.0
MAX_NEURONS = 4096
"""The most neurons that a subnet may have."""

FAUCET_RAO = 1_000_000 * RAO_PER_TAO
"""The balance of every new coldkey."""

NOBODY: str = bt.sp_core.ss58_encode(bytes(32))
"""The owner of what has no owner."""

_CURE = "remove it, or choose another place"

_SCHEMA = """
CREATE TABLE network (
    chain_id TEXT NOT NULL,
    genesis_seconds REAL NOT NULL,
    block_seconds REAL NOT NULL
);
CREATE TABLE subnets (
    netuid INTEGER PRIMARY KEY,
    registered_block INTEGER NOT NULL,
    owner_hotkey TEXT NOT NULL,
    owner_coldkey TEXT NOT NULL
);
CREATE TABLE hyperparameters (
    netuid INTEGER NOT NULL,
    name TEXT NOT NULL,
    value INTEGER NOT NULL,
    PRIMARY KEY (netuid, name)
) WITHOUT ROWID;
CREATE TABLE accounts (
    address TEXT PRIMARY KEY,
    free_rao INTEGER NOT NULL CHECK (free_rao >= 0),
    nonce INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE owners (
    hotkey TEXT PRIMARY KEY,
    coldkey TEXT NOT NULL
) WITHOUT ROWID;
CREATE TABLE stakes (
    hotkey TEXT NOT NULL,
    coldkey TEXT NOT NULL,
    netuid INTEGER NOT NULL,
    rao INTEGER NOT NULL,
    PRIMARY KEY (hotkey, coldkey, netuid)
) WITHOUT ROWID;
CREATE TABLE neurons (
    netuid INTEGER NOT NULL,
    uid INTEGER NOT NULL,
    hotkey TEXT NOT NULL,
    vacant INTEGER NOT NULL DEFAULT 0,
    registered_block INTEGER NOT NULL,
    last_update INTEGER NOT NULL,
    served_block INTEGER NOT NULL DEFAULT 0,
    ip TEXT NOT NULL DEFAULT '0',
    ip_type INTEGER NOT NULL DEFAULT 4,
    port INTEGER NOT NULL DEFAULT 0,
    protocol INTEGER NOT NULL DEFAULT 0,
    version INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (netuid, uid),
    UNIQUE (netuid, hotkey)
) WITHOUT ROWID;
CREATE TABLE weights (
    netuid INTEGER NOT NULL,
    uid INTEGER NOT NULL,
    target INTEGER NOT NULL,
    value INTEGER NOT NULL,
    PRIMARY KEY (netuid, uid, target)
) WITHOUT ROWID;
CREATE TABLE commitments (
    netuid INTEGER NOT NULL,
    hotkey TEXT NOT NULL,
    block INTEGER NOT NULL,
    variant TEXT NOT NULL,
    data BLOB NOT NULL,
    epoch INTEGER NOT NULL,
    used_bytes INTEGER NOT NULL,
    PRIMARY KEY (netuid, hotkey)
) WITHOUT ROWID;
"""


@dataclass(frozen=True)
class Hyperparameter:
    """A subnet's setting: its default here, its largest value, its name in chain storage,
    and the chain's type for it."""

    default: int
    maximum: int
    storage: str
    type: str


def _u16(default: int, storage: str, maximum: int = 65535) -> Hyperparameter:
    return Hyperparameter(default, maximum, storage, "U16")


def _u64(default: int, storage: str) -> Hyperparameter:
    return Hyperparameter(default, 2**62, storage, "U64")


def _flag(default: int, storage: str) -> Hyperparameter:
    return Hyperparameter(default, 1, storage, "Bool")


# The defaults are the main network's, but for the rate limits, which are short because a
# demo lasts seconds, and the price of a registration, which does not float.
HYPERPARAMETERS: dict[str, Hyperparameter] = {
    "tempo": _u16(360, "Tempo"),
    "immunity_period": _u16(4096, "ImmunityPeriod"),
    "min_allowed_weights": _u16(1, "MinAllowedWeights"),
    "max_weights_limit": _u16(65535, "MaxWeightsLimit"),
    "weights_version": _u64(0, "WeightsVersionKey"),
    "weights_rate_limit": _u64(5, "WeightsSetRateLimit"),
    "serving_rate_limit": _u64(2, "ServingRateLimit"),
    "activity_cutoff": _u16(5000, "ActivityCutoff"),
    "max_validators": _u16(64, "MaxAllowedValidators", MAX_NEURONS),
    "max_allowed_uids": _u16(256, "MaxAllowedUids", MAX_NEURONS),
    "registration_allowed": _flag(1, "NetworkRegistrationAllowed"),
    "commit_reveal_weights_enabled": _flag(0, "CommitRevealWeightsEnabled"),
    "burn": _u64(RAO_PER_TAO, "Burn"),
}


class Ledger:
    """The file at `path`. `clock` gives seconds since 1970.

    Each thread of each process opens a connection of its own when it needs one: an SQLite
    connection must never be used, nor even closed, in a forked child.
    """

    def __init__(self, path: Path, *, block_seconds: float, clock: Callable[[], float]):
        if not (math.isfinite(block_seconds) and 0 < block_seconds <= MAX_BLOCK_SECONDS):
            raise ValueError(f"block_seconds must be in 0..{MAX_BLOCK_SECONDS:.0f}")
        self.path = Path(path)
        self._clock = clock
        self._wanted_block_seconds = float(block_seconds)
        # A plain dictionary on purpose: values in a `threading.local` die, and with them
        # their connections are closed, in every child that the process forks. No lock,
        # which a fork could leave locked for ever: each thread writes under its own key.
        self._connections: dict[tuple[int, int], sqlite3.Connection] = {}
        self._network: tuple[str, float, float] | None = None

    # The clock ------------------------------------------------------------------

    @property
    def chain_id(self) -> str:
        """32 hexadecimal digits, drawn when the file was made."""
        return self._header()[0]

    @property
    def genesis_seconds(self) -> float:
        """When block 1 began, in seconds since 1970."""
        return self._header()[1]

    @property
    def block_seconds(self) -> float:
        """The length of a block: the file's, whatever this process asked for."""
        return self._header()[2]

    def now(self) -> float:
        """Seconds since 1970, by this network's clock."""
        return self._clock()

    def block(self) -> int:
        """The current block's number, from 1."""
        age = self._clock() - self.genesis_seconds
        return max(0, int(age / self.block_seconds)) + 1

    def _header(self) -> tuple[str, float, float]:
        if self._network is None:
            self.connection()
        assert self._network is not None
        return self._network

    # Connections ----------------------------------------------------------------

    def connection(self) -> sqlite3.Connection:
        """This thread's connection; makes the file if there is none.

        Raises `OperatorError` if the file cannot be made, or is not ours to read.
        """
        key = (os.getpid(), threading.get_ident())
        known = self._connections.get(key)
        if known is not None:
            return known
        try:
            if not self.path.exists():
                _create(self.path, block_seconds=self._wanted_block_seconds, now=self._clock())
            made, self._network = _connect(self.path)
        except (OSError, sqlite3.OperationalError) as error:
            raise OperatorError(
                f"the embedded network cannot use {self.path}: {error}; "
                "see that its folder can be written to"
            ) from error
        except (sqlite3.Error, TypeError, ValueError) as error:
            raise OperatorError(f"{self.path} cannot be read: {error}; {_CURE}") from error
        self._connections[key] = made
        return made

    def close(self) -> None:
        """Close this process's connections; those inherited over a fork are left alone."""
        for key in [key for key in list(self._connections) if key[0] == os.getpid()]:
            self._connections.pop(key).close()

    # Transactions ---------------------------------------------------------------

    @contextlib.contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """One consistent view of the file."""
        with self._transaction("BEGIN") as connection:
            yield connection

    @contextlib.contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """The one writer: all changes are kept, or, if the block raises, none."""
        with self._transaction("BEGIN IMMEDIATE") as connection:
            yield connection

    @contextlib.contextmanager
    def _transaction(self, begin: str) -> Iterator[sqlite3.Connection]:
        connection = self.connection()
        try:
            connection.execute(begin)
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                # SQLite has rolled back by itself after some failures (a full disk).
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise
        except sqlite3.OperationalError as error:
            raise bt.RpcConnectionError(f"embedded network, {self.path}: {error}") from error
        except sqlite3.Error as error:
            raise bt.ChainError(f"embedded network, {self.path}: {error}") from error


def _connect(path: Path) -> tuple[sqlite3.Connection, tuple[str, float, float]]:
    connection = sqlite3.connect(
        f"{path.absolute().as_uri()}?mode=rw",
        uri=True,
        timeout=BUSY_SECONDS,
        isolation_level=None,
        # Used by one thread only, but closed by whichever thread calls `close`.
        check_same_thread=False,
    )
    try:
        header = _read_header(connection, path)
        # In WAL mode this keeps the file sound through any crash of a process; only a
        # power cut may undo the last few writes, which a network for tests can afford.
        connection.execute("PRAGMA synchronous = NORMAL")
    except BaseException:
        connection.close()
        raise
    return connection, header


def _read_header(connection: sqlite3.Connection, path: Path) -> tuple[str, float, float]:
    application = int(connection.execute("PRAGMA application_id").fetchone()[0])
    version = int(connection.execute("PRAGMA user_version").fetchone()[0])
    if application != APPLICATION_ID:
        raise OperatorError(f"{path} is not an embedded network's file; {_CURE}")
    if version != SCHEMA_VERSION:
        raise OperatorError(
            f"{path} is of version {version}, and this program reads {SCHEMA_VERSION}; {_CURE}"
        )
    row = connection.execute(
        "SELECT chain_id, genesis_seconds, block_seconds FROM network"
    ).fetchone()
    chain_id, genesis, seconds = str(row[0]), float(row[1]), float(row[2])
    if not (math.isfinite(genesis) and 0 < seconds <= MAX_BLOCK_SECONDS):
        raise ValueError("it holds a clock that cannot be")
    return chain_id, genesis, seconds


def _create(path: Path, *, block_seconds: float, now: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    draft = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        with contextlib.closing(sqlite3.connect(draft, isolation_level=None)) as connection:
            _write_schema(connection, block_seconds=block_seconds, now=now)
        draft.chmod(0o600)
        # Another process may have been first: then its file is used.
        with contextlib.suppress(FileExistsError):
            os.link(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def _write_schema(connection: sqlite3.Connection, *, block_seconds: float, now: float) -> None:
    connection.execute("PRAGMA journal_mode = WAL")
    connection.executescript(f"BEGIN; {_SCHEMA} COMMIT;")
    connection.execute("BEGIN")
    connection.execute(
        "INSERT INTO network VALUES (?, ?, ?)", (secrets.token_hex(16), now, block_seconds)
    )
    for netuid in (0, 1):
        add_subnet(connection, netuid, block=1)
    connection.execute("COMMIT")
    connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")


def add_subnet(connection: sqlite3.Connection, netuid: int, *, block: int) -> None:
    """A new subnet that nobody owns, with the default hyperparameters."""
    connection.execute("INSERT INTO subnets VALUES (?, ?, ?, ?)", (netuid, block, NOBODY, NOBODY))
    connection.executemany(
        "INSERT INTO hyperparameters VALUES (?, ?, ?)",
        [(netuid, name, each.default) for name, each in HYPERPARAMETERS.items()],
    )
