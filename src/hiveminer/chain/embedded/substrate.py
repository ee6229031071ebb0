"""The embedded network: a `bittensor.Substrate` over one SQLite file, for all processes
on this machine.

`bittensor.Client(substrate=EmbeddedSubstrate(path))` takes the same calls as a client of
the real chain: register, stake, serve an axon, read the metagraph, set weights, commit and
read commitments. Blocks come from the clock. What each call refuses, and where this
network is simpler than the real one, stands in `rules`; how the metagraph's columns are
worked out, in `consensus`.

There is no history: a read at an earlier block is answered from the present state, with
only the block's number, hash and time being its own.
"""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import json
import secrets
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import bittensor as bt

from hiveminer.chain.embedded import rules
from hiveminer.chain.embedded.consensus import RAO_PER_TAO, STAKE_THRESHOLD_RAO
from hiveminer.chain.embedded.ledger import (
    HYPERPARAMETERS,
    MAX_NEURONS,
    NOBODY,
    SCHEMA_VERSION,
    Ledger,
    add_subnet,
)

_EXISTENTIAL_DEPOSIT_RAO = 500
_NAME, _SYMBOL = b"embedded", "\N{GREEK SMALL LETTER ALPHA}".encode()


class Composed(NamedTuple):
    """A call as this network carries it: the pallet, the function and its parameters."""

    module: str
    function: str
    params: dict[str, Any]

    @property
    def data(self) -> bytes:
        """One canonical form of it: what is signed and hashed."""
        return json.dumps(self, default=repr, sort_keys=True).encode()


