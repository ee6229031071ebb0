"""The embedded network's tables: schema, initial content, and copies."""

from __future__ import annotations

import json
import re
import secrets
import sqlite3
import zlib
from typing import Literal, NamedTuple

import bittensor as bt

RAO_PER_TAO = 10**9

SCHEMA_VERSION = 2
"""Incremented when the tables change. A file of version 1 is upgraded, any other is refused."""

APPLICATION_ID = 0x686D6E31
"""Marks our SQLite files, in the header ("hmn1")."""

MAX_NEURONS = 4096
"""Limit of neurons on a subnet."""

FAUCET_RAO = 1_000_000 * RAO_PER_TAO
"""The balance of every new coldkey."""

NOBODY: str = bt.sp_core.ss58_encode(bytes(32))
"""Stands for a missing owner."""

NETWORK = """
CREATE TABLE network (
    chain_id TEXT NOT NULL,
    genesis_seconds REAL NOT NULL,
    block_seconds REAL NOT NULL
);
"""

BLOCKS = """
CREATE TABLE blocks (
    number INTEGER PRIMARY KEY,
    hash TEXT NOT NULL UNIQUE
);
CREATE TABLE history (
    block INTEGER PRIMARY KEY,
    state BLOB NOT NULL
);
CREATE TABLE written (
    block INTEGER NOT NULL
);
INSERT INTO written VALUES (0);
"""
"""blocks: the final ones. written: the block of the newest write. history: the state after the last
write of earlier blocks."""

STATE = """
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


class Hyperparameter(NamedTuple):
    """A subnet's setting: its default here, its name in chain storage, and the chain's type for
    it."""

    default: int
    storage: str
    type: Literal["U16", "U64", "Bool"]


# The main network's defaults, except for rate limits, which are short because a demo lasts seconds,
# and the price of a registration, which is fixed.
HYPERPARAMETERS: dict[str, Hyperparameter] = {
    "tempo": Hyperparameter(360, "Tempo", "U16"),
    "immunity_period": Hyperparameter(4096, "ImmunityPeriod", "U16"),
    "min_allowed_weights": Hyperparameter(1, "MinAllowedWeights", "U16"),
    "max_weights_limit": Hyperparameter(65535, "MaxWeightsLimit", "U16"),
    "weights_version": Hyperparameter(0, "WeightsVersionKey", "U64"),
    "weights_rate_limit": Hyperparameter(5, "WeightsSetRateLimit", "U64"),
    "serving_rate_limit": Hyperparameter(2, "ServingRateLimit", "U64"),
    "activity_cutoff": Hyperparameter(5000, "ActivityCutoff", "U16"),
    "max_validators": Hyperparameter(64, "MaxAllowedValidators", "U16"),
    "max_allowed_uids": Hyperparameter(256, "MaxAllowedUids", "U16"),
    "registration_allowed": Hyperparameter(1, "NetworkRegistrationAllowed", "Bool"),
    "commit_reveal_weights_enabled": Hyperparameter(0, "CommitRevealWeightsEnabled", "Bool"),
    "burn": Hyperparameter(RAO_PER_TAO, "Burn", "U64"),
}


def write_schema(connection: sqlite3.Connection, *, block_seconds: float, now: float) -> None:
    connection.execute("PRAGMA journal_mode = WAL")
    connection.executescript(f"BEGIN; {NETWORK} {BLOCKS} {STATE} COMMIT;")
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
    """Add a subnet without an owner, with the default hyperparameters."""
    connection.execute("INSERT INTO subnets VALUES (?, ?, ?, ?)", (netuid, block, NOBODY, NOBODY))
    connection.executemany(
        "INSERT INTO hyperparameters VALUES (?, ?, ?)",
        [(netuid, name, each.default) for name, each in HYPERPARAMETERS.items()],
    )


def copied(db: sqlite3.Connection) -> bytes:
    """A copy of all tables of the state."""
    names = re.findall(r"CREATE TABLE (\w+)", STATE)
    tables = {name: db.execute(f"SELECT * FROM {name}").fetchall() for name in names}
    text = json.dumps(tables, default=lambda raw: {"hex": raw.hex()}, separators=(",", ":"))
    return zlib.compress(text.encode(), 1)


def restored(copy: bytes) -> sqlite3.Connection:
    """A copied state as an in-memory database."""
    tables = json.loads(
        zlib.decompress(copy),
        object_hook=lambda each: bytes.fromhex(each["hex"]) if "hex" in each else each,
    )
    db = sqlite3.connect(":memory:", isolation_level=None)
    db.executescript(STATE)
    for name, rows in tables.items():
        for row in rows:
            db.execute(f"INSERT INTO {name} VALUES ({', '.join('?' * len(row))})", row)
    return db
