"""One peer of the exchange benchmark: `python -m benchmarks._exchange FOLDER UID ROUNDS`.

UID 0 is the validator, the others are miners, on the embedded network in FOLDER. Each prints one
JSON object a line: its address first, then, once its standard input names all addresses, its
figures after ROUNDS rounds that counted everybody, and those of an averaging by Hivemind.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks._sent import Sent
from hiveminer.chain import embedded_wallet, join_embedded, open_chain
from hiveminer.chain.wallets import Claimed
from hiveminer.config.run import OptimizerSection, SparselocoSection
from hiveminer.runtime.machine import keep_freed_memory
from hiveminer.strategies.base import RoundResult
from hiveminer.strategies.sparseloco.exchange import Exchange
from hiveminer.strategies.sparseloco.log import Log
from hiveminer.strategies.sparseloco.observer import SparselocoObserver
from hiveminer.strategies.sparseloco.onchain import SubnetRounds, public_key
from hiveminer.strategies.sparseloco.parts import Parts
from hiveminer.strategies.sparseloco.pieces import Bytes
from hiveminer.strategies.sparseloco.plan import Plan
from hiveminer.strategies.sparseloco.rounds import Contribution, Rules, decide
from hiveminer.strategies.sparseloco.shelf import Shelf
from hiveminer.strategies.sparseloco.strategy import SparselocoStrategy
from hiveminer.swarm.identity import Identity
from hiveminer.swarm.membership import Membership
from hiveminer.swarm.peer import Peer
from hiveminer.training.optimizer import inner_optimizer

RUN_ID = "exchange-a-b-c"
BLOCK_SECONDS = 4.0
SECTION = SparselocoSection(round_blocks=15, mark_blocks=7, cut_blocks=2)
OPTIMIZER = OptimizerSection(learning_rate=3e-4)
TOKENS = 128
"""Of a step: one row."""

DUTY = 0.25
"""Share of the time in which a miner trains: all peers share the cores of one machine, and
what is measured of training is its work per CPU-second."""

PLAIN_STEPS = 20
AVERAGING_SECONDS = 120.0


def model_of() -> LlamaForCausalLM:
    """A Llama of 25 million parameters, the same each time."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=8192, hidden_size=512, intermediate_size=1536, num_hidden_layers=6,
            num_attention_heads=8, num_key_value_heads=8, tie_word_embeddings=True,
        )
    )  # fmt: skip


class Timed:
    """Seconds of each kind, as they come."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, list[float]] = defaultdict(list)

    def add(self, kind: str, began: float) -> None:
        self.seconds[kind].append(time.monotonic() - began)

    def median(self, kind: str) -> float | None:
        return round(statistics.median(found), 4) if (found := self.seconds[kind]) else None


class TimedExchange(Exchange):
    """Times the fetching of a round's blobs."""

    timed: Timed

    def fetch_blobs(
        self,
        number: int,
        wanted: Iterable[Contribution],
        *,
        keep: Callable[[Contribution, bytes], None],
        timeout_seconds: float,
    ) -> None:
        began = time.monotonic()
        missing = {each.uid for each in wanted}

        def kept(which: Contribution, blob: bytes) -> None:
            keep(which, blob)
            missing.discard(which.uid)

        super().fetch_blobs(number, wanted, keep=kept, timeout_seconds=timeout_seconds)
        if not missing:
            self.timed.add("exchange", began)


class CountingShelf(Shelf):
    """Counts the blobs that are served."""

    served = 0

    def get(self, digest: bytes) -> Bytes | None:
        found = super().get(digest)
        self.served += found is not None
        return found


class FinalBlocks(SubnetRounds):
    """Remembers when each block was seen to be final."""

    def __init__(self, chain: Any):
        super().__init__(chain)
        self.seen: dict[int, float] = {}

    def final_head(self) -> int:
        found = super().final_head()
        self.seen.setdefault(found, time.monotonic())
        return found

    def since(self, block: int) -> float | None:
        """Seconds since this block was seen to be final."""
        seen = [at for number, at in self.seen.items() if number >= block]
        return time.monotonic() - min(seen) if seen else None


class TimedStrategy(SparselocoStrategy):
    """Times what the rounds do in the training thread where there is something to do."""

    timed: Timed

    def _at_boundary(self) -> None:
        began, moves, wanted = time.monotonic(), self._moves, self._wanted
        super()._at_boundary()
        if wanted is not None:
            self.timed.add("copy", began)
        if self._moves != moves:
            self.timed.add("move", began)


