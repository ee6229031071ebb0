"""`hiveminer doctor`: every line passed, warned or failed, with what to do."""

from __future__ import annotations

import json
import socket
import time
import tomllib
from pathlib import Path
from typing import Any

import bittensor as bt
import pytest
import torch
from small_neurons import SmallMiner, miner_settings
from talk import caller
from tiny import tiny_model

from hiveminer import cli
from hiveminer.chain import Chain, EmbeddedSubstrate, embedded_wallet, join_embedded
from hiveminer.commands.checks import chain as chain_checks
from hiveminer.commands.checks import machine, rounds, training
from hiveminer.commands.checks.base import Check, Examination, passed
from hiveminer.commands.checks.machine import PYTHONS
from hiveminer.commands.doctor import examine, within
from hiveminer.config.settings import MinerSettings
from hiveminer.errors import NotYetRegistered, OperatorError
from hiveminer.training.memory import memory_needed

ROOT = Path(__file__).resolve().parent.parent


def flags(folder: Path) -> list[str]:
    return [
        *("--subtensor.path", str(folder / "network")),
        *("--neuron.path", str(folder / "state")),
        *("--axon.port", "0", "--dht.port", "0"),
    ]


def examined(settings: MinerSettings, **options: Any) -> dict[str, Check]:
    return {check.name: check for check in examine(Examination(settings, **options))}


@pytest.fixture
def registered(tmp_path: Path) -> MinerSettings:
    """A miner that has joined the embedded network in `tmp_path`, and is not running."""
    settings = miner_settings(tmp_path)
    with caller(settings.subtensor.path, prefix="miner") as chain:
        join_embedded(chain)
        chain.serve_axon("127.0.0.1", 8091)
        chain.commit(
            b"/ip4/127.0.0.1/tcp/1/p2p/12D3KooWK99VoVxNE7XzyBwXEzW7xhK7Gpv85r9F3V3fyKSUKPH5"
        )
    return settings


def test_a_fresh_machine_passes_offline_and_nothing_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = cli.main(["doctor", "--json", *flags(tmp_path)])
    said = json.loads(capsys.readouterr().out)
    verdicts = {check["name"]: check["verdict"] for check in said["checks"]}
    assert code == said["failed"] == 0, said
    assert set(verdicts.values()) == {"passed"}, said
    assert len(verdicts) == 19
    assert list(tmp_path.iterdir()) == []


