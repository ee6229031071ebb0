"""Every setting of every program: default, unit, bounds and a description.

Settings describe this machine and its operator; what all miners of a run share is in `run.toml`
(`run.py`). None means "chosen by the program", and the description says how.
"""

from __future__ import annotations

import contextlib
import ipaddress
import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator

from hiveminer.config import files
from hiveminer.config.peers import checked_peer

# --- kinds of values -------------------------------------------------------------------------


def _check_ip(text: str) -> str:
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        raise ValueError("must be an IP address such as 192.0.2.1") from None


def _check_network(text: str) -> str:
    with contextlib.suppress(ValueError):  # of a port or an address that is none
        url = urlsplit(text)
        is_url = url.scheme in ("ws", "wss") and url.hostname and url.port != 0
        if text in ("embedded", "finney", "test", "local") or (is_url and text.split() == [text]):
            return text
    raise ValueError("must be embedded, finney, test, local, or an address such as wss://host:443")


def _matching(pattern: str, what: str) -> AfterValidator:
    def check(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise ValueError(f"must be {what}")
        return text

    return AfterValidator(check)


def _expand(value: object) -> object:
    return files.expanded(value) if isinstance(value, str | Path) else value


def _split(value: object) -> object:
    """Lists may be separated by commas and spaces: "a,b c" has three parts."""
    words = [value] if isinstance(value, str) else value
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        return value
    return [part for word in words for part in re.split(r"[,\s]+", word) if part]


Ip = Annotated[str, AfterValidator(_check_ip)]
Name = Annotated[str, _matching(r"[^\s/\\.][^\s/\\]{0,127}", "a name, without spaces and slashes")]
Network = Annotated[str, AfterValidator(_check_network)]
Device = Annotated[
    str, _matching(r"cpu|mps|cuda(:\d{1,3})?", "cpu, cuda, cuda:0 (or another number) or mps")
]
Peer = Annotated[str, AfterValidator(checked_peer)]
Peers = Annotated[list[Peer], BeforeValidator(_split)]
Folder = Annotated[Path, BeforeValidator(_expand)]


def number(default: float | None, least: float, most: float) -> Any:
    """A number with bounds, which `--help` and errors mention."""
    bounds = f"from {least:.12g} to {most:.12g}" if math.isfinite(most) else f"{least:g} or more"
    return Field(default, ge=least, le=most, json_schema_extra={"bounds": bounds})


# --- groups ----------------------------------------------------------------------------------


class Group(BaseModel):
    """Settings that share a prefix; the text below each is its help."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        validate_default=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        for name in cls.__annotations__.keys() & cls.model_fields.keys():
            field = cls.model_fields[name]
            if isinstance(field.json_schema_extra, dict):
                field.description = f"{field.description}; {field.json_schema_extra['bounds']}"

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: object, info: Any) -> object:
        if isinstance(value, bool) and cls.model_fields[info.field_name].annotation is not bool:
            raise ValueError("must not be true or false")
        return value


class WalletSettings(Group):
    """The neuron's keys. Only the hotkey is used; keep the coldkey elsewhere."""

    name: Name = "default"
    """name of the wallet (its coldkey's name)"""
    hotkey: Name | None = None
    """name of the hotkey; if not given: the next free one on the embedded network, `default` on a
    real one"""
    path: Folder = Path("~/.bittensor/wallets")
    """folder of the wallets"""


class SubtensorSettings(Group):
    """The chain."""

    network: Network = "embedded"
    """embedded (a chain in a file on this machine), finney, test, local, or a node's address:
    ws://... or wss://..."""
    path: Folder = Path("~/.hiveminer/embedded")
    """folder of the embedded network"""
    block_seconds: float = number(1.0, 0.05, 60.0)
    """seconds per block, on the embedded network only"""

    @property
    def file(self) -> Path:
        """The embedded network's."""
        return self.path / "chain.sqlite"


class AxonSettings(Group):
    """The server that validators call."""

    ip: Ip | None = None
    """address to listen on; if not given: 127.0.0.1 on the embedded network, 0.0.0.0 on a real
    one"""
    port: int = number(8091, 0, 65535)
    """TCP port to listen on; 0: any free one; if not given and in use on the embedded network: the
    next free one"""
    external_ip: Ip | None = None
    """address to publish on chain, if it differs from the one listened on"""
    external_port: int | None = number(None, 1, 65535)
    """port to publish on chain, if it differs"""
    max_waiting: int = number(64, 1, 4096)
    """requests that may wait; more are refused"""
    metrics_port: int | None = number(None, 0, 65535)
    """port of /metrics on 127.0.0.1, for Prometheus; if not given: none"""


class DhtSettings(Group):
    """The connection to the other peers of the swarm."""

    ip: Ip | None = None
    """address to listen on; if not given: 127.0.0.1 on the embedded network, 0.0.0.0 on a real
    one"""
    port: int = number(8009, 0, 65535)
    """port to listen on; 0: any free one; if not given and in use on the embedded network: the next
    free one"""
    external_ip: Ip | None = None
    """address to announce to peers, if it differs from the one listened on"""
    external_port: int | None = number(None, 1, 65535)
    """port to announce to peers, if it differs"""
    initial_peers: Peers = []
    """multiaddresses of peers to join, separated by spaces or commas; if not given: those published
    on chain"""


class BlacklistSettings(Group):
    """Which callers are refused."""

    allow_non_registered: bool = False
    """serve hotkeys that are not registered on the subnet"""
    force_validator_permit: bool = True
    """train only for hotkeys with a validator permit"""
    min_stake: float = number(0.0, 0.0, math.inf)
    """minimum stake of a caller of Train, in TAO"""


class NeuronSettings(Group):
    """This machine."""

    device: Device | None = None
    """cpu, cuda, cuda:1 or mps; if not given: the best one available"""
    run: Folder | None = None
    """the subnet's run.toml; if not given: the built-in run"""
    path: Folder = Path("~/.hiveminer")
    """folder of keys, checkpoints and metrics"""
    threads: int | None = number(None, 1, 1024)
    """CPU threads of PyTorch; if not given: 1 on the embedded network, where several neurons share
    the machine, and PyTorch's own choice on a real one"""
    resume: bool = True
    """resume from the newest checkpoint; --no-neuron.resume starts over"""
    checkpoint_seconds: float = number(60.0, 1.0, 86400.0)
    """minimum seconds between two checkpoints; a miner writes one when an epoch begins, and within
    an epoch that lasts ten times as long"""
    keep_models: int = number(1, 0, 1000)
    """number of newest models that a validator keeps as folders, besides the best by held-out loss;
    0: none at all"""


class LoggingSettings(Group):
    """Output on the terminal."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    """minimum severity"""
    format: Literal["text", "json"] = "text"
    """lines for people, or for machines"""
    bars: bool = True
    """progress bars, where stderr is a terminal"""


class WandbSettings(Group):
    """Metrics to Weights & Biases, besides the JSON lines that are always written."""

    mode: Literal["disabled", "offline", "online"] = "disabled"
    """online falls back to offline without an API key"""
    project: Name = "hiveminer"
    """project to write to"""
    entity: Name | None = None
    """user or team; if not given: the account's own"""


class WorkSettings(Group):
    """What miners are asked for, and how it is judged."""

    rows: int = number(64, 1, 4096)
    """rows per Train request"""
    batch_size: int = number(4, 1, 1024)
    """rows per batch"""
    gradient_accumulation_steps: int = number(1, 1, 256)
    """batches per optimizer step"""
    timeout_seconds: float = number(60.0, 0.1, 3600.0)
    """seconds a miner has for one request"""
    sample_rate: float = number(0.25, 0.0, 1.0)
    """share of the answers to replay"""
    weights_seconds: float | None = number(None, 1.0, 86400.0)
    """seconds between weights; if not given: 10 on the embedded network, 1200 on a real one"""
    seed: int | None = number(None, 0, 2**31)
    """seed for choosing rows; if not given: random"""


# --- programs --------------------------------------------------------------------------------


class ProgramSettings(Group):
    """The settings of one program; `flags.parse` reads flags, environment and file."""

    config: Folder | None = None
    """TOML file of settings"""

    def given(self, key: str) -> bool:
        """Whether the operator has set this key ("axon.port"), even if to its default."""
        model: BaseModel = self
        *groups, name = key.split(".")
        for group in groups:
            model = getattr(model, group)
        return name in model.model_fields_set


class Settings(ProgramSettings):
    """Settings of every neuron."""

    netuid: int = number(1, 0, 65535)
    """number of the subnet"""
    wallet: WalletSettings = Field(default_factory=WalletSettings)
    subtensor: SubtensorSettings = Field(default_factory=SubtensorSettings)
    dht: DhtSettings = Field(default_factory=DhtSettings)
    neuron: NeuronSettings = Field(default_factory=NeuronSettings)
    logging: LoggingSettings = Field(default_factory=LoggingSettings)
    wandb: WandbSettings = Field(default_factory=WandbSettings)

    @property
    def embedded(self) -> bool:
        """Whether the network is the one on this machine."""
        return self.subtensor.network == "embedded"

    @property
    def dht_ip(self) -> str:
        """The address that the DHT listens on."""
        return self.dht.ip or self._listen_ip

    @property
    def _listen_ip(self) -> str:
        return "127.0.0.1" if self.embedded else "0.0.0.0"


class MinerSettings(Settings):
    """Settings of a miner."""

    axon: AxonSettings = Field(default_factory=AxonSettings)
    blacklist: BlacklistSettings = Field(default_factory=BlacklistSettings)

    @property
    def axon_ip(self) -> str:
        """The address that the axon listens on."""
        return self.axon.ip or self._listen_ip


class ValidatorSettings(Settings):
    """Settings of a validator."""

    validator: WorkSettings = Field(default_factory=WorkSettings)

    @property
    def weights_seconds(self) -> float:
        """Seconds between two weight settings."""
        return self.validator.weights_seconds or (10.0 if self.embedded else 1200.0)


class DemoSettings(ProgramSettings):
    """Settings of the demo."""

    miners: int = number(3, 1, 64)
    """miners to start beside the validator"""
    seconds: float = number(90.0, 10.0, 86400.0)
    """seconds of training"""
    out: Folder = Path("demo-out")
    """folder for metrics, logs, the plot and the trained model"""
    strategy: Literal["hivemind", "sparseloco"] | None = None
    """how the miners learn from each other; if not given: as the run says"""
    data: str | None = None
    """your own text: a file or a folder of .txt, .md, .jsonl or .parquet files, or a hub name; if
    not given: the run's"""
    model: str | None = None
    """folder or hub name of the model to start from; if not given: the run's"""
    run: Folder | None = None
    """the run.toml; if not given: the built-in run"""
    logging: LoggingSettings = Field(default_factory=LoggingSettings)


class ExportSettings(Settings):
    """What to export, and where to."""

    out: Folder
    """folder to write the model to; it must not exist"""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """precision of the stored weights"""
    source: Literal["disk", "swarm"] = "disk"
    """disk: the newest checkpoint of this machine's neurons, even while they run; swarm: the state
    that peers share with a registered hotkey"""


class UseSettings(Settings):
    """Which model to use."""

    model: Folder | None = None
    """model folder, as written by `hiveminer export`; if not given: the newest checkpoint on this
    machine"""


class GenerateSettings(UseSettings):
    """What to generate."""

    text: str = ""
    """text to continue; also the command's first argument"""
    tokens: int = number(200, 1, 65536)
    """maximum number of tokens to generate"""
    temperature: float = number(0.8, 0.0, 10.0)
    """0: always the most probable token"""
    seed: int | None = number(None, 0, 2**31)
    """seed for sampling; if not given: random"""


class EvaluateSettings(UseSettings):
    """What to evaluate."""

    rows: int = number(32, 1, 10**9)
    """held-out rows to evaluate on; validators use the first 32"""


class LogSettings(Settings):
    """Which log of rounds is shown."""

    folder: Folder | None = None
    """the log; if not given: the newest one on this machine; also the first word of the command"""
    round: int | None = number(None, 0, 2**32 - 1)
    """show this round alone"""
    verify: bool = False
    """rebuild the states offline, and check every hash; with --subtensor.network, compare with the
    chain too"""


class RunNewSettings(ProgramSettings):
    """A new run.toml."""

    out: Folder = Path("run.toml")
    """file to write; it must not exist"""
    name: str = "myrun"
    """name of the run"""
    data: str = "builtin"
    """builtin, a local file or folder, or a hub name"""
    model: str = "builtin"
    """builtin, a local folder, or a hub name"""


class RunCheckSettings(ProgramSettings):
    """A run.toml to check."""

    file: Folder = Path("run.toml")
    """the run.toml to check"""


PROGRAMS: tuple[type[ProgramSettings], ...] = (
    MinerSettings,
    ValidatorSettings,
    DemoSettings,
    ExportSettings,
    GenerateSettings,
    EvaluateSettings,
    LogSettings,
    RunNewSettings,
    RunCheckSettings,
)
