"""`hiveminer doctor`: is this machine ready to mine? Looks at everything, changes nothing.

Each check is one line, passed, warned or failed, with what to do. It takes the miner's own
settings, needs no network for the embedded one, starts no swarm and registers nothing. A
check that hangs is cut off, so that the whole ends within half a minute.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import importlib.metadata
import importlib.util
import json
import netrc
import os
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import bittensor as bt
from rich.table import Table

from hiveminer.chain import Chain, open_chain, open_wallet
from hiveminer.chain.wallets import Reader, embedded_key
from hiveminer.config.run import Run, RunId, load_run
from hiveminer.config.settings import MinerSettings
from hiveminer.errors import ChainError, HiveminerError, OperatorError
from hiveminer.runtime import addresses, dependencies, machine
from hiveminer.runtime.addresses import port_is_free
from hiveminer.runtime.program import rendered

TOTAL_SECONDS = 28.0
"""All checks together; what is left over then is cut off and counts as failed."""

CHECK_SECONDS = 12.0
"""One check, at most."""

LOAD_SECONDS = 300.0
"""The check that loads model and data, at most; not counted in TOTAL_SECONDS."""

CHAIN_SECONDS = 8.0
PEER_SECONDS = 3.0
MAX_PEERS = 64
MAX_EXIT_CODE = 100

ALLOWED_SKEW_SECONDS = 2.0
"""How far a clock may be ahead of another's before signed requests are refused."""

OLD_SECONDS = 10.0
"""After so many seconds a signed request is refused."""

PYTHONS = ((3, 11), (3, 14))
SHOWN = ("bittensor", "hivemind", "torch", "transformers", "datasets")
"""The packages whose versions are listed."""

USUAL_ROWS = 4
"""A validator's batch, unless it says otherwise."""

Verdict = Literal["passed", "warned", "failed"]


@dataclass(frozen=True)
class Check:
    """One line: what was looked at, what was found, and what to do about it."""

    name: str
    verdict: Verdict
    found: str
    cure: str = ""


def passed(found: str) -> Check:
    return Check("", "passed", found)


def warned(found: str, cure: str) -> Check:
    return Check("", "warned", found, cure)


def failed(found: str, cure: str) -> Check:
    return Check("", "failed", found, cure)


