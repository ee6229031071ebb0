"""Rounds on the embedded network with real programs that are killed, stopped and restarted."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest
from small_neurons import small_run
from talk import caller, hotkey_of

from hiveminer.chain import Chain, join_embedded
from hiveminer.chain.embedded.schema import restored
from hiveminer.commands.demo import rounds_summary
from hiveminer.errors import ChainError
from hiveminer.strategies.sparseloco.log import Log, logs_below
from hiveminer.strategies.sparseloco.onchain import public_key
from hiveminer.strategies.sparseloco.records import Mark, decode_mark, decode_record
from hiveminer.strategies.sparseloco.rounds import decide
from hiveminer.strategies.sparseloco.schedule import Schedule
from programs import Network, Program, descendants_gone, wait_for

T = TypeVar("T")

SCHEDULE = Schedule(round_blocks=20, mark_blocks=10, cut_blocks=4)
BLOCK_SECONDS = 0.25
ROUND_SECONDS = SCHEDULE.round_blocks * BLOCK_SECONDS
WAIT_SECONDS = 150.0

RUN = f"""
strategy = "sparseloco"
{{base}}
[sparseloco]
round_blocks = {SCHEDULE.round_blocks}
mark_blocks = {SCHEDULE.mark_blocks}
cut_blocks = {SCHEDULE.cut_blocks}
density = 1.0
"""


class Swarm:
    """Miners and a validator as programs, and their chain as it can be seen from outside."""

    def __init__(self, network: Network):
        self.network = network
        self.names = iter(range(100))
        self.published: dict[tuple[str, int], set[bytes]] = {}
        self.validator = self.start("validator")
        self.miners = [self.start("miner") for _ in range(2)]
        for program in (self.validator, *self.miners):
            program.says(", hotkey ", seconds=WAIT_SECONDS)
        path = network.folder / "network" / "chain.sqlite"
        self.db = sqlite3.connect(path, isolation_level=None, timeout=10)

    def start(self, role: str) -> Program:
        blocks = ("--subtensor.block_seconds", str(BLOCK_SECONDS))
        flags = ("--validator.weights_seconds", "5") if role == "validator" else ()
        return self.network.start(f"{role}-{next(self.names)}", *flags, *blocks)

    # The chain ------------------------------------------------------------------

    def head(self) -> int:
        genesis, seconds = self.db.execute(
            "SELECT genesis_seconds, block_seconds FROM network"
        ).fetchone()
        return int((time.time() - genesis) / seconds) + 1

    def committed(self, program: Program) -> bytes | None:
        row = self.db.execute(
            "SELECT data FROM commitments WHERE hotkey = ?", (hotkey_of(program),)
        ).fetchone()
        return None if row is None else bytes(row[0])

    def look_at_records(self) -> None:
        """Remember the records in all blocks that are still known."""
        pasts = [row[0] for row in self.db.execute("SELECT state FROM history").fetchall()]
        for db in (*map(restored, pasts), self.db):
            for hotkey, data in db.execute("SELECT hotkey, data FROM commitments").fetchall():
                record = decode_record(data)
                if record is not None:
                    blobs = self.published.setdefault((hotkey, record.round), set())
                    blobs.add(record.blob_hash)

    # The logs -------------------------------------------------------------------

    def log_of(self, program: Program) -> Log:
        def found() -> list[Log]:
            logs = logs_below(self.network.folder / "state")
            return [log for log in logs if hotkey_of(program) in log.folder.parts]

        return self.wait(found, "a log of rounds")[0]

    def wait_until(self, number: int, *, by: Program) -> None:
        """Wait until this peer has settled a round."""
        log = self.log_of(by)
        self.wait(lambda: log.rounds()[-1:] >= [number], f"round {number} to be settled")

    def wait_counted(self, *miners: Program, after: int) -> int:
        """Wait for a later round in which exactly these count, and whose state the first one has
        made; its number."""
        log, wanted = self.log_of(miners[0]), {public_key(hotkey_of(each)) for each in miners}
        rules = log.plan()[1].rules

        def counted() -> int:
            for number in log.rounds():
                entry = log.entry(number) if number > after else None
                if entry is not None and entry.made:
                    decision = decide(rules, entry.facts)
                    if {each.hotkey for each in decision.contributions} == wanted:
                        return number
            return 0

        return self.wait(counted, f"a round after {after} in which {len(miners)} count")

    def wait(self, what: Callable[[], T], about: str) -> T:
        programs = self.network.programs
        return wait_for(what, seconds=WAIT_SECONDS, about=about, programs=programs)

    # What happens ---------------------------------------------------------------

    def kill(self, *programs: Program) -> None:
        """kill -9, and the end of all that they started."""
        families = [program.family() for program in programs]
        for program in programs:
            program.process.kill()
        for family in families:
            descendants_gone(family, seconds=60)

    def restart(self, program: Program) -> Program:
        """Start a killed one again, with its hotkey and its folder."""
        again = self.start(program.log.parent.name.split("-")[0])
        again.says(", hotkey ", seconds=WAIT_SECONDS)
        assert hotkey_of(again) == hotkey_of(program)
        return again

    def kill_after_its_record(self, miner: Program) -> int:
        """Kill a miner between its record and the moment from which it serves; the round."""
        before = decode_record(self.committed(miner))

        def new() -> bool:
            now = decode_record(self.committed(miner))
            return now is not None and now != before

        deadline = time.monotonic() + WAIT_SECONDS
        while not new():
            assert time.monotonic() < deadline, miner.words
            time.sleep(0.005)
        miner.process.send_signal(signal.SIGKILL)
        record = decode_record(self.committed(miner))
        assert record is not None
        assert self.head() <= SCHEDULE.records_block(record.round) + 1  # not final yet
        self.kill(miner)
        return record.round

    def kill_between_fetch_and_mark(self, validator: Program) -> int:
        """Kill a validator that has a blob of the round, and has not marked it; the round."""
        blobs = self.log_of(validator).folder / "blobs"
        deadline = time.monotonic() + WAIT_SECONDS

        def fetched() -> int | None:
            """The round of which it has a blob that was not there before."""
            for miner in self.miners:
                record = decode_record(self.committed(miner))
                is_new = record is not None and record.round > settled
                if is_new and (blobs / record.blob_hash.hex()).exists():
                    return record.round
            return None

        settled = self.log_of(validator).rounds()[-1] + 1  # the one that is under way by now
        while time.monotonic() < deadline:
            number = fetched()
            if number is None:
                time.sleep(0.002)
                continue
            os.kill(validator.process.pid, signal.SIGSTOP)
            mark = decode_mark(self.committed(validator))
            if mark is None or mark.round < number:
                self.kill(validator)
                return number
            os.kill(validator.process.pid, signal.SIGCONT)  # it was faster; the next round then
            settled = number
        raise AssertionError(f"it always marked at once: {validator.words[-3000:]}")

    def wait_for_weights(self) -> None:
        weights = self.wait(lambda: self.network.numbers("weights"), "weights")[-1]["weights"]
        assert sum(weights.values()) == pytest.approx(1.0)

    @contextlib.contextmanager
    def stopped(self, program: Program) -> Iterator[None]:
        os.kill(program.process.pid, signal.SIGSTOP)
        yield
        os.kill(program.process.pid, signal.SIGCONT)

    @contextlib.contextmanager
    def without_finality(self) -> Iterator[None]:
        """Blocks and calls go on, and none becomes final."""
        self.db.execute(
            "CREATE TRIGGER stall BEFORE INSERT ON blocks BEGIN SELECT RAISE(IGNORE); END"
        )
        yield
        self.db.execute("DROP TRIGGER stall")

    def end(self, *living: Program) -> None:
        """End the programs; then all logs fit, and no round had two blobs of one miner."""
        self.look_at_records()
        twice = {key: len(blobs) for key, blobs in self.published.items() if len(blobs) > 1}
        assert not twice
        for program in living:
            assert program.interrupt(seconds=60) == 0, program.words
        summary = rounds_summary(self.network.folder / "state")
        assert summary["hashes_equal"], summary
        assert summary["log_verified"], summary
        folder = str(self.log_of(living[0]).folder)
        words = ["-m", "hiveminer", "log", folder, "--verify"]
        with Program(words, folder=self.network.folder / "verify") as verify:
            assert verify.process.wait(60) == 0, verify.words


@contextlib.contextmanager
def swarm_in(folder: Path) -> Iterator[Swarm]:
    """A swarm that trains a local folder of a tiny model."""
    (folder / "run").mkdir()
    base = small_run(folder / "run").read_text()
    with Network(folder / "net", run=RUN.format(base=base)) as network:
        swarm = Swarm(network)
        with contextlib.closing(swarm.db):
            yield swarm


@pytest.mark.timeout(600)
def test_who_is_killed_and_restarted_delays_nobody(tmp_path: Path) -> None:
    with swarm_in(tmp_path) as swarm:
        one, two = swarm.miners
        first = swarm.wait_counted(one, two, after=-1)
        assert first >= 0

        killed = swarm.kill_after_its_record(two)
        two = swarm.restart(two)  # in the middle of that round
        swarm.miners = [one, two]
        swarm.wait_until(killed, by=one)
        swarm.wait_counted(one, two, after=killed)
        swarm.look_at_records()

        killed = swarm.kill_between_fetch_and_mark(swarm.validator)
        validator = swarm.restart(swarm.validator)
        swarm.wait_until(killed, by=one)
        swarm.wait_counted(one, two, after=killed)
        swarm.wait_for_weights()
        swarm.end(one, two, validator)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_stops_a_stall_junk_a_joiner_and_the_end_of_half(tmp_path: Path) -> None:
    with swarm_in(tmp_path) as swarm, caller(tmp_path / "net" / "network") as junk:
        join_embedded(junk, stake_tao=1000.0)
        one, two = swarm.miners
        newest = swarm.wait_counted(one, two, after=-1)

        newest = swarm.wait_counted(one, two, after=newest + name_junk(swarm, junk, rounds=3))

        newest = swarm.kill_after_its_record(two)
        newest = swarm.wait_counted(one, after=newest - 1)  # its blob is nowhere
        two = swarm.restart(two)
        newest = swarm.wait_counted(one, two, after=newest)

        with swarm.stopped(two):
            began = time.monotonic()
            newest = swarm.wait_counted(one, after=newest)
            time.sleep(max(0.0, began + 30 - time.monotonic()))
        newest = swarm.wait_counted(one, two, after=newest)

        with swarm.stopped(swarm.validator):
            time.sleep(30)
            newest = swarm.log_of(one).rounds()[-1]
        newest = swarm.wait_counted(one, two, after=newest)

        with swarm.without_finality():
            before = swarm.log_of(one).rounds()[-1]
            time.sleep(2 * ROUND_SECONDS)
            stalled = swarm.log_of(one).rounds()[-1]
            assert stalled <= before + 1
        newest = swarm.wait_counted(one, two, after=stalled)

        three = swarm.start("miner")
        three.says(", hotkey ", seconds=WAIT_SECONDS)
        swarm.wait(lambda: swarm.head() >= 20 * SCHEDULE.round_blocks, "round 20")
        newest = swarm.wait_counted(three, one, two, after=newest)

        swarm.kill(two, three)
        newest = swarm.wait_counted(one, after=newest)
        swarm.wait_counted(one, after=newest)
        swarm.end(one, swarm.validator)


def name_junk(swarm: Swarm, junk: Chain, *, rounds: int) -> int:
    """A validator with half the other's stake marks states and blobs that nobody has; returns in
    how many rounds it did."""
    run = swarm.log_of(swarm.validator).plan()[1].rules.run
    everybody = frozenset(range(256))
    for count in range(rounds):
        number = SCHEDULE.round_at(swarm.head()) + 1
        swarm.wait(lambda n=number: swarm.head() > SCHEDULE.records_block(n), f"round {number}")
        honest = swarm.committed(swarm.validator)
        state = decode_mark(honest).state if count else secrets.token_bytes(32)  # type: ignore[union-attr]
        with contextlib.suppress(ChainError):
            junk.commit(Mark(run, number, state, everybody, secrets.token_bytes(16)).encode())
    return rounds
