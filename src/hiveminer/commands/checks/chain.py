"""Checks of the keys, the chain, and the address that goes on it."""

from __future__ import annotations

import contextlib
from typing import Any

from hiveminer.chain import open_chain, open_wallet
from hiveminer.chain.wallets import Reader, embedded_key
from hiveminer.commands.checks.base import Check, Checks, failed, passed, warned
from hiveminer.errors import HiveminerError
from hiveminer.runtime import addresses

CHAIN_SECONDS = 8.0

ALLOWED_SKEW_SECONDS = 2.0
"""How far a clock may be ahead of another's before signed requests are refused."""

OLD_SECONDS = 10.0
"""The age at which a signed request is refused."""


class ChainChecks(Checks):
    """Can this hotkey take part in the subnet, and be reached?"""

    def wallet(self) -> Check:
        settings = self.settings
        if settings.embedded:
            self._wallet = embedded_key(settings.subtensor.path, settings.wallet)
            if self._wallet is None:
                return passed("none yet; the miner makes a throwaway key by itself")
            return passed(f"throwaway key {self._wallet.hotkey.ss58_address}")
        name, hotkey = settings.wallet.name, settings.wallet.hotkey or "default"
        self._wallet = open_wallet(name, hotkey, settings.wallet.path)
        folder = settings.wallet.path / name
        said = f"{name}/{hotkey}: {self._wallet.hotkey.ss58_address}"
        file = folder / "hotkeys" / hotkey
        if file.stat().st_mode & 0o077:
            return failed(f"{said}; others on this machine can read it", f"chmod 600 {file}")
        if (folder / "coldkey").exists():
            return warned(
                f"{said}; the coldkey lies here too",
                f"a miner never needs it: keep it elsewhere ({folder / 'coldkey'})",
            )
        return passed(said)

    def chain(self) -> Check:
        settings = self.settings
        file = settings.subtensor.path / "chain.sqlite"
        if settings.embedded and not file.exists():
            return passed(f"embedded, not made yet: the first miner makes {file}")
        self._chain = open_chain(
            network=settings.subtensor.network,
            netuid=settings.netuid,
            wallet=self._wallet or Reader(),
            path=file,
            block_seconds=settings.subtensor.block_seconds,
            timeout_seconds=CHAIN_SECONDS,
        )
        self._metagraph = self._chain.metagraph()
        return passed(
            f"{settings.subtensor.network}, block {self._metagraph.block}, subnet "
            f"{settings.netuid} with {len(self._metagraph)} of {self._metagraph.max_uids} neurons"
        )

    def clock(self) -> Check:
        """Ours against the last block's: as exact as a block is long."""
        if self._chain is None:
            return self._without_chain("there is no chain to compare with")
        stamp = self._chain.read("reading the time", lambda client: client.timestamp())
        ahead = self._clock() - stamp.timestamp()
        block = self._chain.block_seconds()
        cure = "set the clock by NTP: timedatectl set-ntp true"
        if ahead < -ALLOWED_SKEW_SECONDS:
            return failed(f"{-ahead:.0f} s behind the chain: calls will be refused", cure)
        if ahead > 3 * block + OLD_SECONDS:
            return failed(
                f"the last block is {ahead:.0f} s old",
                f"{cure}; if it is right, the node lags: try another with --subtensor.network",
            )
        return passed(f"the last block is {max(0.0, ahead):.0f} s old, of {block:g} s a block")

    def registered(self) -> Check:
        if self._metagraph is None or self._chain is None:
            return self._without_chain("the miner registers by itself")
        ours = self._ours()
        if ours is not None:
            return passed(f"uid {ours.uid} since block {ours.block_at_registration}")
        if self._chain.embedded:
            return passed("not yet; the miner registers by itself")
        if self._wallet is None:
            return failed("there is no hotkey to look for", "put the wallet right first")
        return failed(
            f"{self._chain.hotkey} is not on subnet {self.settings.netuid}; it costs "
            f"{self._price()} now",
            self._chain.registration(),
        )

    def _price(self) -> str:
        assert self._chain is not None
        with contextlib.suppress(HiveminerError):
            return f"{self._chain.price():.4f} TAO"
        return "an unknown price"

    def stake(self) -> Check:
        ours = self._ours()
        if ours is None:
            return passed("none; a miner needs neither")
        permit = "a validator permit" if ours.validator_permit else "no validator permit"
        return passed(f"{float(ours.total_stake.amount):.2f} staked, {permit}; a miner needs none")

    def address(self) -> Check:
        settings = self.settings
        if settings.embedded:
            self._ip = settings.axon.external_ip or settings.axon_ip
            return passed(f"{self._ip}: the embedded network is on this machine alone")
        given = settings.axon.external_ip or settings.axon.ip
        asked = given is None or given in ("0.0.0.0", "::")
        self._ip = self._ask_outside() if asked or given is None else given
        said = "as two services on the internet see it" if asked else "as given"
        for flag, ip in (("--axon.external_ip", self._ip), ("--dht.external_ip", self._dht_ip())):
            problem = addresses.check(ip)
            if problem is not None:
                verdict = failed if problem.kind == "refused" else warned
                return verdict(problem.words, f"give the public address with {flag}")
        return passed(f"{self._ip}, {said}")

    def _dht_ip(self) -> str:
        return self.settings.dht.external_ip or self._ip or ""

    def axon(self) -> Check:
        ours = self._ours()
        if ours is None:
            return passed("nothing yet; the miner puts it there")
        port = self.settings.axon.external_port or self.settings.axon.port
        wanted = f"[{self._ip}]:{port}" if ":" in (self._ip or "") else f"{self._ip}:{port}"
        if ours.axon == wanted:
            return passed(wanted)
        found = f"{ours.axon or 'nothing'} stands there, and {wanted} is wanted"
        if self.settings.embedded or ours.axon is None:
            return passed(f"{found}; the miner puts it there")
        return warned(found, "the miner puts it there when it starts; does another use this key?")

    def outside(self) -> Check:
        if self.settings.embedded:
            return passed("not needed on the embedded network")
        port = self.settings.axon.external_port or self.settings.axon.port
        dht = self.settings.dht.external_port or self.settings.dht.port
        ip = self._ip or "ADDRESS"
        host = f"[{ip}]" if ":" in ip else ip
        return warned(
            "nothing on this machine can tell",
            f"start the miner, then on another machine: curl http://{host}:{port}/ (it says "
            f"alive) and nc -vz {ip} {dht}; if they hang, open both TCP ports in the firewall",
        )

    def _ours(self) -> Any:
        if self._metagraph is None or self._chain is None or self._wallet is None:
            return None
        return self._metagraph.by_hotkey(self._chain.hotkey)

    def _without_chain(self, embedded: str) -> Check:
        if self.settings.embedded:
            return passed(f"the network is not made yet; {embedded}")
        return failed("not known without the chain", "put the chain right first")