class EmbeddedSubstrate:
    """The embedded network in the file `path`, which is made if there is none.

    `block_seconds` is the length of a block in a file made now; in one that stands already,
    its own value counts. `clock` gives seconds since 1970. Use it from any thread, and on
    both sides of a fork: each thread of each process has a connection of its own.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        block_seconds: float = 1.0,
        clock: Callable[[], float] = time.time,
    ):
        self.token_symbols: dict[int, str] = {}
        self._ledger = Ledger(Path(path), block_seconds=block_seconds, clock=clock)

    # What only the network's keeper may do, and no call can --------------------------

    def deregister(self, hotkey: str, *, netuid: int) -> None:
        """Take a neuron's uid away, as if another had pushed it out; for tests.

        Uids have no gaps, so the uid stands under a throwaway hotkey that nobody holds,
        until the next registration takes it. Raises `bittensor.ChainError` if the hotkey
        is not registered.
        """
        with self._ledger.writing() as db:
            uid = rules.uid_of(db, netuid, hotkey)
            if uid is None:
                rules.refuse("HotKeyNotRegisteredInSubNet", f"{hotkey} is not on {netuid}")
            nobody = bt.sp_core.ss58_encode(secrets.token_bytes(32))
            rules.seat(db, netuid, uid, nobody, block=self._ledger.block(), vacant=True)

    def set_hyperparameters(self, netuid: int, **values: int) -> None:
        """Set some of a subnet's hyperparameters (their names are `HYPERPARAMETERS`).

        Raises `ValueError` for an unknown name or a value out of bounds.
        """
        for name, value in values.items():
            known = HYPERPARAMETERS.get(name)
            if known is None or not 0 <= value <= known.maximum:
                raise ValueError(f"no hyperparameter {name} = {value}")
        with self._ledger.writing() as db:
            rules.hyperparameters(db, netuid)
            db.executemany(
                "UPDATE hyperparameters SET value = ? WHERE netuid = ? AND name = ?",
                [(int(value), netuid, name) for name, value in values.items()],
            )

    def create_subnet(self, netuid: int, *, owner_hotkey: str = NOBODY) -> None:
        """Add a subnet beside root (0) and 1, which every file has; one that exists stays.

        `owner_hotkey` is an ss58 address. Raises `ValueError` if it or the netuid is not.
        """
        if not 0 <= netuid <= 65535:
            raise ValueError(f"no netuid: {netuid}")
        bt.sp_core.ss58_decode(owner_hotkey[:64])
        with self._ledger.writing() as db:
            if db.execute("SELECT 1 FROM subnets WHERE netuid = ?", (netuid,)).fetchone() is None:
                add_subnet(db, netuid, block=self._ledger.block())
            coldkey = rules.owner(db, owner_hotkey) or NOBODY
            db.execute(
                "UPDATE subnets SET owner_hotkey = ?, owner_coldkey = ? WHERE netuid = ?",
                (owner_hotkey, coldkey, netuid),
            )

    # Lifecycle --------------------------------------------------------------------

    async def connect(self) -> None:
        """Open the file, or make it. Raises `OperatorError` if that cannot be."""
        self._ledger.connection()

    async def close(self) -> None:
        """Close the file."""
        self._ledger.close()

    # Blocks -----------------------------------------------------------------------

    async def block_number(self) -> int:
        """The number of the block that is now, from 1."""
        return self._ledger.block()

    async def finalized_block_number(self) -> int:
        """The same: here a block is final at once."""
        return self._ledger.block()

    async def block_hash(self, block: int | None = None) -> str:
        """A hash that names this network and the block."""
        return self._hash(self._ledger.block() if block is None else block)

    async def block_time(self) -> float:
        """Seconds a block."""
        return self._ledger.block_seconds

    async def spec_version(self) -> int:
        """The version of the file's schema."""
        return SCHEMA_VERSION

    async def get_block(
        self, block_number: int | None = None, block_hash: str | None = None
    ) -> dict[str, Any] | None:
        """A block's header and its time; calls are not kept. None if it is yet to come."""
        head = self._ledger.block()
        number = self._number(block_hash) if block_number is None else block_number
        if not 0 < number <= head:
            return None
        stamp = {"name": "now", "value": self._milliseconds(number)}
        call = {"call_module": "Timestamp", "call_function": "set", "call_args": [stamp]}
        return {"header": self._block_header(number), "extrinsics": [{"call": call}]}

    async def blocks(self, *, finalized: bool = False) -> AsyncIterator[dict[str, Any]]:
        """The block that is now, and then each next one as it comes."""
        number = self._ledger.block()
        while True:
            if number <= self._ledger.block():
                yield {"header": self._block_header(number)}
                number += 1
            else:
                await asyncio.sleep(max(0.001, self._start(number) - self._ledger.now()))

    async def events(self, block_hash: str | None = None) -> list[dict[str, Any]]:
        """None: this network keeps no events."""
        return []

    def _start(self, number: int) -> float:
        return self._ledger.genesis_seconds + (number - 1) * self._ledger.block_seconds

    def _milliseconds(self, number: int) -> int:
        return int(self._start(number) * 1000)

    def _hash(self, number: int) -> str:
        return f"0x{self._ledger.chain_id}{number:032x}"

    def _number(self, block_hash: str | None) -> int:
        if block_hash is None:
            return self._ledger.block()
        try:
            return int(block_hash[-32:], 16)
        except ValueError:
            raise bt.ChainError(f"no such block: {block_hash[:80]}") from None

    def _block_header(self, number: int) -> dict[str, Any]:
        parent = self._hash(number - 1)
        return {"number": number, "hash": self._hash(number), "parentHash": parent}

    # Reads ------------------------------------------------------------------------

    def balance(self, rao: int, netuid: int = 0) -> bt.Balance:
        """An amount in a subnet's currency (netuid 0: TAO)."""
        return bt.Balance.from_rao(int(rao), netuid, self.token_symbols.get(netuid))

    async def query(
        self,
        module: str,
        storage_function: str,
        params: list[Any] | None = None,
        block_hash: str | None = None,
    ) -> Any:
        """One storage item, decoded. `bittensor.ChainError` for what is not kept here."""
        if (module, storage_function) == ("Timestamp", "Now"):
            return self._milliseconds(self._number(block_hash))
        if (module, storage_function) == ("System", "Number"):
            return self._number(block_hash)
        with self._ledger.reading() as db:
            return self._query(db, module, storage_function, list(params or []))

    async def query_batch(
        self,
        module: str,
        storage_function: str,
        param_sets: list[list[Any]],
        block_hash: str | None = None,
    ) -> list[Any]:
        """One storage item for several keys, of one moment."""
        with self._ledger.reading() as db:
            return [self._query(db, module, storage_function, list(p)) for p in param_sets]

    async def query_map(
        self,
        module: str,
        storage_function: str,
        params: list[Any] | None = None,
        block_hash: str | None = None,
    ) -> list[tuple[Any, Any]]:
        """A whole storage map, as (key, value) pairs."""
        with self._ledger.reading() as db:
            return self._query_map(db, module, storage_function, list(params or []))

    async def map_has_entries(
        self, module: str, storage_function: str, params: list[Any], block_hash: str | None = None
    ) -> bool:
        """Is there anything in the map?"""
        return bool(await self.query_map(module, storage_function, params, block_hash))

    def _query(self, db: sqlite3.Connection, module: str, item: str, params: list[Any]) -> Any:
        if module == "SubtensorModule" and item in _SETTINGS:
            return _setting(db, _SETTINGS[item], params[0])
        reader = _ITEMS.get((module, item))
        if reader is None:
            raise _not_kept(f"{module}.{item}")
        return reader(db, params, self._ledger.block())

    def _query_map(
        self, db: sqlite3.Connection, module: str, item: str, params: list[Any]
    ) -> list[tuple[Any, Any]]:
        if module == "SubtensorModule" and item in _SETTINGS:
            return [(n, _setting(db, _SETTINGS[item], n)) for n in _netuids(db)]
        reader = _MAPS.get((module, item))
        if reader is None:
            raise _not_kept(f"{module}.{item}")
        return reader(db, params)

    async def runtime_call(
        self, api: str, method: str, params: list[Any], block_hash: str | None = None
    ) -> Any:
        """A runtime API's answer, decoded. `bittensor.ChainError` for what is not here."""
        reader = _RUNTIME.get((api, method))
        if reader is None:
            raise _not_kept(f"{api}.{method}")
        with self._ledger.reading() as db:
            return reader(db, list(params), self._ledger.block())

    async def constant(self, module: str, name: str) -> Any:
        """A pallet's constant."""
        if (module, name) == ("Balances", "ExistentialDeposit"):
            return _EXISTENTIAL_DEPOSIT_RAO
        raise _not_kept(f"{module}.{name}")

    # Calls ------------------------------------------------------------------------

    async def compose(self, call: Any) -> Composed:
        """A generated call as this network carries it."""
        module, function, params = call
        if (module, function) not in rules.CALLS:
            raise _not_kept(f"{module}.{function}")
        return Composed(module, function, dict(params))

    async def estimate_fee(self, call: Any, keypair: Any) -> bt.Balance:
        """Nothing: calls are free here."""
        return bt.Balance.from_rao(0)

    async def estimate_weight(self, call: Any, keypair: Any) -> dict[str, int]:
        """Nothing: calls have no weight here."""
        return {"ref_time": 0, "proof_size": 0}

    async def account_next_index(self, address: str) -> int:
        """How many calls this account has made."""
        with self._ledger.reading() as db:
            return _nonce(db, address)

    async def submit(
        self,
        call: Composed,
        keypair: Any,
        *,
        nonce: int | None = None,
        period: int | None = None,
        wait_for_inclusion: bool = True,
        wait_for_finalization: bool = True,
    ) -> bt.ExtrinsicResult:
        """Sign a call, check the signature and do it; refusals come back in the result.

        The keypair really signs, so a key that is public only, or that claims another's
        address, gets nothing done.
        """
        signer = str(keypair.ss58_address)
        message = hashlib.blake2b(f"{self._ledger.chain_id}{nonce}".encode() + call.data).digest()
        try:
            signature = keypair.sign(message)
            signature = bytes(await signature if inspect.isawaitable(signature) else signature)
        except Exception as error:
            raise bt.ChainError(f"{signer} cannot sign: {error}") from error
        try:
            if not _verifies(message, signature, signer, int(keypair.crypto_type)):
                rules.refuse("BadProof", f"the signature is not {signer}'s")
            block, index = self._apply(call, signer, nonce)
        except bt.ChainError as error:
            return bt.ExtrinsicResult(success=False, message=error.message, error=error)
        return bt.ExtrinsicResult(
            success=True,
            message="Success",
            block_hash=self._hash(block),
            extrinsic_id=f"{block}-{index:04d}",
            fee=bt.Balance.from_rao(0),
        )

    def _apply(self, call: Composed, signer: str, nonce: int | None) -> tuple[int, int]:
        with self._ledger.writing() as db:
            expected = _nonce(db, signer)
            if nonce is not None and nonce != expected:
                name = "Stale" if nonce < expected else "Future"
                rules.refuse(name, f"the next nonce of {signer} is {expected}, not {nonce}")
            block = self._ledger.block()
            rule = rules.CALLS[call.module, call.function]
            rule(db, rules.Origin(signer, block), call.params)
            rules.touch(db, signer)
            db.execute("UPDATE accounts SET nonce = nonce + 1 WHERE address = ?", (signer,))
            return block, expected

    # What makes no sense here -------------------------------------------------------

    async def decode_scale(self, type_string: str, data: Any) -> NoReturn:
        """Not here: nothing is encoded in SCALE."""
        raise _no_such_thing("SCALE encoding")

    async def mev_next_key(self) -> NoReturn:
        """Not here: submit the call in the clear, by `submit_call`."""
        raise _no_such_thing("MEV shield; submit the call in the clear, by submit_call")

    async def sign_extrinsic(self, call: Any, keypair: Any, *, nonce: int, period: int) -> NoReturn:
        """Not here: there are no extrinsics to carry about."""
        raise _no_such_thing("signed extrinsics")

    async def find_extrinsic(
        self, extrinsic_hash: str, block_hash: str
    ) -> bt.ExtrinsicResult | None:
        """Not here: calls are not kept."""
        raise _no_such_thing("record of past calls")

    async def prepare(
        self,
        call: Any,
        *,
        address: str,
        crypto_type: int = 1,
        nonce: int | None = None,
        period: int | None = None,
        tip: int = 0,
        metadata_hash: bytes | None = None,
    ) -> NoReturn:
        """Not here: keys are in this process."""
        raise _no_such_thing("signing elsewhere")

    async def submit_signature(
        self,
        unsigned: Any,
        signature: bytes | str,
        *,
        wait_for_inclusion: bool = True,
        wait_for_finalization: bool = True,
    ) -> NoReturn:
        """Not here: keys are in this process."""
        raise _no_such_thing("signing elsewhere")

    async def submit_signed(
        self,
        extrinsic: Any,
        keypair: Any,
        *,
        wait_for_inclusion: bool = True,
        wait_for_finalization: bool = True,
    ) -> NoReturn:
        """Not here: there are no extrinsics to carry about."""
        raise _no_such_thing("signed extrinsics")

    def multisig_account(self, signatories: list[str], threshold: int) -> NoReturn:
        """Not here."""
        raise _no_such_thing("multisig accounts")

    async def submit_multisig(
        self,
        call: Any,
        keypair: Any,
        multisig_account: Any,
        *,
        wait_for_inclusion: bool = True,
        wait_for_finalization: bool = True,
    ) -> NoReturn:
        """Not here."""
        raise _no_such_thing("multisig accounts")


