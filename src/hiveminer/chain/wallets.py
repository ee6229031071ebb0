"""Wallets: throwaway ones for the embedded network, and real ones by Bittensor's layout.

A key of the embedded network belongs to one process at a time, which locks a file beside it. So a
second miner that is started without flags takes the next key.
"""

from __future__ import annotations

import fcntl
import itertools
import os
import re
from pathlib import Path

import bittensor as bt
from bittensor.keyfiles import Keypair

from hiveminer.config.settings import Settings
from hiveminer.errors import OperatorError, one_line
from hiveminer.runtime.locks import Held, hold

EMBEDDED_WALLET = "embedded"
"""The wallet of all hotkeys that `embedded_wallet` creates."""

_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}")


class Claimed:
    """A wallet whose hotkey only this process may use; the context's end releases it."""

    def __init__(self, wallet: bt.Wallet, held: Held):
        self.wallet = wallet
        self._held = held

    def __enter__(self) -> Claimed:
        return self

    def __exit__(self, *error: object) -> None:
        self._held.release()


def embedded_wallet(place: Path, *, prefix: str) -> Claimed:
    """The first of `prefix-0`, `prefix-1`, ... that no process uses, created if needed.

    place: the embedded network's folder. Keys are stored in `place/wallets`, unencrypted, since
    they are worth nothing, and no mnemonic is printed. Raises `OperatorError` if the folder
    cannot be used.
    """
    claims = (_claim(place, EMBEDDED_WALLET, f"{prefix}-{index}") for index in itertools.count())
    return next(claimed for claimed in claims if isinstance(claimed, Claimed))


def named_embedded_wallet(place: Path, name: str, hotkey: str) -> Claimed:
    """This hotkey in `place/wallets`, created if it is missing.

    Raises `OperatorError` if another process uses it, or the folder cannot be used.
    """
    claimed = _claim(place, name, hotkey)
    if isinstance(claimed, Claimed):
        return claimed
    raise OperatorError(
        f"hotkey {name}/{hotkey} is in use by process {claimed}; "
        "stop that, or choose another with --wallet.hotkey"
    )


def open_wallet(name: str, hotkey: str, path: Path | str) -> bt.Wallet:
    """A wallet for a real network: its hotkey is read now, its coldkey never.

    `path` is the folder of wallets (`~` is expanded). Raises `OperatorError` if the hotkey
    is missing or cannot be read.
    """
    _check_names(name, hotkey)
    folder = Path(path).expanduser()
    file = folder / name / "hotkeys" / hotkey
    wallet = bt.Wallet(name, hotkey, str(folder))
    if not file.is_file():
        raise OperatorError(
            f"there is no hotkey at {file}; create one with: btcli wallet new-hotkey "
            f"--wallet {name} --wallet-hotkey {hotkey} --wallet-path {folder}"
        )
    _unlock(wallet)
    return wallet


def _unlock(wallet: bt.Wallet) -> None:
    """Read the hotkey without a prompt, and check that it can sign."""
    file = wallet.hotkey_file
    new = "btcli wallet new-hotkey creates one"
    try:
        if file.is_encrypted() and not os.environ.get(file.env_var_name()):
            raise OperatorError(
                f"the hotkey at {file.path} has a password, and there is no prompt here; set "
                f"{file.env_var_name()}, or use a hotkey without one ({new})"
            )
        wallet.unlock_hotkey().sign(b"")
    except OperatorError:
        raise
    except Exception as error:
        reason = one_line(error)[:200]
        if "no private key" in reason:
            raise OperatorError(
                f"the hotkey at {file.path} is only a public key, which cannot sign; copy the "
                f"whole file here ({new})"
            ) from None
        raise OperatorError(f"the hotkey at {file.path} cannot be read: {reason}") from error


class Reader:
    """A wallet for reading only, with a random key."""

    def __init__(self) -> None:
        self.hotkey = Keypair.create_from_seed(os.urandom(32))
        self.coldkey = self.coldkeypub = self.hotkey


def own_wallet(settings: Settings, *, role: str = "miner") -> bt.Wallet | None:
    """This machine's wallet on the network of the settings, without claiming it, so that a
    running neuron may use it. None on the embedded network where it was not created yet."""
    name, hotkey, path = settings.wallet.name, settings.wallet.hotkey, settings.wallet.path
    if settings.embedded:
        path = settings.subtensor.path / "wallets"
        if hotkey is None:
            name, hotkey = EMBEDDED_WALLET, f"{role}-0"
        if not (path / name / "hotkeys" / hotkey).is_file():
            return None
    return open_wallet(name, hotkey or "default", path)


def _claim(place: Path, name: str, hotkey: str) -> Claimed | str:
    """The key, or the pid of the process that uses it, or "unknown"."""
    _check_names(name, hotkey)
    folder = Path(place).expanduser() / "wallets"
    try:
        locks = folder / name / "locks"
        locks.mkdir(parents=True, exist_ok=True, mode=0o700)
        held = hold(locks / hotkey)
        if isinstance(held, str):
            return held
        try:
            wallet = bt.Wallet(name, hotkey, str(folder))
            _make_keys(wallet, locks)
            _unlock(wallet)
        except BaseException:
            held.release()
            raise
    except OSError as error:
        raise OperatorError(
            f"wallets cannot be kept under {folder}: {error}; choose a folder that is writable"
        ) from error
    return Claimed(wallet, held)


def _make_keys(wallet: bt.Wallet, locks: Path) -> None:
    with open(locks / ".coldkey", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # until it is closed
        # Both are missing, or the process that created them was killed in between, so that the
        # first was never used.
        if not (
            wallet.coldkey_file.exists_on_device() and wallet.coldkeypub_file.exists_on_device()
        ):
            wallet.create_new_coldkey(use_password=False, overwrite=True, suppress=True)
    if not wallet.hotkey_file.exists_on_device():
        wallet.create_new_hotkey(use_password=False, overwrite=True, suppress=True)


def _check_names(name: str, hotkey: str) -> None:
    for flag, value in (("--wallet.name", name), ("--wallet.hotkey", hotkey)):
        if not _NAME.fullmatch(value):
            raise OperatorError(
                f"{flag}: {value[:64]!r} cannot be a name; use up to 64 letters, digits, -, _ and ."
            )