def test_one_line_a_check_for_people(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    missing = tmp_path / "run.toml"
    code = cli.main(["doctor", *flags(tmp_path), "--neuron.run", str(missing)])
    out = capsys.readouterr().out
    assert code == 4  # the run, and what needs it: memory, data and rounds
    assert f"{missing}: no such file" in out
    assert "-> --neuron.run wants a run.toml" in out
    assert "4 failed" in out


def test_a_registered_miner_is_found_without_claiming_its_key(registered: MinerSettings) -> None:
    place = registered.subtensor.path
    with embedded_wallet(place, prefix="miner") as held:  # as a running miner holds it
        checks = examined(registered)
        hotkey = held.wallet.hotkey.ss58_address
    assert checks["wallet"].found == f"throwaway key {hotkey}"
    assert checks["registered"].found.startswith("uid 0 since block ")
    assert "1 of 256 neurons" in checks["chain"].found
    assert checks["clock"].verdict == "passed"
    assert "127.0.0.1:8091 is published" in checks["axon on the chain"].found
    assert {check.verdict for check in checks.values()} == {"passed"}


def rounds_check(folder: Path, settings: MinerSettings, **section: int) -> Check:
    """The check of a run with this [sparseloco] section."""
    run = folder / "run.toml"
    lines = ['strategy = "sparseloco"', "[sparseloco]", *(f"{k} = {v}" for k, v in section.items())]
    run.write_text("\n".join(lines))
    neuron = settings.neuron.model_copy(update={"run": run})
    exam = Examination(settings.model_copy(update={"neuron": neuron}))
    for check in (training.run_file, chain_checks.chain):
        check(exam)
    return rounds.rounds(exam)


@pytest.mark.parametrize(
    ("section", "verdict", "found"),
    [
        ({"round_blocks": 24, "mark_blocks": 7, "cut_blocks": 2}, "passed", "tempo 360"),
        ({"round_blocks": 15, "mark_blocks": 7, "cut_blocks": 2}, "warned", "at least 24"),
        ({"round_blocks": 10, "mark_blocks": 5, "cut_blocks": 2}, "failed", "is too short"),
        ({"round_blocks": 13, "mark_blocks": 7, "cut_blocks": 2}, "failed", "is too short"),
        ({"round_blocks": 30, "mark_blocks": 3, "cut_blocks": 2}, "failed", "mark_blocks 3"),
    ],
)
def test_a_schedule_is_checked(
    tmp_path: Path, section: dict[str, int], verdict: str, found: str
) -> None:
    check = rounds_check(tmp_path, miner_settings(tmp_path), **section)
    assert check.verdict == verdict
    assert found in check.found


def test_a_schedule_is_checked_against_the_chains_tempo(
    registered: MinerSettings, tmp_path: Path
) -> None:
    network = EmbeddedSubstrate(registered.subtensor.path / "chain.sqlite")
    network.set_hyperparameters(1, tempo=1000)
    check = rounds_check(tmp_path, registered, round_blocks=20, mark_blocks=7, cut_blocks=2)
    assert check.verdict == "failed"
    assert "at least 33 with 1 commitments" in check.found
    network.set_hyperparameters(1, tempo=0)
    assert "tempo is 0" in rounds_check(tmp_path, registered, round_blocks=50).found


def test_the_clock_is_compared_with_the_chains(registered: MinerSettings) -> None:
    for ahead, found in ((-60, " s behind the chain: calls will be refused"), (60, " s old")):
        exam = Examination(registered, clock=lambda ahead=ahead: time.time() + ahead)
        chain_checks.chain(exam)
        check = chain_checks.clock(exam)
        assert check.verdict == "failed"
        assert found in check.found
        assert "NTP" in check.cure


def test_peers_are_dialled_and_their_run_compared(
    registered: MinerSettings, tmp_path: Path
) -> None:
    peer = "/ip4/127.0.0.1/tcp/{}/p2p/12D3KooWK99VoVxNE7XzyBwXEzW7xhK7Gpv85r9F3V3fyKSUKPH5"
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        known = {"initial_peers": [peer.format(port), peer.format(1)]}
        good = examined(miner_settings(tmp_path, dht=known))["bootstrap peers"]
        assert (good.verdict, good.found) == ("passed", "1 of 2 take a connection")
    dead = miner_settings(tmp_path, dht={"initial_peers": [peer.format(1)]})
    assert examined(dead)["bootstrap peers"].verdict == "failed"
    # A validator that has committed another run.
    with caller(registered.subtensor.path, prefix="validator") as chain:
        join_embedded(chain, stake_tao=5000)
        chain.commit(b"run other-00000000-00000000-00000000")
        other = examined(registered)["bootstrap peers"]
        assert other.verdict == "failed"
        assert "differs" in other.found
        assert "--neuron.run" in other.cure


def test_taken_ports_fail_unless_any_would_do(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        check = machine.ports(Examination(miner_settings(tmp_path, axon={"port": port})))
        assert (check.verdict, check.found) == ("failed", f"in use: --axon.port {port}")


def test_a_real_network_wants_a_real_wallet_and_says_how(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        dead = f"ws://127.0.0.1:{listener.getsockname()[1]}"
    settings = miner_settings(tmp_path, subtensor={"network": dead}, wallet={"name": "w"})
    checks = examined(settings, ask_outside=lambda: "10.0.0.9")
    assert checks["wallet"].verdict == "failed"
    assert "btcli wallet new-hotkey --wallet w --wallet-hotkey default" in checks["wallet"].cure
    assert checks["chain"].verdict == "failed"
    assert dead in checks["chain"].found
    assert checks["registered"].cure == "fix the chain first"
    assert checks["address"].verdict == "warned"
    assert "private" in checks["address"].found
    assert "curl http://10.0.0.9:0/" in checks["reachable from outside"].cure
    bt.Wallet("w", "default", str(tmp_path / "wallets")).create_new_hotkey(suppress=True)
    assert chain_checks.wallet(Examination(settings)).verdict == "passed"
    file = tmp_path / "wallets" / "w" / "hotkeys" / "default"
    file.chmod(0o644)
    open_to_all = chain_checks.wallet(Examination(settings))
    assert (open_to_all.verdict, open_to_all.cure) == ("failed", f"chmod 600 {file}")
    file.chmod(0o600)
    (tmp_path / "wallets" / "w" / "coldkey").write_text("{}")
    assert chain_checks.wallet(Examination(settings)).verdict == "warned"


def test_a_miner_and_doctor_say_what_a_registration_costs_and_how_to_make_one(
    tmp_path: Path,
) -> None:
    """On an embedded chain that claims to be a real one."""
    bt.Wallet("w", "h", str(tmp_path / "wallets")).create_new_hotkey(suppress=True)
    settings = miner_settings(
        tmp_path, subtensor={"network": "test"}, wallet={"name": "w", "hotkey": "h"}
    )
    exam = Examination(settings)
    chain_checks.wallet(exam)
    client = bt.Client("local", substrate=EmbeddedSubstrate(tmp_path / "chain.sqlite"))
    with Chain(network="test", netuid=1, wallet=exam.wallet, client=client) as chain:
        exam.chain, exam.metagraph = chain, chain.metagraph()
        check = chain_checks.registered(exam)
        with pytest.raises(NotYetRegistered) as raised:
            SmallMiner(settings, chain=chain)
    assert check.verdict == "failed"
    assert "it costs 1.0000 TAO now" in check.found
    line = "btcli tx burned-register --netuid 1 --wallet w --wallet-hotkey h --network test"
    assert line in check.cure
    assert raised.value.exit_code == 2
    assert f"{line} (it costs 1.0000 TAO now)" in str(raised.value)


def test_wandb_without_a_key_stays_offline(tmp_path: Path) -> None:
    settings = miner_settings(tmp_path, wandb={"mode": "online"})
    assert machine.wandb(Examination(settings, environ={})).verdict == "warned"
    exam = Examination(settings, environ={"WANDB_API_KEY": "x"})
    assert machine.wandb(exam).verdict == "passed"


def test_a_check_that_hangs_breaks_or_refuses_is_a_failure_with_a_cure() -> None:
    def refuses() -> Check:
        raise OperatorError("no such thing; make one")

    def breaks() -> Check:
        raise KeyError("x")

    slow = within(lambda: time.sleep(5) or passed(""), seconds=0.05)  # type: ignore[func-returns-value]
    assert (slow.verdict, slow.found) == ("failed", "no answer within 0 s")
    refused = within(refuses, seconds=5)
    assert (refused.verdict, refused.found, refused.cure) == ("failed", "no such thing", "make one")
    assert within(breaks, seconds=5).found == "KeyError: 'x'"
    assert "not checked" in within(refuses, seconds=0).found


def test_the_pythons_are_those_of_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    low, high = (".".join(map(str, version)) for version in PYTHONS)
    assert project["requires-python"] == f">={low},<{high}"


def test_a_temporary_folder_that_a_start_would_refuse_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "none"))
    exam = Examination(miner_settings(tmp_path))
    check = within(lambda: machine.limits(exam), seconds=60)
    assert check.verdict == "failed"
    assert "does not exist" in check.found


@pytest.mark.parametrize(
    ("how", "found"), [("password", "has a password"), ("public", "only a public key")]
)
def test_a_hotkey_that_cannot_sign_fails(tmp_path: Path, how: str, found: str) -> None:
    wallet = bt.Wallet("w", "h", str(tmp_path / "wallets"))
    password = "made-Up-4-this!" if how == "password" else None
    wallet.create_new_hotkey(
        use_password=password is not None, hotkey_password=password, suppress=True
    )
    if how == "public":
        file = Path(wallet.hotkey_file.path)
        said = json.loads(file.read_bytes())
        file.write_text(json.dumps({name: said[name] for name in ("ss58Address", "publicKey")}))
    settings = miner_settings(
        tmp_path,
        subtensor={"network": "test"},
        wallet={"name": "w", "hotkey": "h"},
    )
    check = within(lambda: chain_checks.wallet(Examination(settings)), seconds=60)
    assert check.verdict == "failed"
    assert "the hotkey at" in check.found
    assert found in check.found


def test_memory_is_read_off_the_models_configuration(tmp_path: Path) -> None:
    built = tiny_model("llama")
    built.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()  # its weights are not needed
    run = tmp_path / "run.toml"
    run.write_text(f'[model]\nname = "{tmp_path / "model"}"\nsequence_length = 64')

    exam = Examination(miner_settings(tmp_path, neuron={"run": run, "device": "cpu"}))
    training.run_file(exam)
    needed = memory_needed(built, sequence_length=64)
    assert f"{needed.parameters / 1e6:.1f}M parameters" in training.memory(exam).found
    assert exam.fits
    least = needed.training + needed.host
    verdicts = [
        training.memory_check(needed, torch.device("cpu"), free=free).verdict
        for free in (10**12, least + 1, least - 1)
    ]
    assert verdicts == ["passed", "warned", "failed"]


def test_model_and_data_are_checked_as_the_programs_check_them(tmp_path: Path) -> None:
    data, run = tmp_path / "a.txt", tmp_path / "run.toml"
    run.write_text(f'[data]\nname = "{data}"\n[model]\nsequence_length = 64')

    def checked(content: bytes) -> Check:
        data.write_bytes(content)
        exam = Examination(miner_settings(tmp_path, neuron={"run": run, "device": "cpu"}))
        training.run_file(exam)
        training.memory(exam)
        return within(lambda: training.task(exam), seconds=60)

    assert checked(b"short\n" * 100).verdict == "warned", "rows of 480 bytes, and 64 are trained"
    assert checked(b"short\n").verdict == "passed"
    check = checked("café\n".encode("latin-1"))
    assert (check.verdict, "a.txt: line 1: not UTF-8" in check.found) == ("failed", True)
