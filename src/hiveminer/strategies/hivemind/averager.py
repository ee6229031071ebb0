"""The averager: hivemind's process that finds a group, averages with it, and hands out state.

What is changed against the stock one, each by overriding one of its hooks, and why:

- Only peers that have proved a registered hotkey join a group, send parts, or get the
  state; and we join, send to and load from nobody else.
- A group is of peers that end the same epoch. It is complete when all of those that live are
  in it, so nobody waits out the matchmaking time; a peer that died is left out of a round
  that has begun.
- Peers count by the rows they trained. What is not finite, or far too large, is neither
  sent nor averaged nor applied.
- What is handed out are the weights that the epoch began with, which are the same for all
  peers; each peer vouches for its own with a sketch, and a state that the others contradict
  is not loaded: the next donor is asked.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import multiprocessing
import random
import threading
import time
from collections.abc import Sequence
from functools import partial
from typing import Any, AsyncIterator, ClassVar  # noqa: UP035 - hivemind knows this one only

import torch
from hivemind.averaging import DecentralizedAverager
from hivemind.averaging.allreduce import AllreduceException, AveragingMode
from hivemind.averaging.control import StepControl
from hivemind.averaging.matchmaking import Matchmaking
from hivemind.compression import (
    CompressionBase,
    Float16Compression,
    NoCompression,
    deserialize_torch_tensor,
)
from hivemind.optim.state_averager import TrainingStateAverager, dump_optimizer_state
from hivemind.p2p import P2P, P2PContext, P2PHandlerError, PeerID
from hivemind.proto import averaging_pb2
from hivemind.utils.serializer import MSGPackSerializer
from torch import Tensor

from hiveminer.config.run import SwarmSection
from hiveminer.runtime.events import tell
from hiveminer.strategies.hivemind.bounds import Bounds
from hiveminer.strategies.hivemind.sketch import Vouch, contradiction, read_vouch, sketch_of
from hiveminer.strategies.hivemind.stub import CheckedStub, Incoming, next_of
from hiveminer.swarm.identity import identify
from hiveminer.swarm.peer import START_SECONDS
from hiveminer.swarm.processes import settle

logger = logging.getLogger(__name__)

CHUNK_SECONDS = 30.0
"""How long a peer waits for the next part of a tensor. Generous: a member of the group may
be in the middle of a long step. One that died is left out long before."""

IDLE_WEIGHT = 1e-3
"""An idle peer's weight in rows. Not zero: a group of idle peers would divide by it."""

IDENTIFY_SECONDS = 4.0
"""Within this a peer proves its hotkey."""

KNOWN_SECONDS = 5.0
"""So long a proof is not asked for again; a refusal a fifth of it."""

SHUN_SECONDS = 300.0
"""A peer that sent poison is a stranger for so long."""

IDENTIFIED_AT_ONCE = 16
"""Strangers that are asked for their proof at the same time; more are turned away."""

REMEMBERED = 4096
"""Proofs and refusals that are remembered at most; strangers may be many."""

VOUCH_SECONDS = 3.0
VOUCHES_ASKED = 5
DONORS_ASKED = 16
"""Peers that are asked to vouch for the state."""

LOOK = Matchmaking._request_join_potential_leaders.__name__
END_LOOK_SECONDS = 15.0
CANCEL_AGAIN_SECONDS = 0.5
"""A look for a group that was given up is cancelled so often, and so long: longer than any call
in it."""

TURN_SECONDS = 30.0
"""How long a state that is asked for in the middle of a round waits for its end."""

LINGER_SECONDS = 10.0
"""libp2p's daemon resets a stream that its server closes, and what is still on its way is
lost: about one round in fifty. So the caller closes first; a server waits for it this long."""

MAX_GATHER_BYTES = 1024