def one_step(model: LlamaForCausalLM, rows: torch.Generator) -> None:
    row = torch.randint(0, 8192, (1, TOKENS), generator=rows)
    torch.autograd.backward(model(input_ids=row, labels=row).loss)
    torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.max_grad_norm)


def plain(rows: torch.Generator) -> tuple[int, float]:
    """Tokens, and CPU-seconds of this thread, in a loop of PyTorch and nothing else.

    It trains at DUTY, too: a thread that waits between steps finds its caches cold. The memory
    allocator is set as a miner's: that is worth a twentieth to both.
    """
    model = model_of()
    optimizer = inner_optimizer(model, OPTIMIZER)
    one_step(model, rows)
    optimizer.step()
    began = time.thread_time()
    for _ in range(PLAIN_STEPS):
        step_began = time.monotonic()
        one_step(model, rows)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        time.sleep((time.monotonic() - step_began) * (1 / DUTY - 1))
    return PLAIN_STEPS * TOKENS, time.thread_time() - began


def train(
    strategy: TimedStrategy, rows: torch.Generator, stop: threading.Event
) -> tuple[int, float]:
    """Train at DUTY until told to stop; tokens, and CPU-seconds of this thread."""
    tokens, began = 0, time.thread_time()
    while not stop.is_set():
        step_began = time.monotonic()
        one_step(strategy.model, rows)  # type: ignore[arg-type]
        strategy.step(batch_size=1)
        strategy.zero_grad()
        tokens += TOKENS
        stop.wait((time.monotonic() - step_began) * (1 / DUTY - 1))
    return tokens, time.thread_time() - began


def run(folder: Path, uid: int, rounds: int) -> None:
    torch.set_num_threads(1)
    keep_freed_memory()  # as a miner's program does
    with embedded_wallet(folder, prefix="peer") as claimed:
        _run(folder, uid, rounds, claimed)


def _run(folder: Path, uid: int, rounds: int, claimed: Claimed) -> None:
    sent, timed = Sent(os.getpid()), Timed()
    chain = open_chain(
        network="embedded", netuid=1, wallet=claimed.wallet, path=folder / "chain.sqlite",
        block_seconds=BLOCK_SECONDS,
    )  # fmt: skip
    join_embedded(chain, stake_tao=5000.0 if uid == 0 else 0.0)
    hotkey = claimed.wallet.hotkey
    identity = Identity(hotkey, run_id=RUN_ID, key_path=folder / f"{uid}.key")
    peer = Peer(identity=identity, admitted=[chain.hotkey])
    say(peer={"address": peer.address, "hotkey": chain.hotkey})
    others: dict[str, list[str]] = json.loads(sys.stdin.readline())
    membership = Membership(
        peer, registered=lambda: others["hotkeys"], addresses=lambda: others["addresses"]
    )
    model = model_of()
    plan = Plan.of(SECTION, run_id=RUN_ID, model=model)
    log = Log(folder / f"log-{uid}")
    log.begin(plan, run_id=RUN_ID)
    shelf, final = CountingShelf(log), FinalBlocks(chain)
    exchange = TimedExchange(peer.dht, run=plan.rules.run, source=shelf)
    exchange.timed = timed
    membership.children.watch_thread("the exchange", exchange.thread)
    parts = Parts(
        section=OPTIMIZER, plan=plan, hotkey=public_key(chain.hotkey), chain=final,
        membership=membership, exchange=exchange, log=log, shelf=shelf, poll_seconds=0.25,
    )  # fmt: skip
    counts = Counts(sent, shelf, plan.rules, rounds=rounds, everybody=len(others["hotkeys"]) - 1)
    figures: dict[str, Any] = {}
    if uid == 0:
        observer = SparselocoObserver(model, parts)
        observer.follower.begin()
        while not counts.done(log):
            time.sleep(0.5)
        observer.close()
    else:
        figures = _mine(model, parts, timed, counts, final, uid)
    figures |= counts.figures | {"exchange_s": timed.median("exchange")}
    figures["model_bytes"] = 4 * sum(shape.numel() for shape in plan.shapes.values())
    say(figures=figures)
    averaged = json.loads(sys.stdin.readline())  # all have ended their rounds
    if uid:
        say(averaging=averaging(averaged["initial_peers"], model_of(), sent, averaged["size"]))
    sys.stdin.readline()
    sent.close()
    chain.close()


