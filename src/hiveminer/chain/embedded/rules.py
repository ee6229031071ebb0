"""The calls of the embedded network, with the real chain's checks and error names.

A call runs in one write transaction, and commits it or raises `bittensor.ChainError` with the name
of the real chain's error, so that the SDK maps it to the same `ErrorCode` and hint.

Where this network is simpler than the real one:

- Calls are free and take effect at once; registration has a fixed price, which is burned.
- A new coldkey holds `FAUCET_RAO`.
- One alpha is one TAO, without slippage, and stake on the root subnet counts in full.
- An axon may be at a loopback or private address, which the real chain refuses.
- Commit-reveal needs an external beacon; if it is enabled, weights cannot be set.
- A neuron that loses its uid loses its axon and its commitment with it.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, NoReturn

import bittensor as bt
from pydantic import AfterValidator, ConfigDict, Field, validate_call

from hiveminer.chain.embedded import state
from hiveminer.chain.embedded.consensus import STAKE_THRESHOLD_RAO, permits, scores
from hiveminer.chain.embedded.schema import MAX_NEURONS, RAO_PER_TAO
from hiveminer.chain.embedded.state import Neuron, refuse

MAX_COMMITMENT_SPACE = 3100
"""Bytes that one hotkey may commit in one tempo."""


@dataclass(frozen=True)
class Origin:
    """The signer's address and the block of a call."""

    signer: str
    block: int


def invalid(reason: str) -> NoReturn:
    """Refuse parameters that the real chain's call could not encode."""
    raise bt.ChainError(reason, code=bt.ErrorCode.INVALID_ARGUMENT)


# Parameters ---------------------------------------------------------------------


def _decodable(address: str) -> str:
    bt.sp_core.ss58_decode(address)
    return address


U8 = Annotated[int, Field(strict=True, ge=0, lt=2**8)]
U16 = Annotated[int, Field(strict=True, ge=0, lt=2**16)]
U32 = Annotated[int, Field(strict=True, ge=0, lt=2**32)]
U64 = Annotated[int, Field(strict=True, ge=0, lt=2**64)]
U128 = Annotated[int, Field(strict=True, ge=0, lt=2**128)]
Numbers = Annotated[list[U16], Field(max_length=MAX_NEURONS)]
# Decoding base 58 is quadratic, so the length comes first.
Address = Annotated[str, Field(max_length=64), AfterValidator(_decodable)]
OneField = Annotated[dict[str, str], Field(min_length=1, max_length=1)]
Fields = Annotated[list[OneField], Field(min_length=1)]

_checked = validate_call(config=ConfigDict(arbitrary_types_allowed=True))
"""A call's parameters must be of their types; otherwise it raises `pydantic.ValidationError`."""


# Money --------------------------------------------------------------------------


def touch(db: sqlite3.Connection, address: str) -> None:
    """Create the account's row with its initial balance, if it is missing."""
    free = state.balance(db, address)
    db.execute("INSERT OR IGNORE INTO accounts VALUES (?, ?, 0)", (address, free))


def _debit(db: sqlite3.Connection, account: str, rao: int) -> None:
    free = state.balance(db, account)
    if free < rao:
        refuse("NotEnoughBalanceToStake", f"{account} holds {free} rao, and this takes {rao}")
    touch(db, account)
    db.execute("UPDATE accounts SET free_rao = free_rao - ? WHERE address = ?", (rao, account))


@_checked
def add_stake(
    db: sqlite3.Connection,
    origin: Origin,
    *,
    hotkey: Address,
    netuid: U16,
    amount_staked: U64,
    limit_price: U64 = RAO_PER_TAO,
    allow_partial: bool = False,
) -> None:
    """Signed by a coldkey: TAO from its balance onto a hotkey."""
    state.hyperparameters(db, netuid)
    if limit_price < RAO_PER_TAO:
        refuse("SlippageTooHigh", "one alpha costs one TAO")
    if state.owner(db, hotkey) is None:
        refuse("HotKeyAccountNotExists", f"hotkey {hotkey} was never registered")
    if amount_staked == 0:
        refuse("AmountTooLow", "nothing to stake")
    _debit(db, origin.signer, amount_staked)
    db.execute(
        "INSERT INTO stakes VALUES (?, ?, ?, ?)"
        " ON CONFLICT (hotkey, coldkey, netuid) DO UPDATE SET rao = rao + excluded.rao",
        (hotkey, origin.signer, netuid, amount_staked),
    )


# Registration -------------------------------------------------------------------


