"""A simulator of sparseloco's rounds: a fake chain, peers and validators, all by one seed.

Time goes in blocks. The world hurts its peers in every way that the protocol claims to
survive, and the checks run after every step.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import replace
from fractions import Fraction

from simulated_chain import (
    MAX_BLOB_BYTES,
    RUN,
    START,
    ZERO,
    Call,
    Chain,
    Truth,
    Vector,
    add,
    state_hash,
)
from simulated_peer import SimulatedPeer

from hiveminer.strategies.sparseloco import rounds
from hiveminer.strategies.sparseloco.rounds import Action, Decision, Neuron, Rules
from hiveminer.strategies.sparseloco.schedule import Schedule

FAULTS = ("withholds", "overwrites", "malformed", "too long", "junk record", "rounds")
CHAOS_ROUNDS = 5
CALM_ROUNDS = 3


class World:
    """One schedule: everything that happens follows from the seed."""

    def __init__(self, seed: int):
        rng = self.rng = random.Random(seed)
        self.schedule = Schedule(rng.randint(9, 12), mark_blocks=4, cut_blocks=2)
        quorum = rng.choice([Fraction(1, 2), Fraction(1, 2), Fraction(2, 3), Fraction(9, 10)])
        places = rng.choice([1, 2, 5, 20])
        self.rules = Rules(RUN, self.schedule, MAX_BLOB_BYTES, quorum, places)
        self.truth = Truth(quorum, places, self.schedule)
        self.junk_state = rng.randbytes(32)
        self.crash_rate = rng.choice([0, 0.002, 0.01])
        self.loss = rng.choice([0, 0.1, 0.4])
        self.longest_delay = rng.choice([0, 1, 4])
        self.outage_from = self.outage_until = 0
        self.marks_all = rng.random() < 0.5
        self.withholding = rng.choice([0, 0, 0.5])
        self.unrest = rng.choice([0.02, 0.1, 0.2])
        self.peers: dict[bytes, SimulatedPeer] = {}
        self.gone: set[bytes] = set()
        self.cuts: dict[tuple[int, bytes], Vector] = {}
        self.decisions: dict[int, Decision] = {}
        self._sums: dict[tuple[bytes, bytes], Vector] = {}
        self.events: dict[str, int] = {}
        self.neurons = self._register()
        self.chain = Chain(rng, self.neurons, lag=rng.choice([1, 2]))
        for peer in self.peers.values():
            peer.position = rounds.start(peer.hotkey, state_hash(START))
            peer.states, peer.local = {state_hash(START): START}, START
            peer.save()

    def _register(self) -> tuple[Neuron, ...]:
        rng = self.rng
        uids = rng.sample([0, 255, *rng.sample(range(1, 255), 10)], 12)
        neurons = [
            self._neuron(uids.pop(), permit=True, mines=rng.random() < 0.2)
            for _ in range(rng.randint(1, 5))
        ]
        neurons += [
            self._neuron(uids.pop(), permit=False, mines=True) for _ in range(rng.randint(2, 4))
        ]
        for neuron in sorted(neurons, key=lambda neuron: neuron.stake):
            peer = self.peers[neuron.hotkey]
            if neuron.permit:
                peer.fault = rng.choice(["", "lies", "lies", "lazy"])
            elif rng.random() < 0.3:
                peer.fault = rng.choice(FAULTS)
            if not self._is_safe(neurons):
                peer.fault = ""
        return tuple(neurons)

    def _neuron(self, uid: int, *, permit: bool, mines: bool) -> Neuron:
        hotkey = self.rng.randbytes(32)
        self.peers[hotkey] = SimulatedPeer(self, hotkey, mines=mines)
        stake = self.rng.choice([0, 1, 5, 20, 40, 40]) * self.rng.choice([1, 10**15])
        return Neuron(uid, hotkey, permit, stake, self.rng.choice([0, 0, 7, 99, 65535]))

    def _is_safe(self, neurons: list[Neuron]) -> bool:
        """Whether those who do wrong hold less than it takes to be more than half of a
        quorum: what the protocol promises holds only then."""
        stakes = {n.hotkey: max(1, n.stake) for n in neurons if n.permit}
        bad = sum(stake for hotkey, stake in stakes.items() if self.peers[hotkey].fault)
        return 2 * bad <= self.rules.quorum * sum(stakes.values()) and 2 * bad < sum(
            stakes.values()
        )

    # What happens.

    def run(self) -> None:
        blocks = CHAOS_ROUNDS * self.schedule.round_blocks
        while self.chain.head.number < blocks:
            self._disturb()
            self._tick()
        self._heal()
        last = self.schedule.round_at(self.chain.head.number) + CALM_ROUNDS
        while self.chain.head.number < self.schedule.marks_block(last) + self.chain.lag + 2:
            self._tick()
        self._check_healed(last)

    def _tick(self) -> None:
        self.chain.advance(self.neurons)
        self._follow()
        if self.chain.head.number == self.outage_from:
            for peer in self.peers.values():
                if self.rng.random() < 0.8:
                    kept = peer.kept_hashes
                    peer.blobs = {h: b for h, b in peer.blobs.items() if h in kept}
        peers = [peer for peer in self.peers.values() if peer.hotkey not in self.gone]
        self.rng.shuffle(peers)
        for peer in peers:
            peer.step()
            self._check_peer(peer)

    def _follow(self) -> None:
        newest = self.schedule.newest_final_round(self.chain.final)
        for number in range(len(self.truth.decided), newest + 1):
            before = (self.truth.confirmed, self.truth.newest)
            self.truth.follow(self.chain, number)
            self._check_rule(number, before)

    def _disturb(self) -> None:
        rng = self.rng
        starts = self.chain.head.number % self.schedule.round_blocks == 0
        if starts and rng.random() < self.withholding:
            withhold(self, next(iter(self.peers.values())))
        if rng.random() > self.unrest:
            return
        peer = rng.choice(list(self.peers.values()))
        self.happened(event := rng.choice(sorted(EVENTS)))
        EVENTS[event](self, peer)

    def _heal(self) -> None:
        self.loss = self.longest_delay = self.crash_rate = 0
        self.chain.stalled_until = self.outage_until = 0
        for peer in self.peers.values():
            peer.group, peer.sees_chain = 0, True
            if peer.fault == "rounds":
                peer.fault = ""
            if not peer.alive and peer.hotkey not in self.gone:
                peer.restart()

    def happened(self, event: str) -> None:
        self.events[event] = self.events.get(event, 0) + 1

    def note(self, action: Action) -> None:
        for name in ("returned", "repairs", "differs"):
            if getattr(action, name):
                self.happened(name)

    # What peers reach.

    def send(self, peer: SimulatedPeer, raw: bytes) -> None:
        if self.rng.random() < self.loss / 2:
            return
        arrives = self.chain.head.number + 1 + self.rng.randint(0, self.longest_delay)
        self.chain.submit(Call(peer.hotkey, raw, arrives, arrives + 7))

    def decide(self, number: int) -> Decision:
        """What a peer decides from what it reads itself; often enough, the first one's."""
        if number in self.decisions and self.rng.random() < 0.7:
            return self.decisions[number]
        decision = rounds.decide(self.rules, self.chain.facts(self.schedule, number))
        truth = self.truth.decided[number]
        if truth is None:
            assert decision.parent is None
        else:
            hotkeys = tuple(blob.hotkey for blob in decision.contributions)
            assert (decision.parent, hotkeys) == truth, f"round {number}"
        assert self.decisions.setdefault(number, decision) == decision
        return decision

    def permitted(self, hotkey: bytes, number: int) -> bool:
        neurons = self.chain.blocks[self.schedule.first_block(number)].neurons
        return hotkey in {neuron.hotkey for neuron in neurons if neuron.permit}

    def _others(self, peer: SimulatedPeer, *, blobs: bool) -> list[SimulatedPeer]:
        outage = blobs and self.outage_from <= self.chain.head.number < self.outage_until
        if outage or self.rng.random() < self.loss:
            return []
        others = [
            other
            for other in self.peers.values()
            if other.alive and other is not peer and other.group == peer.group
        ]
        self.rng.shuffle(others)
        return others

    def fetch_blob(self, peer: SimulatedPeer, blob_hash: bytes) -> bytes | None:
        """From a random holder first, and from another if that fails."""
        for other in self._others(peer, blobs=True):
            if other.serves(blob_hash) and self.rng.random() >= self.loss:
                blob = b"something else" if other.fault == "lies" else other.blobs[blob_hash]
                if hashlib.sha256(blob).digest() == blob_hash:
                    return blob
        return None

    def fetch_state(self, peer: SimulatedPeer, wanted: bytes) -> Vector | None:
        for other in self._others(peer, blobs=False):
            if wanted in other.states and self.rng.random() >= self.loss:
                state = (0, 1) if other.fault == "lies" else other.states[wanted]
                if state_hash(state) == wanted:
                    return state
        return None

    def cut(self, peer: SimulatedPeer, number: int, blob: bytes, q: Vector) -> None:
        assert (number, peer.hotkey) not in self.cuts, "a second cut in one round"
        self.cuts[number, peer.hotkey] = q
        self.truth.blobs[hashlib.sha256(blob).digest()] = blob

    def fork(self, state: Vector) -> Vector:
        """The same state with a rounding error."""
        other = (state[0] + 1, state[1])
        self.truth.states[state_hash(other)] = other
        self.truth.lineage[state_hash(other)] = self.truth.lineage[state_hash(state)]
        return other

    # What must hold.

    def _check_rule(self, number: int, before: tuple[bytes, bytes]) -> None:
        decided = self.truth.decided[number]
        if decided is None:
            return
        assert decided[0] in before, "a state that nobody made was decided"
        for share in self.truth.shares[number]:
            assert share > self.rules.quorum / 2, "a minority decided"
        for hotkey in decided[1]:
            assert (number, hotkey) in self.cuts, "what was never cut counts"

    def _check_peer(self, peer: SimulatedPeer) -> None:
        """After every step: the state is one that the chain made, and no learning is lost."""
        position = peer.position
        if not peer.alive or position.held is None:
            return
        state = peer.states[position.held]
        assert self.truth.states[position.held] == state
        assert position.base is None or position.states_to_keep <= set(peer.states)
        if peer.fault == "overwrites":  # it publishes what it does not keep account of
            return
        total = add(peer.learned, add(peer.forgotten, peer.trained))
        total = add(total, self._counted(position.held, peer.hotkey))
        assert total == ZERO, "learning was lost or counted twice"

    def _counted(self, state: bytes, hotkey: bytes) -> Vector:
        """The sum of a peer's blobs that are in a state."""
        if (state, hotkey) not in self._sums:
            total = ZERO
            for number, author in self.truth.lineage[state]:
                if author == hotkey:
                    total = add(total, self.cuts[number, hotkey])
            self._sums[state, hotkey] = total
        return self._sums[state, hotkey]

    def _check_healed(self, last: int) -> None:
        for peer in self.peers.values():
            if peer.hotkey in self.gone:
                continue
            position = peer.position
            assert position.round == last
            assert position.confirmed == self.truth.confirmed
            assert position.newest == position.held == self.truth.newest
        if self._must_progress():
            calm = range(last - CALM_ROUNDS, last + 1)
            decided = [self.truth.decided[number] for number in calm]
            assert any(decided), "nothing was decided though all was calm"
            assert any(found and found[1] for found in decided), "nothing counted"

    def _must_progress(self) -> bool:
        stakes = {n.hotkey: max(1, n.stake) for n in self.neurons if n.permit}
        honest = sum(stake for hotkey, stake in stakes.items() if not self.peers[hotkey].fault)
        miners = [self.peers[neuron.hotkey] for neuron in self.neurons]
        works = any(peer.mines and not peer.fault for peer in miners)
        return works and honest >= self.rules.quorum * sum(stakes.values())