class _Guard(DecentralizedAverager):  # type: ignore[misc]
    """Stands between TrainingStateAverager and its base in the order of inheritance."""

    rows_weight: float = IDLE_WEIGHT
    last_control: StepControl | None = None
    loaded_epoch: int | None = None
    state_bytes: int = 0

    def __init__(self, *args: Any, **kwargs: Any):
        # The optimizer exists, and the process is not forked yet.
        self.state_bytes = sum(tensor.nbytes for tensor in self._state_tensors())
        super().__init__(*args, **kwargs)

    def _state_tensors(self) -> list[Tensor]:
        """What a peer that joins is given, in the order in which it comes."""
        moments = dump_optimizer_state(self.optimizer)[1]
        return [*self.main_parameters, *self.extra_tensors, *moments]

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """Begin a round; this peer weighs as much as the rows it trained in the epoch."""
        kwargs["weight"] = self.rows_weight
        control = super().step(*args, **kwargs)
        if isinstance(control, StepControl):
            self.last_control = control
        return control

    def load_state_from_peers(
        self, wait: bool = True, timeout: float | None = None
    ) -> tuple[Any, Any] | None:
        """The base's download, within a deadline, and refused unless it is sound."""
        self.loaded_epoch = None
        try:
            download = super().load_state_from_peers(wait=False, timeout=timeout)
            state = self._wait_for(download, timeout)
        except Exception as error:  # noqa: BLE001 - whatever a peer's bytes may cause
            tell(logger, "state_download", f"no state came within {timeout} s ({error!r})")
            return None
        if state is None:
            tell(logger, "state_download", "no peer gave its state")
            return None
        problem = self._problem_with(state)
        if problem:
            tell(logger, "state_download", f"a peer's state is refused: {problem}")
            return None
        self.loaded_epoch = state[0]["epoch"]
        return state  # type: ignore[no-any-return]

    def _wait_for(self, future: Any, timeout: float | None) -> Any:
        """The future's result. When the process that would give it has ended, as it does at a
        shutdown, nobody waits for the rest of the time."""
        deadline = time.monotonic() + (math.inf if timeout is None else timeout)
        while True:
            try:
                return future.result(timeout=min(0.5, max(0.0, deadline - time.monotonic())))
            except TimeoutError:
                if future.done():  # just now, or with an error of this kind
                    return future.result(timeout=0)
                if time.monotonic() >= deadline:
                    raise
                if not self.is_alive():
                    raise ConnectionError("the averager's process has ended") from None

    def _problem_with(self, state: tuple[Any, Any]) -> str | None:
        metadata, tensors = state
        if not isinstance(metadata, dict) or not isinstance(metadata.get("epoch"), int):
            return "it does not say its epoch"
        if not isinstance(metadata.get("optimizer_metadata"), list):
            return "it does not describe its optimizer"
        shapes = [tuple(tensor.shape) for tensor in self._state_tensors()]
        if [tuple(tensor.shape) for tensor in tensors] != shapes:
            return "its tensors have other shapes than ours"
        if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
            return "it holds numbers that are not finite"
        return None