def _not_kept(what: str) -> bt.ChainError:
    text = f"the embedded network does not keep {what}"
    return bt.ChainError(text, code=bt.ErrorCode.DISABLED)


def _no_such_thing(what: str) -> bt.ChainError:
    return bt.ChainError(f"the embedded network has no {what}", code=bt.ErrorCode.DISABLED)


def _verifies(message: bytes, signature: bytes, signer: str, crypto_type: int) -> bool:
    try:
        return bool(bt.sp_core.verify(message, signature, signer, crypto_type))
    except (ValueError, TypeError):
        return False


def _nonce(db: sqlite3.Connection, address: str) -> int:
    row = db.execute("SELECT nonce FROM accounts WHERE address = ?", (address,)).fetchone()
    return 0 if row is None else int(row[0])


# Storage items -------------------------------------------------------------------

Item = Callable[[sqlite3.Connection, list[Any], int], Any]
Map = Callable[[sqlite3.Connection, list[Any]], list[tuple[Any, Any]]]

_SETTINGS = {each.storage: name for name, each in HYPERPARAMETERS.items()}


def _netuids(db: sqlite3.Connection) -> list[int]:
    return [int(row[0]) for row in db.execute("SELECT netuid FROM subnets ORDER BY netuid")]


def _setting(db: sqlite3.Connection, name: str, netuid: int) -> int | bool | None:
    row = db.execute(
        "SELECT value FROM hyperparameters WHERE netuid = ? AND name = ?", (netuid, name)
    ).fetchone()
    if row is None:
        return None
    return bool(row[0]) if HYPERPARAMETERS[name].type == "Bool" else int(row[0])


