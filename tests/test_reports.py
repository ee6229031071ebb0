"""Which peers count: not the dead, not the shunned, not one that claims to be far ahead."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
from hivemind.dht.crypto import RSASignatureValidator
from hivemind.p2p import PeerID
from hivemind.utils.timed_storage import ValueWithExpiration
from identities import NAMES, who

from hiveminer.strategies.hivemind.tracker import Reports, swarm_epoch


def peer(number: int) -> PeerID:
    return PeerID.from_base58(who(NAMES[number]).peer_id)


def key(number: int) -> bytes:
    """Under which this peer's report is in the DHT."""
    return bytes(RSASignatureValidator(who(NAMES[number]).private_key).local_public_key)


def report(number: int = 0, *, epoch: int = 4, time: float = 100.0, **changes: Any) -> Any:
    value = {
        "peer_id": peer(number).to_bytes(), "epoch": epoch, "time": time,
        "samples_accumulated": 0, "samples_per_second": 1.0, "client_mode": False,
    }  # fmt: skip
    return ValueWithExpiration(value | changes, 1e12)


def entries(*epochs: int, time: float = 100.0) -> dict[bytes, Any]:
    return {
        key(number): report(number, epoch=epoch, time=time) for number, epoch in enumerate(epochs)
    }


def test_who_was_left_out_counts_again_with_its_next_report() -> None:
    reports = Reports()
    assert len(reports.read(entries(4, 4, 4))) == 3
    reports.leave_out(str(peer(1)))
    # The DHT still holds its last report.
    assert set(reports.read(entries(4, 4, 4))) == {key(0), key(2)}
    assert str(peer(1)) not in reports.seconds
    assert len(reports.read(entries(4, 4, 4, time=101.0))) == 3


def test_who_sent_poison_counts_again_after_a_while() -> None:
    now = 0.0
    reports = Reports(clock=lambda: now)
    reports.read(entries(4, 4))
    reports.leave_out(str(peer(0)), seconds=300.0)
    now = 299.0
    assert set(reports.read(entries(4, 4, time=200.0))) == {key(1)}
    now = 301.0
    assert len(reports.read(entries(4, 4, time=201.0))) == 2


@pytest.mark.parametrize(
    ("own", "others", "epoch"),
    [
        (5, [], 0),
        (5, [5, 10**9], 5),  # it would send everybody after a state that nobody has
        (0, [5, 5, 10**9], 5),
        (5, [5, 6, 5, 10**9], 5),
        (5, [6, 6], 6),
        (5, [6, 5], 5),  # the first has just ended the epoch
        (5, [5, 50, 51], 50),  # the other half of a swarm that was split
        (5, [50], 50),  # of two, nobody can say who is right
        (9, [10, 5], 10),  # rounds have failed, and each is in an epoch of its own
        (5, [10, 9], 9),
        (10, [9, 5], 9),
    ],
)
def test_the_swarm_is_in_the_epoch_that_most_peers_have_reached(
    own: int, others: list[int], epoch: int
) -> None:
    assert swarm_epoch(others, own=own) == epoch


def test_who_is_ahead_of_most_is_a_peer_and_does_not_set_the_epoch() -> None:
    reports = Reports(own=str(peer(0)))
    kept = reports.read(entries(5, 5, 7), own_epoch=5)
    assert max(entry.value["epoch"] for entry in kept.values()) == 5
    assert reports.others == {str(peer(1)): 5, str(peer(2)): 7}
    # Whoever ended the epoch together with us counts, though most have not yet.
    assert len(reports.read(entries(6, 5, 6), own_epoch=6)) == 3


def test_who_is_ahead_and_gives_no_state_is_left_out_longer_each_time() -> None:
    now = 0.0
    reports = Reports(own=str(peer(0)), clock=lambda: now)

    def epochs_at(seconds: float) -> set[int]:
        nonlocal now
        now = seconds
        reports.read(entries(5, 5, 7, time=1000.0 + now), own_epoch=5)
        return set(reports.others.values())

    assert epochs_at(0) == {5, 7}
    assert reports.note_download(epoch=6, loaded=False) == set()
    assert reports.note_download(epoch=5, loaded=False) == {str(peer(2))}
    assert epochs_at(29) == {5}
    assert epochs_at(31) == {5, 7}
    reports.note_download(epoch=5, loaded=False)
    assert epochs_at(31 + 59) == {5}
    assert epochs_at(31 + 61) == {5, 7}
    assert reports.note_download(epoch=5, loaded=True) == set()
    reports.note_download(epoch=5, loaded=False)
    assert epochs_at(31 + 61 + 31) == {5, 7}


def test_rows_that_nobody_can_have_trained_do_not_count() -> None:
    now = 0.0
    reports = Reports(own=str(peer(0)), clock=lambda: now)

    def rows_of_liar(claimed: int, *, epoch: int = 4) -> int:
        honest = report(0, epoch=epoch, samples_per_second=10.0, samples_accumulated=20)
        liar = report(1, epoch=epoch, samples_per_second=1e9, samples_accumulated=claimed)
        kept = reports.read({key(0): honest, key(1): liar}, own_epoch=epoch)
        if epoch == 4:
            assert kept[key(0)].value["samples_accumulated"] == 20
        return int(kept[key(1)].value["samples_accumulated"])

    rows_of_liar(0)
    now = 1.0
    assert rows_of_liar(1_000_000) == 40  # four times as fast as the fastest other
    now = 2.0
    assert rows_of_liar(1_000_000) == 80
    now = 30.0
    assert rows_of_liar(1_000_000, epoch=5) == 0  # the round took long, but it has only just ended
    now = 31.0
    assert rows_of_liar(1_000_000, epoch=5) == 40
    now = 32.0
    assert rows_of_liar(60, epoch=5) == 60  # as an honest one's do


def test_a_lone_peer_s_rows_all_count() -> None:
    reports = Reports(own=str(peer(0)), clock=lambda: 0.0)
    kept = reports.read({key(0): report(0, samples_accumulated=10_000)}, own_epoch=4)
    assert kept[key(0)].value["samples_accumulated"] == 10_000
    # Nor does one that has never trained set a limit.
    idle = report(1, samples_per_second=1e-20)
    kept = reports.read({key(0): report(0, samples_accumulated=20_000), key(1): idle}, own_epoch=4)
    assert kept[key(0)].value["samples_accumulated"] == 20_000


def test_a_peer_counts_once_however_often_it_writes() -> None:
    reports = Reports()
    again = key(0).replace(b"]", b" with a comment]")
    twice = {key(0): report(0, time=1.0), again: report(0, time=2.0, samples_accumulated=3)}
    assert list(reports.read(twice)) == [again]


@pytest.mark.parametrize(
    "value",
    [
        None, {}, {"peer_id": "x", "time": 1.0, "epoch": 1}, [1], "x",
        report(time=math.nan).value, report(time=math.inf).value, report(epoch=-1).value,
        report(epoch=2**60).value, report(epoch=True).value, report(peer_id=b"").value,
        report(samples_accumulated=1.5).value, report(samples_per_second=math.inf).value,
        report(client_mode=0).value, report(more=1).value,
    ],
)  # fmt: skip
def test_what_is_no_report_does_not_count(value: object) -> None:
    reports = Reports()
    assert reports.read({key(0): SimpleNamespace(value=value)}) == {}
    assert reports.seconds == {}


def test_a_report_counts_for_the_peer_that_signed_it() -> None:
    assert Reports().read({key(0): report(0)})
    for other in (key(1), b"key 0", b"", b"[owner:x]", key(0) + key(0)):
        assert Reports().read({other: report(0)}) == {}