class SwarmAverager(TrainingStateAverager, _Guard):  # type: ignore[misc]
    """The stock state averager, with what the head of this module says.

    bounds: what a peer may send.

    After an epoch has turned, `group_size` is the number of peers that averaged, 1 if this
    one was alone or the averaging failed; `is_whole` is False when a part of the average was
    lost on the way.
    """

    _here: ClassVar[SwarmAverager | None] = None
    """The one that this process runs; set in hivemind's process only."""

    group_size = 1
    is_whole = True

    def __init__(self, *, bounds: Bounds, **kwargs: Any):
        self.bounds = bounds
        self._turning = threading.RLock()
        self._averaged = self._in_round = False
        self._sends_float16 = isinstance(kwargs.get("compression"), Float16Compression)
        self._shunned_here, self._shunned_there = multiprocessing.Pipe(duplex=False)
        super().__init__(**kwargs)
        self.vouch()

    # --- in the program's own process ----------------------------------------------------

    def run_in_background(self, await_ready: bool = True, timeout: float | None = None) -> None:
        """As the stock one, but SIGINT is ignored in the new process only, so that a Ctrl-C
        while a program starts is not lost."""
        self.start()
        if await_ready:
            self.wait_until_ready(timeout if timeout is not None else START_SECONDS)

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """As the stock one; when an epoch turns, with a look at what is sent and applied."""
        if not kwargs.get("increment_epoch"):
            return super().step(*args, **kwargs)
        with self._turning:
            self._averaged = False
            self.last_control = kwargs.get("averaging_control")
            if not self.is_sound():
                self.go_back()
                self.weigh(0, self.last_control)
            self._in_round = True
            try:
                result = super().step(*args, **kwargs)
            finally:
                self._in_round = False
            control, self.last_control = self.last_control, None
            self.group_size = self._members_of(control) if self._averaged else 1
            self.is_whole = self.group_size == 1 or bool(control and control.result().whole)
            if self.group_size == 1:
                self.begin_epoch()
            else:
                self.vouch()
            return result

    def _load_local_tensors_into_averager_(self) -> None:
        """The stock one; what is sent in a round in 16 bits is rounded to them first.

        Each peer adds the difference between the average and what it has sent to its own
        weights: what rounding took from those would stay, and peers differ by it.
        """
        super()._load_local_tensors_into_averager_()
        if self._sends_float16 and self._in_round:
            with torch.no_grad(), self.get_tensors() as averaged:
                for tensor in averaged:
                    tensor.copy_(tensor.half())

    def _apply_averaging_results_(self) -> None:
        """The stock one, if there was an average, and honest peers can have made it."""
        if self._members_of(self.last_control) == 1:
            return
        with self.get_tensors() as averaged:
            problem = self.bounds.problem_with_all(averaged, list(self._local_tensors()))
        if problem is not None:
            tell(logger, "poison", f"epoch {self.local_epoch}: the average is refused: {problem}")
            return
        super()._apply_averaging_results_()
        self._averaged = True

    def is_sound(self) -> bool:
        """Whether our weights are near enough to the epoch's start to be sent to anybody."""
        with torch.no_grad(), self.get_tensors() as start:
            return not self.bounds.ran_away(list(self._local_tensors()), start)

    @torch.no_grad()
    def go_back(self) -> None:
        """Take the weights that the epoch began with again; drop moments that are not finite."""
        tell(
            logger, "diverged",
            f"epoch {self.local_epoch}: our weights are not finite, or far too large; back to "
            "those that the epoch began with",
        )  # fmt: skip
        with self.get_tensors() as start:
            for local, before in zip(self._local_tensors(), start, strict=True):
                local.copy_(before)
        for state in self.optimizer.state.values():
            for moment in state.values():
                if isinstance(moment, Tensor) and not bool(torch.isfinite(moment).all()):
                    moment.zero_()

    def get_current_state(self) -> tuple[Any, Any, Any]:
        """What a peer that asks is given: the averaging buffers still hold the epoch's start.

        In the middle of a round they do not, so the asker waits for its end.
        """
        if not self._turning.acquire(timeout=TURN_SECONDS):
            raise TimeoutError("the round does not end")
        try:
            metadata, tensors, infos = super().get_current_state()
            with self.get_tensors() as averaged:
                start = [tensor.clone() for tensor in averaged[: len(self.main_parameters)]]
        finally:
            self._turning.release()
        return metadata, start + tensors[len(start) :], infos

    def load_state_from_peers(self, **kwargs: Any) -> None:  # type: ignore[override]
        super().load_state_from_peers(**kwargs)
        if self.loaded:
            self.vouch()

    def begin_epoch(self) -> None:
        """Take the weights of this moment for the epoch's start: there was no averaging."""
        self._load_local_tensors_into_averager_()
        self.vouch()

    @property
    def loaded(self) -> bool:
        """Whether the last download was sound, and not behind what this peer already had."""
        return self.loaded_epoch is not None and self.loaded_epoch >= self.local_epoch

    def set_target_group_size(self, size: int) -> None:
        """A group of this many peers is complete and need not wait for more."""
        self._outer_pipe.send(("_set_target_group_size", [size], {}))

    def leave_out(self, peers: set[str]) -> None:
        """These peers are gone: a round that counts on them goes on without."""
        self._outer_pipe.send(("_leave_out", [sorted(peers)], {}))

    def shunned(self) -> set[str]:
        """Peers that have sent poison since this was last asked."""
        peers = set()
        while self._shunned_here.poll():
            peers.add(self._shunned_here.recv_bytes(MAX_GATHER_BYTES).decode())
        return peers

    def _members_of(self, control: StepControl | None) -> int:
        """How many peers were in a round that has ended; 1 if it failed."""
        if control is None or not control.done() or control.cancelled() or control.exception():
            return 1
        return max(1, len(control.result() or ()))

    def weigh(self, rows: float, control: StepControl | None) -> None:
        """Count for so many rows in the next round, also if it is arranged already."""
        self.rows_weight = min(rows, self.bounds.most_rows) if rows else IDLE_WEIGHT
        if control is not None and not control.triggered and not control.done():
            control.weight = self.rows_weight

    def vouch(self) -> None:
        """Let the others know the epoch and the sketch of what we would hand out."""
        with self.get_tensors() as averaged:
            numbers = sketch_of(averaged[: len(self.main_parameters)])
        self._outer_pipe.send(("_set_vouch", [int(self.local_epoch), numbers], {}))

    # --- in hivemind's process -----------------------------------------------------------

    def run(self) -> None:
        settle(self._parent_pid)
        SwarmAverager._here = self
        self._known: dict[str, tuple[float, bool]] = {}
        self._shunned_until: dict[str, float] = {}
        self._identifying = 0
        self._gone: dict[str, asyncio.Event] = {}
        self._own_vouch = b""
        super().run()

    async def _set_target_group_size(self, size: int) -> None:
        """The key manager's own target stays unset: it takes it for a bound, and fails on a
        group that has outgrown it."""
        self._matchmaking.target_group_size = size
        self._matchmaking.potential_leaders.target_group_size = size

    async def _set_vouch(self, epoch: int, numbers: list[float]) -> None:
        self._own_vouch = MSGPackSerializer.dumps([epoch, numbers])

    async def _leave_out(self, peers: list[str]) -> None:
        for known in self._gone.keys() - peers:
            self._gone[known].clear()  # not removed: a running call waits for this very event
        for peer in peers:
            self.is_gone(peer).set()
        for group in list(self._running_groups.values()):
            if not group.done() or group.cancelled():
                continue
            runner = group.result()
            for sender in set(runner.sender_peer_ids) - runner.banned_senders:
                if str(sender) in peers:
                    await runner._ban_sender(sender)

    def shun(self, peer: PeerID, problem: str) -> None:
        """Have nothing to do with this peer for a while."""
        if not self._is_shunned(str(peer)):  # told once, not for each part
            tell(logger, "poison", f"what peer {peer} sends is left out: {problem}")
            self._shunned_there.send_bytes(str(peer).encode())
        self._shunned_until[str(peer)] = time.monotonic() + SHUN_SECONDS

    def _is_shunned(self, peer: str) -> bool:
        return time.monotonic() < self._shunned_until.get(peer, 0.0)

    def is_gone(self, peer: str) -> asyncio.Event:
        """Set once this peer is left out."""
        return self._gone.setdefault(peer, asyncio.Event())

    async def admits(self, peer: PeerID) -> bool:
        """Whether this peer has proved a registered hotkey, as far as is known now, and has
        sent no poison of late."""
        return await self._is_registered(str(peer)) and not self._is_shunned(str(peer))

    async def _is_registered(self, name: str) -> bool:
        now = time.monotonic()
        until, admitted = self._known.get(name, (0.0, False))
        if now < until:
            return admitted
        if self._identifying >= IDENTIFIED_AT_ONCE:
            return False
        self._identifying += 1
        try:
            task = partial(identify, peer_id=name, timeout_seconds=IDENTIFY_SECONDS)
            future = self.dht.run_coroutine(task, return_future=True)
            admitted = await asyncio.wait_for(future, IDENTIFY_SECONDS + 1) is not None
        except Exception as error:  # noqa: BLE001 - who cannot be identified is a stranger
            logger.debug("peer %s could not be identified: %r", name, error)
            admitted = False
        finally:
            self._identifying -= 1
        if len(self._known) >= REMEMBERED:
            self._known.clear()
        self._known[name] = (now + (KNOWN_SECONDS if admitted else KNOWN_SECONDS / 5), admitted)
        return admitted

    @classmethod
    def get_stub(cls, p2p: P2P, peer: PeerID, *, namespace: str | None = None) -> Any:
        stub = super().get_stub(p2p, peer, namespace=namespace)
        return stub if cls._here is None else CheckedStub(stub, cls._here, peer)

    async def rpc_join_group(
        self, request: averaging_pb2.JoinRequest, context: P2PContext
    ) -> AsyncIterator[averaging_pb2.MessageFromLeader]:
        """The stock one, for registered peers that end the same epoch as we."""
        epoch = _epoch_in(request.gather)
        if epoch is None or not await self.admits(context.remote_id):
            yield averaging_pb2.MessageFromLeader(code=averaging_pb2.PROTOCOL_VIOLATION)
            return
        control = self._matchmaking.step_control
        if control is not None and _epoch_in(control.data_for_gather) != epoch:
            yield averaging_pb2.MessageFromLeader(code=averaging_pb2.BAD_GROUP_KEY)
            return
        async with _lingering(super().rpc_join_group(request, context)) as answers:
            async for answer in answers:
                yield answer

    async def rpc_aggregate_part(
        self, stream: AsyncIterator[averaging_pb2.AveragingData], context: P2PContext
    ) -> AsyncIterator[averaging_pb2.AveragingData]:
        """The stock one, for registered peers, with each part looked at before it is summed."""
        if not await self.admits(context.remote_id):
            yield averaging_pb2.AveragingData(code=averaging_pb2.PROTOCOL_VIOLATION)
            return
        parts = self._sound_parts(stream, context.remote_id)
        async with _lingering(super().rpc_aggregate_part(parts, context)) as answers:
            async for answer in answers:
                yield answer

    async def rpc_download_state(
        self, request: averaging_pb2.DownloadRequest, context: P2PContext
    ) -> AsyncIterator[averaging_pb2.DownloadData]:
        """The stock one, for registered peers."""
        if not await self.admits(context.remote_id):
            return
        async with _lingering(super().rpc_download_state(request, context)) as answers:
            async for answer in answers:
                yield answer

    async def rpc_vouch(
        self, _request: averaging_pb2.DownloadRequest, context: P2PContext
    ) -> averaging_pb2.DownloadData:
        """The epoch and the sketch of the state that we would hand out."""
        if not await self.admits(context.remote_id):
            raise P2PHandlerError("not a registered peer")
        return averaging_pb2.DownloadData(metadata=self._own_vouch)

    async def _sound_parts(
        self, stream: AsyncIterator[averaging_pb2.AveragingData], sender: PeerID
    ) -> AsyncIterator[averaging_pb2.AveragingData]:
        """The parts that a peer sends, until one is not to be summed."""
        own: Sequence[Tensor] = ()
        number = 0
        async for message in stream:
            if number == 0:
                own = await self._own_parts(message.group_id)
            if number < len(own):
                look = partial(_problem_with_part, message, number, own[number], self.bounds)
                problem = await asyncio.get_running_loop().run_in_executor(None, look)
                if problem is not None:
                    self.shun(sender, problem)
                    if number == 0:  # the group still has to hear of it, to go on without
                        code = averaging_pb2.INTERNAL_ERROR
                        yield averaging_pb2.AveragingData(code=code, group_id=message.group_id)
                        return
                    raise AllreduceException(problem)
            yield message
            number += 1

    async def _step(self, *, step: StepControl, future_for_init: Any) -> None:
        """The stock one; a look for a group that was given up ends with it."""
        try:
            await super()._step(step=step, future_for_init=future_for_init)
        finally:
            await end_look(self._matchmaking, step)

    async def _aggregate_with_group(self, group_info: Any, **kwargs: Any) -> _Gathered:
        """The stock one; what it says besides is whether all of the average arrived."""
        members = {str(peer) for peer in group_info.peer_ids}
        for back in members & self._gone.keys():  # who is in the group is there
            self._gone[back].clear()
        gathered = _Gathered(await super()._aggregate_with_group(group_info, **kwargs))
        runner = self._running_groups[group_info.group_id].result()
        if runner.tensor_part_container.failed_size:
            gathered.whole = any(self._gone[one].is_set() for one in members & self._gone.keys())
        return gathered

    async def _own_parts(self, group_id: bytes) -> Sequence[Tensor]:
        """Our own tensors of the parts that we average for this group; none if it is not ours."""
        if group_id not in self._running_groups:  # its first messages may overtake its beginning
            await asyncio.wait_for(self._pending_groups_registered.wait(), CHUNK_SECONDS)
        group = self._running_groups.get(group_id)
        if group is None:
            return ()
        runner = await asyncio.wait_for(asyncio.shield(group), CHUNK_SECONDS)
        parts: Sequence[Tensor] = runner.parts_for_local_averaging
        return parts

    async def _load_state_from_peers(
        self,
        future: Any,
        timeout: float | None = None,  # noqa: ASYNC109 - the stock one's
    ) -> None:
        """The stock one; each donor's state is compared with what the other peers vouch for."""
        self._vouches = await self._ask_for_vouches()
        await super()._load_state_from_peers(future, timeout)

    async def _who_vouches_for(self, epoch: int, *, but: str) -> list[Vouch]:
        """What the peers but the donor vouch for; asked again while none is in the epoch of
        its state, for an epoch may have begun during the download."""
        for _ in range(VOUCHES_ASKED):
            others = [said for peer, said in self._vouches.items() if peer != but]
            if not others or any(said == epoch for said, _ in others):
                break
            await asyncio.sleep(1.0)
            self._vouches = await self._ask_for_vouches()
        return others

    async def _ask_for_vouches(self) -> dict[str, Vouch]:
        key = f"{self._matchmaking.group_key_manager.prefix}.all_averagers"
        try:
            found = await asyncio.wait_for(
                self.dht.get(key, latest=True, return_future=True), VOUCH_SECONDS
            )
            peers = [PeerID(name) for name in (found.value if found else {})]
        except Exception as error:  # noqa: BLE001 - then nobody vouches
            logger.debug("the donors could not be read: %r", error)
            return {}
        peers = [peer for peer in peers if peer != self.peer_id]
        asked = random.sample(peers, min(len(peers), DONORS_ASKED))
        said = await asyncio.gather(*(self._vouch_of(peer) for peer in asked))
        return {str(peer): vouch for peer, vouch in zip(asked, said, strict=True) if vouch}

    async def _vouch_of(self, peer: PeerID) -> Vouch | None:
        stub = self.get_stub(self._p2p, peer, namespace=self.prefix)
        try:
            answer = await asyncio.wait_for(
                stub.rpc_vouch(averaging_pb2.DownloadRequest()), VOUCH_SECONDS
            )
            if len(answer.metadata) > MAX_GATHER_BYTES:
                return None
            return read_vouch(MSGPackSerializer.loads(answer.metadata))
        except Exception as error:  # noqa: BLE001 - dead, a stranger, or too old to know it
            logger.debug("peer %s does not vouch: %r", peer, error)
            return None

    async def inspected(
        self, stream: Any, donor: PeerID
    ) -> AsyncIterator[averaging_pb2.DownloadData]:
        """A donor's state as it comes; raises AllreduceException when it is not to be had, too
        slow, too large, not finite, or not what the other peers hold."""
        state = Incoming(weights=len(self.main_parameters), all_bytes=self.state_bytes)
        loop = asyncio.get_running_loop()
        try:
            async with contextlib.aclosing(stream) as messages:
                while not state.is_whole and (message := await next_of(messages)) is not None:
                    await loop.run_in_executor(None, state.take, message)
                    yield message
            await loop.run_in_executor(None, state.end)
            if state.epoch is None:
                raise AllreduceException("it is in no state to hand one out")
            others = await self._who_vouches_for(state.epoch, but=str(donor))
            problem = contradiction(state.epoch, state.sketch.numbers, others)
            if problem is not None:
                raise AllreduceException(problem)
        except AllreduceException as error:
            tell(logger, "state_download", f"the state of peer {donor} is not taken: {error}")
            raise


