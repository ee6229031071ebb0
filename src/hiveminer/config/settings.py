"""Every setting of every program, once: default, unit, bounds and a sentence.

Settings describe this machine and this operator; what all miners of a run must share is in
`run.toml` (`run.py`). Flags have Bittensor's dotted names and take precedence over the
environment (`HIVEMINER_AXON__PORT`), the environment over a TOML file (`--config`), the file
over the defaults. None means "chosen by the program", and the sentence says how.
"""

from __future__ import annotations

import ipaddress
import math
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from hiveminer.__version__ import __version__
from hiveminer.config import files, flags
from hiveminer.config.peers import checked_peer

NETWORKS = ("embedded", "finney", "test", "local")


# --- kinds of values -------------------------------------------------------------------------


def _check_ip(text: str) -> str:
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        raise ValueError("must be an IP address such as 192.0.2.1") from None


def _check_name(text: str) -> str:
    if not re.fullmatch(r"[^\s/\\.][^\s/\\]{0,127}", text):
        raise ValueError("must be a name, without spaces and slashes")
    return text


def _check_network(text: str) -> str:
    if text not in NETWORKS and not re.fullmatch(r"wss?://[^\s/]\S*", text):
        raise ValueError(f"must be {', '.join(NETWORKS)}, or an address such as wss://host:443")
    return text


def _check_device(text: str) -> str:
    if not re.fullmatch(r"cpu|mps|cuda(:\d{1,3})?", text):
        raise ValueError("must be cpu, cuda, cuda:0 (or another number) or mps")
    return text


def _expand(value: object) -> object:
    return files.expanded(value) if isinstance(value, str | Path) else value


def _split(value: object) -> object:
    """Lists may be written with commas, also within words: "a,b c" is three."""
    words = [value] if isinstance(value, str) else value
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        return value
    return [part for word in words for part in re.split(r"[,\s]+", word) if part]


Ip = Annotated[str, AfterValidator(_check_ip)]
Name = Annotated[str, AfterValidator(_check_name)]
Network = Annotated[str, AfterValidator(_check_network)]
Device = Annotated[str, AfterValidator(_check_device)]
Peer = Annotated[str, AfterValidator(checked_peer)]
Peers = Annotated[list[Peer], BeforeValidator(_split), NoDecode]
Folder = Annotated[Path, BeforeValidator(_expand)]


def number(default: float | None, least: float, most: float, sentence: str) -> Any:
    """A number and its bounds, which `--help` and errors state."""
    bounds = f"from {least:.12g} to {most:.12g}" if math.isfinite(most) else f"{least:g} or more"
    return Field(
        default,
        ge=least,
        le=most,
        description=f"{sentence}; {bounds}",
        json_schema_extra={"bounds": bounds},
    )


# --- groups ----------------------------------------------------------------------------------


