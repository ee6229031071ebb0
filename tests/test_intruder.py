"""Who is not registered gets no state, joins no group and sends no part; who was, neither."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from programs import started

SCRIPT = '''
import asyncio, json, sys, time
import torch
from bittensor.keyfiles import Keypair
from hivemind.p2p import P2P, PeerID
from hivemind.proto import averaging_pb2
from hivemind.utils import get_dht_time

sys.path.insert(0, sys.argv[1])
from tiny import tiny_model
from hiveminer.config.run import Run
from hiveminer.swarm import Identity, Peer
from hiveminer.swarm.membership import Membership
from hiveminer.strategies.hivemind.averager import SwarmAverager
from hiveminer.strategies.hivemind.records import averager_prefix
from hiveminer.strategies.hivemind.strategy import HivemindStrategy

torch.set_num_threads(1)
RUN_ID = "intruder-a-b-c"
run = Run.model_validate({"swarm": {"epoch_samples": 8, "matchmaking_seconds": 2.0}})
hotkeys = [Keypair.create_from_uri(f"//{name}") for name in ("first", "friend")]
both = [key.ss58_address for key in hotkeys]


def neuron(key):
    identity = Identity(key, run_id=RUN_ID, key_path=None)
    peer = Peer(identity=identity, admitted=both)
    member = Membership(peer)
    return peer, HivemindStrategy(tiny_model("gpt2"), membership=member, run=run, run_id=RUN_ID)


def loads(swarm):
    swarm.optimizer.state_averager.load_state_from_peers(timeout=20)
    return bool(swarm.optimizer.state_averager.loaded)


def within(seconds, what):
    end = time.monotonic() + seconds
    while not (found := what()) and time.monotonic() < end:
        time.sleep(0.2)
    return found


async def stranger():
    """A stock libp2p node that knows the run id and the names of the handlers."""
    p2p = await P2P.create(initial_peers=[first.address])
    prefix = averager_prefix(RUN_ID)
    stub = SwarmAverager.get_stub(p2p, PeerID.from_base58(first.peer_id), namespace=prefix)
    said = {}

    async def read(call, codes):
        async for message in await call:
            codes.append(averaging_pb2.MessageCode.Name(getattr(message, "code", 0)))
            if len(codes) > 2:
                break

    async def answers(call):
        """What came; a refusal may be lost when libp2p resets the stream that it ends."""
        codes = []
        try:
            await asyncio.wait_for(read(call, codes), 10)
        except Exception as error:
            print("refused with", repr(error), flush=True)
        return codes

    state = averaging_pb2.DownloadRequest()
    said["state"] = len(await answers(stub.rpc_download_state(state)))
    join = averaging_pb2.JoinRequest(
        schema_hash=swarm.optimizer.state_averager.schema_hash,
        expiration=get_dht_time() + 5, gather=b"", group_key=f"{prefix}.0b",
    )
    said["group"] = await answers(stub.rpc_join_group(join))

    async def parts():
        yield averaging_pb2.AveragingData(code=averaging_pb2.PART_FOR_AVERAGING, group_id=b"x")

    said["part"] = await answers(stub.rpc_aggregate_part(parts()))
    try:
        await asyncio.wait_for(stub.rpc_vouch(state), 10)
        said["vouch"] = "given"
    except Exception as error:
        said["vouch"] = type(error).__name__
    await p2p.shutdown()
    return said


first, swarm = neuron(hotkeys[0])
friend, other = neuron(hotkeys[1])
friend.dial([first.address])
told = {"friend": within(30, lambda: loads(other))}
told["stranger"] = asyncio.run(asyncio.wait_for(stranger(), 60))
first.admit(both[:1])
told["out"] = within(60, lambda: not loads(other))
first.admit(both)
told["in again"] = within(60, lambda: loads(other))
for closing in (swarm, other, friend, first):
    closing.close()
print("told", json.dumps(told), flush=True)
'''


@pytest.mark.timeout(240)
def test_only_registered_peers_get_state_and_groups(tmp_path: Path) -> None:
    here = str(Path(__file__).resolve().parent)
    with started(SCRIPT, here, folder=tmp_path / "log") as peers:
        words = peers.says("told {", seconds=200)
        assert peers.process.wait(60) == 0, words
    told = json.loads(words.partition("told {")[2].splitlines()[0].join(["{", ""]))
    assert told["friend"], words
    assert told["stranger"]["state"] == 0, words
    assert set(told["stranger"]["group"]) <= {"PROTOCOL_VIOLATION"}, words
    assert set(told["stranger"]["part"]) <= {"PROTOCOL_VIOLATION"}, words
    assert told["stranger"]["vouch"] != "given", words
    assert told["out"], words
    assert told["in again"], words
