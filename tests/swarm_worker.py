"""One peer of a small swarm as a process, which can be made to fail at a chosen moment.

`python swarm_worker.py KIND NAME FOLDER [--rows N] [--group N] [--limit S] [--fault WHERE HOW]`

It trains a tiny model, and finds the others by FOLDER/*.address. KIND `ours` is `Peer` and
`HivemindStrategy`; `stock` is `hivemind.Optimizer` with the same matchmaking time and group
size, so that only a fault makes it wait, and its own default for the rest. What happens
is printed, one JSON object a line; the weights after each round and each download are written to
FOLDER/NAME.EPOCH.round.npy and FOLDER/NAME.EPOCH.load.npy.

SIGUSR1 arms the fault. It then comes in the averager's process, in the next round:
WHERE `matchmaking`: while it looks for a group and another peer could know of it;
WHERE `allreduce`: when another peer has begun to send its part.
HOW `kill`: all its processes end, like a machine that loses power;
HOW `stop`: they hold still and keep their connections, like a machine behind a dead router.

SIGTERM ends it in order.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import hivemind
import numpy as np
import psutil
import torch
from bittensor.keyfiles import Keypair
from hivemind.averaging import DecentralizedAverager
from hivemind.averaging.matchmaking import Matchmaking
from tiny import VOCABULARY, tiny_model

from hiveminer.config.run import Run
from hiveminer.strategies.base import RoundResult
from hiveminer.strategies.hivemind.strategy import HivemindStrategy
from hiveminer.swarm.discovery import Discovery
from hiveminer.swarm.identity import Identity
from hiveminer.swarm.membership import Membership
from hiveminer.swarm.peer import Peer
from hiveminer.training.optimizer import build_optimizer

ROWS = 4
MATCHMAKING_SECONDS = 5.0
RUN_ID = "survival-a-b-c"
PACE_SECONDS = 0.25
LOOK_STEPS = 8
NAMES = "abcdef"


def hotkey(name: str) -> Keypair:
    return Keypair.create_from_uri(f"//{name}")


class Fault:
    """Strikes once, at the place asked for, after it was armed."""

    def __init__(self, where: str, how: str):
        self.number = signal.SIGKILL if how == "kill" else signal.SIGSTOP
        self.armed = multiprocessing.Value("b", 0)
        signal.signal(signal.SIGUSR1, lambda _number, _frame: self._arm())
        if where == "matchmaking":
            self._hook_matchmaking()
        else:
            self._hook_allreduce()

    def _arm(self) -> None:
        self.armed.value = 1

    def strike(self) -> None:
        """Runs in the averager's process: its siblings first, itself last."""
        if not self.armed.value:
            return
        tell("fault")
        me = os.getpid()
        parent = psutil.Process(os.getppid())
        for process in [*parent.children(recursive=True), parent]:
            if process.pid != me:
                process.send_signal(self.number)
        os.kill(me, self.number)

    def _hook_matchmaking(self) -> None:
        answer, ask = Matchmaking.rpc_join_group, Matchmaking._request_join_group

        @functools.wraps(answer)  # its annotations say how it is called
        async def answered(self_: Any, request: Any, context: Any) -> AsyncIterator[Any]:
            self.strike()
            async for message in answer(self_, request, context):
                yield message

        async def asked(self_: Any, leader: Any) -> Any:
            self.strike()
            return await ask(self_, leader)

        Matchmaking.rpc_join_group, Matchmaking._request_join_group = answered, asked

    def _hook_allreduce(self) -> None:
        take = DecentralizedAverager.rpc_aggregate_part

        @functools.wraps(take)
        async def taken(self_: Any, stream: Any, context: Any) -> AsyncIterator[Any]:
            self.strike()
            async for message in take(self_, stream, context):
                yield message

        DecentralizedAverager.rpc_aggregate_part = taken


def tell(event: str, **facts: Any) -> None:
    line = json.dumps({"event": event, "time": time.time()} | facts) + "\n"
    os.write(1, line.encode())


class Worker:
    """A tiny model and the rows that it is given: random ones, its own."""

    def __init__(self, options: argparse.Namespace):
        torch.set_num_threads(1)
        self.name, self.folder = options.name, options.folder
        self.model = tiny_model("gpt2")
        self.rows = torch.Generator().manual_seed(sum(map(ord, self.name)))

    def gradients(self) -> None:
        tokens = torch.randint(2, VOCABULARY, (ROWS, 8), generator=self.rows)
        torch.autograd.backward(self.model(input_ids=tokens, labels=tokens).loss)

    def keep_weights(self, epoch: int, what: str) -> None:
        vector = torch.nn.utils.parameters_to_vector(self.model.parameters()).detach().numpy()
        draft = self.folder / f".{self.name}.npy"
        np.save(draft, vector)
        draft.rename(self.folder / f"{self.name}.{epoch}.{what}.npy")

    def publish(self, address: str) -> None:
        draft = self.folder / f".{self.name}.address"
        draft.write_text(address)
        draft.rename(self.folder / f"{self.name}.address")

    def addresses(self) -> list[str]:
        return [path.read_text() for path in sorted(self.folder.glob("[!.]*.address"))]


