"""Rounds in Hivemind's averager process: who joins a group, what is averaged, who is left out."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import Sequence
from functools import partial
from typing import Any, AsyncIterator, ClassVar  # noqa: UP035 - hivemind knows this one only

from hivemind.averaging.allreduce import AllreduceException
from hivemind.averaging.control import StepControl
from hivemind.averaging.matchmaking import Matchmaking
from hivemind.compression import deserialize_torch_tensor
from hivemind.p2p import P2P, P2PContext, P2PHandlerError, PeerID
from hivemind.proto import averaging_pb2
from hivemind.utils.serializer import MSGPackSerializer
from torch import Tensor

from hiveminer.strategies.hivemind.admission import Admission, epoch_in
from hiveminer.strategies.hivemind.bounds import Bounds
from hiveminer.strategies.hivemind.state_transfer import StateDownload, StateInspector
from hiveminer.strategies.hivemind.stub import CheckedStub
from hiveminer.swarm.processes import detach_from_parent, guard_tasks

logger = logging.getLogger(__name__)

CHUNK_SECONDS = 30.0
"""How long a peer waits for the next part of a tensor: a member of the group may be in the middle
of a long step, and one that died is left out long before."""

SEARCH = Matchmaking._request_join_potential_leaders.__name__
END_SEARCH_SECONDS = 15.0
CANCEL_AGAIN_SECONDS = 0.5
"""An abandoned search for a group is cancelled every CANCEL_AGAIN_SECONDS, for longer than any
call in it lasts."""

LINGER_SECONDS = 10.0
"""libp2p's daemon resets a stream that its server closes, and loses what is still in flight, in
about one round of fifty. So the caller closes first, and the server waits this long for it."""

SILENCE_SECONDS = 5.0
"""How much later than half of its group a member may begin to send, plus the time of a step."""

STALL_SECONDS = 10.0
"""How long a member that has begun to send may pause."""

CHECK_SECONDS = 0.25

IDLE_WEIGHT = 1e-3
"""An idle peer's weight in rows; not zero, since a group of idle peers would divide by it."""

SHUNNED, GROUP, DONOR = "shunned", "group", "donor"
"""Reports of the averager's process to the program."""


