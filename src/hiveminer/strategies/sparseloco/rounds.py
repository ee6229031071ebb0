"""Rounds: which blobs count, and what a peer does about it.

Pure: dataclasses in, decisions out. There is no clock, disk or network here, so that the
rule that moves everybody's weights can be tested, simulated and replayed from a log. The
protocol is docs/sparseloco.md.

- `decide` derives from final chain state who counts in a round, the same on every peer.
- `next_action` says what a peer must do after a decision.
- `Position` is a peer's place in the rounds: the states that the chain names, the one that its
  local weights are based on, and its own blobs. Checkpoints save it.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction

from hiveminer.strategies.sparseloco.records import MAX_UIDS, decode_mark, decode_record
from hiveminer.strategies.sparseloco.schedule import Schedule

INCENTIVE_PLACES = Fraction(4, 5)
"""Share of the places that go to the highest incentives; the rest is drawn at random."""


@dataclass(frozen=True)
class Rules:
    """The run's rules for deciding rounds, the same for everybody.

    run: its 8 bytes in records and marks. max_blob_bytes: the longest blob that counts.
    quorum: the share of all permitted stake that must mark. It is exact: build it from
    the text of run.toml, since the float 0.1 is not a tenth.
    """

    run: bytes
    schedule: Schedule
    max_blob_bytes: int
    quorum: Fraction = Fraction(1, 2)
    max_contributors: int = 20


@dataclass(frozen=True)
class Neuron:
    """One uid of the snapshot. hotkey: 32 bytes. stake: total_stake in rao. incentive: the
    chain's 16-bit integer."""

    uid: int
    hotkey: bytes
    permit: bool
    stake: int
    incentive: int


@dataclass(frozen=True)
class Block:
    """A block that was read; its hash identifies the fork."""

    number: int
    hash: bytes


@dataclass(frozen=True)
class Facts:
    """Everything that decides a round, as read from the chain at three final blocks.

    neurons: the snapshot at the round's first block. records, marks: raw commitments by
    hotkey, whatever they contain, at the records' and at the marks' deadline.
    Raises ValueError if the snapshot has a uid or a hotkey twice.
    """

    round: int
    first_block: Block
    records_block: Block
    marks_block: Block
    neurons: tuple[Neuron, ...]
    records: Mapping[bytes, bytes]
    marks: Mapping[bytes, bytes]

    def __post_init__(self) -> None:
        for values in ([n.uid for n in self.neurons], [n.hotkey for n in self.neurons]):
            if len(set(values)) < len(values):
                raise ValueError(f"round {self.round}: the snapshot has a uid or hotkey twice")

    def of_registered(self) -> Facts:
        """Without the commitments of hotkeys that are not in the snapshot: they decide nothing."""
        hotkeys = {neuron.hotkey for neuron in self.neurons}
        records = {key: data for key, data in self.records.items() if key in hotkeys}
        marks = {key: data for key, data in self.marks.items() if key in hotkeys}
        return replace(self, records=records, marks=marks)


@dataclass(frozen=True)
class Contribution:
    """A blob that counts, and its author."""

    uid: int
    hotkey: bytes
    blob_bytes: int
    blob_hash: bytes


@dataclass(frozen=True)
class Decision:
    """What the chain decided for one round.

    parent: hash of the state that the blobs are applied to; None for an empty round.
    contributions: the blobs that count, by ascending uid. reason: why the round is empty.
    left_out: (uid, why) for each record of this round that does not count.
    """

    round: int
    parent: bytes | None
    contributions: tuple[Contribution, ...] = ()
    reason: str = ""
    left_out: tuple[tuple[int, str], ...] = ()


