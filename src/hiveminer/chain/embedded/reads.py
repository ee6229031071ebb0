"""What can be read of the embedded network: storage items and runtime APIs, in the SDK's form.

It has what the SDK reads for a neuron, `hiveminer doctor` and `hiveminer status`; anything else is
refused. A reader is a function of an open transaction, the parameters, and the block.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence
from typing import Any

import bittensor as bt

from hiveminer.chain.embedded import state
from hiveminer.chain.embedded.consensus import RAO_PER_TAO
from hiveminer.chain.embedded.rules import MAX_COMMITMENT_SPACE
from hiveminer.chain.embedded.schema import HYPERPARAMETERS

_NAME, _SYMBOL = b"embedded", "\N{GREEK SMALL LETTER ALPHA}".encode()

Reader = Callable[[sqlite3.Connection, list[Any], int], Any]


def item(module: str, name: str) -> Reader:
    """The reader of a storage item. Raises `bittensor.ChainError` for an unsupported one."""
    if module == "SubtensorModule" and name in _SETTINGS:
        setting = _SETTINGS[name]
        return lambda db, params, block: _setting(db, setting, params[0])
    return _find(_ITEMS, module, name)


def whole_map(module: str, name: str) -> Reader:
    """The reader of a whole storage map, as (key, value) pairs. Raises as `item` does."""
    return _find(_MAPS, module, name)


def runtime(api: str, method: str) -> Reader:
    """The reader of a runtime API's answer. Raises as `item` does."""
    return _find(_RUNTIME, api, method)


def not_kept(what: str) -> bt.ChainError:
    """The error for what this network does not support."""
    text = f"the embedded network does not keep {what}"
    return bt.ChainError(text, code=bt.ErrorCode.DISABLED)


def nonce(db: sqlite3.Connection, address: str) -> int:
    """Number of calls that this account has made."""
    row = db.execute("SELECT nonce FROM accounts WHERE address = ?", (address,)).fetchone()
    return 0 if row is None else int(row[0])


def _find(readers: dict[tuple[str, str], Reader], module: str, name: str) -> Reader:
    reader = readers.get((module, name))
    if reader is None:
        raise not_kept(f"{module}.{name}")
    return reader


# Storage items -------------------------------------------------------------------

_SETTINGS = {each.storage: name for name, each in HYPERPARAMETERS.items()}


def _setting(db: sqlite3.Connection, name: str, netuid: int) -> int | bool | None:
    row = db.execute(
        "SELECT value FROM hyperparameters WHERE netuid = ? AND name = ?", (netuid, name)
    ).fetchone()
    if row is None:
        return None
    return bool(row[0]) if HYPERPARAMETERS[name].type == "Bool" else int(row[0])


def _account(db: sqlite3.Connection, params: list[Any], block: int) -> dict[str, Any]:
    free = state.balance(db, params[0])
    return {
        "nonce": nonce(db, params[0]),
        "data": {"free": free, "reserved": 0, "frozen": 0, "flags": 0},
    }


def _last_updates(db: sqlite3.Connection, params: list[Any], block: int) -> list[int]:
    return [neuron.last_update for neuron in state.neurons(db, params[0])]


def _axon(neuron: state.Neuron) -> dict[str, int]:
    return {
        "block": neuron.served,
        "version": neuron.version,
        "ip": int(neuron.ip),
        "port": neuron.port,
        "ip_type": neuron.ip_type,
        "protocol": neuron.protocol,
        "placeholder1": 0,
        "placeholder2": 0,
    }


def _commitments(db: sqlite3.Connection, params: list[Any], block: int) -> list[tuple[Any, Any]]:
    rows = db.execute(
        "SELECT hotkey, block, variant, data FROM commitments WHERE netuid = ?", (params[0],)
    )
    return [
        (hotkey, {"block": at, "deposit": 0, "info": {"fields": [{variant: "0x" + data.hex()}]}})
        for hotkey, at, variant, data in rows
    ]


def _weights(db: sqlite3.Connection, params: list[Any], block: int) -> list[tuple[Any, Any]]:
    return [(uid, list(row.items())) for uid, row in state.weights(db, params[0]).items()]


