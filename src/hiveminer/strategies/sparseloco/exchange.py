"""Transfers blobs and states between peers, over Hivemind's p2p.

There are two calls, `have(round)` for the uids whose blobs a peer serves, and `get(hash,
offset)` for bytes by their SHA-256: a blob, a state's manifest, or a piece of a state. Only
registered peers are answered and asked. Holders are drawn at random, which spreads the load; on
failure the next one continues where the last one stopped. Everything is checked against its
hash, so it does not matter where it came from.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import math
import threading
from collections.abc import Callable, Coroutine, Iterable, Mapping
from typing import Any, TypeVar

import torch
from hivemind.p2p import P2P

from hiveminer.strategies.sparseloco.apply import State
from hiveminer.strategies.sparseloco.fetching import ASK_SECONDS, Fetching
from hiveminer.strategies.sparseloco.pieces import Bytes
from hiveminer.strategies.sparseloco.records import pack_uids
from hiveminer.strategies.sparseloco.rounds import Contribution
from hiveminer.strategies.sparseloco.shelf import Shelf
from hiveminer.strategies.sparseloco.streams import (
    ABSENT,
    ANSWER,
    CHUNK_BYTES,
    GET,
    HAVE,
    OK,
    OPEN_SECONDS,
    REQUEST,
    SLOWEST_BYTES,
    Streams,
)
from hiveminer.swarm.admission import Admission

logger = logging.getLogger(__name__)

T = TypeVar("T")

START_SECONDS = 30.0


class Exchange:
    """Serves a `Shelf` to the registered peers of a run, and fetches from them.

    dht: a started `hivemind.DHT` with an `Authorizer`. run: the run's 8 bytes. ask_seconds: the
    first timeout for an answer.
    The methods are called from any thread but the exchange's own, and block.
    """

    def __init__(self, dht: Any, *, run: bytes, source: Shelf, ask_seconds: float = ASK_SECONDS):
        self._dht = dht
        self._source = source
        self._name = f"sparseloco.1.{run.hex()}"
        self._admission = Admission(dht)
        self._streams = Streams()
        self._loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self._loop.run_forever, name="exchange", daemon=True)
        self.thread.start()
        self._closed = False
        try:
            self._p2p: P2P = self._run(self._start(), seconds=START_SECONDS)
            self._fetching = Fetching(
                dht, self._p2p, self._name, self._admission, ask_seconds=ask_seconds
            )
        except BaseException:
            self.close()
            raise

    def fetch_blobs(
        self,
        number: int,
        wanted: Iterable[Contribution],
        *,
        keep: Callable[[Contribution, bytes], None],
        timeout_seconds: float,
    ) -> None:
        """Fetch blobs of a round, and pass each to `keep`, in another thread, once it is complete
        and verified."""
        work = self._fetching.blobs(number, {each.uid: each for each in wanted}, keep)
        self._within(work, seconds=timeout_seconds)

    def fetch_state(
        self,
        digest: bytes,
        shapes: Mapping[str, torch.Size],
        *,
        timeout_seconds: float,
        idle_seconds: float = math.inf,
    ) -> State | None:
        """Download the state with this hash; None if that does not succeed in time, or no peer
        has sent a piece of it for `idle_seconds`."""
        work = self._fetching.state(digest, shapes, idle_seconds=idle_seconds)
        return self._within(work, seconds=timeout_seconds)

    def close(self) -> None:
        """Stop serving, and cancel downloads. Idempotent."""
        if self._closed:
            return
        self._closed = True
        with contextlib.suppress(Exception):  # the DHT's process may be gone
            asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(5)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self.thread.join(5)
        if not self.thread.is_alive():
            self._loop.close()

    # The loop's thread ------------------------------------------------------------

    def _run(self, work: Coroutine[Any, Any, T], *, seconds: float) -> T:
        return asyncio.run_coroutine_threadsafe(asyncio.wait_for(work, seconds), self._loop).result(
            seconds + 5
        )

    def _within(self, work: Coroutine[Any, Any, T], *, seconds: float) -> T | None:
        """The result of what may take until its time is up, or until `close`."""
        if self._closed:
            work.close()
            return None
        try:
            return self._run(work, seconds=seconds)
        except (TimeoutError, asyncio.CancelledError, concurrent.futures.CancelledError):
            return None
        except Exception as error:  # noqa: BLE001 - such as the end of the DHT's process
            logger.warning("fetching failed: %r", error)
            return None

    async def _start(self) -> P2P:
        p2p = await self._dht.replicate_p2p()
        await p2p.add_binary_stream_handler(self._name, self._serve)
        return p2p

    async def _stop(self) -> None:
        with contextlib.suppress(Exception):
            await asyncio.wait_for(self._p2p.remove_binary_stream_handler(self._name), 2)
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks, timeout=2)
        await self._p2p.shutdown()
        await self._loop.shutdown_default_executor()

    # Serving ----------------------------------------------------------------------

    async def _serve(
        self, info: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        caller = str(info.peer_id)
        with contextlib.closing(writer):
            if not await self._admission.admits(info.peer_id):
                return
            with self._streams.of(caller) as is_free:
                if not is_free:
                    return
                try:
                    await self._answer(reader, writer)
                except (OSError, TimeoutError, asyncio.IncompleteReadError) as error:
                    logger.debug("a stream to %s ended early: %r", caller, error)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = await asyncio.wait_for(reader.readexactly(REQUEST.size), OPEN_SECONDS)
        kind, digest, number = REQUEST.unpack(request)
        data: Bytes | None = None
        if kind == HAVE:
            data = pack_uids(await asyncio.to_thread(self._source.have, number))
        elif kind == GET:
            whole = await asyncio.to_thread(self._source.get, digest)
            data = None if whole is None or number > len(whole) else memoryview(whole)[number:]
        if data is None:
            writer.write(ANSWER.pack(ABSENT, 0))
            return
        writer.write(ANSWER.pack(OK, len(data)))
        async with asyncio.timeout(OPEN_SECONDS + len(data) / SLOWEST_BYTES):
            for start in range(0, len(data), CHUNK_BYTES):
                writer.write(data[start : start + CHUNK_BYTES])
                await writer.drain()
