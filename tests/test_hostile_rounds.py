"""What hostile peers put on the chain and serve: each attack is one round of honest peers.

Two honest miners and two honest validators with most of the stake go through the rounds with a
hostile miner and a hostile validator, whose hotkeys are registered. After each attack the round
has counted who should count, all honest peers hold the same state, and it is one that the attack
did not move.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import struct
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from hivemind.p2p import PeerID
from memory_peers import Peers, key

from hiveminer.strategies.sparseloco.codec import Compression, Header, encode
from hiveminer.strategies.sparseloco.exchange import Exchange
from hiveminer.strategies.sparseloco.records import MAX_BLOB_BYTES, Mark, Record
from hiveminer.strategies.sparseloco.rounds import Contribution, Decision, decide
from hiveminer.strategies.sparseloco.streams import ABSENT, ANSWER, GET, HAVE, OK, REQUEST

HOSTILE, JUDGE = 5, 10
HONEST = (0, 1)


class Hostile:
    """Serves whatever it was given, and claims to have everything."""

    def __init__(self) -> None:
        self.files: dict[bytes, bytes] = {}

    def have(self, number: int) -> Collection[int]:
        return range(256)

    def get(self, digest: bytes) -> bytes | None:
        return self.files.get(digest)


@dataclass
class Attack:
    """One round, between the honest cuts and the deadline of the records."""

    peers: Peers
    number: int
    source: Hostile

    @property
    def parent(self) -> bytes:
        base = self.peers.validator.replica.position.base
        assert base is not None
        return base

    def header(self) -> Header:
        plan = self.peers.validator.replica.plan
        return Header(key(HOSTILE), plan.rules.run, self.number, self.parent)

    def update(self, *, scale: float = 1.0) -> dict[str, torch.Tensor]:
        draw = torch.Generator().manual_seed(self.number)
        shapes = self.peers.validator.replica.plan.shapes
        return {name: scale * torch.randn(s, generator=draw) for name, s in shapes.items()}

    def blob(self, *, header: Header | None = None, bits: int = 2, chunk: int = 4096) -> bytes:
        compression = Compression(0.25, bits, chunk)
        return encode(self.update(), header=header or self.header(), compression=compression)

    def record(self, blob: bytes, **changes: Any) -> bytes:
        """The record of a blob that is served."""
        digest = hashlib.sha256(blob).digest()
        self.source.files[digest] = blob
        run = self.peers.validator.replica.plan.rules.run
        honest = Record(run, self.number, self.parent, len(blob), digest)
        return replace(honest, **changes).encode()

    def mark(self, **changes: Any) -> bytes:
        run = self.peers.validator.replica.plan.rules.run
        honest = Mark(run, self.number, self.parent, frozenset(HONEST), bytes(16))
        return replace(honest, **changes).encode()

    def old_blob(self, uid: int) -> bytes:
        """What an honest miner published in the round before."""
        log = self.peers.validator.follower.log
        counted = decide(self.peers.validator.replica.plan.rules, log.read(self.number - 1).facts)
        digest = next(each.blob_hash for each in counted.contributions if each.uid == uid)
        blob = log.blob(digest)
        assert blob is not None
        return blob


@pytest.fixture(scope="module")
def peers(tmp_path_factory: pytest.TempPathFactory) -> Peers:
    peers = Peers(tmp_path_factory.mktemp("peers"), miners=2)
    neuron = replace(peers.network.neurons[-1], uid=JUDGE, hotkey=key(JUDGE), stake=30)
    peers.network.neurons = (*peers.network.neurons, neuron)
    peers.short_round(2)
    peers.block(4, training=False)
    return peers


def play(
    peers: Peers,
    *,
    record: Callable[[Attack], bytes] | None = None,
    mark: Callable[[Attack], bytes] | None = None,
    who: int = HOSTILE,
    late: bool = False,
) -> Decision:
    """One round with a record or a mark of the attacker's; what the honest peers made of it."""
    schedule, network = peers.validator.replica.plan.rules.schedule, peers.network
    number = schedule.round_at(network.head)
    source = Hostile()
    peers.swarm.sources[key(HOSTILE)] = source
    downloaded, attack = peers.swarm.bytes, Attack(peers, number, source)
    peers.block()
    while network.head < schedule.records_block(number) - (0 if late else 1):
        peers.block(training=False)
    if record:
        network.pending[key(who)] = record(attack)
    while network.head < schedule.marks_block(number) - 1:
        peers.block(training=False)
    if mark:
        network.pending[key(JUDGE)] = mark(attack)
    peers.block(5, training=False)
    network.pending.pop(key(who), None)
    rules, log = peers.validator.replica.plan.rules, peers.validator.follower.log
    states = peers.states()
    assert len(states) == 1
    assert None not in states
    # Each blob once for each honest peer, and what the attack itself is worth at most.
    assert peers.swarm.bytes - downloaded <= 16 * rules.max_blob_bytes
    return decide(rules, log.read(number).facts)


