"""Which peers count: not the dead, not the shunned, not one that claims to be far ahead."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from bittensor.keyfiles import Keypair
from hivemind.dht.crypto import RSASignatureValidator
from hivemind.p2p import PeerID

from hiveminer.strategies.hivemind.tracker import Reports
from hiveminer.swarm import Identity


def peer(number: int) -> PeerID:
    return PeerID(b"\x12\x20" + bytes([number]) * 32)


def entries(*epochs: int, time: float = 100.0) -> dict[str, Any]:
    return {
        f"key {number}": SimpleNamespace(
            value={"peer_id": peer(number).to_bytes(), "epoch": epoch, "time": time}
        )
        for number, epoch in enumerate(epochs)
    }


def test_who_was_left_out_counts_again_with_its_next_report() -> None:
    reports = Reports()
    assert len(reports.read(entries(4, 4, 4))) == 3
    reports.leave_out(str(peer(1)))
    assert reports.gone == {str(peer(1))}
    # The DHT still holds its last report.
    assert set(reports.read(entries(4, 4, 4))) == {"key 0", "key 2"}
    assert str(peer(1)) not in reports.seconds
    assert len(reports.read(entries(4, 4, 4, time=101.0))) == 3
    assert reports.gone == set()


def test_who_sent_poison_counts_again_after_a_while() -> None:
    now = 0.0
    reports = Reports(clock=lambda: now)
    reports.read(entries(4, 4))
    reports.shun(str(peer(0)), seconds=300.0)
    now = 299.0
    assert set(reports.read(entries(4, 4, time=200.0))) == {"key 1"}
    now = 301.0
    assert len(reports.read(entries(4, 4, time=201.0))) == 2


@pytest.mark.parametrize(
    ("epochs", "believed"),
    [
        ([5, 5, 10**9], 2),  # it would send everybody after a state that nobody has
        ([5, 6, 5, 10**9], 3),
        ([5, 5, 7], 3),
        ([5, 5, 50, 51], 4),  # the other half of a swarm that was split
        ([5, 50], 2),  # nobody can say who is right
        ([0, 0, 0], 3),
    ],
)
def test_one_peer_alone_cannot_claim_an_epoch_far_ahead(epochs: list[int], believed: int) -> None:
    assert len(Reports().read(entries(*epochs))) == believed


@pytest.mark.parametrize(
    "value",
    [None, {}, {"peer_id": "x", "time": 1.0, "epoch": 1}, {"peer_id": b"", "time": 1.0}, [1], "x"],
)
def test_what_is_no_report_does_not_count(value: object) -> None:
    reports = Reports()
    assert reports.read({"key": SimpleNamespace(value=value)}) == {}
    assert reports.seconds == {}


def test_a_report_counts_for_the_peer_that_signed_it() -> None:
    identity = Identity(Keypair.create_from_uri("//A"), run_id="a-b-c", key_path=None)
    owner = RSASignatureValidator(identity.private_key).local_public_key
    value = {"peer_id": PeerID.from_base58(identity.peer_id).to_bytes(), "time": 1.0, "epoch": 1}
    true = {owner: SimpleNamespace(value=value)}
    assert Reports(signed=True).read(true) == true
    for other in ({**value, "peer_id": peer(1).to_bytes()},):
        assert Reports(signed=True).read({owner: SimpleNamespace(value=other)}) == {}
    for key in ("key 0", b"", b"[owner:x]", owner + owner):
        assert Reports(signed=True).read({key: SimpleNamespace(value=value)}) == {}
