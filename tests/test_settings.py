"""Settings: from flags, environment and file, with one-line errors."""

from __future__ import annotations

from pathlib import Path

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hiveminer import protocol
from hiveminer.config import flags
from hiveminer.config.flags import parse
from hiveminer.config.settings import (
    PROGRAMS,
    MinerSettings,
    ProgramSettings,
    ValidatorSettings,
)
from hiveminer.errors import ChainError, NotRegistered, OperatorError
from hiveminer.runtime.program import run_program

PEER_ID = "QmWhiaLrx3HRZfgXc2i7KW5nMUNK7P9tRc71yFJdGEZKkC"
PEER = f"/ip4/192.0.2.1/tcp/8009/p2p/{PEER_ID}"
OTHER_PEER = (
    "/dns4/peer.example/udp/8009/quic-v1/p2p/12D3KooWEyoppNCUx8Yx66oV9fJnriXwCcXwDDUA2kj6vnc6iDEp"
)
UNREAD = "nothing reads this variable"


def miner(*argv: str, **env: str) -> MinerSettings:
    return parse(argv, cls=MinerSettings, prog="hiveminer miner", env=env)


def validator(*argv: str, **env: str) -> ValidatorSettings:
    return parse(argv, cls=ValidatorSettings, prog="hiveminer validator", env=env)


def told(*argv: str, **env: str) -> str:
    """The one line that a mistake is told in."""
    with pytest.raises(OperatorError) as caught:
        miner(*argv, **env)
    assert caught.value.exit_code == 2
    line = str(caught.value)
    assert line
    assert line.isprintable()
    return line


def file(tmp_path: Path, text: str) -> str:
    path = tmp_path / "miner.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


# --- where a value comes from ------------------------------------------------------------------


def test_defaults_are_the_embedded_network_on_loopback() -> None:
    settings = miner()
    assert settings.embedded
    assert settings.netuid == 1
    assert (settings.axon_ip, settings.axon.port) == ("127.0.0.1", 8091)
    assert (settings.dht_ip, settings.dht.port) == ("127.0.0.1", 8009)
    assert settings.wallet.hotkey is None
    assert settings.blacklist.force_validator_permit
    assert not settings.blacklist.allow_non_registered
    assert settings.neuron.path == Path.home() / ".hiveminer"


def test_a_real_network_listens_everywhere_unless_told_otherwise() -> None:
    settings = miner("--subtensor.network", "finney")
    assert (settings.axon_ip, settings.dht_ip) == ("0.0.0.0", "0.0.0.0")
    settings = miner("--subtensor.network", "wss://node.example:443", "--axon.ip", "::1")
    assert (settings.axon_ip, settings.dht_ip) == ("::1", "0.0.0.0")


def test_flags_go_over_environment_over_file_over_defaults(tmp_path: Path) -> None:
    text = "netuid = 2\r\n[axon]\nport = 2\nmax_waiting = 2\n[dht]\nport = 2\n"
    path = file(tmp_path, f"\ufeff{text}")  # with a byte-order mark
    settings = miner(
        "--axon.port", "4", "--config", path, HIVEMINER_AXON__PORT="3", HIVEMINER_DHT__PORT="3"
    )
    assert settings.axon.port == 4
    assert settings.dht.port == 3
    assert settings.axon.max_waiting == 2
    assert settings.netuid == 2
    assert settings.axon.external_port is None
    assert miner(HIVEMINER_CONFIG=path).netuid == 2
    assert miner("--config", path, HIVEMINER_CONFIG="/nowhere.toml").netuid == 2


def test_what_was_given_is_known_also_where_it_is_the_default(tmp_path: Path) -> None:
    settings = miner("--axon.port", "8091", HIVEMINER_NETUID="1", HIVEMINER_DHT__PORT="")
    assert settings.given("axon.port")
    assert settings.given("netuid")
    assert not settings.given("dht.port")  # an empty variable counts as not set
    assert miner("--config", file(tmp_path, "[dht]\nport = 8009\n")).given("dht.port")


