"""Why peers do not start or do not answer, a split of the DHT, and when peers are dialed again."""

from __future__ import annotations

import logging
import socket
from collections.abc import Sequence
from pathlib import Path

import pytest
from embedded_network import Clock
from small_neurons import miner_settings, told

from hiveminer.errors import OperatorError
from hiveminer.swarm.discovery import Discovery
from hiveminer.swarm.membership import start_peer
from hiveminer.swarm.peer import FOREIGN, DialResult, start_cure, why_silent
from programs import started

# peer_start and dht_split

MEET = """
import itertools, logging, socket, sys
import psutil
import pytest
from hiveminer.errors import OperatorError
from hiveminer.swarm import peer as peers
from hiveminer.swarm.discovery import Discovery
from hiveminer.swarm.peer import Peer, PortTaken
from hiveminer.swarm.peer import UNREACHED
from identities import EVERYBODY, who
from programs import free_port, wait_for

logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
with pytest.raises(OperatorError, match="does not start on 192.0.2.1 port 0: .* has no such addr"):
    Peer(identity=who("Alice"), ip="192.0.2.1")
busy = socket.create_server(("127.0.0.1", 0))
with pytest.raises(PortTaken, match="choose another with --dht.port"):
    Peer(identity=who("Alice"), port=busy.getsockname()[1])

class Dying(peers._Node):
    def run(self):
        sys.exit(7)

peers._Node, node = Dying, peers._Node
with pytest.raises(OperatorError, match="its process ended with 7; the system may have killed it"):
    Peer(identity=who("Alice"))
peers._Node = node

def peer(name, **options):
    return Peer(identity=who(name), admitted=EVERYBODY, **options)

def silent(one, address, **options):
    [why] = one.dial([address], **options).silent.values()
    return why

port = free_port()
other = peer("Bob", port=port)
address = other.address
other.close()

first = peer("Alice")
away = "/ip4/127.0.0.1/tcp/%d/p2p/" + address.split("/p2p/")[1]
assert "nothing is listening there" in silent(first, address)
why = silent(first, away % busy.getsockname()[1], timeout_seconds=3)
assert "something other than a peer" in why or UNREACHED in why
discovery = Discovery(first, clock=itertools.count(0, 60).__next__)
discovery.meet([address])
discovery.meet([address])
print("told once")

other = peer("Bob", port=port)

def until(what):
    wait_for(lambda: what(discovery.meet([address])), seconds=60)

until(lambda result: result.answered)
family = [psutil.Process(other.dht.pid), *psutil.Process(other.dht.pid).children()]
for process in family:
    process.suspend()  # as if a cable were pulled
until(lambda result: result.silent)
print("cut off")
for process in family:
    process.resume()
until(lambda result: result.answered)
assert not discovery.meet([address]).joined
stranger = peer("Charlie")
why = silent(stranger, first.address.split("/p2p/")[0] + "/p2p/" + address.split("/p2p/")[1])
assert "another peer is at its address now" in why
for each in (first, other, stranger):
    each.close()
print("closed")
"""


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_peer_that_is_alone_says_why_and_a_split_that_it_was_healed(tmp_path: Path) -> None:
    with started(MEET, folder=tmp_path / "meet") as program:
        words = program.says("closed", seconds=150)
    # The foreign address, the dying one, alone at the start, and alone when cut off.
    assert words.count("[peer_start]") == 4
    before, _, after = words.partition("cut off")
    alone = "none of the 1 known peers answered (1 times: "
    assert before.partition("told once")[0].count(alone) == 1
    assert "[dht_split]" not in before  # it had only not been started
    assert after.count("[dht_split]") == 1
    assert "the DHT was split: 1 of 1 peers that answered were not in our part of it" in after
    assert "; healed; " in after


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ("dial tcp4 192.0.2.1:5: connect: connection refused", "nothing is listening there"),
        ("peer id mismatch: expected Qm, but remote key matches 12D3", "another peer"),
        ("context deadline exceeded", "a firewall"),
        ("dial backoff", "a recent attempt"),
        ("backoff\n connection refused", "nothing is listening there"),
    ],
)
def test_what_a_failed_dial_means(words: str, why: str) -> None:
    assert why in why_silent(RuntimeError(words))


def test_what_to_do_when_a_peer_does_not_start() -> None:
    assert "--dht.port" in start_cure("bind: address already in use")
    assert "below 1024" in start_cure("bind: permission denied")
    assert "reinstall hivemind" in start_cure("p2pd binary not found at x")
    assert "--dht.port" in start_cure("something new")


class Dialled:
    """In place of a peer: whom it would reach, and how often it dialed."""

    client_only = False

    def __init__(self) -> None:
        self.reached: set[str] = set()
        self.looks = 0

    def dial(self, addresses: Sequence[str]) -> DialResult:
        self.looks += 1
        answered = frozenset(addresses) & self.reached
        silent = {name: FOREIGN for name in addresses if name not in answered}
        return DialResult(answered=answered, silent=silent)


def test_peers_that_work_and_do_not_report_are_a_split(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    clock, peer = Clock(), Dialled()
    discovery = Discovery(peer, clock=clock)  # type: ignore[arg-type]
    discovery.compare(working=3, reporting=1)
    clock.seconds += 40
    discovery.compare(working=3, reporting=3)  # they had only just begun
    for _ in range(5):
        assert not told(caplog, "dht_split")
        discovery.compare(working=3, reporting=1)
        clock.seconds += 12
    discovery.compare(working=3, reporting=1)
    discovery.compare(working=3, reporting=1)
    (words,) = told(caplog, "dht_split")
    assert "2 of 3 peers of this run" in words
    discovery.compare(working=3, reporting=4)
    assert "all 3 peers that work report" in caplog.messages[-1]


def test_peers_are_dialled_again_now_and_then(caplog: pytest.LogCaptureFixture) -> None:
    clock, peer = Clock(), Dialled()
    discovery = Discovery(peer, clock=clock)  # type: ignore[arg-type]

    def looks(seconds: int) -> int:
        before = peer.looks
        for _ in range(seconds):
            discovery.meet(["a", "b"])
            clock.seconds += 1
        return peer.looks - before

    peer.reached = {"a", "b"}
    assert looks(60) == 2
    peer.reached = set()
    assert looks(1) == 1
    assert not told(caplog, "peer_start")  # they may not have read of us on the chain yet
    assert looks(29) == 3  # after 2, 4 and 8 seconds
    assert looks(300) == 10
    assert len(told(caplog, "peer_start")) == 1
    discovery.meet(["a", "b", "c"])  # a new one is dialled at once
    assert peer.looks == 17
    peer.reached = {"c"}
    clock.seconds += 30
    discovery.meet(["a", "b", "c"])
    peer.reached = set()
    assert looks(60) > 2
    assert len(told(caplog, "peer_start")) == 2


def test_a_port_that_is_taken_is_an_event_too(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        settings = miner_settings(tmp_path, dht={"port": port})
        with pytest.raises(OperatorError, match="choose another"):
            start_peer(settings, identity=None, admitted=())  # type: ignore[arg-type]
    (words,) = told(caplog, "peer_start")
    assert f"--dht.port {port}: in use on 127.0.0.1" in words