def ours(worker: Worker, options: argparse.Namespace) -> HivemindStrategy:
    section = {
        "epoch_samples": options.rows,
        "matchmaking_seconds": MATCHMAKING_SECONDS,
        "averaging_timeout_seconds": options.limit,
    }
    key = worker.folder / f"{worker.name}.key"
    peer = Peer(
        identity=Identity(hotkey(worker.name), run_id=RUN_ID, key_path=key),
        admitted=[hotkey(name).ss58_address for name in NAMES],
    )

    def on_round(ended: RoundResult) -> None:
        worker.keep_weights(ended.epoch, "round")
        tell("round", epoch=ended.epoch, size=ended.group_size, seconds=ended.seconds)

    swarm = HivemindStrategy(
        worker.model,
        membership=Membership(peer),
        run=Run.model_validate({"swarm": section}),
        run_id=RUN_ID,
        on_round=on_round,
    )
    averager = swarm.optimizer.state_averager
    load = averager.load_state_from_peers

    def loaded(*args: Any, **kwargs: Any) -> Any:
        state = load(*args, **kwargs)
        epoch = int(averager.local_epoch)
        worker.keep_weights(epoch, "load")
        tell("load", epoch=epoch, loaded=bool(averager.loaded))
        return state

    averager.load_state_from_peers = loaded
    worker.publish(peer.address)
    discovery = Discovery(peer)

    def keep_meeting() -> None:
        """As a miner does with the addresses on the chain."""
        while True:
            discovery.meet(worker.addresses())
            time.sleep(0.5)

    discovery.meet(worker.addresses())
    threading.Thread(target=keep_meeting, daemon=True).start()
    return swarm


class Stock(hivemind.Optimizer):
    """The stock optimizer, with what a strategy has besides."""

    @property
    def epoch(self) -> int:
        return int(self.local_epoch)

    def catch_up(self) -> None:
        """It does so within its steps."""

    def interrupt(self) -> None:
        os._exit(0)  # its own shutdown waits for rounds that nobody will end

    def close(self) -> None:
        """Never reached."""


def stock(worker: Worker, options: argparse.Namespace) -> Stock:
    dht = hivemind.DHT(initial_peers=worker.addresses() or None, start=True, startup_timeout=30)
    worker.publish(str(dht.get_visible_maddrs()[0]))
    optimizer = Stock(
        dht=dht,
        run_id=RUN_ID,
        target_batch_size=options.rows,
        optimizer=build_optimizer(worker.model.parameters(), Run().optimizer),
        use_local_updates=True,
        matchmaking_time=MATCHMAKING_SECONDS,
        averager_opts={"target_group_size": options.group, "request_timeout": 1.5},
        tracker_opts={"default_refresh_period": 1.0, "max_refresh_period": 1.0},
    )
    watch_rounds(optimizer)
    return optimizer


def watch_rounds(optimizer: Stock) -> None:
    """Say of each round how large its group was."""
    averager, base = optimizer.state_averager, DecentralizedAverager
    begin, apply = base.step, averager._apply_averaging_results_
    controls: list[Any] = []

    def begun(self_: Any, *args: Any, **kwargs: Any) -> Any:
        control = begin(self_, *args, **kwargs)
        controls.append(control)
        return control

    def applied() -> None:
        apply()
        done = [control for control in controls if control.done()]
        controls[:] = [control for control in controls if not control.done()]
        fine = [c for c in done if not c.cancelled() and c.exception() is None]
        size = max((len(control.result() or ()) for control in fine), default=1)
        tell("round", epoch=optimizer.epoch, size=size or 1)

    base.step, averager._apply_averaging_results_ = begun, applied


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=("ours", "stock"))
    parser.add_argument("name")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=64, help="of an epoch, of all peers")
    parser.add_argument("--group", type=int, default=2, help="the stock's target group size")
    parser.add_argument("--limit", type=float, default=30.0, help="seconds of a round of ours")
    parser.add_argument("--fault", nargs=2, metavar=("WHERE", "HOW"))
    options = parser.parse_args()
    if options.fault:
        Fault(*options.fault)
    worker = Worker(options)
    optimizer = ours(worker, options) if options.kind == "ours" else stock(worker, options)
    stopping = threading.Event()
    signal.signal(signal.SIGTERM, lambda _number, _frame: stopping.set())
    optimizer.catch_up()
    tell("ready", epoch=optimizer.epoch)
    steps = 0
    while not stopping.wait(PACE_SECONDS):
        if steps % LOOK_STEPS == 0:
            optimizer.catch_up()
        steps += 1
        optimizer.zero_grad()
        worker.gradients()
        epoch, began = optimizer.epoch, time.time()
        kept = optimizer.step(batch_size=ROWS)
        tell("step", epoch=epoch, kept=kept, seconds=round(time.time() - began, 3))
    optimizer.interrupt()
    optimizer.close()


if __name__ == "__main__":
    main()