def _account(db: sqlite3.Connection, params: list[Any], block: int) -> dict[str, Any]:
    address = str(params[0])
    free = rules.balance(db, address)
    return {
        "nonce": _nonce(db, address),
        "data": {"free": free, "reserved": 0, "frozen": 0, "flags": 0},
    }


def _subnet_owner(column: str) -> Item:
    def read(db: sqlite3.Connection, params: list[Any], block: int) -> str | None:
        row = db.execute(f"SELECT {column} FROM subnets WHERE netuid = ?", (params[0],)).fetchone()
        return None if row is None else str(row[0])

    return read


def _registered_at(db: sqlite3.Connection, params: list[Any], block: int) -> int | None:
    row = db.execute(
        "SELECT registered_block FROM subnets WHERE netuid = ?", (params[0],)
    ).fetchone()
    return None if row is None else int(row[0])


def _column(take: Callable[[rules.Neuron], Any]) -> Item:
    return lambda db, params, block: [take(n) for n in rules.neurons(db, params[0])]


def _permits(db: sqlite3.Connection, params: list[Any], block: int) -> list[bool]:
    return rules.columns(db, params[0], rules.neurons(db, params[0]), block=block)[0]


def _by_uid(take: Callable[[rules.Neuron], Any]) -> Item:
    def read(db: sqlite3.Connection, params: list[Any], block: int) -> Any:
        found = rules.neurons(db, params[0])
        return take(found[params[1]]) if 0 <= params[1] < len(found) else None

    return read