async def end_look(matchmaking: Any, step: Any) -> None:
    """See to it that the matchmaking no longer looks for a group for this step, which is over.

    Before Python 3.12 `asyncio.wait_for` loses a cancellation that comes in the same moment as
    the answer. Hivemind would look on, for nobody, and no other look begins meanwhile, so that
    the next rounds are missed as well. Who has not ended after a while is cancelled again.
    """
    deadline = time.monotonic() + END_LOOK_SECONDS
    while matchmaking.step_control is step and time.monotonic() < deadline:
        await asyncio.sleep(CANCEL_AGAIN_SECONDS)
        if matchmaking.step_control is step:
            for task in asyncio.all_tasks():
                if getattr(task.get_coro(), "__name__", "") == LOOK:
                    task.cancel()


@contextlib.asynccontextmanager
async def _lingering(answers: Any) -> AsyncIterator[Any]:
    """A handler's answers; after the last one, time for the caller to close first."""
    async with contextlib.aclosing(answers):
        yield answers
    await asyncio.sleep(LINGER_SECONDS)


class _Gathered(dict[Any, Any]):
    """What the members of a round said; `whole` unless a live one's part of the average did
    not arrive."""

    whole = True


def _problem_with_part(
    message: averaging_pb2.AveragingData, number: int, own: Tensor, bounds: Bounds
) -> str | None:
    if number == 0 and message.code != averaging_pb2.PART_FOR_AVERAGING:
        return None  # the stock code refuses it; it reads no code of later ones
    problem = bounds.problem_with_weight(message.weight)
    return problem or bounds.problem_with(deserialize_torch_tensor(message.tensor_part), own)


def _epoch_in(gather: bytes) -> int | None:
    """The epoch that a peer is about to begin, out of what it tells its group; None if that is
    not a bandwidth, a mode and an epoch. The whole group reads it, and a round fails for all
    on what cannot be read."""
    if len(gather) > MAX_GATHER_BYTES:
        return None
    try:
        bandwidth, mode, said = MSGPackSerializer.loads(gather)
        AveragingMode(mode)
        epoch = MSGPackSerializer.loads(said)
    except Exception:  # noqa: BLE001 - the parser raises whatever it meets
        return None
    if bandwidth is not None:
        sound = isinstance(bandwidth, int | float) and math.isfinite(bandwidth) and bandwidth >= 0
        if not sound:
            return None
    return epoch if isinstance(epoch, int) else None


def averager_prefix(run_id: str) -> str:
    return f"{run_id}_state_averager"


def compression(section: SwarmSection) -> CompressionBase:
    return Float16Compression() if section.compression == "float16" else NoCompression()