def with_byte(data: bytes, at: int, value: int) -> bytes:
    return data[:at] + bytes([value]) + data[at + 1 :]


def bomb(attack: Attack) -> bytes:
    """A blob whose first tensor claims more values than there are in the model."""
    head = attack.blob()[:91]
    return head + struct.pack("<IBI", 1 << 31, 0, 1 << 31) + bytes(4096)


def other_model(attack: Attack) -> bytes:
    update = {"another.weight": torch.ones(64)}
    return encode(update, header=attack.header(), compression=Compression(0.25, 2))


BLOBS: dict[str, Callable[[Attack], bytes]] = {
    "no bytes at all": lambda _: b"",
    "random bytes": lambda _: bytes(range(256)) * 8,
    "cut short": lambda a: a.blob()[:-1],
    "one byte more": lambda a: a.blob() + b"\0",
    "another version": lambda a: b"HMU2" + a.blob()[4:],
    "the header of another hotkey": lambda a: a.blob(header=replace(a.header(), hotkey=key(0))),
    "the header of another run": lambda a: a.blob(header=replace(a.header(), run=bytes(8))),
    "the header of the next round": lambda a: a.blob(
        header=replace(a.header(), round=a.number + 1)
    ),
    "the header of another state": lambda a: a.blob(header=replace(a.header(), parent=bytes(32))),
    "another's blob of the round before": lambda a: a.old_blob(0),
    "a model of other shapes": other_model,
    "chunks of another size": lambda a: a.blob(chunk=64),
    "more bits than the run allows": lambda a: a.blob(bits=4),
    "fewer bits than the run wants": lambda a: a.blob(bits=1),
    "a bomb": bomb,
}


@pytest.mark.parametrize("name", BLOBS)
def test_a_hostile_blob_is_not_marked(peers: Peers, name: str) -> None:
    decision = play(peers, record=lambda attack: attack.record(BLOBS[name](attack)))
    assert tuple(each.uid for each in decision.contributions) == HONEST
    assert [uid for uid, _ in decision.left_out] == [HOSTILE]


def unserved(attack: Attack) -> bytes:
    record = attack.record(attack.blob())
    attack.source.files.clear()
    return record


def lied(attack: Attack) -> bytes:
    """The bytes that are served are others, of the right length."""
    blob = attack.blob()
    record = attack.record(blob)
    attack.source.files[hashlib.sha256(blob).digest()] = bytes(len(blob))
    return record


