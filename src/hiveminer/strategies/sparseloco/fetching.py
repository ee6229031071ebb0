"""Downloads blobs and states from other peers, each from whoever has it."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import random
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any

import torch
from hivemind.p2p import P2P, PeerID

from hiveminer.errors import SwarmError
from hiveminer.strategies.sparseloco.apply import State
from hiveminer.strategies.sparseloco.pieces import (
    Piece,
    StateBuilder,
    StateError,
    manifest_length,
    read_manifest,
)
from hiveminer.strategies.sparseloco.records import MAX_UIDS, unpack_uids
from hiveminer.strategies.sparseloco.rounds import Contribution
from hiveminer.strategies.sparseloco.streams import (
    ANSWER,
    CHUNK_BYTES,
    CHUNK_SECONDS,
    GET,
    HAVE,
    OK,
    OPEN_SECONDS,
    REQUEST,
    SLOWEST_BYTES,
)
from hiveminer.swarm.admission import Admission
from hiveminer.swarm.identity import proved_peers

logger = logging.getLogger(__name__)

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

_MASK_BYTES = MAX_UIDS // 8


class Fetching:
    """Downloads for an `Exchange`, in its loop.

    dht: knows the peers that have proved a hotkey. name: of the calls' protocol. ask_seconds: the
    first timeout for an answer.
    """

    def __init__(self, dht: Any, p2p: P2P, name: str, admission: Admission, *, ask_seconds: float):
        self._dht = dht
        self._p2p = p2p
        self._name = name
        self._admission = admission
        self._ask_seconds = ask_seconds
        self._silent: set[str] = set()
        self._random = random.SystemRandom()

    async def blobs(
        self,
        number: int,
        missing: dict[int, Contribution],
        keep: Callable[[Contribution, bytes], None],
    ) -> None:
        """Download blobs of a round by uid, until none is missing."""
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

    async def state(
        self, digest: bytes, shapes: Mapping[str, torch.Size], *, idle_seconds: float
    ) -> State | None:
        """Download a state; None when nothing of it has come for `idle_seconds`."""
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
        try:
            manifest = read_manifest(raw, shapes)
        except StateError as error:  # the chain named something else
            name = digest.hex()[:16]
            raise SwarmError(f"state {name} is none of this model's: {error}") from None
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
            request = REQUEST.pack(HAVE, bytes(32), number)
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
                    if (await asyncio.to_thread(hashlib.sha256, data)).digest() == digest:
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
        """Append the `size` bytes of a peer's answer to `into`, or what came of them, and note
        whether it answers."""
        try:
            async with asyncio.timeout(answer_seconds):
                _, reader, writer = await self._p2p.call_binary_stream_handler(peer, self._name)
            with contextlib.closing(writer):
                writer.write(request)
                answer = await asyncio.wait_for(reader.readexactly(ANSWER.size), answer_seconds)
                left = size if ANSWER.unpack(answer) == (OK, size) else 0
                latest = time.monotonic() + OPEN_SECONDS + left / SLOWEST_BYTES
                while left:
                    seconds = min(chunk_seconds, latest - time.monotonic())
                    chunk = await asyncio.wait_for(reader.read(min(left, CHUNK_BYTES)), seconds)
                    if not chunk:
                        break
                    into += chunk
                    left -= len(chunk)
            self._silent.discard(str(peer))
        except Exception as error:  # noqa: BLE001 - also the daemon's own: the peer is gone
            logger.debug("peer %s does not answer: %r", peer, error)
            self._silent.add(str(peer))


async def _at_most(count: int, work: Sequence[Awaitable[None]]) -> None:
    semaphore = asyncio.Semaphore(count)

    async def run(each: Awaitable[None]) -> None:
        async with semaphore:
            await each

    async with asyncio.TaskGroup() as group:
        for each in work:
            group.create_task(run(each))