def decide(rules: Rules, facts: Facts) -> Decision:
    """Decide who counts in a round. The same facts give the same decision on every machine.

    Commitments are not trusted: anything but a record or a mark of this run and round is
    ignored. Raises ValueError if the facts were read at the wrong blocks.
    """
    _check_blocks(rules.schedule, facts)
    stakes = {n.hotkey: max(1, n.stake) for n in facts.neurons if n.permit}
    marks = {
        hotkey: mark
        for hotkey in stakes
        if (mark := decode_mark(facts.marks.get(hotkey))) is not None
        and (mark.run, mark.round) == (rules.run, facts.round)
    }
    marking = sum(stakes[hotkey] for hotkey in marks)
    if not marks or marking < rules.quorum * sum(stakes.values()):
        return Decision(facts.round, None, reason="too little stake marked")
    by_state: Counter[bytes] = Counter()
    for hotkey, mark in marks.items():
        by_state[mark.state] += stakes[hotkey]
    parent, stake = by_state.most_common(1)[0]
    if 2 * stake <= marking:
        return Decision(facts.round, None, reason="no state was named by more than half")
    behind = [(stakes[hotkey], mark) for hotkey, mark in marks.items() if mark.state == parent]

    def is_marked(uid: int) -> bool:
        return 2 * sum(stake for stake, mark in behind if uid in mark.uids) > marking

    return _count(rules, facts, parent, is_marked)


def candidates(rules: Rules, facts: Facts, parent: bytes) -> dict[Neuron, Contribution]:
    """The blobs that a validator that holds `parent` may mark, by author: their records have this
    run, round and parent and are within bounds. `facts.marks` is not read."""
    return {neuron: blob for neuron, blob, why in _records(rules, facts, parent) if not why}


def first_places(
    neurons: Iterable[Neuron], *, places: int, records_hash: bytes
) -> tuple[Neuron, ...]:
    """Who gets the places: four fifths by incentive, largest first, the rest drawn at random.

    The draw is by SHA-256(hash of the records' block, hotkey), smallest first, which also breaks
    ties of incentive. A validator fetches the blobs of those that this function picks from its
    candidates, drops the bad ones, and calls it again until all are good.
    """

    def lot(neuron: Neuron) -> bytes:
        return hashlib.sha256(records_hash + neuron.hotkey).digest()

    by_incentive = sorted(neurons, key=lambda neuron: (-neuron.incentive, lot(neuron)))
    first = int(places * INCENTIVE_PLACES)
    rest = sorted(by_incentive[first:], key=lot)
    return tuple(by_incentive[:first] + rest[: places - first])


def _check_blocks(schedule: Schedule, facts: Facts) -> None:
    read = (facts.first_block.number, facts.records_block.number, facts.marks_block.number)
    blocks = schedule.first_block, schedule.records_block, schedule.marks_block
    due = tuple(block(facts.round) for block in blocks)
    if read != due:
        raise ValueError(f"round {facts.round} is decided at blocks {due}, these are {read}")


def _records(
    rules: Rules, facts: Facts, parent: bytes
) -> Iterator[tuple[Neuron, Contribution, str]]:
    """The records of this run and round by ascending uid, and why each cannot count, if so."""
    for neuron in sorted(facts.neurons, key=lambda neuron: neuron.uid):
        record = decode_record(facts.records.get(neuron.hotkey))
        if record is None or (record.run, record.round) != (rules.run, facts.round):
            continue
        if not 0 <= neuron.uid < MAX_UIDS:
            continue
        why = ""
        if record.parent != parent:
            why = "based on another state"
        elif not 0 < record.blob_bytes <= rules.max_blob_bytes:
            why = "blob size out of bounds"
        blob = Contribution(neuron.uid, neuron.hotkey, record.blob_bytes, record.blob_hash)
        yield neuron, blob, why


def _count(rules: Rules, facts: Facts, parent: bytes, is_marked: Callable[[int], bool]) -> Decision:
    left_out, eligible = {}, {}
    for neuron, blob, why in _records(rules, facts, parent):
        if why or not is_marked(neuron.uid):
            left_out[neuron.uid] = why or "not marked by more than half"
        else:
            eligible[neuron] = blob
    chosen = first_places(
        eligible, places=rules.max_contributors, records_hash=facts.records_block.hash
    )
    left_out |= {n.uid: "more contributors than places" for n in eligible.keys() - set(chosen)}
    contributions = tuple(blob for neuron, blob in eligible.items() if neuron in chosen)
    return Decision(facts.round, parent, contributions, left_out=tuple(sorted(left_out.items())))