class RoundServer(StateDownload):
    """Between `TrainingStateAverager` and its base in the method resolution order: begins rounds in
    the program's process, and takes part in them in its own. `SwarmAverager` sets `bounds`,
    `run_id`, `_step_seconds` and `_news_there` before the fork."""

    bounds: Bounds
    run_id: str
    _step_seconds: Any
    _news_there: Any
    rows_weight: float = IDLE_WEIGHT
    last_control: StepControl | None = None

    _here: ClassVar[RoundServer | None] = None
    """The instance that runs in this process."""

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """Begin a round, weighted by the rows that this peer trained in the epoch."""
        kwargs["weight"] = self.rows_weight
        control = super().step(*args, **kwargs)
        if isinstance(control, StepControl):
            self.last_control = control
        return control

    def run(self) -> None:
        detach_from_parent(self._parent_pid)
        RoundServer._here = self
        self._own_vouch = b""
        self._admission = Admission(self.dht, on_shun=lambda peer: self._report(SHUNNED, peer))
        self._inspector = StateInspector(
            dht=self.dht,
            run_id=self.run_id,
            own_id=self.peer_id,
            stub_of=lambda peer: self.get_stub(self._p2p, peer, namespace=self.prefix),
            weights=len(self.main_parameters),
            all_bytes=self.state_bytes,
            on_state=lambda donor: self._report(DONOR, donor),
        )
        super().run()

    async def _guard_tasks(self) -> None:
        guard_tasks(self._p2p)

    def _report(self, *news: Any) -> None:
        self._news_there.send_bytes(MSGPackSerializer.dumps(news))

    def _patience_seconds(self) -> float:
        return SILENCE_SECONDS + float(self._step_seconds.value)

    async def _set_target_group_size(self, size: int) -> None:
        """The key manager's target stays unset: there it is a limit, and larger groups fail."""
        self._matchmaking.target_group_size = size
        self._matchmaking.potential_leaders.target_group_size = size

    async def _set_vouch(self, epoch: int, numbers: list[float]) -> None:
        self._own_vouch = MSGPackSerializer.dumps([epoch, numbers])

    async def _leave_out(self, peers: list[str]) -> None:
        self._admission.leave_out(peers)
        for group in list(self._running_groups.values()):
            if not group.done() or group.cancelled():
                continue
            runner = group.result()
            for sender in set(runner.sender_peer_ids) - runner.banned_senders:
                if str(sender) in peers:
                    await runner._ban_sender(sender)

    @classmethod
    def get_stub(cls, p2p: P2P, peer: PeerID, *, namespace: str | None = None) -> Any:
        stub = super().get_stub(p2p, peer, namespace=namespace)
        here = cls._here
        if here is None:
            return stub
        return CheckedStub(
            stub=stub,
            peer=peer,
            admission=here._admission,
            bounds=here.bounds,
            inspector=here._inspector,
            patience_seconds=here._patience_seconds,
        )

    async def rpc_join_group(
        self, request: averaging_pb2.JoinRequest, context: P2PContext
    ) -> AsyncIterator[averaging_pb2.MessageFromLeader]:
        """As in the base class, for registered peers that end the same epoch as this one."""
        epoch = epoch_in(request.gather)
        if epoch is None or not await self._admission.admits(context.remote_id):
            yield averaging_pb2.MessageFromLeader(code=averaging_pb2.PROTOCOL_VIOLATION)
            return
        control = self._matchmaking.step_control
        if control is not None and epoch_in(control.data_for_gather) != epoch:
            yield averaging_pb2.MessageFromLeader(code=averaging_pb2.BAD_GROUP_KEY)
            return
        async with _lingering(super().rpc_join_group(request, context)) as answers:
            async for answer in answers:
                yield answer

    async def rpc_aggregate_part(
        self, stream: AsyncIterator[averaging_pb2.AveragingData], context: P2PContext
    ) -> AsyncIterator[averaging_pb2.AveragingData]:
        """As in the base class, for registered peers; each part is checked before it is summed."""
        if not await self._admission.admits(context.remote_id):
            yield averaging_pb2.AveragingData(code=averaging_pb2.PROTOCOL_VIOLATION)
            return
        parts = self._sound_parts(stream, context.remote_id)
        async with _lingering(super().rpc_aggregate_part(parts, context)) as answers:
            async for answer in answers:
                yield answer

    async def rpc_download_state(
        self, request: averaging_pb2.DownloadRequest, context: P2PContext
    ) -> AsyncIterator[averaging_pb2.DownloadData]:
        """As in the base class, for registered peers."""
        if not await self._admission.admits(context.remote_id):
            return
        async with _lingering(super().rpc_download_state(request, context)) as answers:
            async for answer in answers:
                yield answer

    async def rpc_vouch(
        self, _request: averaging_pb2.DownloadRequest, context: P2PContext
    ) -> averaging_pb2.DownloadData:
        """The epoch and the sketch of the state that we would serve."""
        if not await self._admission.admits(context.remote_id):
            raise P2PHandlerError("not a registered peer")
        return averaging_pb2.DownloadData(metadata=self._own_vouch)

    async def _sound_parts(
        self, stream: AsyncIterator[averaging_pb2.AveragingData], sender: PeerID
    ) -> AsyncIterator[averaging_pb2.AveragingData]:
        """The parts that a peer sends, up to the first that must not be averaged."""
        own: Sequence[Tensor] = ()
        for number in itertools.count():
            try:
                message = await asyncio.wait_for(anext(stream, None), STALL_SECONDS)
            except TimeoutError:
                silence = f"it sent nothing for {STALL_SECONDS:.0f} s"
                if 0 < number < len(own):  # before the first, it may be no member of any group
                    self._admission.note_silence(sender, silence)
                raise AllreduceException(silence) from None
            if message is None:
                return
            if number == 0:
                own = await self._own_parts(message.group_id)
            if number < len(own):
                check = partial(problem_with_part, message, number, own[number], self.bounds)
                problem = await asyncio.get_running_loop().run_in_executor(None, check)
                if problem is not None:
                    self._admission.shun(sender, problem)
                    if number == 0:  # the group still has to hear of it, to go on without
                        code = averaging_pb2.INTERNAL_ERROR
                        yield averaging_pb2.AveragingData(code=code, group_id=message.group_id)
                        return
                    raise AllreduceException(problem)
            yield message

    async def _step(self, *, step: StepControl, future_for_init: Any) -> None:
        """As in the base class; also ends the search for a group."""
        try:
            await super()._step(step=step, future_for_init=future_for_init)
        finally:
            await end_search(self._matchmaking, step)

    async def _aggregate_with_group(self, group_info: Any, **kwargs: Any) -> _Gathered:
        """As in the base class; the result also has whether all of the average arrived."""
        members = {str(peer) for peer in group_info.peer_ids if peer != self.peer_id}
        self._admission.take_back(members)
        self._report(GROUP, group_info.group_id, *sorted(members))
        watching = asyncio.create_task(self._leave_out_silent(group_info.group_id))
        try:
            gathered = _Gathered(await super()._aggregate_with_group(group_info, **kwargs))
        finally:
            watching.cancel()
            self._report(GROUP, b"")
        runner = self._running_groups[group_info.group_id].result()
        if runner.tensor_part_container.failed_size:
            gathered.whole = any(self._admission.gone(peer).is_set() for peer in members)
        return gathered

    async def _leave_out_silent(self, group_id: bytes) -> None:
        """Leave out members that do not begin to send soon after half of the group has."""
        runner = await asyncio.shield(self._running_groups[group_id])
        # Hivemind has an event for all of them only.
        while 2 * len(runner.active_senders) < len(runner.sender_peer_ids):  # noqa: ASYNC110
            await asyncio.sleep(CHECK_SECONDS)
        seconds = self._patience_seconds()
        await asyncio.sleep(seconds)
        for peer in silent_members(runner):
            if not self._admission.gone(str(peer)).is_set():  # the program knows that already
                self._admission.note_silence(peer, f"it sent nothing for {seconds:.0f} s")
            await runner._ban_sender(peer)

    async def _own_parts(self, group_id: bytes) -> Sequence[Tensor]:
        """Our tensors of the parts that we average for this group; none if it is not ours."""
        if group_id not in self._running_groups:  # its first messages may overtake its beginning
            await asyncio.wait_for(self._pending_groups_registered.wait(), CHUNK_SECONDS)
        group = self._running_groups.get(group_id)
        if group is None:
            return ()
        runner = await asyncio.wait_for(asyncio.shield(group), CHUNK_SECONDS)
        parts: Sequence[Tensor] = runner.parts_for_local_averaging
        return parts

    async def _load_state_from_peers(self, **kwargs: Any) -> None:
        """As in the base class; each donor's state is compared with what the others vouch for."""
        await self._inspector.prepare()
        await super()._load_state_from_peers(**kwargs)


