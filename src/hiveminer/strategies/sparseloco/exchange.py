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
import hashlib
import logging
import math
import random
import threading
import time
from collections import defaultdict
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Coroutine,
    Iterable,
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
from hiveminer.strategies.sparseloco.streams import (
    ABSENT,
    ANSWER,
    CHUNK_BYTES,
    CHUNK_SECONDS,
    GET,
    HAVE,
    OK,
    OPEN_SECONDS,
    REQUEST,
    SLOWEST_BYTES,
    CallFailed,
    Streams,
    call,
)
from hiveminer.swarm.admission import Admission
from hiveminer.swarm.identity import proved_peers

logger = logging.getLogger(__name__)

T = TypeVar("T")

MAX_CALLS = 64
"""Concurrent `have` calls."""

ASK_SECONDS = 1.0
"""First timeout for an answer, which doubles up to OPEN_SECONDS while something is missing."""

PROMPT_SECONDS = 0.25
"""How long a download waits to learn about all holders. It is not waited for a peer that did not
answer its last call, so one that hangs delays nobody."""

MAX_DOWNLOADS = 4
"""Downloads at the same time; the machine's memory holds as many blobs or pieces of a state."""

AGAIN_SECONDS = 0.5
"""Pause before peers are asked again for what none of them had."""

START_SECONDS = 30.0

_MASK_BYTES = MAX_UIDS // 8
_NO_HASH = bytes(32)


class Source(Protocol):
    """What a peer serves; called in another thread."""

    def have(self, number: int) -> Collection[int]:
        """The uids whose blobs of this round are served."""

    def get(self, digest: bytes) -> Bytes | None:
        """The bytes with this SHA-256, if they are served."""


