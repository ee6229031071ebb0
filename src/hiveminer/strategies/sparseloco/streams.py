"""Calls between peers: a request and its answer, over a raw stream.

The stream is one of the DHT's libp2p daemon, with its own framing: Hivemind's servicers buffer a
message of whatever length the other side claims, and these calls only what was asked for.

    request   kind 1 (1 have, 2 get), hash 32 (zero for have), round or offset 8
    answer    status 1 (0 ok, 1 absent), length 8; then as many bytes
"""

from __future__ import annotations

import contextlib
import struct
from collections import Counter
from collections.abc import Iterator

HAVE, GET = 1, 2
OK, ABSENT = 0, 1

REQUEST = struct.Struct("<B32sQ")
ANSWER = struct.Struct("<BQ")

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
