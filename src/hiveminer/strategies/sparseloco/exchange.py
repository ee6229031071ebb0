"""Transfers blobs and states between peers, over Hivemind's p2p.

There are two calls, `have(round)` for the uids whose blobs a peer serves, and `get(hash,
offset)` for bytes by their SHA-256: a blob, a state's manifest, or a piece of a state. Only
registered peers are answered and asked. Holders are drawn at random, which spreads the load; on
failure the next one continues where the last one stopped. Everything is checked against its
hash, so it does not matter where it came from.

Each call is a raw stream of the DHT's libp2p daemon with its own framing: Hivemind's servicers
buffer a message of whatever length the other side claims, and these calls only what was asked for.

    request   kind 1 (1 have, 2 get), hash 32 (zero for have), round or offset 8
    answer    status 1 (0 ok, 1 absent), length 8; then as many bytes
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import hashlib
import logging
import random
import struct
import threading
import time
from collections import Counter, defaultdict
from collections.abc import (
    Awaitable,
    Callable,
    Collection,
    Coroutine,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from typing import Any, Protocol, TypeVar

import torch
from hivemind.p2p import P2P, PeerID

from hiveminer.errors import SwarmError
from hiveminer.strategies.sparseloco.apply import State
from hiveminer.strategies.sparseloco.pieces import (
    Bytes,
    Manifest,
    Piece,
    StateBuilder,
    StateError,
    manifest_length,
    read_manifest,
)
from hiveminer.strategies.sparseloco.records import MAX_UIDS, pack_uids, unpack_uids
from hiveminer.strategies.sparseloco.rounds import Contribution
from hiveminer.swarm.admission import Admission
from hiveminer.swarm.identity import proved_peers

logger = logging.getLogger(__name__)

T = TypeVar("T")

HAVE, GET = 1, 2
OK, ABSENT = 0, 1

REQUEST = struct.Struct("<B32sQ")
ANSWER = struct.Struct("<BQ")
_MASK_BYTES = MAX_UIDS // 8
_NO_HASH = bytes(32)

CHUNK_BYTES = 2**18

OPEN_SECONDS = 10.0
"""Timeout for opening a stream, and for its request or the first bytes of its answer."""

CHUNK_SECONDS = 10.0
"""Timeout for the next bytes of a stream."""

SLOWEST_BYTES = 62_500.0
"""Bytes per second (0.5 Mbit/s) below which a stream is given up on both sides, after
OPEN_SECONDS."""

MAX_STREAMS = 16
MAX_STREAMS_PER_PEER = 6

MAX_CALLS = 64
"""Concurrent `have` calls."""

ASK_SECONDS = 1.0
"""Timeout for these calls, which doubles up to OPEN_SECONDS while a blob is missing: a peer that
hangs does not delay what the others have."""

MAX_DOWNLOADS = 4
"""Downloads at the same time; the machine's memory holds as many blobs or pieces of a state."""

AGAIN_SECONDS = 0.5
"""Pause before peers are asked again for what none of them had."""

START_SECONDS = 30.0


class Source(Protocol):
    """What a peer serves; called in another thread."""

    def have(self, number: int) -> Collection[int]:
        """The uids whose blobs of this round are served."""

    def get(self, digest: bytes) -> Bytes | None:
        """The bytes with this SHA-256, if they are served."""


class _Failed(Exception):
    """A call failed; another peer may have the data."""


class Streams:
    """The streams that are served at the same time, by caller: at most MAX_STREAMS, of which no
    caller has more than MAX_STREAMS_PER_PEER. A caller that has none always gets one, so a few
    cannot shut out the others."""

    def __init__(self) -> None:
        self._open: Counter[str] = Counter()

    @contextlib.contextmanager
    def of(self, caller: str) -> Iterator[bool]:
        """Context of a stream; False if it must not be served."""
        own, is_full = self._open[caller], self._open.total() >= MAX_STREAMS
        if own and (is_full or own >= MAX_STREAMS_PER_PEER):
            yield False
            return
        self._open[caller] += 1
        try:
            yield True
        finally:
            self._open -= Counter([caller])