def _by_hotkey(take: Callable[[rules.Neuron], Any]) -> Item:
    def read(db: sqlite3.Connection, params: list[Any], block: int) -> Any:
        return next((take(n) for n in rules.neurons(db, params[0]) if n.hotkey == params[1]), None)

    return read


def _axon(neuron: rules.Neuron) -> dict[str, int]:
    return {
        "block": neuron.served,
        "version": neuron.version,
        "ip": neuron.ip,
        "port": neuron.port,
        "ip_type": neuron.ip_type,
        "protocol": neuron.protocol,
        "placeholder1": 0,
        "placeholder2": 0,
    }


def _commitment(row: Sequence[Any]) -> dict[str, Any]:
    fields = [{str(row[1]): "0x" + bytes(row[2]).hex()}]
    return {"block": int(row[0]), "deposit": 0, "info": {"fields": fields}}


def _commitments(db: sqlite3.Connection, params: list[Any]) -> list[tuple[Any, Any]]:
    rows = db.execute(
        "SELECT block, variant, data, hotkey FROM commitments WHERE netuid = ?"
        " AND length(data) <= 512 LIMIT ?",
        (params[0], MAX_NEURONS),
    )
    return [(str(row[3]), _commitment(row)) for row in rows]


def _commitment_of(db: sqlite3.Connection, params: list[Any], block: int) -> Any:
    return dict(_commitments(db, params)).get(params[1])