RECORDS: dict[str, Callable[[Attack], bytes]] = {
    "a length that is one too small": lambda a: a.record(a.blob(), blob_bytes=len(a.blob()) - 1),
    "a length that is one too large": lambda a: a.record(a.blob(), blob_bytes=len(a.blob()) + 1),
    "the largest length there is": lambda a: a.record(a.blob(), blob_bytes=MAX_BLOB_BYTES),
    "a blob that nobody has": lambda a: a.record(a.blob(), blob_hash=bytes(32)),
    "a blob that its author withholds": unserved,
    "a blob in whose place others are served": lied,
    "another state": lambda a: a.record(a.blob(), parent=bytes(32)),
    "another run": lambda a: a.record(a.blob(), run=bytes(8)),
    "the round before": lambda a: a.record(a.blob(), round=a.number - 1),
    "the last round there can be": lambda a: a.record(a.blob(), round=2**32 - 1),
    "one byte too few": lambda a: a.record(a.blob())[:-1],
    "one byte too many": lambda a: a.record(a.blob()) + b"\0",
    "another version": lambda a: with_byte(a.record(a.blob()), 0, 0x12),
    "a mark from who has no permit": lambda a: a.mark(state=bytes(32)),
    "a record in the place of a mark": lambda a: with_byte(a.record(a.blob()), 0, 0x21),
    "no bytes": lambda _: b"",
    "text": lambda _: b"/ip4/127.0.0.1/tcp/1/p2p/12D3KooW",
}


@pytest.mark.parametrize("name", RECORDS)
def test_a_hostile_record_does_not_count(peers: Peers, name: str) -> None:
    decision = play(peers, record=RECORDS[name])
    assert tuple(each.uid for each in decision.contributions) == HONEST


def test_a_late_record_and_one_of_a_stranger_do_not_count(peers: Peers) -> None:
    for options in ({"late": True}, {"who": 77}):
        decision = play(peers, record=lambda a: a.record(a.blob()), **options)  # type: ignore[arg-type]
        assert tuple(each.uid for each in decision.contributions) == HONEST
        assert decision.left_out == ()


MARKS: dict[str, Callable[[Attack], bytes]] = {
    "a state that nobody has": lambda a: a.mark(state=bytes(32)),
    "every uid there can be": lambda a: a.mark(uids=frozenset(range(256))),
    "nobody": lambda a: a.mark(uids=frozenset()),
    "only the attacker": lambda a: a.mark(uids=frozenset({HOSTILE})),
    "another run": lambda a: a.mark(run=bytes(8)),
    "another round": lambda a: a.mark(round=a.number + 1),
    "one byte too few": lambda a: a.mark()[:-1],
    "a record": lambda a: a.record(a.blob()),
    "random bytes": lambda _: bytes(range(93)),
}


@pytest.mark.parametrize("name", MARKS)
def test_a_hostile_mark_of_a_minority_moves_nothing(peers: Peers, name: str) -> None:
    decision = play(peers, record=unserved, mark=MARKS[name])
    assert tuple(each.uid for each in decision.contributions) == HONEST
    assert decision.left_out == ((HOSTILE, "not marked by more than half"),)


# Answers over p2p, without a daemon: streams in memory --------------------------------------------

RUN, NUMBER = b"12345678", 7
BLOB = bytes(range(256)) * 20
WANTED = Contribution(3, bytes(32), len(BLOB), hashlib.sha256(BLOB).digest())
Answer = Callable[[int, bytes, int], bytes | None]
"""From the kind, the hash and the number of a request to all the bytes of the answer; None for
none, ever."""


def honest(kind: int, digest: bytes, number: int) -> bytes:
    if kind == HAVE:
        return ANSWER.pack(OK, 32) + (1 << 3).to_bytes(32, "little")
    return ANSWER.pack(OK, len(BLOB) - number) + BLOB[number:]


class Writer:
    """One side of a stream: what is written is what the other side reads."""

    def __init__(self, on_write: Callable[[bytes], None]):
        self._on_write = on_write
        self.is_closed = False

    def write(self, data: bytes) -> None:
        self._on_write(bytes(data))

    async def drain(self) -> None:
        await asyncio.sleep(0)

    def close(self) -> None:
        self.is_closed = True