@_checked
def burned_register(
    db: sqlite3.Connection, origin: Origin, *, netuid: U16, hotkey: Address
) -> None:
    """Signed by a coldkey: burn the price, and give the hotkey a uid.

    It gets a vacant uid, else a new one, and on a full subnet that of the neuron with the lowest
    emission outside its immunity period (among equals, the one that registered first, then the
    lowest uid).
    """
    settings = state.hyperparameters(db, netuid)
    if netuid == 0:
        refuse("RegistrationNotPermittedOnRootSubnet", "the root subnet takes no miners")
    if not settings["registration_allowed"]:
        refuse("SubNetRegistrationDisabled", f"subnet {netuid} takes no registrations")
    known, signer = state.owner(db, hotkey), origin.signer
    # A hotkey owned by nobody else, and not a hotkey that signs for itself.
    if signer == hotkey or state.owner(db, signer) or known not in (None, signer):
        refuse("NonAssociatedColdKey", f"{signer} is not the coldkey of {hotkey}")
    if state.uid_of(db, netuid, hotkey) is not None:
        refuse("HotKeyAlreadyRegisteredInSubNet", f"{hotkey} is registered on subnet {netuid}")
    _debit(db, signer, settings["burn"])
    if known is None:
        db.execute("INSERT INTO owners VALUES (?, ?)", (hotkey, signer))
    uid = _free_uid(db, netuid, settings, block=origin.block)
    seat(db, netuid, uid, hotkey, block=origin.block, vacant=False)


def _free_uid(
    db: sqlite3.Connection, netuid: int, settings: Mapping[str, int], *, block: int
) -> int:
    found = state.neurons(db, netuid)
    vacant = next((n.uid for n in found if n.vacant), None)
    if vacant is not None:
        return vacant
    if len(found) < min(settings["max_allowed_uids"], MAX_NEURONS):
        return len(found)
    mortal = [n for n in found if block - n.registered >= settings["immunity_period"]]
    if not mortal:
        refuse("NoNeuronIdAvailable", f"subnet {netuid} is full, and every neuron is immune")
    earned = scores(found, state.weights(db, netuid), settings, block=block).emission
    return min(mortal, key=lambda n: (earned[n.uid], n.registered, n.uid)).uid


def seat(
    db: sqlite3.Connection, netuid: int, uid: int, hotkey: str, *, block: int, vacant: bool
) -> None:
    """Give a uid to a hotkey, and delete the previous neuron with its commitment and weights."""
    db.execute(
        "DELETE FROM commitments WHERE netuid = ? AND hotkey IN"
        " (SELECT hotkey FROM neurons WHERE netuid = ? AND uid = ?)",
        (netuid, netuid, uid),
    )
    db.execute("DELETE FROM weights WHERE netuid = ? AND uid = ?", (netuid, uid))
    db.execute("DELETE FROM neurons WHERE netuid = ? AND uid = ?", (netuid, uid))
    db.execute(
        "INSERT INTO neurons (netuid, uid, hotkey, vacant, registered_block, last_update)"
        " VALUES (?, ?, ?, ?, ?, ?)",
        (netuid, uid, hotkey, int(vacant), block, block),
    )


# What a neuron's hotkey signs ---------------------------------------------------


@_checked
def serve_axon(
    db: sqlite3.Connection,
    origin: Origin,
    *,
    netuid: U16,
    version: U32,
    ip: U128,
    port: U16,
    ip_type: U8,
    protocol: U8,
    placeholder1: U8,
    placeholder2: U8,
) -> None:
    """Publish the axon's address. The address 0 means that it no longer listens."""
    settings = state.hyperparameters(db, netuid)
    uid = state.uid_of(db, netuid, origin.signer)
    if uid is None:
        refuse("HotKeyNotRegisteredInNetwork", f"{origin.signer} is not on subnet {netuid}")
    if ip_type not in (4, 6):
        refuse("InvalidIpType", f"an address is of type 4 or 6, not {ip_type}")
    if ip >= (2**32 if ip_type == 4 else 2**128) - 1:
        refuse("InvalidIpAddress", "that is not a host's address")
    if port == 0:
        refuse("InvalidPort", "an axon cannot be at port 0")
    served = state.neurons(db, netuid)[uid].served
    wait = settings["serving_rate_limit"] - (origin.block - served)
    if served and wait > 0:
        refuse("ServingRateLimitExceeded", f"the axon may be served again in {wait} blocks")
    db.execute(
        "UPDATE neurons SET ip = ?, ip_type = ?, port = ?, protocol = ?, version = ?,"
        " served_block = ? WHERE netuid = ? AND uid = ?",
        (str(ip), ip_type, port, protocol, version, origin.block, netuid, uid),
    )