class Group(BaseModel):
    """Settings that share a first word."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: object, info: Any) -> object:
        if isinstance(value, bool) and cls.model_fields[info.field_name].annotation is not bool:
            raise ValueError("must not be true or false")
        return value


class WalletSettings(Group):
    """The keys of this neuron. Only the hotkey is used; a coldkey has no place here."""

    name: Name = Field("default", description="name of the wallet (its coldkey's name)")
    hotkey: Name | None = Field(
        None,
        description="name of the hotkey; if not given: the next free one on the embedded "
        "network, `default` on a real one",
    )
    path: Folder = Field(Path("~/.bittensor/wallets"), description="folder of the wallets")


class SubtensorSettings(Group):
    """The chain."""

    network: Network = Field(
        "embedded",
        description="embedded (a chain in a file on this machine), finney, test, local, or the "
        "address of a node: ws://... or wss://...",
    )
    path: Folder = Field(
        Path("~/.hiveminer/embedded"), description="folder of the embedded network"
    )
    block_seconds: float = number(1.0, 0.05, 60.0, "seconds a block, on the embedded network only")


class AxonSettings(Group):
    """The server that validators call."""

    ip: Ip | None = Field(
        None,
        description="address to listen on; if not given: 127.0.0.1 on the embedded network, "
        "0.0.0.0 on a real one",
    )
    port: int = number(
        8091,
        0,
        65535,
        "TCP port to listen on; 0: any free one; if not given and in use on the "
        "embedded network: the next free one",
    )
    external_ip: Ip | None = Field(
        None, description="address to put on the chain, if it is not the one listened on"
    )
    external_port: int | None = number(None, 1, 65535, "port to put on the chain, if it is another")
    max_waiting: int = number(64, 1, 4096, "requests that may wait; more are turned away")
    metrics_port: int | None = number(
        None, 0, 65535, "port of /metrics on 127.0.0.1, for Prometheus; if not given: none"
    )


class DhtSettings(Group):
    """The way to the other peers of the swarm."""

    ip: Ip | None = Field(
        None,
        description="address to listen on; if not given: 127.0.0.1 on the embedded network, "
        "0.0.0.0 on a real one",
    )
    port: int = number(
        8009,
        0,
        65535,
        "port to listen on; 0: any free one; if not given and in use on the "
        "embedded network: the next free one",
    )
    external_ip: Ip | None = Field(
        None, description="address to announce to peers, if it is not the one listened on"
    )
    external_port: int | None = number(
        None, 1, 65535, "port to announce to peers, if it is another"
    )
    initial_peers: Peers = Field(
        default=[],
        description="multiaddresses of peers to join by, with spaces or commas between; if not "
        "given: those that stand on the chain",
    )


class BlacklistSettings(Group):
    """Who is turned away."""

    allow_non_registered: bool = Field(
        False, description="serve hotkeys that are not registered on the subnet"
    )
    force_validator_permit: bool = Field(
        True, description="train only for hotkeys with a validator permit"
    )
    min_stake: float = number(0.0, 0.0, math.inf, "least stake of a caller of Train, in TAO")


class NeuronSettings(Group):
    """This machine."""

    device: Device | None = Field(
        None, description="cpu, cuda, cuda:1 or mps; if not given: the best one there is"
    )
    run: Folder | None = Field(
        None, description="the subnet's run.toml; if not given: the built-in run"
    )
    path: Folder = Field(
        Path("~/.hiveminer"), description="folder of what must outlive a restart, and of metrics"
    )
    threads: int | None = number(
        None,
        1,
        1024,
        "CPU threads of PyTorch; if not given: 1 on the embedded network, where "
        "several neurons share the machine, and PyTorch's own choice on a real one",
    )
    resume: bool = Field(
        True, description="go on from the newest checkpoint; --no-neuron.resume starts anew"
    )
    checkpoint_seconds: float = number(
        60.0,
        1.0,
        86400.0,
        "seconds between two checkpoints at least; a miner writes one when an epoch "
        "begins, and within an epoch that is ten times as long",
    )
    keep_models: int = number(
        1,
        0,
        1000,
        "models that a validator keeps as folders: so many of the newest, and the best by held-out "
        "loss; 0: none",
    )


class LoggingSettings(Group):
    """What is told on the terminal."""

    level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="least severity that is shown"
    )
    format: Literal["text", "json"] = Field("text", description="lines for people, or for machines")
    bars: bool = Field(True, description="progress bars, where stderr is a terminal")


class WandbSettings(Group):
    """Numbers to Weights & Biases, beside the JSON lines that are always written."""

    mode: Literal["disabled", "offline", "online"] = Field(
        "disabled", description="online falls back to offline where there is no API key"
    )
    project: Name = Field("hiveminer", description="project to write to")
    entity: Name | None = Field(None, description="user or team; if not given: the account's own")


class WorkSettings(Group):
    """What is asked of miners, and how it is judged."""

    rows: int = number(64, 1, 4096, "rows in a Train request")
    batch_size: int = number(4, 1, 1024, "rows in a logical batch")
    gradient_accumulation_steps: int = number(1, 1, 256, "batches in an optimizer step")
    timeout_seconds: float = number(60.0, 0.1, 3600.0, "seconds a miner has for one request")
    sample_rate: float = number(0.25, 0.0, 1.0, "share of the answers that is replayed here")
    weights_seconds: float | None = number(
        None,
        1.0,
        86400.0,
        "seconds between weights; if not given: 10 on the embedded network, 1200 on a real one",
    )
    seed: int | None = number(None, 0, 2**31, "seed of the choice of rows; if not given: by chance")


# --- programs --------------------------------------------------------------------------------


class ProgramSettings(BaseSettings):
    """The settings of one program. Built directly, they take what is given and the defaults;
    `parse` reads flags, environment and file as well."""

    model_config = SettingsConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    config: Folder | None = Field(None, description="TOML file of settings")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Leave the environment to `parse`, which can name the variable that is wrong."""
        return (init_settings,)

    def given(self, key: str) -> bool:
        """Was this setting ("axon.port") set by the operator, be it to its default?"""
        model: BaseModel = self
        *groups, name = key.split(".")
        for group in groups:
            model = getattr(model, group)
        assert name in type(model).model_fields, key
        return name in model.model_fields_set


class Settings(ProgramSettings):
    """What every neuron has."""

    netuid: int = number(1, 0, 65535, "number of the subnet")
    wallet: WalletSettings = Field(default_factory=WalletSettings)
    subtensor: SubtensorSettings = Field(default_factory=SubtensorSettings)
    dht: DhtSettings = Field(default_factory=DhtSettings)
    neuron: NeuronSettings = Field(default_factory=NeuronSettings)
    logging: LoggingSettings = Field(default_factory=LoggingSettings)
    wandb: WandbSettings = Field(default_factory=WandbSettings)

    @property
    def embedded(self) -> bool:
        """The network is the one on this machine."""
        return self.subtensor.network == "embedded"

    @property
    def dht_ip(self) -> str:
        """The address that the DHT listens on."""
        return self.dht.ip or self._listen_ip

    @property
    def _listen_ip(self) -> str:
        return "127.0.0.1" if self.embedded else "0.0.0.0"