# --- what disturbs the world ------------------------------------------------------------


def crash(world: World, peer: SimulatedPeer) -> None:
    peer.alive = False


def restart(world: World, peer: SimulatedPeer) -> None:
    for other in world.peers.values():
        if not other.alive and other.hotkey not in world.gone:
            other.restart()


def partition(world: World, peer: SimulatedPeer) -> None:
    for other in world.peers.values():
        other.group = world.rng.randint(0, 1)
        other.sees_chain = world.rng.random() < 0.8


def reunite(world: World, peer: SimulatedPeer) -> None:
    for other in world.peers.values():
        other.group, other.sees_chain = 0, True


def stall(world: World, peer: SimulatedPeer) -> None:
    world.chain.stalled_until = world.chain.head.number + world.rng.randint(3, 18)


def withhold(world: World, peer: SimulatedPeer) -> None:
    """After the next marks nobody serves blobs for a while, and some lose what they had."""
    number = world.schedule.round_at(world.chain.head.number)
    world.outage_from = world.schedule.marks_block(number) - 1
    world.outage_until = world.outage_from + world.rng.randint(5, 14)


def reorganize(world: World, peer: SimulatedPeer) -> None:
    for _ in range(world.chain.reorganize()):
        world.chain.advance(world.neurons)
    world._follow()