def _weights(db: sqlite3.Connection, params: list[Any]) -> list[tuple[Any, Any]]:
    found = rules.weights(db, params[0])
    return [(uid, sorted(row.items())) for uid, row in sorted(found.items())]


def _memberships(db: sqlite3.Connection, params: list[Any]) -> list[tuple[Any, Any]]:
    rows = db.execute("SELECT netuid FROM neurons WHERE hotkey = ? LIMIT 65536", (params[0],))
    return [(int(row[0]), True) for row in rows]


def _owned(db: sqlite3.Connection, params: list[Any], block: int) -> list[str]:
    rows = db.execute("SELECT hotkey FROM owners WHERE coldkey = ? LIMIT 65536", (params[0],))
    return [str(row[0]) for row in rows]


def _subtensor(items: dict[str, Item]) -> dict[tuple[str, str], Item]:
    return {("SubtensorModule", name): item for name, item in items.items()}


_ITEMS: dict[tuple[str, str], Item] = {
    ("System", "Account"): _account,
    ("Commitments", "CommitmentOf"): _commitment_of,
    ("Commitments", "MaxSpace"): lambda db, params, block: rules.MAX_COMMITMENT_SPACE,
    **_subtensor(
        {
            "NetworksAdded": lambda db, params, block: params[0] in _netuids(db),
            "TotalNetworks": lambda db, params, block: len(_netuids(db)),
            "SubnetworkN": lambda db, params, block: len(rules.neurons(db, params[0])),
            "SubnetOwner": _subnet_owner("owner_coldkey"),
            "SubnetOwnerHotkey": _subnet_owner("owner_hotkey"),
            "NetworkRegisteredAt": _registered_at,
            "SubnetEpochConsensus": lambda db, params, block: "Yuma",
            "CollateralLockShare": lambda db, params, block: 0,
            "MechanismCountCurrent": lambda db, params, block: 1,
            "TxRateLimit": lambda db, params, block: 0,
            "TaoWeight": lambda db, params, block: 2**64 - 1,
            "StakeThreshold": lambda db, params, block: STAKE_THRESHOLD_RAO,
            "Uids": lambda db, params, block: rules.uid_of(db, params[0], params[1]),
            "Keys": _by_uid(lambda neuron: neuron.hotkey),
            "BlockAtRegistration": _by_uid(lambda neuron: neuron.registered),
            "LastUpdate": _column(lambda neuron: neuron.last_update),
            "Active": _column(lambda neuron: True),
            "ValidatorPermit": _permits,
            "Axons": _by_hotkey(_axon),
            "Weights": lambda db, params, block: dict(_weights(db, params)).get(params[1], []),
            "Owner": lambda db, params, block: rules.owner(db, params[0]),
            "OwnedHotkeys": _owned,
            "TotalHotkeyAlpha": lambda db, params, block: rules.stake(db, params[0], params[1]),
        }
    ),
}

