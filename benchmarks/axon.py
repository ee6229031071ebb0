"""How fast the axon answers: while it trains, and while strangers flood it.

`scripts/bench axon` starts a miner as a process, on an embedded network of its own in a
temporary folder, with one torch thread, and keeps it training to the end. Then, in turn:

- `is_alive_training_*`: signed `IsAlive` one at a time, from the first byte sent to the last
  one read. One connection serves 20 calls, so the time to connect is in one of them. The
  signature is made before and the answer's is checked after the clock runs; `call_*` is the
  same with both, as a validator's `Dendrite` sees it.
- `requests_per_second`: signed `IsAlive`, one after the other on each of 32 connections, from
  8 registered hotkeys in turn, since each has a budget (200 a second, 1000 at once).
- `flood_*`: as the first, under the flood that `_flood.py` describes, from a niced process on
  this machine. `rss_growth_mb` is the miner's peak then, over its peak in the seconds before.
- `fuzz_*`: malformed requests, drawn by hypothesis (`tests/malformed.py`), each as it is and
  7 times with bytes changed by chance, in the body before it is signed or in the whole
  afterwards; `fuzz_500` is the number of those answered with 500, by the answers or by the
  miner's own count, whichever is higher.
- `base_*`: the same calls, signatures and all, to a plain Starlette server without checks,
  `_plain.py`. The miner's training competes with its own server for one interpreter, so the
  plain server trains the same model in a thread of its process too.

All of it shares one machine: the miner, the flood and the caller itself, whose own delays
are in every number.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from bittensor import http_auth

from benchmarks import _flood, machine
from benchmarks._processes import cpu_seconds, started
from hiveminer.chain import embedded_wallet, join_embedded, open_chain
from hiveminer.errors import MinerError
from hiveminer.protocol import IsAlive, Train
from hiveminer.rpc.dendrite import Dendrite, Endpoint, endpoints_of
from hiveminer.rpc.signatures import verify_answer
from hiveminer.runtime.metrics import progress_bar

ROOT = Path(__file__).resolve().parent.parent
HOST = "127.0.0.1"
HOTKEYS = 8
CONNECTIONS = 32
REQUESTS_IN_A_ROUND = 4
CALLS_A_CONNECTION = 20
PAUSE_SECONDS = 0.008
"""Mean pause between calls, by chance, so that they fall anywhere in a training step."""

FUZZERS = 96
FUZZ_WAIT_SECONDS = 0.5
"""For an answer; half of the malformed requests wait for more and get none."""

START_SECONDS = 120.0
FLOOD_SECONDS = 120.0
BODY = IsAlive().model_dump_json().encode()


@dataclass
class Target:
    """A server, and who calls it; `hotkey` is None where answers are not signed."""

    name: str
    port: int
    process: psutil.Process
    hotkey: str
    signs: bool
    wallets: list[Any]


@dataclass
class Sizes:
    """How much is measured."""

    samples: int
    fuzz: int


class Line:
    """One HTTP connection, as lean as can be: the caller's own work is in every number."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, request: bytes) -> tuple[int, dict[str, str], bytes]:
        """Send it, connecting if need be; status, headers and body of the answer."""
        if self._streams is None:
            self._streams = await asyncio.open_connection(HOST, self.target.port)
        reader, writer = self._streams
        writer.write(request)
        head = await reader.readuntil(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")[:-2]
        pairs = (line.split(": ", 1) for line in lines)
        headers = {name.lower(): value for name, value in pairs}
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        if headers.get("connection") == "close":
            self.close()
        return int(first.split(" ")[1]), headers, body

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


@dataclass
class Signed:
    """A signed `IsAlive`, ready to send, and the check of its answer."""

    target: Target
    wallet: Any
    headers: dict[str, str] = field(init=False)
    raw: bytes = field(init=False)

    def __post_init__(self) -> None:
        self.headers = http_auth.sign(
            self.wallet.hotkey,
            method="POST",
            path="/IsAlive",
            body=BODY,
            receiver_ss58=self.target.hotkey,
        )
        lines = {"host": "x", "content-length": str(len(BODY)), **self.headers}
        head = "\r\n".join(f"{name}: {value}" for name, value in lines.items())
        self.raw = f"POST /IsAlive HTTP/1.1\r\n{head}\r\n\r\n".encode() + BODY

    def check(self, status: int, headers: dict[str, str], body: bytes) -> None:
        """The answer says yes and, where answers are signed, this neuron says so."""
        assert status == 200, f"{self.target.name} answered {status}: {body[:200]!r}"
        assert json.loads(body)["completion"] is True
        if self.target.signs:
            nonce = self.headers[http_auth.HEADER_NONCE]
            signer = verify_answer(
                headers,
                body,
                target="/IsAlive",
                nonce=nonce,
                status=status,
                receiver=self.wallet.hotkey.ss58_address,
            )
            assert signer == self.target.hotkey


# What is measured


@dataclass
class Times:
    """Seconds of each call; `again` counts those that had to be sent again."""

    seconds: list[float] = field(default_factory=list)
    again: int = 0

    def ms(self, share: float) -> float:
        """The time within which that share of the calls was answered."""
        ordered = sorted(self.seconds)
        return round(1000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))], 2)

    def result(self, name: str) -> dict[str, float]:
        return {f"{name}_p50_ms": self.ms(0.50), f"{name}_p99_ms": self.ms(0.99)}