@_checked
def set_commitment(
    db: sqlite3.Connection, origin: Origin, *, netuid: U16, info: dict[str, Fields]
) -> None:
    """Publish up to 128 bytes (`Raw`) or 512 (`BigRaw`) for the neuron."""
    settings = state.hyperparameters(db, netuid)
    if state.uid_of(db, netuid, origin.signer) is None:
        refuse("AccountNotAllowedCommit", f"{origin.signer} is not on subnet {netuid}")
    if len(info["fields"]) > 1:
        refuse("TooManyFieldsInCommitmentInfo", "a commitment has one field")
    ((variant, value),) = info["fields"][0].items()
    try:
        data = bytes.fromhex(value.removeprefix("0x"))
    except ValueError:
        invalid("a commitment's data are 0x and hexadecimal digits")
    big = variant == "BigRaw"
    if not (big or variant == f"Raw{len(data)}") or len(data) > (512 if big else 128):
        invalid(f"a {variant[:32]} of {len(data)} bytes; kept are Raw up to 128, BigRaw up to 512")
    # The chain's epochs are one block longer than the tempo.
    epoch = (origin.block + netuid + 1) // (settings["tempo"] + 1)
    before = db.execute(
        "SELECT epoch, used_bytes FROM commitments WHERE netuid = ? AND hotkey = ?",
        (netuid, origin.signer),
    ).fetchone()
    used = int(before[1]) if before and int(before[0]) == epoch else 0
    used += max(100, len(data))  # the least that a commitment counts for
    if used > MAX_COMMITMENT_SPACE:
        refuse("SpaceLimitExceeded", f"{origin.signer} has committed enough for this tempo")
    db.execute(
        "INSERT OR REPLACE INTO commitments VALUES (?, ?, ?, ?, ?, ?, ?)",
        (netuid, origin.signer, origin.block, variant, data, epoch, used),
    )


@_checked
def set_weights(
    db: sqlite3.Connection,
    origin: Origin,
    *,
    netuid: U16,
    dests: Numbers,
    weights: Numbers,
    version_key: U64,
    mecid: U8 = 0,
) -> None:
    """Set a validator's weights, with the checks in the chain's order."""
    settings = state.hyperparameters(db, netuid)
    if mecid:
        refuse("MechanismDoesNotExist", "the embedded network's subnets have one mechanism")
    if settings["commit_reveal_weights_enabled"]:
        refuse("CommitRevealEnabled", f"subnet {netuid} takes commits only")
    if len(dests) != len(weights):
        refuse("WeightVecNotEqualSize", "there must be one weight for each uid")
    found = state.neurons(db, netuid)
    if len(dests) > len(found):
        refuse("UidsLengthExceedUidsInSubNet", "there are more weights than neurons")
    me = next((n for n in found if n.hotkey == origin.signer), None)
    if me is None:
        refuse("HotKeyNotRegisteredInSubNet", f"{origin.signer} is not on subnet {netuid}")
    _check_rights(me, settings, version_key, block=origin.block)
    # As on the real chain, weights for oneself alone need no permit, and have no limits.
    own = dests == [me.uid]
    if not own and not permits(found, settings)[me.uid]:
        refuse("NeuronNoValidatorPermit", f"uid {me.uid} holds no validator permit")
    _check_weights(dests, weights, len(found), settings, own=own)
    top = max(weights)
    db.execute("DELETE FROM weights WHERE netuid = ? AND uid = ?", (netuid, me.uid))
    db.executemany(
        "INSERT INTO weights VALUES (?, ?, ?, ?)",
        [
            (netuid, me.uid, target, round(weight * 65535 / top))
            for target, weight in zip(dests, weights, strict=True)
            if weight
        ],
    )
    db.execute(
        "UPDATE neurons SET last_update = ? WHERE netuid = ? AND uid = ?",
        (origin.block, netuid, me.uid),
    )


def _check_rights(me: Neuron, settings: Mapping[str, int], version_key: int, *, block: int) -> None:
    if me.stake < STAKE_THRESHOLD_RAO:
        refuse("NotEnoughStakeToSetWeights", f"{STAKE_THRESHOLD_RAO} rao of stake are needed")
    wanted = settings["weights_version"]
    if version_key < wanted:
        refuse(
            "IncorrectWeightVersionKey",
            f"the subnet requires version {wanted}, not {version_key}",
        )
    wait = settings["weights_rate_limit"] - (block - me.last_update)
    if wait > 0:
        refuse("SettingWeightsTooFast", f"weights may be set again in {wait} blocks")


def _check_weights(
    targets: list[int], values: list[int], size: int, settings: Mapping[str, int], *, own: bool
) -> None:
    if len(set(targets)) != len(targets):
        refuse("DuplicateUids", "a uid is given twice")
    if any(target >= size for target in targets):
        refuse("UidVecContainInvalidOne", f"the uids are 0 to {size - 1}")
    total = sum(values)
    if total == 0 or (len(values) < settings["min_allowed_weights"] and not own):
        refuse(
            "WeightVecLengthIsLow", f"at least {settings['min_allowed_weights']} weights are needed"
        )
    if max(values) * 65535 > settings["max_weights_limit"] * total and not own:
        refuse("MaxWeightExceeded", "the share of one weight is too large")


CALLS: dict[tuple[str, str], Callable[..., None]] = {
    ("SubtensorModule", "burned_register"): burned_register,
    ("SubtensorModule", "add_stake"): add_stake,
    ("SubtensorModule", "add_stake_limit"): add_stake,
    ("SubtensorModule", "serve_axon"): serve_axon,
    ("SubtensorModule", "set_weights"): set_weights,
    ("SubtensorModule", "set_mechanism_weights"): set_weights,
    ("Commitments", "set_commitment"): set_commitment,
}
