"""Peers find each other: what stands on the chain, and the ways that it names."""

from __future__ import annotations

from pathlib import Path

import pytest

from hiveminer.swarm.peer import addresses_in, peer_id_of
from programs import started

ID = "QmcarEgZaGuB2HrUo7yJMwWP1fKCR1YBZrmgnQXoDCzyjY"

MEET = """
import sys
from hiveminer.swarm.peer import Peer, addresses_in
from identities import EVERYBODY, NAMES, who
from programs import free_port

def counts(result):
    return len(result.answered), len(result.tried)

NOBODY = "/ip4/127.0.0.1/tcp/1/p2p/" + sys.argv[1]
first, second, third = (
    Peer(identity=who(name), admitted=EVERYBODY, port=free_port(), quic=True) for name in NAMES
)
assert len(second.commitment.encode()) <= 128
tcp, quic = addresses_in(second.commitment)
assert tcp == second.address
assert counts(first.dial([quic])) == (1, 1)
assert counts(third.dial([tcp, quic, third.address, "/no/address"])) == (1, 1)
assert counts(first.dial([NOBODY], timeout_seconds=3)) == (0, 1)
for peer in (first, second, third):
    peer.close()
print("closed")
"""


def test_a_commitment_stands_for_tcp_and_quic() -> None:
    tcp = f"/ip4/192.0.2.1/tcp/8009/p2p/{ID}"
    assert addresses_in(tcp) == [tcp]
    assert addresses_in(f"{tcp} quic") == [tcp, f"/ip4/192.0.2.1/udp/8009/quic-v1/p2p/{ID}"]
    assert all(peer_id_of(address) == ID for address in addresses_in(f"{tcp} quic"))


@pytest.mark.parametrize("text", ["", "run embedded-1-2-3", "quic", " quic", "\x00"])
def test_what_is_no_address_stands_for_none(text: str) -> None:
    assert addresses_in(text) == []


@pytest.mark.parametrize("text", ["/", "/ quic", "/tcp/ quic", "/p2p/x quic", "/" + "a" * 600])
def test_a_broken_address_names_no_peer(text: str) -> None:
    assert [peer_id_of(address) for address in addresses_in(text)].count(None) == len(
        addresses_in(text)
    )


@pytest.mark.timeout(120)
def test_peers_meet_over_quic_and_over_tcp(tmp_path: Path) -> None:
    with started(MEET, ID, folder=tmp_path / "peers") as peers:
        peers.says("closed", seconds=90)
        assert peers.process.wait(60) == 0, peers.words
