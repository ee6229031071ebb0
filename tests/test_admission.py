"""Who is admitted, shunned, or gone; and which requests to join a group can be read."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import pytest
from hivemind.p2p import PeerID
from hivemind.utils.serializer import MSGPackSerializer

from hiveminer.strategies.hivemind.admission import Admission as RoundAdmission
from hiveminer.strategies.hivemind.admission import epoch_in
from hiveminer.swarm.admission import MAX_CONCURRENT, Admission
from hiveminer.swarm.identity import known_hotkey

PEER = PeerID(b"\x12\x20" + b"7" * 32)


class Registry:
    """As much of the DHT as an admission asks: everybody is registered, but for strangers, who do
    not answer."""

    def __init__(self, strangers: frozenset[str] = frozenset()) -> None:
        self.strangers = strangers
        self.asked = 0

    def run_coroutine(self, task: Any, *, return_future: bool) -> asyncio.Future[str | None]:
        assert return_future
        self.asked += 1
        answer: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()
        if task.keywords["peer_id"] not in self.strangers:
            answer.set_result("hotkey")
        elif task.func is known_hotkey:
            answer.set_result(None)
        return answer


def gather(bandwidth: object = None, mode: object = 0, said: object = 7) -> bytes:
    return bytes(MSGPackSerializer.dumps([bandwidth, mode, MSGPackSerializer.dumps(said)]))


def test_a_group_is_of_one_epoch() -> None:
    assert epoch_in(gather()) == 7
    assert epoch_in(gather(bandwidth=1e6)) == 7


@pytest.mark.parametrize(
    "said",
    [
        b"", b"x", b"\xc1", gather()[:-1], gather(bandwidth=-1.0), gather(bandwidth=math.nan),
        gather(bandwidth="much"), gather(mode=9), gather(said="7"), gather(said=b"x" * 2000),
        bytes(MSGPackSerializer.dumps([None, 0])),
        bytes(MSGPackSerializer.dumps([None, 0, 7])),
    ],
)  # fmt: skip
def test_what_a_group_could_not_read_is_refused(said: bytes) -> None:
    assert epoch_in(said) is None


def test_a_running_call_hears_of_a_second_peer_that_is_gone() -> None:
    async def run() -> None:
        admission = RoundAdmission(Registry(), on_shun=lambda peer: None)
        running = admission.gone("second")  # what a call to it waits for
        admission.leave_out(["first"])
        assert not running.is_set()
        admission.leave_out(["second"])
        assert running.is_set()
        admission.take_back(["second", "third"])
        assert not running.is_set()
        assert admission.gone("first").is_set()

    asyncio.run(run())


def test_strangers_that_do_not_answer_keep_nobody_out() -> None:
    async def run() -> None:
        strangers = [PeerID(b"\x12\x20" + bytes([number]) * 32) for number in range(40)]
        admission = Admission(Registry(frozenset(map(str, strangers))))
        waiting = [asyncio.create_task(admission.admits(each)) for each in strangers]
        await asyncio.sleep(0)
        assert await admission.admits(PEER)
        done, pending = await asyncio.wait(waiting, timeout=0.1)
        assert [task.result() for task in done] == [False] * (40 - MAX_CONCURRENT)
        for task in pending:
            task.cancel()

    asyncio.run(run())


def test_a_peer_that_sent_poison_stays_out_although_it_is_registered() -> None:
    async def run() -> None:
        registry, shunned = Registry(), []
        admission = RoundAdmission(registry, on_shun=shunned.append)
        assert await admission.admits(PEER)
        admission.shun(PEER, "it holds numbers that are not finite")
        admission.shun(PEER, "it holds numbers that are not finite")
        assert shunned == [str(PEER)]
        admission._cache.clear()
        assert not await admission.admits(PEER)
        assert registry.asked == 2

    asyncio.run(run())


def test_a_peer_that_is_silent_twice_is_shunned() -> None:
    async def run() -> None:
        shunned: list[str] = []
        admission = RoundAdmission(Registry(), on_shun=shunned.append)
        admission.note_silence(PEER, "it sent nothing for 5 s")
        assert admission.gone(str(PEER)).is_set()
        assert await admission.admits(PEER)
        admission.take_back([str(PEER)])
        assert not admission.gone(str(PEER)).is_set()
        assert shunned == []
        admission.note_silence(PEER, "it sent nothing for 5 s")
        assert shunned == [str(PEER)]
        assert not await admission.admits(PEER)

    asyncio.run(run())
