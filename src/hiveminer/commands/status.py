"""`hiveminer status`: the subnet as a table, one row per neuron.

Most of it is on chain. Each neuron is asked with `IsAlive`, signed by the operator's own hotkey,
whether it is up and at which epoch. Scores, last calls and refusals are only known of this
machine's neurons, from their folders.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from hiveminer.chain import Chain, open_subnet
from hiveminer.chain.wallets import Reader, own_wallet
from hiveminer.config.settings import MinerSettings
from hiveminer.errors import OperatorError
from hiveminer.neuron import subnet_folder
from hiveminer.protocol import IsAlive
from hiveminer.rpc.dendrite import endpoints_of, probe
from hiveminer.runtime.program import rendered
from hiveminer.training.checkpoint import SCORES_FOLDER, newest
from hiveminer.validation.scores import ScoreTable

TAIL_BYTES = 512 * 1024
"""How much of the end of a neuron's metrics is read."""


@dataclass
class Row:
    """One neuron; None means unknown.

    stake: in TAO. weight: share of the incentive on chain. immunity_left: in blocks. last_calls:
    seconds ago, by caller's hotkey.
    """

    uid: int
    hotkey: str
    axon: str | None
    alive: bool | None
    peer: str | None
    run: str | None
    epoch: int | None
    stake: float
    permit: bool
    score: float | None
    weight: float
    immunity_left: int
    last_calls: dict[str, float] = field(default_factory=dict)
    refusals: int | None = None
    why_not: str = ""
    ours: bool = False


@dataclass
class Local:
    """What the neurons of this machine have recorded."""

    scores: dict[str, float] = field(default_factory=dict)
    last_calls: dict[str, dict[str, float]] = field(default_factory=dict)
    """By miner, then by validator: Unix seconds of the last answered `Train`."""
    refusals: dict[str, int] = field(default_factory=dict)
    """By miner: requests that its axon has refused since its start."""
    hotkeys: set[str] = field(default_factory=set)


def gather(settings: MinerSettings, *, clock: Callable[[], float] = time.time) -> Iterator[Row]:
    """One row per neuron. Raises OperatorError or ChainError."""
    with open_reader(settings) as chain:
        graph = chain.metagraph()
        immunity = int(chain.hyperparameters().get("immunity_period", 0))
        wallet = chain.wallet
    local = read_local(subnet_folder(settings))
    alive = asyncio.run(probe(wallet, endpoints_of(graph)))
    commitments = chain.commitments(graph)
    for neuron in graph:
        hotkey = neuron.hotkey
        answer = alive.get(hotkey)
        said = commitments.get(hotkey, b"").decode(errors="replace")
        place = (answer.peer if isinstance(answer, IsAlive) else "") or said
        calls = local.last_calls.get(hotkey, {})
        yield Row(
            uid=neuron.uid,
            hotkey=hotkey,
            axon=neuron.axon,
            alive=None if answer is None else isinstance(answer, IsAlive) and answer.completion,
            peer=place.split()[0].rpartition("/p2p/")[2] if place.startswith("/") else None,
            run=answer.run_id if isinstance(answer, IsAlive) else said.partition("run ")[2] or None,
            epoch=answer.epoch if isinstance(answer, IsAlive) else None,
            stake=float(neuron.total_stake.amount),
            permit=neuron.validator_permit,
            score=local.scores.get(hotkey),
            weight=float(neuron.incentive),
            immunity_left=max(0, neuron.block_at_registration + immunity - graph.block),
            last_calls={who: round(max(0.0, clock() - at), 1) for who, at in calls.items()},
            refusals=local.refusals.get(hotkey),
            why_not=answer if isinstance(answer, str) else "",
            ours=hotkey in local.hotkeys,
        )


def open_reader(settings: MinerSettings) -> Chain:
    """The chain, with the operator's own hotkey if there is one; nothing is registered."""
    file = settings.subtensor.file
    if settings.embedded and not file.exists():
        raise OperatorError(
            f"there is no embedded network at {file}; start a miner, or name another with "
            "--subtensor.path or --subtensor.network"
        )
    wallets = (own_wallet(settings, role=role) for role in ("miner", "validator"))
    wallet = next((wallet for wallet in wallets if wallet is not None), None) or Reader()
    return open_subnet(settings, wallet)


def read_local(folder: Path) -> Local:
    """Scores of local validators, and calls and refusals of local miners, on one subnet."""
    local = Local()
    for place in sorted(folder.glob("*/")):
        local.hotkeys.add(place.name)
        saved = newest(place / SCORES_FOLDER)
        with contextlib.suppress(KeyError, ValueError):
            if saved is not None:
                standings = ScoreTable.restore(saved.metadata["scores"]).standings
                local.scores |= {who: standing.score for who, standing in standings.items()}
        for line in _last_lines(place / "metrics.jsonl"):
            _take(local, place.name, line)
    return local


def _take(local: Local, hotkey: str, text: bytes) -> None:
    """A miner's `train` and a validator's `answer` are two ends of one call."""
    try:
        line = json.loads(text)
    except ValueError:
        return
    match line:
        case {"kind": "train", "time": float(at), "caller": str(validator)}:
            miner = hotkey
        case {"kind": "answer", "time": float(at), "hotkey": str(miner)}:
            validator = hotkey
        case {"kind": "axon", "refused": int(refused)}:
            local.refusals[hotkey] = refused
            return
        case _:
            return
    calls = local.last_calls.setdefault(miner, {})
    calls[validator] = max(at, calls.get(validator, 0.0))


def _last_lines(path: Path) -> list[bytes]:
    """The lines within TAIL_BYTES of a file's end, in order."""
    try:
        with path.open("rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(max(0, size - TAIL_BYTES))
            lines = stream.read().splitlines()
    except OSError:
        return []
    return lines[1:] if size > TAIL_BYTES else lines


def _cells(row: Row) -> list[str]:
    alive = {True: "[green]yes[/]", False: "[red]no[/]", None: ""}[row.alive]
    uid = f"[bold]{row.uid}*[/]" if row.ours else str(row.uid)
    calls = ", ".join(f"{who[:6]} {ago:.0f}s" for who, ago in sorted(row.last_calls.items()))
    return [
        uid,
        row.hotkey[:8],
        escape(row.axon or ""),
        alive,
        escape((row.peer or "")[-8:]),
        "" if row.epoch is None else str(row.epoch),
        f"{row.stake:.1f}" + (" v" if row.permit else ""),
        "" if row.score is None else f"{row.score:.2f}",
        f"{row.weight:.3f}" if row.weight else "",
        str(row.immunity_left or ""),
        calls,
        "" if row.refusals is None else str(row.refusals),
    ]


def main(settings: MinerSettings, *, as_json_text: bool = False) -> int:
    """Show the subnet; 0, or 1 when the chain does not answer."""
    rows = list(gather(settings))
    if as_json_text:
        print(json.dumps([asdict(row) for row in rows], indent=1))
        return 0
    title = f"subnet {settings.netuid} of {settings.subtensor.network}: {len(rows)} neurons"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for column in ("uid", "hotkey", "axon", "alive"):
        table.add_column(column, no_wrap=True, min_width=len(column))
    for column in ("peer", "epoch", "stake", "score", "weight", "immunity", "last call", "refused"):
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*_cells(row))
    legend = "* on this machine; v: validator permit; weight: share of the incentive"
    print(rendered(table, legend, width=200))
    return 0
