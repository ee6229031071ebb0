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

import re
import sqlite3
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import bittensor as bt

from hiveminer.chain.embedded.consensus import RAO_PER_TAO, STAKE_THRESHOLD_RAO, permits
from hiveminer.chain.embedded.schema import MAX_NEURONS
from hiveminer.chain.embedded.state import (
    Neuron,
    balance,
    columns,
    hyperparameters,
    neurons,
    owner,
    refuse,
    uid_of,
)

MAX_COMMITMENT_SPACE = 3100
"""Bytes that one hotkey may commit in one tempo."""

MIN_COMMITMENT_SPACE = 100
"""Least bytes that a commitment counts for."""

_MAX_AMOUNT_RAO = 2**62
_RAW = re.compile(r"Raw(\d{1,3})|BigRaw")


@dataclass(frozen=True)
class Origin:
    """The signer's address and the block of a call."""

    signer: str
    block: int


Params = Mapping[str, Any]
Rule = Callable[[sqlite3.Connection, Origin, Params], None]


def invalid(reason: str) -> NoReturn:
    """Refuse parameters that the real chain's call could not encode."""
    raise bt.ChainError(reason, code=bt.ErrorCode.INVALID_ARGUMENT)


# Parameters ---------------------------------------------------------------------


def integer(params: Params, name: str, *, maximum: int) -> int:
    """An integer from 0 to `maximum`."""
    value = params.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= maximum:
        invalid(f"{name} must be a whole number from 0 to {maximum}")
    return value


def address(params: Params, name: str) -> str:
    """An ss58 address."""
    value = params.get(name)
    # Decoding base 58 is quadratic, so the length comes first.
    if not isinstance(value, str) or len(value) > 64:
        invalid(f"{name} must be an ss58 address")
    try:
        bt.sp_core.ss58_decode(value)
    except ValueError:
        invalid(f"{name} must be an ss58 address")
    return value


def _numbers(params: Params, name: str) -> list[int]:
    values = params.get(name)
    if not isinstance(values, (list, tuple)) or len(values) > MAX_NEURONS:
        invalid(f"{name} must be a list of at most {MAX_NEURONS} numbers")
    return [integer({name: value}, name, maximum=65535) for value in values]


def _netuid(params: Params) -> int:
    return integer(params, "netuid", maximum=65535)


# Money --------------------------------------------------------------------------


def touch(db: sqlite3.Connection, address: str) -> None:
    """Create the account's row with its initial balance, if it is missing."""
    db.execute("INSERT OR IGNORE INTO accounts VALUES (?, ?, 0)", (address, balance(db, address)))


def _debit(db: sqlite3.Connection, account: str, rao: int) -> None:
    free = balance(db, account)
    if free < rao:
        refuse("NotEnoughBalanceToStake", f"{account} holds {free} rao, and this takes {rao}")
    touch(db, account)
    db.execute("UPDATE accounts SET free_rao = free_rao - ? WHERE address = ?", (rao, account))


def add_stake(db: sqlite3.Connection, origin: Origin, params: Params) -> None:
    """Signed by a coldkey: TAO from its balance onto a hotkey."""
    hotkey, netuid = address(params, "hotkey"), _netuid(params)
    amount = integer(params, "amount_staked", maximum=_MAX_AMOUNT_RAO)
    hyperparameters(db, netuid)
    if (
        integer({"limit_price": RAO_PER_TAO, **params}, "limit_price", maximum=2**64 - 1)
        < RAO_PER_TAO
    ):
        refuse("SlippageTooHigh", "one alpha costs one TAO")
    if owner(db, hotkey) is None:
        refuse("HotKeyAccountNotExists", f"hotkey {hotkey} was never registered")
    if amount == 0:
        refuse("AmountTooLow", "nothing to stake")
    _debit(db, origin.signer, amount)
    db.execute(
        "INSERT INTO stakes VALUES (?, ?, ?, ?)"
        " ON CONFLICT (hotkey, coldkey, netuid) DO UPDATE SET rao = rao + excluded.rao",
        (hotkey, origin.signer, netuid, amount),
    )


# Registration -------------------------------------------------------------------