def test_settings_built_by_hand_read_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HIVEMINER_NETUID", "7")
    assert MinerSettings.model_validate({"axon": {"port": 0}}).netuid == 1
    assert parse([], cls=MinerSettings, prog="miner").netuid == 7


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], (False, True)),
        (["--blacklist.allow_non_registered"], (True, True)),
        (
            ["--blacklist.allow_non_registered", "--no-blacklist.allow_non_registered"],
            (False, True),
        ),
        (["--blacklist.allow_non_registered", "true"], (True, True)),
        (["--blacklist.force_validator_permit=false"], (False, False)),
        (["--no-blacklist.force_validator_permit"], (False, False)),
    ],
)
def test_booleans(words: list[str], expected: tuple[bool, bool]) -> None:
    blacklist = miner(*words).blacklist
    assert (blacklist.allow_non_registered, blacklist.force_validator_permit) == expected


def test_lists_from_flags_environment_and_file(tmp_path: Path) -> None:
    path = file(tmp_path, f'[dht]\ninitial_peers = ["{PEER}", "{OTHER_PEER}"]\n')
    for settings in (
        miner("--dht.initial_peers", PEER, OTHER_PEER),
        miner("--dht.initial_peers", f"{PEER},{OTHER_PEER}"),
        miner("--dht.initial_peers", PEER, "--dht.initial_peers", OTHER_PEER),
        miner(HIVEMINER_DHT__INITIAL_PEERS=f"{PEER}, {OTHER_PEER}"),
        miner("--config", path),
    ):
        assert settings.dht.initial_peers == [PEER, OTHER_PEER]


def test_one_file_and_one_environment_serve_all_programs(tmp_path: Path) -> None:
    path = file(tmp_path, "[axon]\nport = 1\n[validator]\nrows = 2\n")
    assert miner("--config", path, HIVEMINER_VALIDATOR__SEED="3").axon.port == 1
    settings = validator("--config", path, HIVEMINER_VALIDATOR__SEED="3")
    assert (settings.validator.rows, settings.validator.seed) == (2, 3)


def test_weights_are_set_more_often_on_the_embedded_network() -> None:
    assert validator().weights_seconds == 10
    assert validator("--subtensor.network", "test").weights_seconds == 1200
    assert validator("--validator.weights_seconds", "5").weights_seconds == 5


def test_limits_are_those_of_the_protocol() -> None:
    limits = {
        "rows": protocol.MAX_ROWS,
        "batch_size": protocol.MAX_BATCH_SIZE,
        "gradient_accumulation_steps": protocol.MAX_ACCUMULATION_STEPS,
        "timeout_seconds": protocol.MAX_TIMEOUT_SECONDS,
    }
    for name, limit in limits.items():
        assert getattr(validator(f"--validator.{name}", str(limit)).validator, name) == limit
        with pytest.raises(OperatorError, match=f"--validator.{name}: must be from"):
            validator(f"--validator.{name}", str(limit + 1))


# --- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("--axno.port 1", "no such flag; did you mean --axon.port?"),
        ("--axno.port=1", "no such flag; did you mean --axon.port?"),
        ("--port 1", "no such flag; did you mean --dht.port or --axon.port?"),
        ("--xyzzy", "no such flag"),
        ("--axon.por 1", "no such flag; did you mean --axon.port?"),
        ("--validator.rows 1", "not a flag of hiveminer miner"),
        ("--no-validator.rows", "not a flag of hiveminer miner"),
        ("--axon.port", "expected one value"),
        ("--dht.initial_peers", "expected one value"),
        ("--axon.port 80x", "must be a valid integer from 0 to 65535, not '80x'"),
        ("--axon.port=1.5", "must be a valid integer from 0 to 65535, not '1.5'"),
        ("--axon.port -1", "must be from 0 to 65535, not '-1'"),
        ("--axon.port 65536", "must be from 0 to 65535, not '65536'"),
        ("--blacklist.min_stake nan", "must be a finite number 0 or more, not 'nan'"),
        ("--blacklist.min_stake inf", "must be a finite number 0 or more, not 'inf'"),
        ("--logging.bars maybe", "ignored explicit value 'maybe'"),
        ("--logging.level loud", "must be 'debug', 'info', 'warning' or 'error', not 'loud'"),
        (
            "--subtensor.network finny",
            "must be embedded, finney, test, local, or an address such as wss://host:443, "
            "not 'finny'",
        ),
        (
            "--subtensor.network ws://node:99999",
            "must be embedded, finney, test, local, or an address such as wss://host:443, "
            "not 'ws://node:99999'",
        ),
        ("--axon.ip here", "must be an IP address such as 192.0.2.1, not 'here'"),
        ("--wallet.hotkey ../key", "must be a name, without spaces and slashes, not '../key'"),
        ("--neuron.device tpu", "must be cpu, cuda, cuda:0 (or another number) or mps, not 'tpu'"),
        ("--config /no/such.toml", "there is no file '/no/such.toml'"),
        ("--config /", "cannot read '/': not a regular file"),
    ],
)
def test_a_wrong_flag_is_told_in_one_line(words: str, reason: str) -> None:
    flag = words.replace("=", " ").split()[0]
    assert told(*words.split()) == f"{flag}: {reason}"