class Doctor:
    """Looks at one machine with one set of settings.

    clock: seconds since 1970. ask_outside: the question for the public address. Both for
    tests, as is `environ`.
    """

    def __init__(
        self,
        settings: MinerSettings,
        *,
        clock: Callable[[], float] = time.time,
        ask_outside: Callable[[], str] = addresses.ask_outside,
        environ: Mapping[str, str] = os.environ,
    ):
        self.settings = settings
        self._clock = clock
        self._ask_outside = ask_outside
        self._environ = environ
        self._wallet: Any = None
        self._chain: Chain | None = None
        self._metagraph: bt.Metagraph | None = None
        self._run: Run | None = None
        self._run_id: RunId | None = None
        self._fits = False
        self._ip: str | None = None

    def checks(self) -> list[tuple[str, Callable[[], Check]]]:
        """Every check with its name, in the order that the later ones need the earlier."""
        return [
            ("python", self.python),
            ("packages", self.packages),
            ("temporary and open files", self.limits),
            ("run", self.run_file),
            ("device and memory", self.memory),
            ("disk", self.disk),
            ("ports", self.ports),
            ("wallet", self.wallet),
            ("chain", self.chain),
            ("clock", self.clock),
            ("registered", self.registered),
            ("stake and permit", self.stake),
            ("address", self.address),
            ("axon on the chain", self.axon),
            ("model and data", self.task),
            ("bootstrap peers", self.peers),
            ("wandb", self.wandb),
            ("reachable from outside", self.outside),
        ]

    def examine(self) -> Iterator[Check]:
        """Do every check, each within its time."""
        deadline = time.monotonic() + TOTAL_SECONDS
        try:
            for name, look in self.checks():
                began = time.monotonic()
                loads = look == self.task
                left = LOAD_SECONDS if loads else min(CHECK_SECONDS, deadline - began)
                found = within(look, seconds=left)
                deadline += time.monotonic() - began if loads else 0.0
                yield Check(name, found.verdict, found.found, found.cure)
        finally:
            if self._chain is not None:
                self._chain.close()

    # This machine ------------------------------------------------------------------

    def python(self) -> Check:
        version = ".".join(str(part) for part in sys.version_info[:3])
        if not PYTHONS[0] <= sys.version_info[:2] < PYTHONS[1]:
            return failed(version, "install Python 3.11, 3.12 or 3.13")
        return passed(version)

    def packages(self) -> Check:
        wrong = dependencies.unmet()
        if wrong:
            return failed("; ".join(map(str, wrong)), "install what this version was written for")
        return passed(", ".join(f"{name} {importlib.metadata.version(name)}" for name in SHOWN))

    def limits(self) -> Check:
        """What a start would refuse: temporary files, and how many may be open."""
        folder = machine.check_temporary_folder()
        return passed(f"temporary files in {folder}, {machine.check_descriptors()} may be open")

    def run_file(self) -> Check:
        self._run = load_run(self.settings.neuron.run)
        self._run.check_version()
        place = self.settings.neuron.run or "built in"
        return passed(f"{self._run.name} ({place}), hash {self._run.hash[:8]}")

    def memory(self) -> Check:
        """Device, and memory for this model: one row at a time, and a batch as usual."""
        if self._run is None:
            return failed("not known without the run", "put the run right first")
        from hiveminer.training.memory import memory_left, memory_needed
        from hiveminer.training.model import choose_device, shape_of_model

        named = self._run.model
        built = shape_of_model(named.name, revision=named.revision)
        device = choose_device(self.settings.neuron.device)
        free = memory_left(device)
        needed = memory_needed(built, sequence_length=self._run.model.sequence_length)
        least = needed.training + (0 if device.type == "cuda" else needed.host)
        usual = least + (USUAL_ROWS - 1) * needed.activations
        said = (
            f"{device}, {gigabytes(free)} free; {needed.parameters / 1e6:.1f}M parameters take "
            f"{gigabytes(least)} at least, {gigabytes(usual)} with {USUAL_ROWS} rows at a time"
        )
        self._fits = least <= free
        if not self._fits:
            return failed(said, "use a device with more memory, or a smaller model in run.toml")
        if usual > free:
            return warned(said, "it trains, in smaller pieces and slower")
        return passed(said)

    def disk(self) -> Check:
        place = self.settings.neuron.path
        existing = next(p for p in (place.absolute(), *place.absolute().parents) if p.exists())
        if not os.access(existing, os.W_OK | os.X_OK):
            return failed(
                f"{existing} cannot be written to", "choose another folder with --neuron.path"
            )
        free = shutil.disk_usage(existing).free
        said = f"{gigabytes(free)} free at {existing}"
        if free < 200e6:
            return failed(said, "free some space, or choose another folder with --neuron.path")
        if free < 2e9:
            return warned(said, "logs and metrics grow: keep 2 GB free")
        return passed(said)

    def ports(self) -> Check:
        settings = self.settings
        wanted = [
            ("--axon.port", settings.axon_ip, settings.axon.port),
            ("--dht.port", settings.dht_ip, settings.dht.port),
            ("--axon.metrics_port", "127.0.0.1", settings.axon.metrics_port or 0),
        ]
        taken = [(flag, port) for flag, ip, port in wanted if port and not port_is_free(ip, port)]
        said = ", ".join(f"{flag} {port or 'any'}" for flag, _, port in wanted if port) or "any"
        if not taken:
            return passed(f"free: {said}")
        names = ", ".join(f"{flag} {port}" for flag, port in taken)
        if settings.embedded and not any(settings.given(flag[2:]) for flag, _ in taken):
            return passed(f"in use: {names}; a miner takes the next free ones")
        return failed(f"in use: {names}", "stop what listens there (your miner?), or choose others")

    # Keys and chain ------------------------------------------------------------------

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

    # Data and swarm --------------------------------------------------------------------

    def task(self) -> Check:
        """Everything that a program loads at its start, checked as it does."""
        if self._run is None:
            return failed("not known without the run", "put the run right first")
        if not self._fits:
            return failed("not known without the memory to load it", "put the memory right first")
        from hiveminer.training.model import REPORTED_SHARE
        from hiveminer.training.task import load_task

        task = load_task(self._run)
        self._run_id = task.run_id
        compared = "as the run wants it" if self._run.data.hash else "the run names none"
        found = (
            f"model {self._run.model.name}; data {self._run.data.name}: {len(task.dataset)} rows, "
            f"hash {task.dataset.hash[:8]} ({compared})"
        )
        if task.beyond >= REPORTED_SHARE:
            return warned(
                f"{found}; about {task.beyond:.0%} of it is beyond the sequence length and never "
                "trained",
                "cut its rows into shorter ones, or raise model.sequence_length in run.toml",
            )
        return passed(found)

    def peers(self) -> Check:
        """Do the known peers answer, and is the run that validators commit ours?"""
        known = list(self.settings.dht.initial_peers)
        commitments: Mapping[str, bytes] = {}
        if self._chain is not None and self._metagraph is not None:
            commitments = self._chain.commitments(self._metagraph)
            own = self._chain.hotkey
            said = (
                text.decode(errors="replace") for who, text in commitments.items() if who != own
            )
            known = known or [text.split()[0] for text in said if text.startswith("/")]
        other = self._other_run(commitments)
        if other:
            return failed(other, "get the subnet's run.toml and data: --neuron.run")
        if not known:
            return passed("none yet; this miner would be the first")
        answered = sum(answers(known[:MAX_PEERS]))
        said_so = f"{answered} of {min(len(known), MAX_PEERS)} take a connection"
        if answered:
            return passed(said_so)
        cure = "their ports may be closed to you; a miner starts alone and tries again"
        return (failed if self.settings.dht.initial_peers else warned)(said_so, cure)

    def _other_run(self, commitments: Mapping[str, bytes]) -> str | None:
        """How our run differs from every one that a validator has committed, if it does."""
        if self._run_id is None or self._metagraph is None:
            return None
        permitted = {n.hotkey for n in self._metagraph if n.validator_permit}
        runs = [
            text.decode(errors="replace").removeprefix("run ")
            for who, text in commitments.items()
            if who in permitted and text.startswith(b"run ")
        ]
        differences = [self._run_id.difference(run) for run in runs]
        return differences[0] if differences and None not in differences else None

    def wandb(self) -> Check:
        mode = self.settings.wandb.mode
        if mode == "disabled":
            return passed("disabled; numbers go to metrics.jsonl")
        if importlib.util.find_spec("wandb") is None:
            return failed(f"{mode}, and the package is missing", "pip install wandb")
        if mode == "online" and not self._has_wandb_key():
            return warned("online, and there is no API key: it stays offline", "run: wandb login")
        return passed(mode)

    def _has_wandb_key(self) -> bool:
        if self._environ.get("WANDB_API_KEY"):
            return True
        with contextlib.suppress(OSError, netrc.NetrcParseError):
            return netrc.netrc().authenticators("api.wandb.ai") is not None
        return False

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

    # Helpers -----------------------------------------------------------------------------

    def _ours(self) -> Any:
        if self._metagraph is None or self._chain is None or self._wallet is None:
            return None
        return self._metagraph.by_hotkey(self._chain.hotkey)

    def _without_chain(self, embedded: str) -> Check:
        if self.settings.embedded:
            return passed(f"the network is not made yet; {embedded}")
        return failed("not known without the chain", "put the chain right first")


