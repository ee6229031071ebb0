"""Events: known problems of a swarm, logged as one line with cause, remedy and name.

docs/troubleshooting.md explains each in more detail.
"""

from __future__ import annotations

import logging

EVENTS: dict[str, str] = {
    "peer_start": (
        "check that the port is free, that the firewall lets it in and out, and that "
        "--dht.initial_peers, where given, are this run's; a running peer dials again by itself"
    ),
    "no_group": (
        "nothing is lost, the next epoch tries again; if it repeats, let other peers reach "
        "--dht.port (--dht.external_ip behind a router), or give [swarm] matchmaking_seconds of "
        "run.toml more"
    ),
    "dht_split": (
        "registered peers are dialed again every 30 seconds; if it persists, check that --dht.port "
        "is open on both sides and that --dht.external_ip is the address of this machine"
    ),
    "state_download": (
        "the next peer is asked, or the same again at the next request; if it persists, this "
        "machine's link is too slow for the model, or no peer of the run can be reached"
    ),
    "stall": (
        "give it a minute to recover; if it does not, restart this neuron, which resumes from its "
        "last checkpoint, and report this line"
    ),
    "batch_meaning": (
        "batch sizes come from the request, epoch_samples and learning_rate from run.toml: "
        "no flag of this machine changes them"
    ),
    "dependencies": ("install what this version was written for"),
    "catch_up": (
        "a peer that is often behind needs a faster machine or link, or its run longer epochs "
        "([swarm] epoch_samples of run.toml)"
    ),
    "score": ("docs/troubleshooting.md says what each part measures"),
    "embedded_chain": (
        "to join a real one: --subtensor.network finney --netuid N --wallet.name W "
        "--wallet.hotkey H"
    ),
    "other_run": (
        "peers train together only with the same run.toml, model and data: compare them, and "
        "the versions of hiveminer"
    ),
    "poison": (
        "it was neither sent nor applied; if it is ours and repeats, lower [optimizer] "
        "learning_rate or check the rows; if it is another's, that miner must act"
    ),
    "silence": (
        "only time is lost; if it is ours, check this machine's link and load; if it is another's, "
        "that miner must act"
    ),
    "diverged": (
        "it loads the swarm's state again; if it repeats, test this machine's memory and device"
    ),
    "checkpoint": (
        "the previous one is used, or the swarm's state; check that the disk of --neuron.path "
        "has room and works"
    ),
}


def tell(logger: logging.Logger, event: str, cause: str, *, level: int = logging.WARNING) -> None:
    """Log one line, "cause; remedy [event]"; the record's `event` is the name, one of EVENTS."""
    logger.log(
        level, "%s; %s [%s]", cause, EVENTS[event], event,
        extra={"event": event}, stacklevel=2,
    )  # fmt: skip