@pytest.mark.parametrize("words", ["stray", "--netuid 1 stray"])
def test_a_stray_word_is_told_in_one_line(words: str) -> None:
    line = "'stray' is not understood: settings are given as --flag value"
    assert told(*words.split()) == line


@pytest.mark.parametrize(
    ("address", "wrong"),
    [
        ("1.2.3.4:80", "must end with /p2p/ and the peer's id"),
        ("/ip4/192.0.2.1/tcp/8009", "must end with /p2p/ and the peer's id"),
        (f"192.0.2.1/tcp/8009/p2p/{PEER_ID}", "must begin with /ip4/, /ip6/ or /dns4/"),
        (f"/foo/p2p/{PEER_ID}", "must begin with /ip4/, /ip6/ or /dns4/"),
        (
            f"/ip4/miner.example.invalid/tcp/8009/p2p/{PEER_ID}",
            "'miner.example.invalid' is not an IPv4 address (a name: /dns4/NAME)",
        ),
        (f"/ip4/::1/tcp/8009/p2p/{PEER_ID}", "'::1' is not an IPv4 address"),
        (f"/dns4/a_b!/tcp/8009/p2p/{PEER_ID}", "'a_b!' is not a host name"),
        (f"/ip4/127.0.0.1/tcp/99999/p2p/{PEER_ID}", "'99999' is not a port from 1 to 65535"),
        (f"/ip4/127.0.0.1/tcp/0/p2p/{PEER_ID}", "'0' is not a port from 1 to 65535"),
        (f"/ip4/127.0.0.1/p2p/{PEER_ID}", "must follow the host, not nothing"),
        (f"/ip4/127.0.0.1/udp/80/quic/p2p/{PEER_ID}", "must follow the host, not /udp/80/quic"),
        ("/ip4/127.0.0.1/tcp/80/p2p/12D3Koo", "'12D3Koo' is not a peer id"),
        (f"/ip4/127.0.0.1/tcp/80/p2p/{PEER_ID[:-1]}", "is not a peer id"),
        (f"/ip4/127.0.0.1/tcp/80/p2p/{PEER_ID}0", "is not a peer id"),
    ],
)
def test_a_peers_address_is_checked_and_the_wrong_part_named(address: str, wrong: str) -> None:
    line = told("--dht.initial_peers", PEER, address)
    assert line.startswith("--dht.initial_peers: ")
    assert wrong in line
    assert line.endswith((f"not {address!r}", " ...'"))


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("HIVEMINER_AXON__PROT", "1", f"{UNREAD}; did you mean HIVEMINER_AXON__PORT?"),
        ("HIVEMINER_AXON_PORT", "1", f"{UNREAD}; did you mean HIVEMINER_AXON__PORT?"),
        ("HIVEMINER_ZZZ", "1", UNREAD),
        ("HIVEMINER_AXON", "{}", f"{UNREAD}; did you mean HIVEMINER_AXON__IP?"),
        ("hiveminer_netuid", "1", f"{UNREAD}; did you mean HIVEMINER_NETUID?"),
        ("HIVEMINER_NETUID", "one", "must be a valid integer from 0 to 65535, not 'one'"),
        ("HIVEMINER_CONFIG", "/no.toml", "there is no file '/no.toml'"),
    ],
)
def test_a_wrong_variable_is_told_in_one_line(name: str, value: str, reason: str) -> None:
    assert told(**{name: value}) == f"{name}: {reason}"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("[axon]\nprot = 1", "nothing reads the key axon.prot; did you mean axon.port?"),
        ("axon = 1", "axon is a table: write [axon] and its settings under it"),
        ("[axon.port]\nx = 1", "nothing reads the key axon.port.x; did you mean axon.port?"),
        ("[axon]\nport = 70000", "axon.port: must be from 0 to 65535, not 70000"),
        ("[axon]\nport = true", "axon.port: must not be true or false, not True"),
        ("[axon]\nip = 7", "axon.ip: must be a valid string, not 7"),
        ("[dht]\ninitial_peers = 7", "dht.initial_peers: must be a valid list, not 7"),
        ('config = "x"', "nothing reads the key config"),
    ],
)
def test_a_wrong_key_in_the_file_is_told_in_one_line(tmp_path: Path, text: str, line: str) -> None:
    path = file(tmp_path, text)
    assert told("--config", path) == f"{path}: {line}"