class MemoryDHT:
    """What the exchange needs of a `hivemind.DHT`, and the p2p daemon that it asks for."""

    def __init__(self, peers: dict[str, Answer], *, strangers: Collection[str] = ()):
        self.peers = {PeerID(name.encode()): answer for name, answer in peers.items()}
        self.strangers = {str(PeerID(name.encode())) for name in strangers}
        self.asked: list[PeerID] = []
        self.handler: Any = None

    # The DHT
    async def replicate_p2p(self) -> MemoryDHT:
        return self

    def run_coroutine(self, work: Any, *, return_future: bool) -> asyncio.Future[Any]:
        found: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        if isinstance(work, partial):  # identify: None for a stranger
            name = work.keywords["peer_id"]
            found.set_result(None if name in self.strangers else "hotkey")
        else:
            found.set_result({str(peer): "hotkey" for peer in self.peers})
        return found

    # The daemon
    async def add_binary_stream_handler(self, name: str, handler: Any) -> None:
        self.handler = handler

    async def remove_binary_stream_handler(self, name: str) -> None:
        self.handler = None

    async def shutdown(self) -> None:
        pass

    async def call_binary_stream_handler(self, peer: PeerID, name: str) -> tuple[Any, Any, Any]:
        self.asked.append(peer)
        reader = asyncio.StreamReader()

        def answer(request: bytes) -> None:
            data = self.peers[peer](*REQUEST.unpack(request))
            if data is not None:
                reader.feed_data(data)
                reader.feed_eof()

        return None, reader, Writer(answer)

    async def ask(self, peer: str, request: bytes) -> bytes:
        """Send these bytes to the exchange, and take its whole answer."""
        reader, answer = asyncio.StreamReader(), bytearray()
        reader.feed_data(request)
        reader.feed_eof()
        info = type("Info", (), {"peer_id": PeerID(peer.encode())})()
        await self.handler(info, reader, Writer(answer.extend))
        return bytes(answer)


class Blobs:
    """The honest source."""

    def have(self, number: int) -> Collection[int]:
        return (3,) if number == NUMBER else ()

    def get(self, digest: bytes) -> bytes | None:
        return BLOB if digest == WANTED.blob_hash else None


@contextlib.contextmanager
def exchange_on(dht: MemoryDHT, *, ask_seconds: float = 1.0) -> Iterator[Exchange]:
    exchange = Exchange(dht, run=RUN, source=Blobs(), ask_seconds=ask_seconds)
    try:
        yield exchange
    finally:
        exchange.close()


def claims(get: Callable[[int], bytes | None]) -> Answer:
    """A peer that says it has everything, and answers `get` with this."""

    def answer(kind: int, digest: bytes, number: int) -> bytes | None:
        return ANSWER.pack(OK, 32) + b"\xff" * 32 if kind == HAVE else get(number)

    return answer