class MinerSettings(Settings):
    """What a miner has."""

    axon: AxonSettings = Field(default_factory=AxonSettings)
    blacklist: BlacklistSettings = Field(default_factory=BlacklistSettings)

    @property
    def axon_ip(self) -> str:
        """The address that the axon listens on."""
        return self.axon.ip or self._listen_ip


class ValidatorSettings(Settings):
    """What a validator has."""

    validator: WorkSettings = Field(default_factory=WorkSettings)

    @property
    def weights_seconds(self) -> float:
        """Seconds between two settings of weights."""
        return self.validator.weights_seconds or (10.0 if self.embedded else 1200.0)


class DemoSettings(ProgramSettings):
    """What the demo has: few things, since it is to work without any."""

    miners: int = number(3, 1, 64, "miners to start beside the validator")
    seconds: float = number(90.0, 10.0, 86400.0, "seconds of training")
    out: Folder = Field(
        Path("demo-out"), description="folder for numbers, logs, the plot and the trained model"
    )
    strategy: Literal["hivemind", "sparseloco"] | None = Field(
        None,
        description="how the miners learn from each other; if not given: as the run says",
    )
    data: str | None = Field(
        None,
        description="your own text: a file or a folder of .txt, .md, .jsonl or .parquet files, or "
        "a hub name; if not given: the run's",
    )
    model: str | None = Field(
        None,
        description="folder or hub name of the model to begin with; if not given: the run's",
    )
    run: Folder | None = Field(
        None, description="run.toml to train by; if not given: the built-in run"
    )
    logging: LoggingSettings = Field(default_factory=LoggingSettings)


class ExportSettings(Settings):
    """What is exported, and to where."""

    out: Folder = Field(description="folder to write the model to; it must not exist")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="what the weights are stored as"
    )
    source: Literal["disk", "swarm"] = Field(
        "disk",
        description="disk: the newest checkpoint or model of this machine's neurons, also while "
        "they run; swarm: the state that the other peers hand out to a registered hotkey",
    )


class UseSettings(Settings):
    """Which model is used."""

    model: Folder | None = Field(
        None,
        description="folder of a model, as `hiveminer export` writes it; if not given: the newest "
        "checkpoint on this machine",
    )


class GenerateSettings(UseSettings):
    """What is generated."""

    text: str = Field("", description="text to continue; also the first word of the command")
    tokens: int = number(200, 1, 65536, "tokens to generate at most")
    temperature: float = number(0.8, 0.0, 10.0, "0: the most probable token each time")
    seed: int | None = number(None, 0, 2**31, "seed of the choice of tokens; if not given: none")


class EvaluateSettings(UseSettings):
    """What is measured."""

    rows: int = number(
        32, 1, 10**9, "held-out rows to measure on; validators measure on the first 32"
    )


class RunNewSettings(ProgramSettings):
    """A new run.toml."""

    out: Folder = Field(Path("run.toml"), description="file to write; it must not exist")
    name: str = Field("myrun", description="what the run is called")
    data: str = Field(
        "builtin", description="builtin, a local file or folder, or a hub name; it is read"
    )
    model: str = Field("builtin", description="builtin, a local folder, or a hub name")


class RunCheckSettings(ProgramSettings):
    """A run.toml to check."""

    file: Folder = Field(Path("run.toml"), description="the run.toml to check")


PROGRAMS: tuple[type[ProgramSettings], ...] = (
    MinerSettings,
    ValidatorSettings,
    DemoSettings,
    ExportSettings,
    GenerateSettings,
    EvaluateSettings,
    RunNewSettings,
    RunCheckSettings,
)

Tree = TypeVar("Tree", bound=ProgramSettings)


def parse(
    argv: Sequence[str] | None = None,
    *,
    cls: type[Tree],
    prog: str,
    description: str = "",
    env: Mapping[str, str] | None = None,
) -> Tree:
    """Read the settings of a program: flags over environment over file over defaults.

    `argv` are the words after the program's name (None: this process's), `env` the variables
    (None: this process's). Raises OperatorError with one line that names the flag, variable
    or key; SystemExit(0) after `--help` and `--version`.
    """
    return flags.read(
        cls,
        sys.argv[1:] if argv is None else argv,
        env=os.environ if env is None else env,
        prog=prog,
        description=description,
        version=f"hiveminer {__version__}",
        others=PROGRAMS,
    )