def test_a_file_that_is_not_toml_is_told_in_one_line(tmp_path: Path) -> None:
    path = file(tmp_path, "[axon\nport = 1")
    assert told("--config", path).startswith(f"{path}: not a TOML file: ")
    Path(path).write_bytes(b"\xff\xfe\x00")
    assert told("--config", path).startswith(f"{path}: not a TOML file: ")


@pytest.mark.parametrize(
    "key", ["config", "wallet.path", "subtensor.path", "neuron.run", "neuron.path"]
)
def test_a_path_that_names_nothing_is_one_line(key: str) -> None:
    assert told(f"--{key}", "").startswith(f"--{key}: must not be empty")
    assert "no home folder for ~" in told(f"--{key}", "~nobody-has-this-name/x")
    assert told(f"--{key}=~nobody-has-this-name").startswith(f"--{key}: ")
    assert told(f"--{key}", "a\0b").startswith(f"--{key}: ")


def test_a_default_below_a_home_that_is_missing_is_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HOME", "")
    assert told() == "--wallet.path: there is no home folder for ~: give the path in full"


def test_the_source_that_is_wrong_is_the_one_that_is_named(tmp_path: Path) -> None:
    path = file(tmp_path, '[axon]\nport = "x"\n')
    assert told("--config", path, HIVEMINER_AXON__PORT="y").startswith("HIVEMINER_AXON__PORT: ")
    assert told("--axon.port", "z", HIVEMINER_AXON__PORT="1").startswith("--axon.port: ")
    assert miner("--config", path, HIVEMINER_AXON__PORT="1").axon.port == 1


def mistakes(*words: str) -> list[str]:
    try:
        miner(*words)
    except OperatorError as error:
        return [str(error)]
    except SystemExit:  # -h
        pass
    return []


@hypothesis.settings(max_examples=50)
@given(st.lists(st.text(max_size=30), max_size=4))
def test_any_words_are_read_or_refused_in_one_line(words: list[str]) -> None:
    assert all(line.isprintable() for line in mistakes(*words))


@hypothesis.settings(max_examples=50)
@given(st.sampled_from(sorted(flags.options(MinerSettings))), st.text(max_size=30))
def test_any_value_is_read_or_refused_in_one_line(key: str, value: str) -> None:
    for line in mistakes(f"--{key}={value}"):
        assert line.isprintable()
        assert line.startswith(f"--{key}: ")


# --- words for people ----------------------------------------------------------------------------


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_setting_has_a_sentence(program: type[ProgramSettings]) -> None:
    for key, field in flags.options(program).items():
        assert field.description, key


def test_help_lists_every_flag_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        miner("--help")
    text = capsys.readouterr().out
    assert end.value.code == 0
    assert all(f"--{key}" in text for key in flags.options(MinerSettings))
    assert "from 0 to 65535" in text
    assert "(default: 8091)" in text
    assert "--validator.rows" not in text


def test_a_subnets_own_program_may_add_a_setting() -> None:
    class Mine(MinerSettings):
        flavour: str = "plain"

    assert parse(["--flavour", "sweet"], cls=Mine, prog="miner.py", env={}).flavour == "sweet"


# --- how a program ends --------------------------------------------------------------------------


def _raise(error: BaseException) -> int:
    raise error


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (OperatorError("no wallet:\nmake one"), 2, "hiveminer: no wallet: make one\n"),
        (NotRegistered("register it"), 3, "hiveminer: register it\n"),
        (ChainError("the chain is silent"), 1, "hiveminer: the chain is silent\n"),
        (KeyboardInterrupt(), 130, ""),
        (SystemExit(4), 4, ""),
        (SystemExit(), 0, ""),
    ],
)
def test_a_program_ends_with_one_line_and_its_code(
    capsys: pytest.CaptureFixture[str], error: BaseException, code: int, line: str
) -> None:
    assert run_program(lambda: _raise(error)) == code
    assert capsys.readouterr().err == line


def test_a_bug_is_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError):
        run_program(lambda: _raise(ZeroDivisionError()))
