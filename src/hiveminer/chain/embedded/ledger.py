"""The embedded network's one file: SQLite, its schema, its transactions and its clock.

Any number of processes share the file. The first one writes it completely under another name and
links it into place. WAL mode lets readers proceed during a write, and a transaction of a process
that is killed leaves nothing behind.

Blocks come from the clock. A block is final once it is sealed, which takes the write lock, and a
write goes into the first block that is not sealed. So a process that is stopped within its
transaction delays finality, but cannot change what is final for others. Before the first write of
a block the state is copied to `history`, so that it can be read as of an earlier block.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import bittensor as bt

from hiveminer.chain.embedded.schema import (
    APPLICATION_ID,
    BLOCKS,
    SCHEMA_VERSION,
    copied,
    restored,
    write_schema,
)
from hiveminer.errors import OperatorError

FINALITY_BLOCKS = 2
"""A block is final once this many follow it."""

KEPT_BLOCKS = 256
"""The state can be read as of this many blocks before the head, as from a pruned node."""

_CURE = "remove it, or choose another place"


class Header(NamedTuple):
    """chain_id: 32 hexadecimal digits, drawn when the file was made. genesis_seconds: the start
    of block 1, in seconds since 1970."""

    chain_id: str
    genesis_seconds: float
    block_seconds: float


class Ledger:
    """The file at `path`. `clock` gives seconds since 1970.

    Each thread of each process opens a connection of its own when it needs one: an SQLite
    connection must never be used, nor even closed, in a forked child.
    """

    def __init__(self, path: Path, *, block_seconds: float, clock: Callable[[], float]):
        self.path = Path(path)
        self._clock = clock
        self._wanted_block_seconds = float(block_seconds)
        # Not a `threading.local`: its values are dropped, and with them the connections closed,
        # in every forked child. And no lock, which a fork could leave locked: each thread writes
        # under its own key.
        self._connections: dict[tuple[int, int], sqlite3.Connection] = {}
        self._header: Header | None = None

    # The clock ------------------------------------------------------------------

    @property
    def header(self) -> Header:
        """What the file says of itself. Raises as `connection` does."""
        if self._header is None:
            self._header = _read_header(self.connection(), self.path)
        return self._header

    def start_of(self, block: int) -> float:
        """When a block begins, in seconds since 1970."""
        return self.header.genesis_seconds + (block - 1) * self.header.block_seconds

    def block(self) -> int:
        """The current block's number, from 1."""
        age = self._clock() - self.header.genesis_seconds
        return max(0, int(age / self.header.block_seconds)) + 1

    # Connections ----------------------------------------------------------------

    def connection(self) -> sqlite3.Connection:
        """This thread's connection; creates the file if it is missing.

        Raises `OperatorError` if the file cannot be created or read.
        """
        key = (os.getpid(), threading.get_ident())
        known = self._connections.get(key)
        if known is not None:
            return known
        try:
            if not self.path.exists():
                _create(self.path, block_seconds=self._wanted_block_seconds, now=self._clock())
            made = _connect(self.path)
        except (OSError, sqlite3.OperationalError) as error:
            raise OperatorError(
                f"the embedded network cannot use {self.path}: {error}; "
                "check that its folder is writable"
            ) from error
        except (sqlite3.Error, TypeError, ValueError) as error:
            raise OperatorError(f"{self.path} cannot be read: {error}; {_CURE}") from error
        self._connections[key] = made
        return made

    def close(self) -> None:
        """Close this process's connections; those inherited over a fork are left alone."""
        for key in [key for key in list(self._connections) if key[0] == os.getpid()]:
            self._connections.pop(key).close()

    # Blocks ---------------------------------------------------------------------

    def final_block(self) -> int:
        """The newest final block; it and all blocks before it are sealed."""
        due = self.block() - FINALITY_BLOCKS
        with self.transaction() as db:
            sealed = _sealed(db)
        if sealed < due:
            with self.transaction("BEGIN IMMEDIATE") as db:
                sealed = _sealed(db)
                oldest = due - KEPT_BLOCKS
                new = range(max(sealed + 1, oldest), due + 1)
                db.executemany(
                    "INSERT INTO blocks VALUES (?, ?)",
                    [(number, f"0x{secrets.token_hex(32)}") for number in new],
                )
                db.execute("DELETE FROM blocks WHERE number < ?", (oldest,))
                sealed = _sealed(db)
        return max(sealed, 0)

    def hash_of(self, number: int) -> str:
        """A block's hash: random, drawn when the block becomes final; a placeholder before."""
        with self.transaction() as db:
            row = db.execute("SELECT hash FROM blocks WHERE number = ?", (number,)).fetchone()
            if row is not None:
                return str(row[0])
            if not _sealed(db) < number <= max(self.block(), _written(db)):
                raise bt.ChainError(f"the embedded network has no block {number} any more, or yet")
        return f"0x{self.header.chain_id}{number:032x}"

    def number_of(self, block_hash: str) -> int:
        """The number of the block with this hash."""
        with self.transaction() as db:
            row = db.execute("SELECT number FROM blocks WHERE hash = ?", (block_hash,)).fetchone()
        if row is not None:
            return int(row[0])
        name, number = block_hash[:-32], block_hash[-32:]
        if name != f"0x{self.header.chain_id}":
            raise bt.ChainError(f"no such block: {block_hash[:80]}")
        return int(number, 16)

    # Transactions ---------------------------------------------------------------

    @contextlib.contextmanager
    def at(self, block: int | None = None) -> Iterator[tuple[sqlite3.Connection, int]]:
        """The state after a block, the current one if none is given, and the block."""
        with self.transaction() as db:
            head = max(self.block(), _written(db))
            number = head if block is None else block
            if not head - KEPT_BLOCKS <= number <= head:
                raise bt.ChainError(f"the state of block {number} is not kept, or not there yet")
            if number >= _written(db):
                yield db, number
                return
            row = db.execute(
                "SELECT state FROM history WHERE block <= ? ORDER BY block DESC LIMIT 1", (number,)
            ).fetchone()
        if row is None:
            raise bt.ChainError(f"the state of block {number} is not kept")
        with contextlib.closing(restored(row[0])) as past:
            yield past, number

    @contextlib.contextmanager
    def writing(self) -> Iterator[tuple[sqlite3.Connection, int]]:
        """A write transaction, and the block that it writes into."""
        with self.transaction("BEGIN IMMEDIATE") as db:
            written = _written(db)
            block = max(self.block(), written, _sealed(db) + 1)
            if block > written:
                db.execute("INSERT INTO history VALUES (?, ?)", (written, copied(db)))
                db.execute(
                    "DELETE FROM history WHERE block <"
                    " (SELECT MAX(block) FROM history WHERE block <= ?)",
                    (block - KEPT_BLOCKS,),
                )
                db.execute("UPDATE written SET block = ?", (block,))
            yield db, block

    @contextlib.contextmanager
    def transaction(self, begin: str = "BEGIN") -> Iterator[sqlite3.Connection]:
        """One consistent view of the file; rolled back if the body raises."""
        connection = self.connection()
        try:
            connection.execute(begin)
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                # After some failures, such as a full disk, SQLite has rolled back already.
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise
        except sqlite3.OperationalError as error:
            raise bt.RpcConnectionError(f"embedded network, {self.path}: {error}") from error
        except sqlite3.Error as error:
            raise bt.ChainError(f"embedded network, {self.path}: {error}") from error


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(
        f"{path.absolute().as_uri()}?mode=rw",
        uri=True,
        timeout=5.0,  # for another process's transaction to end
        isolation_level=None,
        # Used by one thread only, but closed by whichever thread calls `close`.
        check_same_thread=False,
    )
    try:
        _upgrade(connection)
        _read_header(connection, path)
        # In WAL mode the file survives any crash of a process; only a power cut may undo the last
        # few writes, which a network for tests can afford.
        connection.execute("PRAGMA synchronous = NORMAL")
    except BaseException:
        connection.close()
        raise
    return connection