@dataclass(frozen=True)
class OwnBlob:
    """A blob of this peer's: the round that it was cut in and its SHA-256.

    forgotten: (1 - rho) e was already taken off u, which happens only once.
    """

    round: int
    blob_hash: bytes
    forgotten: bool = False


@dataclass(frozen=True)
class Transfer:
    """What moves between u (what a peer has learned beyond its state) and the state.

    off: own blobs whose q is taken off u, with (1 - rho) e unless `forgotten`.
    back: own blobs whose q is added to u.
    """

    off: tuple[OwnBlob, ...] = ()
    back: tuple[OwnBlob, ...] = ()


@dataclass(frozen=True)
class Position:
    """A peer's place in the decided rounds.

    hotkey: the peer's. round: the newest round that it settled; None for a joiner.
    confirmed: the state that the last decided round named as its parent. contributions:
    that round's blobs. newest: the state after them; None until this peer has computed it.
    held: the state that the local weights are based on; None if there is none yet.

    Own blobs, whose q and e must be kept. cut: its round is not decided yet. counted: is
    among `contributions`. taken: whether its q was taken off u, because `held` is the newest
    state. owed: confirmed, but not taken off yet, because `held` does not include them.
    """

    hotkey: bytes
    round: int | None = None
    confirmed: bytes | None = None
    contributions: tuple[Contribution, ...] = ()
    newest: bytes | None = None
    held: bytes | None = None
    cut: OwnBlob | None = None
    counted: OwnBlob | None = None
    taken: bool = False
    owed: tuple[OwnBlob, ...] = ()

    @property
    def base(self) -> bytes | None:
        """The parent of this peer's records and marks: the newest state that it holds.

        None while it holds neither the newest nor the confirmed state."""
        current = self.held is not None and self.held in {self.confirmed, self.newest}
        return self.held if current else None

    @property
    def missing_state(self) -> bytes | None:
        """The state to download, if one is needed, before `take_state`."""
        return None if self.base is not None else self.confirmed

    @property
    def missing_blobs(self) -> tuple[Contribution, ...]:
        """The blobs to fetch and apply to the confirmed state, if any, before `make_newest`."""
        ready = self.base is not None and self.newest is None
        return self.contributions if ready else ()

    @property
    def states_to_keep(self) -> frozenset[bytes]:
        """The states that this peer keeps and serves, if it has them."""
        return frozenset(state for state in (self.confirmed, self.newest) if state is not None)

    @property
    def own_blobs(self) -> tuple[OwnBlob, ...]:
        """The own blobs that a checkpoint must hold."""
        return (*self.owed, *(blob for blob in (self.counted, self.cut) if blob is not None))


@dataclass(frozen=True)
class Action:
    """What a peer does about a decision, besides to apply its blobs to the state that it names.

    returned: the own blob of the last counted round, whose q goes back into u, since that round is
    void. repairs: the peer does not hold the named state, and downloads it. differs: it computed
    another newest state from the same log. Then it takes the named one only if the two are equal
    within rounding; otherwise it keeps its own and stops committing, since a majority must not
    rewrite history for those who hold it.
    """

    returned: OwnBlob | None = None
    repairs: bool = False
    differs: bool = False


def start(hotkey: bytes, state: bytes, *, settled: int = -1) -> Position:
    """The position at the run's initial state, before any round has counted.

    settled: the newest final round, for a joiner that finds only empty ones.
    """
    return Position(hotkey, round=settled, confirmed=state, newest=state, held=state)