ANSWERS: dict[str, Answer] = {
    "nothing": lambda *_: b"",
    "half an answer's head": lambda *_: b"\0\0",
    "a length of 2**63": lambda *_: ANSWER.pack(OK, 2**63) + BLOB,
    "an unknown status": lambda *_: ANSWER.pack(7, len(BLOB)) + BLOB,
    "a mask of one byte": lambda *_: ANSWER.pack(OK, 1) + b"\xff",
    "absent": claims(lambda _: ANSWER.pack(ABSENT, 0)),
    "other bytes": claims(lambda at: ANSWER.pack(OK, len(BLOB) - at) + bytes(len(BLOB) - at)),
    "a longer blob": claims(lambda _: ANSWER.pack(OK, len(BLOB) + 1) + BLOB + b"\0"),
    "a shorter blob": claims(lambda _: ANSWER.pack(OK, len(BLOB) - 1) + BLOB[:-1]),
    "more bytes than it says": claims(
        lambda at: ANSWER.pack(OK, len(BLOB) - at) + BLOB[at:] + bytes(10**6)
    ),
    "the half of it": claims(lambda at: ANSWER.pack(OK, len(BLOB) - at) + BLOB[at : at + 999]),
    "the half of something else": claims(lambda at: ANSWER.pack(OK, len(BLOB) - at) + bytes(999)),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_a_hostile_answer_costs_another_question(name: str) -> None:
    """With two liars and one honest holder the blob comes, with its hash, from the holder."""
    dht = MemoryDHT({"a": ANSWERS[name], "b": ANSWERS[name], "c": honest})
    with exchange_on(dht) as exchange:
        for _ in range(3):
            assert fetched(exchange) == [BLOB]
    assert len(dht.asked) <= 3 * 3 * len(dht.peers)  # who has it, the bytes, and all bytes again


def test_peers_that_are_stopped_are_not_waited_for() -> None:
    dht = MemoryDHT({"a": lambda *_: None, "b": lambda *_: None, "c": honest})
    with exchange_on(dht, ask_seconds=60) as exchange:
        assert fetched(exchange) == [BLOB]
        dht.peers |= dict.fromkeys(dht.peers, honest)  # all go on, and the only holder leaves
        del dht.peers[PeerID(b"c")]
        assert fetched(exchange) == [BLOB]


def test_a_holder_that_hangs_is_passed_over() -> None:
    hangs = claims(lambda _: None)
    dht = MemoryDHT({**dict.fromkeys("abdefg", hangs), "c": honest})
    with exchange_on(dht, ask_seconds=0.1) as exchange:
        assert fetched(exchange, timeout_seconds=9) == [BLOB]


def fetched(exchange: Exchange, *, timeout_seconds: float = 30) -> list[bytes]:
    got: list[bytes] = []
    exchange.fetch_blobs(
        NUMBER, [WANTED], keep=lambda _, blob: got.append(blob), timeout_seconds=timeout_seconds
    )
    return got


REQUESTS: dict[str, tuple[bytes, bytes]] = {
    "nothing": (b"", b""),
    "half a request": (REQUEST.pack(GET, WANTED.blob_hash, 0)[:20], b""),
    "an unknown call": (REQUEST.pack(7, WANTED.blob_hash, 0), ANSWER.pack(ABSENT, 0)),
    "an unknown hash": (REQUEST.pack(GET, bytes(32), 0), ANSWER.pack(ABSENT, 0)),
    "past the end": (REQUEST.pack(GET, WANTED.blob_hash, 2**64 - 1), ANSWER.pack(ABSENT, 0)),
    "the end": (REQUEST.pack(GET, WANTED.blob_hash, len(BLOB)), ANSWER.pack(OK, 0)),
    "a round in the far future": (
        REQUEST.pack(HAVE, bytes(32), 2**64 - 1),
        ANSWER.pack(OK, 32) + bytes(32),
    ),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_a_hostile_request_gets_what_it_is_worth(name: str) -> None:
    request, expected = REQUESTS[name]
    dht = MemoryDHT({})
    with exchange_on(dht) as exchange:
        ask = partial(_in_its_loop, exchange, dht)
        assert ask("a", request) == expected
        assert ask("a", REQUEST.pack(GET, WANTED.blob_hash, 0)).endswith(BLOB)


def test_a_stranger_gets_nothing_and_is_not_asked() -> None:
    dht = MemoryDHT({"stranger": honest}, strangers=["stranger"])
    with exchange_on(dht) as exchange:
        for request in (
            REQUEST.pack(HAVE, bytes(32), NUMBER),
            REQUEST.pack(GET, WANTED.blob_hash, 0),
        ):
            assert _in_its_loop(exchange, dht, "stranger", request) == b""
            assert _in_its_loop(exchange, dht, "member", request) != b""
        assert fetched(exchange, timeout_seconds=1.2) == []


def _in_its_loop(exchange: Exchange, dht: MemoryDHT, peer: str, request: bytes) -> bytes:
    return asyncio.run_coroutine_threadsafe(dht.ask(peer, request), exchange._loop).result(60)
