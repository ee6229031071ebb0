"""The embedded network: a `bittensor.Substrate` over one SQLite file, for all processes
on this machine.

`bittensor.Client(substrate=EmbeddedSubstrate(path))` supports the calls of a client of the real
chain: register, stake, serve an axon, read the metagraph, set weights, commit and read
commitments. Blocks come from the clock. `rules` has the checks of each call, and where this network
is simpler than the real one; `reads` what can be read; `consensus` the columns of the metagraph.

State can be read as of any of the last 256 blocks. A block is final two blocks later, and then gets
an unpredictable hash; see `ledger`.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import bittensor as bt
from pydantic import ValidationError

from hiveminer.chain.embedded import reads, rules, state
from hiveminer.chain.embedded.ledger import Ledger
from hiveminer.chain.embedded.schema import HYPERPARAMETERS, NOBODY, add_subnet


class Composed(NamedTuple):
    """A call in this network's form: the pallet, the function and its parameters."""

    module: str
    function: str
    params: dict[str, Any]


def _unsupported(what: str) -> bt.ChainError:
    return bt.ChainError(f"the embedded network has no {what}", code=bt.ErrorCode.DISABLED)


def _refuses(what: str) -> Callable[..., Any]:
    def refuse(*_arguments: Any, **_named: Any) -> NoReturn:
        raise _unsupported(what)

    return refuse