class Exchange:
    """Serves a `Source` to the registered peers of a run, and fetches from them.

    dht: a started `hivemind.DHT` with an `Authorizer`. run: the run's 8 bytes.
    The methods are called from any thread but the exchange's own, and block.
    """

    def __init__(self, dht: Any, *, run: bytes, source: Source):
        self._dht = dht
        self._source = source
        self._name = f"sparseloco.1.{run.hex()}"
        self._admission = Admission(dht)
        self._streams = Streams()
        self._silent: set[str] = set()
        self._random = random.SystemRandom()
        self._loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self._loop.run_forever, name="exchange", daemon=True)
        self.thread.start()
        self._closed = False
        try:
            self._p2p: P2P = self._run(self._start(), seconds=START_SECONDS)
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
    ) -> frozenset[int]:
        """Fetch blobs of a round, and pass each to `keep` once it is complete and verified.

        keep: called in other threads. Returns the uids of those that came in time.
        """
        found: set[int] = set()
        work = self._fetch_blobs(number, {each.uid: each for each in wanted}, keep, found)
        self._within(work, seconds=timeout_seconds)
        return frozenset(found)

    def fetch_state(
        self, digest: bytes, shapes: Mapping[str, torch.Size], *, timeout_seconds: float
    ) -> State | None:
        """Download the state with this hash; None if that does not succeed in time."""
        return self._within(self._fetch_state(digest, shapes), seconds=timeout_seconds)

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

    # Fetching ---------------------------------------------------------------------

    async def _fetch_blobs(
        self,
        number: int,
        missing: dict[int, Contribution],
        keep: Callable[[Contribution, bytes], None],
        found: set[int],
    ) -> None:
        async def fetch(uid: int, holders: Sequence[PeerID]) -> None:
            blob = missing[uid]
            data = await self._download(blob.blob_hash, blob.blob_bytes, holders)
            if data is not None:
                await asyncio.to_thread(keep, blob, data)
                found.add(uid)
                del missing[uid]

        seconds = ASK_SECONDS
        while missing:
            holders = await self._holders(number, timeout_seconds=seconds)
            work = [fetch(uid, holders[uid]) for uid in missing.keys() & holders.keys()]
            self._random.shuffle(work)
            await _at_most(MAX_DOWNLOADS, work)
            if missing:
                seconds = min(2 * seconds, OPEN_SECONDS)
                await asyncio.sleep(AGAIN_SECONDS)

    async def _fetch_state(self, digest: bytes, shapes: Mapping[str, torch.Size]) -> State:
        manifest = await self._fetch_manifest(digest, shapes)
        builder = StateBuilder(manifest, shapes)

        async def fetch(piece: Piece) -> None:
            data = await self._insist(piece.hash, piece.length)
            await asyncio.to_thread(builder.add, piece, data)

        await _at_most(MAX_DOWNLOADS, [fetch(piece) for piece in manifest.pieces])
        return builder.build()

    async def _fetch_manifest(self, digest: bytes, shapes: Mapping[str, torch.Size]) -> Manifest:
        raw = await self._insist(digest, manifest_length(shapes))
        try:
            return read_manifest(raw, shapes)
        except StateError as error:  # the chain named something else
            raise SwarmError(
                f"state {digest.hex()[:16]} is none of this model's: {error}"
            ) from None

    async def _insist(self, digest: bytes, size: int) -> bytes:
        """Download from any peer, and retry until it succeeds."""
        while True:
            data = await self._download(digest, size, await self._peers())
            if data is not None:
                return data
            await asyncio.sleep(AGAIN_SECONDS)

    async def _peers(self) -> list[PeerID]:
        """The peers that have proved a registered hotkey, in random order; last those that did
        not answer the last call."""
        proved = await asyncio.wait_for(
            self._dht.run_coroutine(proved_peers, return_future=True), OPEN_SECONDS
        )
        peers = [PeerID.from_base58(name) for name in sorted(proved)]
        self._random.shuffle(peers)
        self._silent &= proved.keys()
        return sorted(peers, key=lambda peer: str(peer) in self._silent)

    async def _holders(self, number: int, *, timeout_seconds: float) -> dict[int, list[PeerID]]:
        """By uid, the peers that serve its blob of this round, in random order."""
        holders: defaultdict[int, list[PeerID]] = defaultdict(list)

        async def ask(peer: PeerID) -> None:
            mask = bytearray()
            try:
                async with asyncio.timeout(timeout_seconds):
                    request = REQUEST.pack(HAVE, _NO_HASH, number)
                    await self._call(peer, request, _MASK_BYTES, mask)
            except TimeoutError:
                self._silent.add(str(peer))
                return
            except _Failed as error:
                logger.debug("peer %s did not say what it has: %s", peer, error)
                return
            for uid in unpack_uids(bytes(mask)):
                holders[uid].append(peer)

        await _at_most(MAX_CALLS, [ask(peer) for peer in await self._peers()])
        for peers in holders.values():
            self._random.shuffle(peers)
        return holders

    async def _download(self, digest: bytes, size: int, holders: Sequence[PeerID]) -> bytes | None:
        """Bytes by their hash, from the first holder that has them.

        What came before a failure is completed by the next one. If that proves wrong, nobody
        knows who lied, and each holder is asked for the whole.
        """
        for resumes in (True, False):
            data = bytearray()
            givers: list[PeerID] = []
            for peer in holders:
                if not resumes:
                    data.clear()
                    givers.clear()
                if await self._append(peer, digest, size, data):
                    givers.append(peer)
                if len(data) == size:
                    if await asyncio.to_thread(_has_hash, data, digest):
                        return bytes(data)
                    if len(givers) == 1:
                        self._admission.shun(peer, "what it sent has another hash")
                    if resumes:
                        break
            if len(data) < size:
                break
        return None

    async def _append(self, peer: PeerID, digest: bytes, size: int, data: bytearray) -> bool:
        """Ask a peer for what is still missing; whether anything came."""
        if not await self._admission.admits(peer):
            return False
        before = len(data)
        try:
            await self._call(peer, REQUEST.pack(GET, digest, before), size - before, data)
        except _Failed as error:
            logger.debug("peer %s did not send %s: %s", peer, digest.hex()[:16], error)
        return len(data) > before

    async def _call(self, peer: PeerID, request: bytes, size: int, into: bytearray) -> None:
        """Append the `size` bytes of a peer's answer to `into`. Raises _Failed, and keeps what was
        received."""
        try:
            async with asyncio.timeout(OPEN_SECONDS):
                _, reader, writer = await self._p2p.call_binary_stream_handler(peer, self._name)
            with contextlib.closing(writer):
                writer.write(request)
                answer = await asyncio.wait_for(reader.readexactly(ANSWER.size), OPEN_SECONDS)
                self._silent.discard(str(peer))
                status, length = ANSWER.unpack(answer)
                if status != OK or length != size:
                    raise _Failed("absent" if status == ABSENT else f"{length} bytes, not {size}")
                await _receive(reader, size, into)
        except (OSError, TimeoutError, asyncio.IncompleteReadError) as error:
            self._silent.add(str(peer))
            raise _Failed(repr(error)) from None
        except _Failed:
            raise
        except Exception as error:  # the daemon's own, for a peer that is gone or refuses
            raise _Failed(repr(error)) from error


async def _receive(reader: asyncio.StreamReader, size: int, into: bytearray) -> None:
    latest = time.monotonic() + OPEN_SECONDS + size / SLOWEST_BYTES
    while size:
        seconds = min(CHUNK_SECONDS, latest - time.monotonic())
        chunk = await asyncio.wait_for(reader.read(min(size, CHUNK_BYTES)), seconds)
        if not chunk:
            raise _Failed(f"{size} bytes are missing")
        into += chunk
        size -= len(chunk)


async def _at_most(count: int, work: Sequence[Awaitable[None]]) -> None:
    """Run these, at most `count` at a time."""
    semaphore = asyncio.Semaphore(count)

    async def run(each: Awaitable[None]) -> None:
        async with semaphore:
            await each

    async with asyncio.TaskGroup() as group:
        for each in work:
            group.create_task(run(each))


def _has_hash(data: bytearray, digest: bytes) -> bool:
    return hashlib.sha256(data).digest() == digest