class Counts:
    """The bytes and blobs that this peer sent in the rounds that are measured."""

    def __init__(
        self, sent: Sent, shelf: CountingShelf, rules: Rules, *, rounds: int, everybody: int
    ):
        self.sent, self.shelf, self.rules = sent, shelf, rules
        self.rounds, self.everybody = rounds, everybody
        self.first: int | None = None
        self.figures: dict[str, Any] = {}
        self._began = (0, 0)

    def done(self, log: Log) -> bool:
        """Whether the rounds that counted everybody are enough; the first one only warms up."""
        rounds = log.rounds()
        entry = log.entry(rounds[-1]) if rounds else None
        if entry is None:
            return False
        number, counted = entry.facts.round, decide(self.rules, entry.facts).contributions
        if self.first is None:
            if len(counted) == self.everybody:
                self.first, self._began = number, (self.sent.bytes(), self.shelf.served)
            return False
        if number < self.first + self.rounds:
            return False
        made = number - self.first
        self.figures = {
            "rounds": made,
            "bytes_per_round": (self.sent.bytes() - self._began[0]) / made,
            "blobs_per_round": (self.shelf.served - self._began[1]) / made,
            "contributors": len(counted),
            "blob_bytes": max((each.blob_bytes for each in counted), default=0),
        }
        return True


def _mine(
    model: LlamaForCausalLM,
    parts: Parts,
    timed: Timed,
    counts: Counts,
    final: FinalBlocks,
    uid: int,
) -> dict[str, Any]:
    settled: list[float] = []

    def on_round(ended: RoundResult) -> None:
        since = final.since(strategy.plan.rules.schedule.marks_block(ended.epoch - 1))
        if since is not None:
            settled.append(since)

    rows = torch.Generator().manual_seed(uid)
    before = plain(rows)
    strategy = TimedStrategy(model, parts, on_round=on_round)
    strategy.timed = timed
    strategy.join()
    stop, trained = threading.Event(), []
    trainer = threading.Thread(target=lambda: trained.append(train(strategy, rows, stop)))
    trainer.start()
    while not counts.done(parts.log):
        strategy.check()
        time.sleep(0.5)
    stop.set()
    trainer.join(60)
    strategy.close()
    after = plain(rows)
    plain_rate = (before[0] + after[0]) / (before[1] + after[1])
    rate = trained[0][0] / trained[0][1]
    return {
        "settle_s": round(statistics.median(settled), 3),
        "copy_s": timed.median("copy"),
        "move_s": timed.median("move"),
        "pauses_s": [round(each, 4) for each in timed.seconds["copy"] + timed.seconds["move"]],
        "plain_tokens_per_cpu_s": round(plain_rate, 2),
        "tokens_per_cpu_s": round(rate, 2),
        "train_ratio": round(rate / plain_rate, 4),
    }


def averaging(
    initial_peers: list[str], model: LlamaForCausalLM, sent: Sent, size: int
) -> dict[str, Any]:
    """One averaging of the model's weights by Hivemind, in Float16."""
    import hivemind
    from hivemind.compression import Float16Compression

    dht = hivemind.DHT(initial_peers=initial_peers or None, start=True)
    if not initial_peers:
        say(first=[str(each) for each in dht.get_visible_maddrs()])
    averager = hivemind.averaging.DecentralizedAverager(
        [each.detach().clone() for each in model.parameters()], dht, prefix="bench", start=True,
        target_group_size=size, min_group_size=size, min_matchmaking_time=5.0,
        compression=Float16Compression(),
    )  # fmt: skip
    before, began = sent.bytes(), time.monotonic()
    found = averager.step(timeout=AVERAGING_SECONDS)
    taken = time.monotonic() - began
    result: Mapping[str, Any] = {
        "peers": len(found or ()), "seconds": round(taken, 3), "bytes": sent.bytes() - before
    }  # fmt: skip
    averager.shutdown()
    dht.shutdown()
    return dict(result)


def say(**fields: Any) -> None:
    print(json.dumps(fields), flush=True)


if __name__ == "__main__":
    run(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