class EmbeddedSubstrate:
    """The embedded network in the file `path`, which is created if it does not exist.

    block_seconds: seconds per block in a new file; an existing file keeps its own.
    clock: seconds since 1970. Usable from any thread, and on both sides of a fork: each thread of
    each process has its own connection.
    """

    # The methods of `bittensor.Substrate` that make no sense for a chain in a file.
    decode_scale = spec_version = constant = estimate_weight = _refuses("runtime")
    map_has_entries = query_batch = _refuses("batched reads")
    blocks = events = _refuses("stream of blocks and events")
    get_block = find_extrinsic = _refuses("record of past blocks and calls")
    mev_next_key = _refuses("MEV shield; submit the call in the clear, by submit_call")
    sign_extrinsic = prepare = submit_signature = submit_signed = _refuses("signed extrinsics")
    multisig_account = submit_multisig = _refuses("multisig accounts")

    def __init__(
        self,
        path: Path | str,
        *,
        block_seconds: float = 1.0,
        clock: Callable[[], float] = time.time,
    ):
        self.token_symbols: dict[int, str] = {}
        self._ledger = Ledger(Path(path), block_seconds=block_seconds, clock=clock)

    # Administration, for which there are no calls --------------------------------------

    def deregister(self, hotkey: str, *, netuid: int) -> None:
        """Take a neuron's uid away, as if another neuron had replaced it; for tests.

        Uids have no gaps, so a random hotkey gets the uid until the next registration takes it.
        Raises `bittensor.ChainError` if the hotkey is not registered.
        """
        with self._ledger.writing() as (db, block):
            uid = state.uid_of(db, netuid, hotkey)
            if uid is None:
                state.refuse("HotKeyNotRegisteredInSubNet", f"{hotkey} is not on {netuid}")
            nobody = bt.sp_core.ss58_encode(secrets.token_bytes(32))
            rules.seat(db, netuid, uid, nobody, block=block, vacant=True)

    def set_hyperparameters(self, netuid: int, **values: int) -> None:
        """Set some of a subnet's hyperparameters; their names are `HYPERPARAMETERS`."""
        assert values.keys() <= HYPERPARAMETERS.keys(), "unknown hyperparameters"
        with self._ledger.writing() as (db, _):
            state.hyperparameters(db, netuid)
            db.executemany(
                "UPDATE hyperparameters SET value = ? WHERE netuid = ? AND name = ?",
                [(int(value), netuid, name) for name, value in values.items()],
            )

    def create_subnet(self, netuid: int, *, owner_hotkey: str = NOBODY) -> None:
        """Add a subnet to root (0) and 1, which every file has; an existing one gets this owner."""
        with self._ledger.writing() as (db, block):
            if db.execute("SELECT 1 FROM subnets WHERE netuid = ?", (netuid,)).fetchone() is None:
                add_subnet(db, netuid, block=block)
            db.execute(
                "UPDATE subnets SET owner_hotkey = ?, owner_coldkey = ? WHERE netuid = ?",
                (owner_hotkey, state.owner(db, owner_hotkey) or NOBODY, netuid),
            )

    # Lifecycle --------------------------------------------------------------------

    async def connect(self) -> None:
        """Open or create the file. Raises `OperatorError` if that fails."""
        self._ledger.connection()

    async def close(self) -> None:
        """Close the file."""
        self._ledger.close()

    # Blocks -----------------------------------------------------------------------

    async def block_number(self) -> int:
        """The current block's number, from 1."""
        return self._ledger.block()

    async def finalized_block_number(self) -> int:
        """The newest final block, two behind the head."""
        return self._ledger.final_block()

    async def block_hash(self, block: int | None = None) -> str:
        """A block's hash; a placeholder until it is final."""
        return self._ledger.hash_of(self._ledger.block() if block is None else block)

    async def block_time(self) -> float:
        """Seconds per block."""
        return self._ledger.header.block_seconds

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
        """One storage item, decoded. Raises `bittensor.ChainError` for an unsupported one."""
        if (module, storage_function) == ("System", "BlockHash"):
            return self._ledger.hash_of(int((params or [0])[0]))
        if (module, storage_function) == ("Timestamp", "Now"):
            ledger = self._ledger
            block = ledger.block() if block_hash is None else ledger.number_of(block_hash)
            return int(ledger.start_of(block) * 1000)
        return self._read(reads.ITEMS, module, storage_function, params, block_hash)

    async def query_map(
        self,
        module: str,
        storage_function: str,
        params: list[Any] | None = None,
        block_hash: str | None = None,
    ) -> list[tuple[Any, Any]]:
        """A whole storage map, as (key, value) pairs."""
        return list(self._read(reads.MAPS, module, storage_function, params, block_hash))

    async def runtime_call(
        self, api: str, method: str, params: list[Any], block_hash: str | None = None
    ) -> Any:
        """A runtime API's answer, decoded. Raises `bittensor.ChainError` for an unsupported one."""
        return self._read(reads.RUNTIME, api, method, params, block_hash)

    def _read(
        self,
        readers: reads.Readers,
        module: str,
        name: str,
        params: list[Any] | None,
        block_hash: str | None,
    ) -> Any:
        reader = readers.get((module, name))
        if reader is None:
            raise _unsupported(f"{module}.{name}")
        number = None if block_hash is None else self._ledger.number_of(block_hash)
        with self._ledger.at(number) as (db, block):
            return reader(db, list(params or []), block)

    # Calls ------------------------------------------------------------------------

    async def compose(self, call: Any) -> Composed:
        """A generated call in this network's form."""
        module, function, params = call
        if (module, function) not in rules.CALLS:
            raise _unsupported(f"{module}.{function}")
        return Composed(module, function, dict(params))

    async def estimate_fee(self, call: Any, keypair: Any) -> bt.Balance:
        """Zero: calls are free."""
        return bt.Balance.from_rao(0)

    async def account_next_index(self, address: str) -> int:
        """How many calls this account has made."""
        with self._ledger.transaction() as db:
            return state.nonce(db, address)

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
        """Sign a call, check the signature and apply it; refusals are returned in the result.

        A public key alone, or a key that claims another's address, cannot submit anything.
        """
        signer = str(keypair.ss58_address)
        content = json.dumps(call, default=repr, sort_keys=True)
        signed = f"{self._ledger.header.chain_id}{nonce}{content}"
        message = hashlib.blake2b(signed.encode()).digest()
        try:
            signature = keypair.sign(message)
            signature = bytes(await signature if inspect.isawaitable(signature) else signature)
        except Exception as error:
            raise bt.ChainError(f"{signer} cannot sign: {error}") from error
        try:
            if not bt.sp_core.verify(message, signature, signer, int(keypair.crypto_type)):
                state.refuse("BadProof", f"the signature is not {signer}'s")
            block, index = self._apply(call, signer, nonce)
        except bt.ChainError as error:
            return bt.ExtrinsicResult(success=False, message=error.message, error=error)
        return bt.ExtrinsicResult(
            success=True,
            message="Success",
            block_hash=self._ledger.hash_of(block),
            extrinsic_id=f"{block}-{index:04d}",
            fee=bt.Balance.from_rao(0),
        )

    def _apply(self, call: Composed, signer: str, nonce: int | None) -> tuple[int, int]:
        with self._ledger.writing() as (db, block):
            expected = state.nonce(db, signer)
            if nonce is not None and nonce != expected:
                name = "Stale" if nonce < expected else "Future"
                state.refuse(name, f"the next nonce of {signer} is {expected}, not {nonce}")
            try:
                rule = rules.CALLS[call.module, call.function]
                rule(db, rules.Origin(signer, block), **call.params)
            except ValidationError as error:
                first = error.errors()[0]
                rules.invalid(f"{first['loc'][0]}: {first['msg']}")
            rules.touch(db, signer)
            db.execute("UPDATE accounts SET nonce = nonce + 1 WHERE address = ?", (signer,))
            return block, expected