def burned_register(db: sqlite3.Connection, origin: Origin, params: Params) -> None:
    """Signed by a coldkey: burn the price, and give the hotkey a uid.

    It gets a vacant uid, else a new one, and on a full subnet that of the neuron with the lowest
    emission outside its immunity period (among equals, the one that registered first, then the
    lowest uid).
    """
    netuid, hotkey = _netuid(params), address(params, "hotkey")
    settings = hyperparameters(db, netuid)
    if netuid == 0:
        refuse("RegistrationNotPermittedOnRootSubnet", "the root subnet takes no miners")
    if not settings["registration_allowed"]:
        refuse("SubNetRegistrationDisabled", f"subnet {netuid} takes no registrations")
    known = owner(db, hotkey)
    # A hotkey owned by nobody else, and not a hotkey that signs for itself.
    if origin.signer == hotkey or owner(db, origin.signer) or known not in (None, origin.signer):
        refuse("NonAssociatedColdKey", f"{origin.signer} is not the coldkey of {hotkey}")
    if uid_of(db, netuid, hotkey) is not None:
        refuse("HotKeyAlreadyRegisteredInSubNet", f"{hotkey} is registered on subnet {netuid}")
    _debit(db, origin.signer, settings["burn"])
    if known is None:
        db.execute("INSERT INTO owners VALUES (?, ?)", (hotkey, origin.signer))
    uid = _free_uid(db, netuid, settings, block=origin.block)
    seat(db, netuid, uid, hotkey, block=origin.block, vacant=False)


def _free_uid(
    db: sqlite3.Connection, netuid: int, settings: Mapping[str, int], *, block: int
) -> int:
    found = neurons(db, netuid)
    vacant = next((n.uid for n in found if n.vacant), None)
    if vacant is not None:
        return vacant
    if len(found) < min(settings["max_allowed_uids"], MAX_NEURONS):
        return len(found)
    mortal = [n for n in found if block - n.registered >= settings["immunity_period"]]
    if not mortal:
        refuse("NoNeuronIdAvailable", f"subnet {netuid} is full, and every neuron is immune")
    _, scored = columns(db, netuid, found, block=block)
    return min(mortal, key=lambda n: (scored.emission[n.uid], n.registered, n.uid)).uid


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


def serve_axon(db: sqlite3.Connection, origin: Origin, params: Params) -> None:
    """Publish the axon's address. The address 0 means that it no longer listens."""
    netuid = _netuid(params)
    settings = hyperparameters(db, netuid)
    uid = uid_of(db, netuid, origin.signer)
    if uid is None:
        refuse("HotKeyNotRegisteredInNetwork", f"{origin.signer} is not on subnet {netuid}")
    ip, ip_type = _ip(params)
    port = integer(params, "port", maximum=65535)
    if port == 0:
        refuse("InvalidPort", "an axon cannot be at port 0")
    served = db.execute(
        "SELECT served_block FROM neurons WHERE netuid = ? AND uid = ?", (netuid, uid)
    ).fetchone()[0]
    wait = settings["serving_rate_limit"] - (origin.block - int(served))
    if served and wait > 0:
        refuse("ServingRateLimitExceeded", f"the axon may be served again in {wait} blocks")
    db.execute(
        "UPDATE neurons SET ip = ?, ip_type = ?, port = ?, protocol = ?, version = ?,"
        " served_block = ? WHERE netuid = ? AND uid = ?",
        (
            str(ip),
            ip_type,
            port,
            integer(params, "protocol", maximum=255),
            integer(params, "version", maximum=2**32 - 1),
            origin.block,
            netuid,
            uid,
        ),
    )


def _ip(params: Params) -> tuple[int, int]:
    ip_type = integer(params, "ip_type", maximum=255)
    if ip_type not in (4, 6):
        refuse("InvalidIpType", f"an address is of type 4 or 6, not {ip_type}")
    ip = integer(params, "ip", maximum=2**128 - 1)
    limit = 2**32 - 1 if ip_type == 4 else 2**128 - 1
    if ip >= limit:
        refuse("InvalidIpAddress", "that is not a host's address")
    return ip, ip_type


def set_commitment(db: sqlite3.Connection, origin: Origin, params: Params) -> None:
    """Publish up to 128 bytes (`Raw`) or 512 (`BigRaw`) for the neuron."""
    netuid = _netuid(params)
    settings = hyperparameters(db, netuid)
    if uid_of(db, netuid, origin.signer) is None:
        refuse("AccountNotAllowedCommit", f"{origin.signer} is not on subnet {netuid}")
    variant, data = _field(params)
    # The chain's epochs are one block longer than the tempo.
    epoch = (origin.block + netuid + 1) // (settings["tempo"] + 1)
    before = db.execute(
        "SELECT epoch, used_bytes FROM commitments WHERE netuid = ? AND hotkey = ?",
        (netuid, origin.signer),
    ).fetchone()
    used = int(before[1]) if before and int(before[0]) == epoch else 0
    used += max(MIN_COMMITMENT_SPACE, len(data))
    if used > MAX_COMMITMENT_SPACE:
        refuse("SpaceLimitExceeded", f"{origin.signer} has committed enough for this tempo")
    db.execute(
        "INSERT OR REPLACE INTO commitments VALUES (?, ?, ?, ?, ?, ?, ?)",
        (netuid, origin.signer, origin.block, variant, data, epoch, used),
    )


