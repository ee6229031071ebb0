"""The flood: what strangers send to an axon that they want down, paced and bounded.

`python -m benchmarks._flood PORT HOTKEY SECONDS` floods 127.0.0.1:PORT and no other place,
at the lowest priority, until its standard input or its time ends; the last line says what
it did. HOTKEY is a registered one: hotkeys are public, so a stranger can name one.

Connections come from 32 addresses of the loopback network where there are so many (Linux),
so that the axon's bound for one address is not all that stands in their way.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import random
import resource
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable

HALF_OPEN = 2000
"""Connections that it tries to hold open without ever ending a header."""

OPENED_PER_SECOND = 400.0
"""Connections opened at most for that, the lost ones again."""

REQUESTS_PER_SECOND = {"unsigned": 50.0, "long_hotkey": 20.0, "large_body": 2.0}
LARGE_BODY = 50 * 1024 * 1024
MOST_SECONDS = 300.0

CHUNK = b"x" * 65536


def rates() -> dict[str, float]:
    """What it is made to do, each second."""
    return {
        "half_open_held": HALF_OPEN,
        "half_open_opened_per_second": OPENED_PER_SECOND,
        **{f"{name}_per_second": rate for name, rate in REQUESTS_PER_SECOND.items()},
        "large_body_mb": LARGE_BODY // 2**20,
    }


class Flood:
    """One flood; `counts` is what was done, `lost` how often a held connection was cut."""

    def __init__(self, port: int, hotkey: str) -> None:
        self.port = port
        self.hotkey = hotkey.encode()
        self.counts: Counter[str] = Counter()
        self.held = 0
        self.most_held = 0
        self._sources = itertools.cycle(_sources())

    async def run(self, seconds: float) -> None:
        """Flood for so long."""
        jobs: list[Awaitable[None]] = [self._hold()]
        jobs += [
            self._paced(rate, getattr(self, f"_{name}"))
            for name, rate in REQUESTS_PER_SECOND.items()
        ]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await asyncio.gather(*jobs)

    async def _paced(self, rate: float, job: Callable[[], Awaitable[None]]) -> None:
        async with asyncio.TaskGroup() as group:
            async for _ in _ticks(rate):
                group.create_task(_quietly(job()))

    async def _hold(self) -> None:
        places = asyncio.Semaphore(HALF_OPEN)

        async def one() -> None:
            try:
                await _quietly(self._half_open())
            finally:
                places.release()

        async with asyncio.TaskGroup() as group:
            async for _ in _ticks(OPENED_PER_SECOND):
                await places.acquire()
                group.create_task(one())

    async def _half_open(self) -> None:
        reader, writer = await self._connect()
        self.counts["half_open"] += 1
        self.held += 1
        self.most_held = max(self.most_held, self.held)
        try:
            if self.counts["half_open"] % 2:
                writer.write(b"POST /Train HTTP/1.1\r\nhost:")
            await reader.read(1)
            self.counts["half_open_cut"] += 1
        finally:
            self.held -= 1
            writer.close()

    async def _unsigned(self) -> None:
        await self._send(b"POST /Train HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n{}")
        self.counts["unsigned"] += 1

    async def _long_hotkey(self) -> None:
        hotkey = b"5" * 65536
        head = b"POST /IsAlive HTTP/1.1\r\nhost: x\r\nx-bittensor-hotkey: %b\r\n\r\n" % hotkey
        await self._send(head)
        self.counts["long_hotkey"] += 1

    async def _large_body(self) -> None:
        """In turn: with a length that tells, and in chunks that do not."""
        reader, writer = await self._connect()
        self.counts["large_body"] += 1
        chunked = self.counts["large_body"] % 2 == 0
        how = b"transfer-encoding: chunked" if chunked else b"content-length: %d" % LARGE_BODY
        path = random.choice([b"Train", b"IsAlive"])
        head = b"POST /%b HTTP/1.1\r\nhost: x\r\n%b\r\n%b\r\n\r\n" % (path, how, self._forged())
        try:
            writer.write(head)
            for _ in range(LARGE_BODY // len(CHUNK)):
                writer.write(b"10000\r\n" + CHUNK + b"\r\n" if chunked else CHUNK)
                await writer.drain()
                self.counts["large_body_bytes"] += len(CHUNK)
            if chunked:
                writer.write(b"0\r\n\r\n")
            await asyncio.wait_for(reader.read(1), 5)
        finally:
            writer.close()

    def _forged(self) -> bytes:
        return (
            b"x-bittensor-version: 1\r\nx-bittensor-hotkey: %b\r\nx-bittensor-nonce: %d\r\n"
            b"x-bittensor-signature: 0x%b" % (self.hotkey, time.time_ns(), b"ab" * 64)
        )

    async def _send(self, data: bytes) -> None:
        reader, writer = await self._connect()
        try:
            writer.write(data)
            await asyncio.wait_for(reader.read(64), 5)
        finally:
            writer.close()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.wait_for(
            asyncio.open_connection("127.0.0.1", self.port, local_addr=(next(self._sources), 0)), 5
        )


async def _ticks(rate: float) -> AsyncIterator[None]:
    """So many a second; what it was too slow for is left out, not made up for."""
    due = time.monotonic()
    while True:
        yield
        due = max(due + 1 / rate, time.monotonic() - 0.05)
        await asyncio.sleep(max(0.0, due - time.monotonic()))


async def _quietly(job: Awaitable[None]) -> None:
    with contextlib.suppress(OSError, TimeoutError):
        await job


def _sources() -> list[str]:
    sources = [f"127.0.0.{last}" for last in range(2, 34)]
    with socket.socket() as probe:
        try:
            probe.bind((sources[0], 0))
        except OSError:
            return ["127.0.0.1"]
    return sources


def _standard_input_ends() -> threading.Event:
    """It does when our parent ends, also when that is killed."""
    ended = threading.Event()

    def wait() -> None:
        sys.stdin.read()
        ended.set()

    threading.Thread(target=wait, daemon=True).start()
    return ended


async def main(ended: threading.Event) -> None:
    port, hotkey, seconds = int(sys.argv[1]), sys.argv[2], float(sys.argv[3])
    flood = Flood(port, hotkey)
    began = time.monotonic()
    flooding = asyncio.create_task(flood.run(min(seconds, MOST_SECONDS)))
    told = False
    while not flooding.done() and not ended.is_set():
        await asyncio.sleep(0.1)
        if not told and (flood.held >= HALF_OPEN or time.monotonic() - began > 6):
            print("ready", flush=True)
            told = True
    flooding.cancel()
    await asyncio.gather(flooding, return_exceptions=True)
    seconds = time.monotonic() - began
    done = {"seconds": round(seconds, 1), "most_held": flood.most_held, **flood.counts}
    print(json.dumps(done), flush=True)


if __name__ == "__main__":
    os.nice(19)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (8192, 8192))
    asyncio.run(main(_standard_input_ends()))