async def is_alive(target: Target, *, samples: int, title: str) -> Times:
    """Call one at a time. A call that was cut off is signed and sent again, on its time."""
    times = Times()
    line = Line(target)
    for number in bar(range(samples), title):
        if number % CALLS_A_CONNECTION == 0:
            line.close()
        await asyncio.sleep(random.uniform(0, 2 * PAUSE_SECONDS))
        signed = Signed(target, target.wallets[0])
        began = time.perf_counter()
        while True:
            try:
                answer = await line.ask(signed.raw)
                break
            except (OSError, asyncio.IncompleteReadError):
                line.close()
                times.again += 1
                assert times.again <= samples, f"{target.name} cuts off every call"
                signed = Signed(target, target.wallets[0])
        times.seconds.append(time.perf_counter() - began)
        signed.check(*answer)
    line.close()
    return times


async def calls(target: Target, *, samples: int) -> Times:
    """The same by `Dendrite`: signing, sending, checking."""
    times = Times()
    endpoint = Endpoint(target.hotkey, HOST, target.port)
    async with Dendrite(target.wallets[0]) as dendrite:
        for _ in bar(range(samples), f"{target.name}: calls"):
            await asyncio.sleep(random.uniform(0, 2 * PAUSE_SECONDS))
            began = time.perf_counter()
            await dendrite.call(endpoint, IsAlive(), timeout_seconds=30)
            times.seconds.append(time.perf_counter() - began)
    return times


async def requests_per_second(target: Target, *, requests: int) -> float:
    """From all connections at once; signed before, in rounds short enough to stay fresh."""
    seconds, answered = 0.0, 0
    lines = [Line(target) for _ in range(CONNECTIONS)]

    async def ask(line: Line, share: list[Signed]) -> list[tuple[int, dict[str, str], bytes]]:
        return [await line.ask(signed.raw) for signed in share]

    while answered < requests:
        shares = [
            [Signed(target, target.wallets[place % HOTKEYS]) for _ in range(REQUESTS_IN_A_ROUND)]
            for place in range(CONNECTIONS)
        ]
        began = time.perf_counter()
        answers = await asyncio.gather(*map(ask, lines, shares))
        seconds += time.perf_counter() - began
        for share, theirs in zip(shares, answers, strict=True):
            for signed, answer in zip(share, theirs, strict=True):
                signed.check(*answer)
        answered += CONNECTIONS * REQUESTS_IN_A_ROUND
    for line in lines:
        line.close()
    return round(answered / seconds, 1)


@contextlib.asynccontextmanager
async def peak_memory(target: Target) -> AsyncIterator[Callable[[], float]]:
    """The most memory that the server's process held meanwhile, MB."""
    most = 0.0

    async def watch() -> None:
        nonlocal most
        while True:
            most = max(most, target.process.memory_info().rss / 2**20)
            await asyncio.sleep(0.05)

    watching = asyncio.create_task(watch())
    try:
        yield lambda: most
    finally:
        watching.cancel()


