"""Requests that no client would send, for the axon's tests and its benchmark."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import hypothesis
from bittensor import http_auth
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from hiveminer.protocol import Train

Sign = Callable[[bytes, str], Mapping[str, str]]
"""Body and target to the headers of a true signature."""


@dataclass(frozen=True)
class Malformed:
    """The parts of one request; `signed` ones carry a true signature among the rest."""

    start: bytes
    lines: Sequence[tuple[bytes, bytes]]
    body: bytes
    signed: bool

    def changed(self, chance: random.Random, *, times: int) -> Malformed:
        """The same with bytes of its body changed, which is what will be signed then."""
        return replace(self, body=change(self.body, chance, times=times))

    def raw(self, sign: Sign) -> bytes:
        """The bytes to send now: a signature is soon too old."""
        head = [self.start]
        if self.signed:
            target = [*self.start.split(b" "), b""][1].decode("latin-1")
            true = {"Host": "x", "Content-Length": str(len(self.body)), **sign(self.body, target)}
            head += [f"{name}: {value}".encode("latin-1") for name, value in true.items()]
        head += [name + b": " + value for name, value in self.lines]
        return b"\r\n".join([*head, b"", b""]) + self.body


def change(data: bytes, chance: random.Random, *, times: int) -> bytes:
    """Put in, leave out or replace a byte or two, so many times."""
    changed = bytearray(data)
    for _ in range(times):
        place = chance.randrange(len(changed) + 1)
        changed[place : place + chance.randrange(2)] = chance.randbytes(chance.randrange(3))
    return bytes(changed)


def malformed(*, hotkeys: Sequence[str]) -> st.SearchStrategy[Malformed]:
    """Requests with something wrong in them; `hotkeys` are some that the axon knows."""
    return st.builds(
        Malformed,
        start=_starts(),
        lines=st.one_of(st.just([]), _lines(hotkeys), st.lists(_noise(), max_size=2)),
        body=_bodies(),
        signed=st.booleans(),
    )


def many(count: int, *, hotkeys: Sequence[str]) -> list[Malformed]:
    """The same `count` requests each time."""
    found: list[Malformed] = []
    seed = 0
    while len(found) < count:
        _draw(malformed(hotkeys=hotkeys), count - len(found), seed=seed, into=found)
        seed += 1
    return found[:count]


def _draw(
    strategy: st.SearchStrategy[Malformed], count: int, *, seed: int, into: list[Malformed]
) -> None:
    @hypothesis.seed(seed)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(one=strategy)
    def draw(one: Malformed) -> None:
        into.append(one)

    draw()


def _starts() -> st.SearchStrategy[bytes]:
    methods = [b"POST", b"GET", b"PUT", b"HEAD", b"CONNECT", b"PRI", b"OPTIONS", b"x"]
    targets = [
        *(b"/Train", b"/IsAlive", b"/", b"*", b"/%", b"/%ff", b"/Train?%00", b"//", b"x:1"),
        *(b"http://[::1/Train", b"/" + b"a" * 9000, b"/Train#a", b"/../Train"),
    ]
    versions = [b"HTTP/1.1", b"HTTP/1.0", b"HTTP/2.0", b"HTTP/9", b""]
    good = st.sampled_from([b"POST /Train HTTP/1.1", b"POST /IsAlive HTTP/1.1"])
    return st.one_of(
        good,
        good,
        st.tuples(*(st.sampled_from(part) for part in (methods, targets, versions))).map(b" ".join),
        st.binary(max_size=60),
    )


def _lines(hotkeys: Sequence[str]) -> st.SearchStrategy[list[tuple[bytes, bytes]]]:
    names = [
        *(http_auth.HEADER_HOTKEY, http_auth.HEADER_NONCE, http_auth.HEADER_SIGNATURE),
        *(http_auth.HEADER_RECEIVER, http_auth.HEADER_CRYPTO, http_auth.HEADER_VERSION),
        *("Content-Length", "Transfer-Encoding", "Connection", "Upgrade", "Expect", "Host"),
    ]
    values = [
        *("", "0", "-1", "1", "5", "9" * 30, "1_0", "chunked", "gzip, chunked", "close"),
        *("websocket", "h2c", "100-continue", "sr25519", "ed25519", "0x" + "ab" * 64, "5" * 65),
        *hotkeys,
    ]
    line = st.tuples(
        st.sampled_from([name.encode() for name in names]),
        st.one_of(
            st.sampled_from([value.encode() for value in values]),
            _printable().map(lambda text: text.encode("latin-1")),
            st.binary(max_size=80),
        ),
    )
    return st.lists(line, max_size=5)


def _printable() -> st.SearchStrategy[str]:
    """What HTTP lets a header hold."""
    return st.text(st.characters(min_codepoint=33, max_codepoint=255, exclude_categories=["Cc"]))


def _noise() -> st.SearchStrategy[tuple[bytes, bytes]]:
    return st.tuples(st.binary(max_size=12), st.binary(max_size=80))


def _bodies() -> st.SearchStrategy[bytes]:
    chunks = [b"5\r\nhello\r\n0\r\n\r\n", b"ffffffffff\r\n", b"-1\r\n", b"[" * 2000, b"{}"]
    return st.one_of(st.binary(max_size=60), st.sampled_from(chunks), _trains())


def _trains() -> st.SearchStrategy[bytes]:
    """A good `Train` in which some fields are anything that JSON, or Python's, can say."""
    good = {"request_id": "a", "run_id": "run", "data_hash": "data", "dataset_indices": [1]}
    plain = st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.just(10**400)
    )
    anything = st.recursive(
        plain,
        lambda inner: st.one_of(
            st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)
        ),
        max_leaves=6,
    )
    names = st.one_of(st.sampled_from(sorted(Train.model_fields)), st.text(max_size=6))
    return st.dictionaries(names, anything, min_size=1, max_size=3).map(
        lambda odd: json.dumps({**good, **odd}).encode()
    )