_ITEMS: dict[tuple[str, str], Reader] = {
    ("System", "Number"): lambda db, params, block: block,
    ("System", "Account"): _account,
    ("Commitments", "MaxSpace"): lambda db, params, block: MAX_COMMITMENT_SPACE,
    ("SubtensorModule", "SubnetEpochConsensus"): lambda db, params, block: "Yuma",
    ("SubtensorModule", "Uids"): lambda db, params, block: state.uid_of(db, params[0], params[1]),
    ("SubtensorModule", "LastUpdate"): _last_updates,
    ("SubtensorModule", "Weights"): lambda db, params, block: dict(_weights(db, params, block)).get(
        params[1], []
    ),
    ("SubtensorModule", "TotalHotkeyAlpha"): lambda db, params, block: state.stake(
        db, params[0], params[1]
    ),
}

_MAPS: dict[tuple[str, str], Reader] = {
    ("Commitments", "CommitmentOf"): _commitments,
    ("Commitments", "RevealedCommitments"): lambda db, params, block: [],
    ("SubtensorModule", "Weights"): _weights,
}
# Without `TokenSymbol`: `Client.connect` would write it to the user's cache, under the name of the
# real network that the client was given.


# Runtime APIs --------------------------------------------------------------------


def _u16(values: Sequence[float]) -> list[int]:
    return [round(min(1.0, max(0.0, value)) * 65535) for value in values]


def _metagraph(db: sqlite3.Connection, params: list[Any], block: int) -> dict[str, Any] | None:
    netuid = params[0]
    subnet = db.execute(
        "SELECT registered_block, owner_hotkey, owner_coldkey FROM subnets WHERE netuid = ?",
        (netuid,),
    ).fetchone()
    if subnet is None:
        return None
    settings = state.hyperparameters(db, netuid)
    found = state.neurons(db, netuid)
    permitted, scored = state.columns(db, netuid, found, block=block)
    since_step = block % max(1, settings["tempo"])
    active = [block - n.last_update <= settings["activity_cutoff"] for n in found]
    return {
        **settings,
        "netuid": netuid,
        "name": list(_NAME),
        "symbol": list(_SYMBOL),
        "identity": None,
        "network_registered_at": int(subnet[0]),
        "owner_hotkey": str(subnet[1]),
        "owner_coldkey": str(subnet[2]),
        "block": block,
        "last_step": block - since_step,
        "blocks_since_last_step": since_step,
        "num_uids": len(found),
        "max_uids": settings["max_allowed_uids"],
        "tao_in": RAO_PER_TAO,
        "alpha_in": RAO_PER_TAO,
        "moving_price": {"bits": 2**32},
        "hotkeys": [n.hotkey for n in found],
        "coldkeys": [n.coldkey for n in found],
        "identities": [None] * len(found),
        "axons": [_axon(n) for n in found],
        "active": active,
        "validator_permit": permitted,
        "last_update": [n.last_update for n in found],
        "block_at_registration": [n.registered for n in found],
        "rank": _u16(scored.rank),
        "trust": _u16(scored.trust),
        "consensus": _u16(scored.consensus),
        "incentives": _u16(scored.incentive),
        "dividends": _u16(scored.dividends),
        "pruning_score": _u16(scored.emission),
        # What a neuron would earn in a tempo if a block paid one alpha.
        "emission": [int(e * settings["tempo"] * RAO_PER_TAO) for e in scored.emission],
        "alpha_stake": [n.alpha_stake for n in found],
        "tao_stake": [n.tao_stake for n in found],
        "total_stake": [n.stake for n in found],
    }


def _hyperparameters(
    db: sqlite3.Connection, params: list[Any], block: int
) -> list[dict[str, Any]] | None:
    values = {name: _setting(db, name, params[0]) for name in HYPERPARAMETERS}
    if values["tempo"] is None:
        return None
    return [
        {"name": name, "value": {each.type: values[name]}} for name, each in HYPERPARAMETERS.items()
    ]


_RUNTIME: dict[tuple[str, str], Reader] = {
    ("SubnetInfoRuntimeApi", "get_metagraph"): _metagraph,
    ("SubnetInfoRuntimeApi", "get_subnet_hyperparams_v3"): _hyperparameters,
    ("SwapRuntimeApi", "current_alpha_price"): lambda db, params, block: RAO_PER_TAO,
}
