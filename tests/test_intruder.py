"""Who is not registered gets no state, joins no group and sends no part; who was, neither."""

from __future__ import annotations

from pathlib import Path

import pytest

from programs import started

SCRIPT = '''
import asyncio
import torch
from hivemind.p2p import P2P, PeerID
from hivemind.proto import averaging_pb2
from hivemind.utils import get_dht_time
from hiveminer.config.run import Run
from hiveminer.swarm.peer import Peer
from hiveminer.swarm.membership import Membership
from hiveminer.strategies.hivemind.averager import SwarmAverager
from hiveminer.strategies.hivemind.records import averager_prefix
from hiveminer.strategies.hivemind.strategy import HivemindStrategy
from identities import ALICE, BOB, RUN, who
from programs import wait_for
from tiny import tiny_model

torch.set_num_threads(1)
run = Run.model_validate({"swarm": {"epoch_samples": 8, "matchmaking_seconds": 2.0}})


def neuron(name):
    peer = Peer(identity=who(name), admitted=[ALICE, BOB])
    member = Membership(peer)
    return peer, HivemindStrategy(tiny_model("gpt2"), membership=member, run=run, run_id=RUN)


def loads(swarm):
    swarm.optimizer.state_averager.load_state_from_peers(timeout=20)
    return bool(swarm.optimizer.state_averager.loaded)


async def stranger():
    """A stock libp2p node that knows the run id and the names of the handlers."""
    p2p = await P2P.create(initial_peers=[first.address])
    prefix = averager_prefix(RUN)
    stub = SwarmAverager.get_stub(p2p, PeerID.from_base58(first.peer_id), namespace=prefix)

    async def read(call, answers):
        async for message in await call:
            answers.append(message)

    async def answers(call):
        """What came; a refusal may be lost when libp2p resets the stream that it ends."""
        came = []
        try:
            await asyncio.wait_for(read(call, came), 10)
        except Exception as error:
            print("refused with", repr(error), flush=True)
        return came

    async def parts():
        yield averaging_pb2.AveragingData(code=averaging_pb2.PART_FOR_AVERAGING, group_id=b"x")

    state = averaging_pb2.DownloadRequest()
    assert await answers(stub.rpc_download_state(state)) == []
    join = averaging_pb2.JoinRequest(
        schema_hash=swarm.optimizer.state_averager.schema_hash,
        expiration=get_dht_time() + 5, gather=b"", group_key=f"{prefix}.0b",
    )
    for call in (stub.rpc_join_group(join), stub.rpc_aggregate_part(parts())):
        codes = {answer.code for answer in await answers(call)}
        assert codes <= {averaging_pb2.PROTOCOL_VIOLATION}, codes
    try:
        await asyncio.wait_for(stub.rpc_vouch(state), 10)
    except Exception as error:
        print("refused with", repr(error), flush=True)
    else:
        raise AssertionError("it was given a vouch")
    await p2p.shutdown()


first, swarm = neuron("Alice")
friend, other = neuron("Bob")
friend.dial([first.address])
wait_for(lambda: loads(other), seconds=60)
asyncio.run(asyncio.wait_for(stranger(), 60))
first.admit([ALICE])
wait_for(lambda: not loads(other), seconds=60)
first.admit([ALICE, BOB])
wait_for(lambda: loads(other), seconds=60)
for closing in (swarm, other, friend, first):
    closing.close()
print("closed", flush=True)
'''


@pytest.mark.timeout(300)
def test_only_registered_peers_get_state_and_groups(tmp_path: Path) -> None:
    with started(SCRIPT, folder=tmp_path / "log") as peers:
        peers.says("closed", seconds=200)
        assert peers.process.wait(60) == 0, peers.words