async def flooded(target: Target, *, samples: int) -> dict[str, Any]:
    """`is_alive` under the flood, and what that did to the server's memory."""
    async with peak_memory(target) as before:
        await asyncio.sleep(3)
    command = ["-m", "benchmarks._flood", target.port, target.wallets[0].hotkey.ss58_address]
    with started(*command, FLOOD_SECONDS) as flood:
        assert await line_of(flood) == "ready"
        async with peak_memory(target) as during:
            times = await is_alive(target, samples=samples, title=f"{target.name}: flooded")
        assert flood.stdin is not None
        flood.stdin.close()
        done = json.loads(await line_of(flood))
    return {
        "flood_p50_ms": times.ms(0.50),
        "flood_p99_ms": times.ms(0.99),
        "flood_sent_again": times.again,
        "rss_before_mb": round(before(), 1),
        "rss_growth_mb": round(max(0.0, during() - before()), 1),
        "flood": done,
    }


async def fuzz(target: Target, metrics_port: int, *, count: int) -> dict[str, Any]:
    """Send malformed requests, signed by the registered hotkeys in turn."""
    raws = fuzzed(target, count)
    statuses: Counter[int] = Counter()
    turns = bar(range(count), f"{target.name}: fuzz")

    async def fuzzer() -> None:
        for number in turns:
            statuses[await status_of(target, raws(number))] += 1

    failed = failures(metrics_port)
    async with peak_memory(target) as before:
        await asyncio.sleep(3)
    async with peak_memory(target) as during, asyncio.TaskGroup() as group:
        for _ in range(FUZZERS):
            group.create_task(fuzzer())
    alive = await is_alive(target, samples=10, title=f"{target.name}: still alive")
    return {
        "fuzz_requests": statuses.total(),
        "fuzz_500": max(statuses[500], failures(metrics_port) - failed),
        "fuzz_statuses": {str(status or "none"): n for status, n in sorted(statuses.items())},
        "fuzz_rss_growth_mb": round(max(0.0, during() - before()), 1),
        "fuzz_then_p50_ms": alive.ms(0.50),
    }