_MAPS: dict[tuple[str, str], Map] = {
    ("Commitments", "CommitmentOf"): _commitments,
    ("Commitments", "RevealedCommitments"): lambda db, params: [],
    ("SubtensorModule", "NetworksAdded"): lambda db, params: [(n, True) for n in _netuids(db)],
    ("SubtensorModule", "SubnetworkN"): lambda db, params: [
        (n, len(rules.neurons(db, n))) for n in _netuids(db)
    ],
    ("SubtensorModule", "Uids"): lambda db, params: [
        (n.hotkey, n.uid) for n in rules.neurons(db, params[0])
    ],
    ("SubtensorModule", "Keys"): lambda db, params: [
        (n.uid, n.hotkey) for n in rules.neurons(db, params[0])
    ],
    ("SubtensorModule", "Weights"): _weights,
    ("SubtensorModule", "IsNetworkMember"): _memberships,
}
# `TokenSymbol` is left out on purpose: `Client.connect` would write what it found to the
# user's own cache, under the name of whatever real network the client was given.


# Runtime APIs ----------------------------------------------------------------------


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
    settings = rules.hyperparameters(db, netuid)
    found = rules.neurons(db, netuid)
    permitted, scored = rules.columns(db, netuid, found, block=block)
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


def _neurons_lite(
    db: sqlite3.Connection, params: list[Any], block: int
) -> list[dict[str, Any]] | None:
    graph = _metagraph(db, params, block)
    if graph is None:
        return None
    return [
        {
            "uid": n.uid,
            "netuid": params[0],
            "hotkey": n.hotkey,
            "coldkey": n.coldkey,
            "active": graph["active"][n.uid],
            "axon_info": _axon(n),
            "stake": [(n.coldkey, n.stake)],
            "rank": graph["rank"][n.uid],
            "trust": graph["trust"][n.uid],
            "consensus": graph["consensus"][n.uid],
            "incentive": graph["incentives"][n.uid],
            "dividends": graph["dividends"][n.uid],
            "emission": graph["emission"][n.uid],
            "last_update": n.last_update,
            "validator_permit": graph["validator_permit"][n.uid],
            "pruning_score": graph["pruning_score"][n.uid],
        }
        for n in rules.neurons(db, params[0])
    ]


def _hyperparameters(
    db: sqlite3.Connection, params: list[Any], block: int
) -> list[dict[str, Any]] | None:
    if params[0] not in _netuids(db):
        return None
    return [
        {"name": name, "value": {each.type: _setting(db, name, params[0])}}
        for name, each in HYPERPARAMETERS.items()
    ]


def _stake_info(db: sqlite3.Connection, hotkey: str, coldkey: str, netuid: int) -> dict[str, Any]:
    return {
        "hotkey": hotkey,
        "coldkey": coldkey,
        "netuid": netuid,
        "stake": rules.position(db, hotkey, coldkey, netuid),
        "is_registered": rules.uid_of(db, netuid, hotkey) is not None,
    }


def _stakes_of_coldkey(
    db: sqlite3.Connection, params: list[Any], block: int
) -> list[dict[str, Any]]:
    rows = db.execute(
        "SELECT hotkey, netuid FROM stakes WHERE coldkey = ? LIMIT 65536", (params[0],)
    ).fetchall()
    return [_stake_info(db, str(hotkey), params[0], int(netuid)) for hotkey, netuid in rows]


_RUNTIME: dict[tuple[str, str], Item] = {
    ("SubnetInfoRuntimeApi", "get_metagraph"): _metagraph,
    ("SubnetInfoRuntimeApi", "get_subnet_hyperparams_v3"): _hyperparameters,
    ("NeuronInfoRuntimeApi", "get_neurons_lite"): _neurons_lite,
    ("StakeInfoRuntimeApi", "get_stake_info_for_hotkey_coldkey_netuid"): (
        lambda db, params, block: _stake_info(db, params[0], params[1], params[2])
    ),
    ("StakeInfoRuntimeApi", "get_stake_info_for_coldkey"): _stakes_of_coldkey,
    ("SwapRuntimeApi", "current_alpha_price"): lambda db, params, block: RAO_PER_TAO,
}