def deregister(world: World, peer: SimulatedPeer) -> None:
    """Another hotkey takes the uid; it joins late.

    Not the only holder of a state: what is lost for good nobody can bring back.
    """
    others = [p for p in world.peers.values() if p is not peer and p.hotkey not in world.gone]
    held = {state for other in others for state in other.checkpoint.states}
    if not {world.truth.confirmed, world.truth.newest} <= held:
        return
    for neuron in world.neurons:
        if neuron.hotkey == peer.hotkey:
            new = world._neuron(neuron.uid, permit=False, mines=True)
            neurons = [new if n is neuron else n for n in world.neurons]
            if world._is_safe(neurons) and any(n.permit for n in neurons):
                world.neurons = tuple(neurons)
                world.gone.add(peer.hotkey)
                peer.alive = False
            else:
                del world.peers[new.hotkey]
            return


def change(world: World, peer: SimulatedPeer) -> None:
    """Stake, incentive and permit of one neuron change."""
    rng = world.rng
    neurons = [
        replace(
            neuron,
            permit=rng.random() < 0.6,
            stake=rng.choice([0, 5, 20, 40]),
            incentive=rng.randint(0, 65535),
        )
        if neuron.hotkey == peer.hotkey
        else neuron
        for neuron in world.neurons
    ]
    if world._is_safe(neurons) and any(neuron.permit for neuron in neurons):
        world.neurons = tuple(neurons)


EVENTS = {
    event.__name__: event
    for event in (
        crash, restart, partition, reunite, stall, withhold, reorganize, deregister, change,
    )
}  # fmt: skip