def within(look: Callable[[], Check], *, seconds: float) -> Check:
    """A check's outcome; its mistakes are failures, and so is taking too long."""
    future: concurrent.futures.Future[Check] = concurrent.futures.Future()

    def work() -> None:
        try:
            future.set_result(look())
        except BaseException as error:  # noqa: BLE001 - told below
            future.set_exception(error)

    if seconds <= 0:
        return failed("not looked at: the checks before it took too long", "put those right first")
    # A thread of our own: one that hangs for ever must not keep the program from ending.
    threading.Thread(target=work, name="check", daemon=True).start()
    try:
        return future.result(seconds)
    except concurrent.futures.TimeoutError:
        return failed(f"no answer within {seconds:.0f} s", "look at the network, and try again")
    except (OperatorError, ChainError) as error:
        found, _, cure = " ".join(str(error).split()).partition("; ")
        return failed(found, cure or "try again in a minute")
    except Exception as error:  # noqa: BLE001 - one broken check must not hide the others
        return failed(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}", "report it")


def answers(peers: Iterable[str]) -> list[bool]:
    """Which of these multiaddresses take a TCP connection; all are tried at once."""
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        return list(pool.map(_answers, peers))


def _answers(peer: str) -> bool:
    parts = peer.split("/")
    try:
        host, port = parts[2], int(parts[parts.index("tcp") + 1])
        with socket.create_connection((host, port), timeout=PEER_SECONDS):
            return True
    except (OSError, ValueError, IndexError, OverflowError):
        return False


def gigabytes(count: float) -> str:
    return f"{count / 1e9:.1f} GB"


MARKS = {"passed": "[green]passed[/]", "warned": "[yellow]warned[/]", "failed": "[red]failed[/]"}


def as_text(checks: Sequence[Check]) -> str:
    """A table for people."""
    table = Table(box=None, show_header=False, pad_edge=False)
    for column in ("verdict", "name", "found"):
        table.add_column(column, overflow="fold")
    for check in checks:
        cure = f"\n-> {check.cure}" if check.cure else ""
        table.add_row(MARKS[check.verdict], check.name, _plain(check.found + cure))
    count = {v: sum(c.verdict == v for c in checks) for v in ("passed", "warned", "failed")}
    return rendered(table, ", ".join(f"{number} {verdict}" for verdict, number in count.items()))


def _plain(text: str) -> str:
    return text.replace("[", r"\[")


def as_json(checks: Sequence[Check]) -> str:
    """The same for machines."""
    failures = sum(check.verdict == "failed" for check in checks)
    return json.dumps({"failed": failures, "checks": [asdict(check) for check in checks]}, indent=1)


def main(settings: MinerSettings, *, as_json_text: bool = False) -> int:
    """Examine this machine; the exit code is the number of failures, 100 at most."""
    checks = list(Doctor(settings).examine())
    print(as_json(checks) if as_json_text else as_text(checks))
    return min(MAX_EXIT_CODE, sum(check.verdict == "failed" for check in checks))
