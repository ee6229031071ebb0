"""What can be read of the embedded network: storage items and runtime APIs, in the SDK's form.

It has what the SDK reads for a neuron, `hiveminer doctor` and `hiveminer status`; anything else is
refused. A reader is a function of an open transaction, the parameters, and the block.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from typing import Any

from hiveminer.chain.embedded import state
from hiveminer.chain.embedded.consensus import permits, scores
from hiveminer.chain.embedded.rules import MAX_COMMITMENT_SPACE
from hiveminer.chain.embedded.schema import HYPERPARAMETERS, RAO_PER_TAO

Reader = Callable[[sqlite3.Connection, list[Any], int], Any]
Readers = dict[tuple[str, str], Reader]


# Storage items -------------------------------------------------------------------


def _setting(db: sqlite3.Connection, name: str, netuid: int) -> int | bool | None:
    row = db.execute(
        "SELECT value FROM hyperparameters WHERE netuid = ? AND name = ?", (netuid, name)
    ).fetchone()
    if row is None:
        return None
    return bool(row[0]) if HYPERPARAMETERS[name].type == "Bool" else int(row[0])


def _setting_of(name: str) -> Reader:
    return lambda db, params, block: _setting(db, name, params[0])


def _account(db: sqlite3.Connection, params: list[Any], block: int) -> dict[str, Any]:
    data = {"free": state.balance(db, params[0]), "reserved": 0, "frozen": 0, "flags": 0}
    return {"nonce": state.nonce(db, params[0]), "data": data}


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


ITEMS: Readers = {
    ("System", "Number"): lambda db, params, block: block,
    ("System", "Account"): _account,
    ("Commitments", "MaxSpace"): lambda db, params, block: MAX_COMMITMENT_SPACE,
    ("SubtensorModule", "SubnetEpochConsensus"): lambda db, params, block: "Yuma",
    ("SubtensorModule", "Uids"): lambda db, params, block: state.uid_of(db, params[0], params[1]),
    ("SubtensorModule", "LastUpdate"): lambda db, params, block: [
        neuron.last_update for neuron in state.neurons(db, params[0])
    ],
    ("SubtensorModule", "Weights"): lambda db, params, block: dict(_weights(db, params, block)).get(
        params[1], []
    ),
    ("SubtensorModule", "TotalHotkeyAlpha"): lambda db, params, block: state.stake(
        db, params[0], params[1]
    ),
} | {("SubtensorModule", each.storage): _setting_of(name) for name, each in HYPERPARAMETERS.items()}

MAPS: Readers = {
    ("Commitments", "CommitmentOf"): _commitments,
    ("Commitments", "RevealedCommitments"): lambda db, params, block: [],
    ("SubtensorModule", "Weights"): _weights,
}
# Without `TokenSymbol`: `Client.connect` would write it to the user's cache, under the name of the
# real network that the client was given.


# Runtime APIs --------------------------------------------------------------------


def _u16(values: list[float]) -> list[int]:
    return [round(value * 65535) for value in values]


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
    scored = scores(found, state.weights(db, netuid), settings, block=block)
    since_step = block % max(1, settings["tempo"])
    return {
        **settings,
        "netuid": netuid,
        "name": list(b"embedded"),
        "network_registered_at": int(subnet[0]),
        "owner_hotkey": str(subnet[1]),
        "owner_coldkey": str(subnet[2]),
        "block": block,
        "last_step": block - since_step,
        "blocks_since_last_step": since_step,
        "num_uids": len(found),
        "max_uids": settings["max_allowed_uids"],
        "hotkeys": [n.hotkey for n in found],
        "coldkeys": [n.coldkey for n in found],
        "axons": [{"ip": int(n.ip), "port": n.port, "ip_type": n.ip_type} for n in found],
        "active": [block - n.last_update <= settings["activity_cutoff"] for n in found],
        "validator_permit": permits(found, settings),
        "last_update": [n.last_update for n in found],
        "block_at_registration": [n.registered for n in found],
        "incentives": _u16(scored.incentive),
        "dividends": _u16(scored.dividends),
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


RUNTIME: Readers = {
    ("SubnetInfoRuntimeApi", "get_metagraph"): _metagraph,
    ("SubnetInfoRuntimeApi", "get_subnet_hyperparams_v3"): _hyperparameters,
    ("SwapRuntimeApi", "current_alpha_price"): lambda db, params, block: RAO_PER_TAO,
}