def fuzzed(target: Target, count: int) -> Callable[[int], bytes]:
    """The bytes of the malformed request of each number, signed when they are asked for."""
    sys.path.append(str(ROOT / "tests"))
    from malformed import change, many

    hotkeys = [wallet.hotkey.ss58_address for wallet in target.wallets]
    drawn = many(-(-count // 8), hotkeys=[*hotkeys[:1], target.hotkey])
    chance = random.Random(0)

    def raw(number: int) -> bytes:
        wallet = target.wallets[number % HOTKEYS]

        def sign(body: bytes, path: str) -> dict[str, str]:
            return http_auth.sign(
                wallet.hotkey, method="POST", path=path, body=body, receiver_ss58=target.hotkey
            )

        request, times = drawn[number // 8], number % 8
        if number % 2:
            return bytes(request.changed(chance, times=times).raw(sign))
        return bytes(change(request.raw(sign), chance, times=times))

    return raw


async def status_of(target: Target, data: bytes) -> int:
    """The status that it is answered with; 0 for none."""
    try:
        reader, writer = await asyncio.open_connection(HOST, target.port)
    except OSError:
        return 0
    try:
        writer.write(data)
        line = await asyncio.wait_for(reader.readline(), FUZZ_WAIT_SECONDS)
    except (OSError, TimeoutError):
        return 0
    finally:
        writer.close()
    return int(line.split(b" ")[1]) if line.startswith(b"HTTP/1.1 ") else 0


def failures(metrics_port: int) -> int:
    """Requests that the miner itself counts as failed."""
    with urllib.request.urlopen(f"http://{HOST}:{metrics_port}/metrics", timeout=10) as page:
        text = page.read().decode()
    found = [line for line in text.splitlines() if 'requests_total{kind="failed"}' in line]
    return int(float(found[0].split(" ")[1])) if found else 0


# What is measured against


async def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = await asyncio.to_thread(process.stdout.readline)
    assert line, "a process ended that was to go on; see its lines above"
    return line.strip()


@contextlib.contextmanager
def hotkeys(folder: Path) -> Iterator[list[Any]]:
    """Registered ones on the embedded network in `folder`; the first holds a permit."""
    with contextlib.ExitStack() as stack:
        wallets = []
        for number in range(HOTKEYS):
            wallet = stack.enter_context(embedded_wallet(folder, prefix="bench")).wallet
            with chain_of(folder, wallet) as chain:
                join_embedded(chain, stake_tao=0.0 if number else 10_000.0)
            wallets.append(wallet)
        yield wallets


def chain_of(folder: Path, wallet: Any) -> Any:
    path = folder / "chain.sqlite"
    return open_chain(network="embedded", netuid=1, wallet=wallet, path=path)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


@contextlib.asynccontextmanager
async def miner(folder: Path, wallets: list[Any], metrics_port: int) -> AsyncIterator[Target]:
    """A miner's process that serves and is known to know its callers."""
    flags = {
        "subtensor.path": folder,
        "neuron.path": folder / "neuron",
        "neuron.device": "cpu",
        "neuron.threads": 1,
        "axon.port": 0,
        "axon.metrics_port": metrics_port,
        "dht.port": 0,
        "logging.level": "error",
    }
    words = [word for name, value in flags.items() for word in (f"--{name}", value)]
    with started("-m", "hiveminer", "miner", *words) as process:
        endpoint = await served(folder, wallets, process)
        yield Target(
            name="miner",
            port=endpoint.port,
            process=psutil.Process(process.pid),
            hotkey=endpoint.hotkey,
            signs=True,
            wallets=wallets,
        )


async def served(folder: Path, wallets: list[Any], process: subprocess.Popen[str]) -> Endpoint:
    """The one axon that is served, once it is on the chain."""
    deadline = time.monotonic() + START_SECONDS
    with chain_of(folder, wallets[0]) as chain:
        while time.monotonic() < deadline and process.poll() is None:
            if found := endpoints_of(await asyncio.to_thread(chain.metagraph)):
                return found[0]
            await asyncio.sleep(0.5)
    raise SystemExit("axon: the miner did not come up; see its lines above")


@contextlib.asynccontextmanager
async def plain(hotkey: str, wallets: list[Any]) -> AsyncIterator[Target]:
    """The plain server's process, training."""
    with started("-m", "benchmarks._plain") as process:
        port = int(await line_of(process))
        yield Target(
            name="plain",
            port=port,
            process=psutil.Process(process.pid),
            hotkey=hotkey,
            signs=False,
            wallets=wallets,
        )


class Work:
    """Keeps the miner training: two requests of a permitted validator are always there."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.endpoint = Endpoint(target.hotkey, HOST, target.port)
        self.samples = 0
        self.errors: Counter[str] = Counter()

    async def run(self) -> None:
        async with Dendrite(self.target.wallets[0]) as dendrite:
            alive = await dendrite.call(self.endpoint, IsAlive(), timeout_seconds=30)
            async with asyncio.TaskGroup() as group:
                for _ in range(2):
                    group.create_task(self._train(dendrite, alive))

    async def _train(self, dendrite: Dendrite, alive: IsAlive) -> None:
        while True:
            request = Train(
                request_id=uuid.uuid4().hex,
                run_id=alive.run_id,
                data_hash=alive.data_hash,
                dataset_indices=random.sample(range(2000), 64),
                batch_size=4,
                timeout_seconds=60,
            )
            try:
                answer = await dendrite.call(self.endpoint, request, timeout_seconds=300)
                self.samples += answer.samples
            except MinerError as error:
                self.errors[error.reason] += 1
                await asyncio.sleep(0.5)


@contextlib.asynccontextmanager
async def at_work(target: Target) -> AsyncIterator[Work]:
    """The miner trains from here on; returns when it has begun."""
    work = Work(target)
    working = asyncio.create_task(work.run())
    try:
        await busy(target)
        yield work
    finally:
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)


async def busy(target: Target) -> None:
    """Wait until the process computes all the time, as far as others at work here let it."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        before = cpu_seconds([target.process])
        await asyncio.sleep(2)
        if cpu_seconds([target.process]) - before > 0.3:
            return
    raise SystemExit(f"axon: the {target.name} server does not train")


# The whole


async def measure(sizes: Sizes) -> dict[str, Any]:
    """All numbers, by name."""
    with tempfile.TemporaryDirectory(prefix="hiveminer-bench-") as name:
        folder = Path(name)
        with hotkeys(folder) as wallets:
            metrics_port = free_port()
            say("starting a miner")
            async with miner(folder, wallets, metrics_port) as target:
                result = await of_miner(target, metrics_port, sizes)
            say("starting the plain server")
            async with plain(target.hotkey, wallets) as target:
                await busy(target)
                base = await of_server(target, sizes)
    result.update({f"base_{name}": value for name, value in base.items()})
    return result


async def of_miner(target: Target, metrics_port: int, sizes: Sizes) -> dict[str, Any]:
    async with at_work(target) as work:
        began, spent = time.monotonic(), cpu_seconds([target.process])
        result = await of_server(target, sizes)
        result.update((await calls(target, samples=sizes.samples)).result("call"))
        result.update(await fuzz(target, metrics_port, count=sizes.fuzz))
        seconds = time.monotonic() - began
        result["miner_cores_used"] = round((cpu_seconds([target.process]) - spent) / seconds, 2)
        result["miner_trained_samples"] = work.samples
        result["miner_training_errors"] = dict(work.errors)
    return result


async def of_server(target: Target, sizes: Sizes) -> dict[str, Any]:
    """What is measured of both."""
    await is_alive(target, samples=CALLS_A_CONNECTION, title=f"{target.name}: warming up")
    quiet = await is_alive(target, samples=sizes.samples, title=f"{target.name}: IsAlive")
    rate = await requests_per_second(target, requests=max(sizes.samples, CONNECTIONS))
    return {
        **quiet.result("is_alive_training"),
        "requests_per_second": rate,
        **(await flooded(target, samples=sizes.samples)),
    }


def aims(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What was aimed at, and whether it was met."""
    most = {
        "is_alive_training_p50_ms": 10.0,
        "is_alive_training_p99_ms": 40.0,
        "flood_p99_ms": round(3 * result["is_alive_training_p99_ms"], 2),
        "rss_growth_mb": 50.0,
        "fuzz_500": 0,
    }
    return {name: machine.aim(result[name], most=bound) for name, bound in most.items()}


def say(text: str) -> None:
    print(f"axon {time.strftime('%H:%M:%S')}: {text}", file=sys.stderr, flush=True)


def bar(items: range, title: str) -> Iterator[int]:
    """The items, and a line or a progress bar that says how far it is."""
    say(title)
    with progress_bar(title=title, total=len(items), unit="call", shown=True) as shown:
        for item in items:
            yield item
            shown.update()


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/bench axon", description=__doc__.split("\n")[0])
    parser.add_argument("--samples", type=int, default=1000, help="calls for each number")
    parser.add_argument("--fuzz", type=int, default=20_000, help="malformed requests")
    parser.add_argument("--quick", action="store_true", help="a tenth of it; writes no result")
    parser.add_argument(
        "--out", type=Path, default=machine.RESULTS / "axon.json", help="file of the result"
    )
    given = parser.parse_args(argv)
    if given.samples < 20 or given.fuzz < 1:
        parser.error("--samples is at least 20, --fuzz at least 1")
    return given


def main(argv: Sequence[str]) -> int:
    """Measure, print and write; the exit code says nothing of the aims."""
    given = arguments(argv)
    tenth = 10 if given.quick else 1
    sizes = Sizes(samples=max(20, given.samples // tenth), fuzz=max(1, given.fuzz // tenth))
    here = machine.describe()
    began = time.monotonic()
    try:
        measured = asyncio.run(_until_terminated(measure(sizes)))
    except (KeyboardInterrupt, asyncio.CancelledError):
        say("stopped; nothing was written")
        return 130
    result = {
        "benchmark": "axon",
        "machine": here,
        "seconds": round(time.monotonic() - began, 1),
        "samples": sizes.samples,
        "base": "plain Starlette on uvicorn, no checks, training in a thread of its process",
        "flood_rates": _flood.rates(),
        **measured,
        "aims": aims(measured),
    }
    print(json.dumps(result, indent=2))
    if not given.quick:
        machine.write(given.out, result)
        say(f"written to {given.out}")
    for name, aim in result["aims"].items():
        met = "met" if aim["met"] else "NOT MET"
        say(f"{name}: {aim['measured']}, at most {aim['aim']}: {met}")
    return 0


async def _until_terminated(work: Any) -> Any:
    """SIGTERM ends it as Ctrl-C does."""
    task = asyncio.ensure_future(work)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    return await task


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
