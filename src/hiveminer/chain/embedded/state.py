"""Reads neurons, stakes, balances and weights from the ledger's tables.

Functions of an open transaction, for `reads` and `rules`.
"""

from __future__ import annotations

import sqlite3
from typing import NamedTuple, NoReturn

import bittensor as bt

from hiveminer.chain.embedded.schema import FAUCET_RAO, NOBODY


def refuse(name: str, reason: str) -> NoReturn:
    """Refuse a call or a read with the chain's name for the error."""
    raise bt.ChainError(f"{reason} ({name})", name)


def hyperparameters(db: sqlite3.Connection, netuid: int) -> dict[str, int]:
    """A subnet's settings by name; `SubnetNotExists` if there is no such subnet."""
    rows = db.execute(
        "SELECT name, value FROM hyperparameters WHERE netuid = ?", (netuid,)
    ).fetchall()
    if not rows:
        refuse("SubnetNotExists", f"there is no subnet {netuid}")
    return {str(name): int(value) for name, value in rows}


def owner(db: sqlite3.Connection, hotkey: str) -> str | None:
    """The coldkey that owns a hotkey."""
    row = db.execute("SELECT coldkey FROM owners WHERE hotkey = ?", (hotkey,)).fetchone()
    return None if row is None else str(row[0])


def balance(db: sqlite3.Connection, address: str) -> int:
    """Free rao. An unused account is a funded coldkey, unless it is a hotkey."""
    row = db.execute("SELECT free_rao FROM accounts WHERE address = ?", (address,)).fetchone()
    if row is not None:
        return int(row[0])
    return 0 if address == NOBODY or owner(db, address) is not None else FAUCET_RAO


def stake(db: sqlite3.Connection, hotkey: str, netuid: int) -> int:
    """Rao staked on a hotkey on a subnet, by all coldkeys."""
    row = db.execute(
        "SELECT COALESCE(SUM(rao), 0) FROM stakes WHERE hotkey = ? AND netuid = ?",
        (hotkey, netuid),
    ).fetchone()
    return int(row[0])


class Neuron(NamedTuple):
    """A neuron in the ledger; blocks are numbers, stakes are in rao.

    vacant: its hotkey was deregistered, and the uid is free. ip: the address as a decimal
    number.
    """

    uid: int
    hotkey: str
    coldkey: str
    vacant: int
    registered: int
    last_update: int
    served: int
    ip: str
    ip_type: int
    port: int
    alpha_stake: int
    tao_stake: int

    @property
    def stake(self) -> int:
        """The stake that counts: on the subnet and on root."""
        return self.alpha_stake + self.tao_stake


_NEURONS = """
SELECT n.uid, n.hotkey, COALESCE(o.coldkey, ?), n.vacant, n.registered_block, n.last_update,
    n.served_block, n.ip, n.ip_type, n.port,
    (SELECT COALESCE(SUM(rao), 0) FROM stakes s WHERE s.hotkey = n.hotkey AND s.netuid = n.netuid
        AND n.netuid != 0),
    (SELECT COALESCE(SUM(rao), 0) FROM stakes s WHERE s.hotkey = n.hotkey AND s.netuid = 0)
FROM neurons n LEFT JOIN owners o ON o.hotkey = n.hotkey WHERE n.netuid = ? ORDER BY n.uid
"""


def neurons(db: sqlite3.Connection, netuid: int) -> list[Neuron]:
    """A subnet's neurons; a neuron's index in the list is its uid."""
    return [Neuron(*row) for row in db.execute(_NEURONS, (NOBODY, netuid))]


def weights(db: sqlite3.Connection, netuid: int) -> dict[int, dict[int, int]]:
    """All weights: {validator's uid: {uid: 0..65535}}."""
    found: dict[int, dict[int, int]] = {}
    rows = db.execute(
        "SELECT uid, target, value FROM weights WHERE netuid = ? ORDER BY uid, target", (netuid,)
    )
    for uid, target, value in rows:
        found.setdefault(uid, {})[target] = value
    return found


def uid_of(db: sqlite3.Connection, netuid: int, hotkey: str) -> int | None:
    """A hotkey's uid on a subnet."""
    row = db.execute(
        "SELECT uid FROM neurons WHERE netuid = ? AND hotkey = ?", (netuid, hotkey)
    ).fetchone()
    return None if row is None else int(row[0])


def nonce(db: sqlite3.Connection, address: str) -> int:
    """Number of calls that this account has made."""
    row = db.execute("SELECT nonce FROM accounts WHERE address = ?", (address,)).fetchone()
    return 0 if row is None else int(row[0])