def _field(params: Params) -> tuple[str, bytes]:
    info = params.get("info")
    fields = info.get("fields") if isinstance(info, dict) else None
    if not isinstance(fields, (list, tuple)) or not fields:
        invalid("a commitment needs one field")
    if len(fields) > 1:
        refuse("TooManyFieldsInCommitmentInfo", "a commitment has one field")
    if not isinstance(fields[0], dict) or len(fields[0]) != 1:
        invalid("a commitment's field is one variant with its data")
    ((variant, value),) = fields[0].items()
    match = _RAW.fullmatch(str(variant))
    if match is None:
        invalid(f"the embedded network keeps Raw and BigRaw commitments, not {str(variant)[:32]}")
    data = _bytes(value)
    wanted = int(match[1]) if match[1] else len(data)
    if wanted != len(data) or len(data) > (128 if match[1] else 512):
        invalid(f"{variant} cannot hold {len(data)} bytes")
    return str(variant), data


def _bytes(value: object) -> bytes:
    if isinstance(value, (bytes, bytearray)):
        return bytes(value)
    if not isinstance(value, str) or len(value) > 2048:
        invalid("a commitment's data are bytes, or 0x and hexadecimal digits")
    try:
        return bytes.fromhex(value.removeprefix("0x"))
    except ValueError:
        invalid("a commitment's data are bytes, or 0x and hexadecimal digits")


def set_weights(db: sqlite3.Connection, origin: Origin, params: Params) -> None:
    """Set a validator's weights, with the checks in the chain's order."""
    netuid = _netuid(params)
    settings = hyperparameters(db, netuid)
    if integer({"mecid": 0, **params}, "mecid", maximum=255):
        refuse("MechanismDoesNotExist", "the embedded network's subnets have one mechanism")
    if settings["commit_reveal_weights_enabled"]:
        refuse("CommitRevealEnabled", f"subnet {netuid} takes commits only")
    targets, values = _numbers(params, "dests"), _numbers(params, "weights")
    if len(targets) != len(values):
        refuse("WeightVecNotEqualSize", "there must be one weight for each uid")
    found = neurons(db, netuid)
    if len(targets) > len(found):
        refuse("UidsLengthExceedUidsInSubNet", "there are more weights than neurons")
    me = next((n for n in found if n.hotkey == origin.signer), None)
    if me is None:
        refuse("HotKeyNotRegisteredInSubNet", f"{origin.signer} is not on subnet {netuid}")
    _may_set_weights(me, found, settings, params, block=origin.block, own=targets == [me.uid])
    _check_weights(targets, values, len(found), settings, own=targets == [me.uid])
    top = max(values)
    db.execute("DELETE FROM weights WHERE netuid = ? AND uid = ?", (netuid, me.uid))
    db.executemany(
        "INSERT INTO weights VALUES (?, ?, ?, ?)",
        [
            (netuid, me.uid, target, round(value * 65535 / top))
            for target, value in zip(targets, values, strict=True)
            if value
        ],
    )
    db.execute(
        "UPDATE neurons SET last_update = ? WHERE netuid = ? AND uid = ?",
        (origin.block, netuid, me.uid),
    )


def _may_set_weights(
    me: Neuron,
    found: list[Neuron],
    settings: Mapping[str, int],
    params: Params,
    *,
    block: int,
    own: bool,
) -> None:
    if me.stake < STAKE_THRESHOLD_RAO:
        refuse("NotEnoughStakeToSetWeights", f"{STAKE_THRESHOLD_RAO} rao of stake are needed")
    version, wanted = integer(params, "version_key", maximum=2**64 - 1), settings["weights_version"]
    if version < wanted:
        refuse("IncorrectWeightVersionKey", f"the subnet requires version {wanted}, not {version}")
    wait = settings["weights_rate_limit"] - (block - me.last_update)
    if wait > 0:
        refuse("SettingWeightsTooFast", f"weights may be set again in {wait} blocks")
    held = permits([n.stake for n in found], max_validators=settings["max_validators"])
    # As on the real chain, weights for oneself alone need no permit.
    if not held[me.uid] and not own:
        refuse("NeuronNoValidatorPermit", f"uid {me.uid} holds no validator permit")


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


CALLS: dict[tuple[str, str], Rule] = {
    ("SubtensorModule", "burned_register"): burned_register,
    ("SubtensorModule", "add_stake"): add_stake,
    ("SubtensorModule", "add_stake_limit"): add_stake,
    ("SubtensorModule", "serve_axon"): serve_axon,
    ("SubtensorModule", "set_weights"): set_weights,
    ("SubtensorModule", "set_mechanism_weights"): set_weights,
    ("Commitments", "set_commitment"): set_commitment,
}