class Exchange:
    """Serves a `Source` to the registered peers of a run, and fetches from them.

    dht: a started `hivemind.DHT` with an `Authorizer`. run: the run's 8 bytes. ask_seconds: the
    first timeout for an answer.
    The methods are called from any thread but the exchange's own, and block.
    """

    def __init__(self, dht: Any, *, run: bytes, source: Source, ask_seconds: float = ASK_SECONDS):
        self._dht = dht
        self._ask_seconds = ask_seconds
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
        self,
        digest: bytes,
        shapes: Mapping[str, torch.Size],
        *,
        timeout_seconds: float,
        idle_seconds: float = math.inf,
    ) -> State | None:
        """Download the state with this hash; None if that does not succeed in time, or no peer
        has sent a piece of it for `idle_seconds`."""
        work = self._fetch_state(digest, shapes, idle_seconds=idle_seconds)
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

    # Fetching ---------------------------------------------------------------------

    async def _fetch_blobs(
        self,
        number: int,
        missing: dict[int, Contribution],
        keep: Callable[[Contribution, bytes], None],
        found: set[int],
    ) -> None:
        seconds = self._ask_seconds

        async def fetch(uid: int, holders: list[PeerID]) -> None:
            blob = missing[uid]
            self._random.shuffle(holders)
            data = await self._download(
                blob.blob_hash, blob.blob_bytes, holders, answer_seconds=seconds,
                chunk_seconds=seconds,
            )  # fmt: skip
            if data is not None:
                await asyncio.to_thread(keep, blob, data)
                found.add(uid)
                del missing[uid]

        while missing:
            holders: defaultdict[int, list[PeerID]] = defaultdict(list)
            async with self._asking(number, holders, timeout_seconds=seconds) as pending:
                while missing:
                    known = missing.keys() & holders.keys()
                    work = [fetch(uid, holders.pop(uid)) for uid in known]
                    self._random.shuffle(work)
                    await _at_most(MAX_DOWNLOADS, work)
                    pending = {task for task in pending if not task.done()}
                    if not pending and not missing.keys() & holders.keys():
                        break
                    if missing and pending:
                        await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            if missing:
                seconds = min(2 * seconds, OPEN_SECONDS)
                await asyncio.sleep(AGAIN_SECONDS)

    async def _fetch_state(
        self, digest: bytes, shapes: Mapping[str, torch.Size], *, idle_seconds: float
    ) -> State | None:
        came_at = time.monotonic()

        async def insist(digest: bytes, size: int) -> bytes | None:
            """Ask all peers, until nothing of the state has come for `idle_seconds`."""
            nonlocal came_at
            seconds = self._ask_seconds
            while True:
                data = await self._download(
                    digest, size, await self._peers(), answer_seconds=seconds
                )
                if data is not None:
                    came_at = time.monotonic()
                    return data
                if time.monotonic() - came_at > idle_seconds:
                    return None
                seconds = min(2 * seconds, OPEN_SECONDS)
                await asyncio.sleep(AGAIN_SECONDS)

        raw = await insist(digest, manifest_length(shapes))
        if raw is None:
            return None
        manifest = self._manifest(digest, raw, shapes)
        builder = StateBuilder(manifest, shapes)
        is_complete = True

        async def fetch(piece: Piece) -> None:
            nonlocal is_complete
            data = await insist(piece.hash, piece.length) if is_complete else None
            if data is None:
                is_complete = False
            else:
                await asyncio.to_thread(builder.add, piece, data)

        await _at_most(MAX_DOWNLOADS, [fetch(piece) for piece in manifest.pieces])
        return builder.build() if is_complete else None

    def _manifest(self, digest: bytes, raw: bytes, shapes: Mapping[str, torch.Size]) -> Manifest:
        try:
            return read_manifest(raw, shapes)
        except StateError as error:  # the chain named something else
            raise SwarmError(
                f"state {digest.hex()[:16]} is none of this model's: {error}"
            ) from None

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

    @contextlib.asynccontextmanager
    async def _asking(
        self, number: int, holders: dict[int, list[PeerID]], *, timeout_seconds: float
    ) -> AsyncIterator[set[asyncio.Task[None]]]:
        """Ask all peers for the uids whose blobs of this round they serve, and add them to
        `holders`. Entered once those that usually answer have done so; yields all calls."""
        limit = asyncio.Semaphore(MAX_CALLS)

        async def ask(peer: PeerID) -> None:
            mask = bytearray()
            request = REQUEST.pack(HAVE, _NO_HASH, number)
            async with limit:
                await self._call(
                    peer, request, size=_MASK_BYTES, into=mask, answer_seconds=timeout_seconds,
                    chunk_seconds=timeout_seconds,
                )  # fmt: skip
            if len(mask) == _MASK_BYTES:
                for uid in unpack_uids(bytes(mask)):
                    holders[uid].append(peer)

        calls = {peer: asyncio.create_task(ask(peer)) for peer in await self._peers()}
        try:
            prompt = {call for peer, call in calls.items() if str(peer) not in self._silent}
            if prompt:
                await asyncio.wait(prompt, timeout=PROMPT_SECONDS)
            yield set(calls.values())
        finally:
            for peer, call in calls.items():
                if not call.done():
                    self._silent.add(str(peer))
                    call.cancel()

    async def _download(
        self,
        digest: bytes,
        size: int,
        holders: Sequence[PeerID],
        *,
        answer_seconds: float,
        chunk_seconds: float = CHUNK_SECONDS,
    ) -> bytes | None:
        """Bytes by their hash, from the first holder that has them. One that does not begin to
        answer within `answer_seconds`, or pauses for `chunk_seconds`, is passed over.

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
                before = len(data)
                if await self._admission.admits(peer):
                    await self._call(
                        peer, REQUEST.pack(GET, digest, before), size=size - before, into=data,
                        answer_seconds=answer_seconds, chunk_seconds=chunk_seconds,
                    )  # fmt: skip
                givers += [peer] * (len(data) > before)
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

    async def _call(
        self,
        peer: PeerID,
        request: bytes,
        *,
        size: int,
        into: bytearray,
        answer_seconds: float,
        chunk_seconds: float,
    ) -> None:
        """Append a peer's answer to `into`, or what came of it, and note whether it answers."""
        try:
            await call(
                self._p2p, peer, self._name, request, size=size, into=into,
                answer_seconds=answer_seconds, chunk_seconds=chunk_seconds,
            )  # fmt: skip
        except CallFailed as error:
            logger.debug("a call of peer %s failed: %s", peer, error)
            if not error.answered:
                self._silent.add(str(peer))
                return
        self._silent.discard(str(peer))


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