async def end_search(matchmaking: Any, step: Any) -> None:
    """Make sure that the search for a group for this step has ended.

    Before Python 3.12 `asyncio.wait_for` loses a cancellation that arrives together with the
    result. Hivemind would keep searching, and the next rounds would be missed as well. So a search
    that has not ended is cancelled again.
    """
    deadline = time.monotonic() + END_SEARCH_SECONDS
    while matchmaking.step_control is step and time.monotonic() < deadline:
        await asyncio.sleep(CANCEL_AGAIN_SECONDS)
        if matchmaking.step_control is step:
            for task in asyncio.all_tasks():
                if getattr(task.get_coro(), "__name__", "") == SEARCH:
                    task.cancel()


def silent_members(runner: Any) -> list[PeerID]:
    """The members of an all-reduce that have not begun to send."""
    begun = runner.active_senders | runner.banned_senders
    return [peer for peer in runner.sender_peer_ids if peer not in begun]


@contextlib.asynccontextmanager
async def _lingering(answers: Any) -> AsyncIterator[Any]:
    """A handler's answers, and then time for the caller to close first."""
    async with contextlib.aclosing(answers):
        yield answers
    await asyncio.sleep(LINGER_SECONDS)


class _Gathered(dict[Any, Any]):
    """The metadata of a round's members; `whole` unless a live member's part of the average did
    not arrive."""

    whole = True


def problem_with_part(
    message: averaging_pb2.AveragingData, number: int, own: Tensor, bounds: Bounds
) -> str | None:
    """Why this part of a peer's tensors must not be averaged with ours; None if it may be."""
    if number == 0 and message.code != averaging_pb2.PART_FOR_AVERAGING:
        return None  # the base class refuses it; it does not read the codes of later ones
    problem = bounds.problem_with_weight(message.weight)
    return problem or bounds.problem_with(deserialize_torch_tensor(message.tensor_part), own)
