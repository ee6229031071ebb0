"""Doctor's checks of the keys, the chain, and the published address."""

from __future__ import annotations

import contextlib
from typing import Any

from bittensor import http_auth

from hiveminer.chain import open_subnet
from hiveminer.chain.wallets import Reader, own_wallet
from hiveminer.commands.checks.base import Check, Examination, failed, passed, warned
from hiveminer.errors import HiveminerError
from hiveminer.runtime import addresses


def wallet(exam: Examination) -> Check:
    settings = exam.settings
    exam.wallet = own_wallet(settings)
    if exam.wallet is None:
        return passed("none yet; the miner makes a throwaway key by itself")
    if settings.embedded:
        return passed(f"throwaway key {exam.wallet.hotkey.ss58_address}")
    name, hotkey = settings.wallet.name, settings.wallet.hotkey or "default"
    folder = settings.wallet.path / name
    said = f"{name}/{hotkey}: {exam.wallet.hotkey.ss58_address}"
    file = folder / "hotkeys" / hotkey
    if file.stat().st_mode & 0o077:
        return failed(f"{said}; others on this machine can read it", f"chmod 600 {file}")
    if (folder / "coldkey").exists():
        return warned(
            f"{said}; the coldkey is on this machine too",
            f"a miner never needs it: keep it elsewhere ({folder / 'coldkey'})",
        )
    return passed(said)


def chain(exam: Examination) -> Check:
    settings = exam.settings
    file = settings.subtensor.file
    if settings.embedded and not file.exists():
        return passed(f"embedded, not created yet: the first miner creates {file}")
    exam.chain = open_subnet(settings, exam.wallet or Reader(), timeout_seconds=8.0)
    exam.metagraph = exam.chain.metagraph()
    return passed(
        f"{settings.subtensor.network}, block {exam.metagraph.block}, subnet "
        f"{settings.netuid} with {len(exam.metagraph)} of {exam.metagraph.max_uids} neurons"
    )


def clock(exam: Examination) -> Check:
    """Compare with the last block's time, as exact as a block is long, by the limits of signed
    requests."""
    if exam.chain is None:
        return _without_chain(exam, "there is no chain to compare with")
    stamp = exam.chain.read("reading the time", lambda client: client.timestamp())
    ahead = exam.clock() - stamp.timestamp()
    block = exam.chain.block_seconds()
    cure = "set the clock by NTP: timedatectl set-ntp true"
    if ahead < -http_auth.DEFAULT_ALLOWED_SKEW:
        return failed(f"{-ahead:.0f} s behind the chain: calls will be refused", cure)
    if ahead > 3 * block + http_auth.DEFAULT_MAX_AGE:
        return failed(
            f"the last block is {ahead:.0f} s old",
            f"{cure}; if it is right, the node lags: try another with --subtensor.network",
        )
    return passed(f"the last block is {max(0.0, ahead):.0f} s old, of {block:g} s a block")


def registered(exam: Examination) -> Check:
    if exam.metagraph is None or exam.chain is None:
        return _without_chain(exam, "the miner registers by itself")
    ours = _ours(exam)
    if ours is not None:
        return passed(f"uid {ours.uid} since block {ours.block_at_registration}")
    if exam.chain.embedded:
        return passed("not yet; the miner registers by itself")
    if exam.wallet is None:
        return failed("there is no hotkey to look for", "fix the wallet first")
    price = "an unknown price"
    with contextlib.suppress(HiveminerError):
        price = f"{exam.chain.price():.4f} TAO"
    return failed(
        f"{exam.chain.hotkey} is not on subnet {exam.settings.netuid}; it costs {price} now",
        exam.chain.registration(),
    )


def stake(exam: Examination) -> Check:
    ours = _ours(exam)
    if ours is None:
        return passed("none; a miner needs neither")
    permit = "a validator permit" if ours.validator_permit else "no validator permit"
    return passed(f"{float(ours.total_stake.amount):.2f} staked, {permit}; a miner needs none")


def address(exam: Examination) -> Check:
    settings = exam.settings
    if settings.embedded:
        exam.ip = settings.axon.external_ip or settings.axon_ip
        return passed(f"{exam.ip}: the embedded network is on this machine alone")
    given = settings.axon.external_ip or settings.axon.ip
    if given is None or given in addresses.EVERY_ADDRESS:
        exam.ip, said = exam.ask_outside(), "as two services on the internet see it"
    else:
        exam.ip, said = given, "as given"
    dht_ip = settings.dht.external_ip or exam.ip
    for flag, ip in (("--axon.external_ip", exam.ip), ("--dht.external_ip", dht_ip)):
        cure = f"give the public address with {flag}"
        try:
            doubt = addresses.check(ip)
        except ValueError as error:
            return failed(str(error), cure)
        if doubt:
            return warned(doubt, cure)
    return passed(f"{exam.ip}, {said}")


def axon(exam: Examination) -> Check:
    ours = _ours(exam)
    if ours is None:
        return passed("nothing yet; the miner publishes it")
    port = exam.settings.axon.external_port or exam.settings.axon.port
    wanted = f"[{exam.ip}]:{port}" if ":" in (exam.ip or "") else f"{exam.ip}:{port}"
    if ours.axon == wanted:
        return passed(wanted)
    found = f"{ours.axon or 'nothing'} is published, expected {wanted}"
    if exam.settings.embedded or ours.axon is None:
        return passed(f"{found}; the miner publishes it")
    return warned(found, "the miner publishes it when it starts; does another use this key?")


def outside(exam: Examination) -> Check:
    if exam.settings.embedded:
        return passed("not needed on the embedded network")
    port = exam.settings.axon.external_port or exam.settings.axon.port
    dht = exam.settings.dht.external_port or exam.settings.dht.port
    ip = exam.ip or "ADDRESS"
    host = f"[{ip}]" if ":" in ip else ip
    return warned(
        "cannot be checked from this machine",
        f"start the miner, then on another machine: curl http://{host}:{port}/ (it answers "
        f"alive) and nc -vz {ip} {dht}; if they hang, open both TCP ports in the firewall",
    )


def _ours(exam: Examination) -> Any:
    if exam.metagraph is None or exam.chain is None or exam.wallet is None:
        return None
    return exam.metagraph.by_hotkey(exam.chain.hotkey)


def _without_chain(exam: Examination, embedded: str) -> Check:
    if exam.settings.embedded:
        return passed(f"the network is not created yet; {embedded}")
    return failed("unknown without the chain", "fix the chain first")