def _upgrade(connection: sqlite3.Connection) -> None:
    """Add the tables that version 1 did not have."""
    if _pragmas(connection) != (APPLICATION_ID, 1):
        return
    connection.execute("BEGIN IMMEDIATE")
    if _pragmas(connection) == (APPLICATION_ID, 1):  # nobody else was first
        for statement in BLOCKS.split(";"):
            connection.execute(statement)
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
    connection.execute("COMMIT")


def _pragmas(connection: sqlite3.Connection) -> tuple[int, int]:
    application, version = (
        int(connection.execute(f"PRAGMA {name}").fetchone()[0])
        for name in ("application_id", "user_version")
    )
    return application, version


def _read_header(connection: sqlite3.Connection, path: Path) -> Header:
    application, version = _pragmas(connection)
    if application != APPLICATION_ID:
        raise OperatorError(f"{path} is not an embedded network's file; {_CURE}")
    if version != SCHEMA_VERSION:
        raise OperatorError(
            f"{path} is of version {version}, and this program reads {SCHEMA_VERSION}; {_CURE}"
        )
    query = "SELECT chain_id, genesis_seconds, block_seconds FROM network"
    return Header(*connection.execute(query).fetchone())


def _create(path: Path, *, block_seconds: float, now: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    draft = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        with contextlib.closing(sqlite3.connect(draft, isolation_level=None)) as connection:
            write_schema(connection, block_seconds=block_seconds, now=now)
        draft.chmod(0o600)
        # If another process was first, its file is used.
        with contextlib.suppress(FileExistsError):
            os.link(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def _sealed(db: sqlite3.Connection) -> int:
    """The newest sealed block; -1 if there is none."""
    newest = db.execute("SELECT MAX(number) FROM blocks").fetchone()[0]
    return -1 if newest is None else int(newest)


def _written(db: sqlite3.Connection) -> int:
    return int(db.execute("SELECT block FROM written").fetchone()[0])