def next_action(position: Position, decision: Decision) -> Action:
    """What the peer must do after the decision of its next round."""
    parent = decision.parent
    if parent is None:
        return Action()
    returned = position.counted if position.taken and _is_void(position, parent) else None
    holds = position.base is not None
    repairs = not holds or parent not in position.states_to_keep
    return Action(returned, repairs, differs=repairs and holds and position.newest is not None)


def settle(position: Position, decision: Decision) -> tuple[Position, Action]:
    """The position after a decision, and the action that leads there.

    Rounds are settled in order, empty ones too; a joiner (`Position(hotkey)`) starts with the
    newest decided one. Afterwards the peer fetches `missing_state` and `missing_blobs`, in that
    order, however long that takes. Raises ValueError for a round out of order.
    """
    if position.round is not None and decision.round != position.round + 1:
        raise ValueError(f"round {decision.round} cannot be settled after {position.round}")
    action = next_action(position, decision)
    cut = position.cut
    position = replace(position, round=decision.round, cut=None)
    if decision.parent is None:
        return position, action
    owed = position.owed
    if position.counted and not position.taken and not _is_void(position, decision.parent):
        owed = (*owed, position.counted)
    counts = cut is not None and any(
        (blob.hotkey, blob.blob_hash) == (position.hotkey, cut.blob_hash)
        for blob in decision.contributions
    )
    return (
        replace(
            position,
            confirmed=decision.parent,
            contributions=decision.contributions,
            newest=None if decision.contributions else decision.parent,
            held=position.held if action.repairs else decision.parent,
            counted=cut if counts else None,
            taken=False,
            owed=owed,
        ),
        action,
    )


def take_state(position: Position) -> tuple[Position, Transfer]:
    """The position after the download of the confirmed state.

    Apply the transfer to u first, then set local = state - u. Raises ValueError if no state is
    missing.
    """
    if position.missing_state is None:
        raise ValueError(f"round {position.round}: no state is missing")
    newest = None if position.contributions else position.confirmed
    back = (position.counted,) if position.counted and position.taken else ()
    transfer = Transfer(position.owed, back)
    held = position.confirmed
    return replace(position, held=held, newest=newest, taken=False, owed=()), transfer


def make_newest(position: Position, state: bytes) -> tuple[Position, Transfer]:
    """The position after the missing blobs were applied to the confirmed state.

    state: the hash of the result, on which the local weights are based from now on: local +=
    result - confirmed, less the transfer. Raises ValueError unless the peer holds the
    confirmed state and has not done this yet.
    """
    if position.held != position.confirmed or position.newest is not None:
        raise ValueError(f"round {position.round}: there is nothing to apply the blobs to")
    position = replace(position, newest=state, held=state)
    own = position.counted
    if own is None:
        return position, Transfer()
    return replace(position, counted=replace(own, forgotten=True), taken=True), Transfer((own,))


def cut_blob(position: Position, number: int, blob_hash: bytes) -> Position:
    """The position after a blob of round `number` was cut against `position.base`.

    Save it with the blob, q and e before the record is committed. Raises ValueError if the
    round before is not settled, there is no state to cut against, or this round already has a
    blob: a restarted peer serves the old one and never cuts a second.
    """
    if position.round != number - 1:
        raise ValueError(f"no cut in round {number}: the newest settled one is {position.round}")
    if position.base is None:
        raise ValueError(f"no cut in round {number}: the confirmed state is missing")
    if position.cut is not None:
        raise ValueError(f"round {number} already has its blob")
    return replace(position, cut=OwnBlob(number, blob_hash))


def restart(position: Position, states: Collection[bytes]) -> Position:
    """The position of a checkpoint after a restart with only `states` available.

    Without both of its states the peer holds none, and downloads the confirmed one.
    """
    return position if position.states_to_keep <= set(states) else replace(position, held=None)


def _is_void(position: Position, parent: bytes) -> bool:
    """Whether naming `parent` voids the last counted round."""
    return parent == position.confirmed and parent != position.newest
