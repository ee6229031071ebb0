"""The run: what everybody who trains together has agreed on, as the subnet owner's `run.toml`.

The run id contains the hashes of the run, the model's schema and the data, so that peers with
different configurations can never average unnoticed, and each can say which of the three
differs.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from packaging.version import Version
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from hiveminer.__version__ import __version__
from hiveminer.config import files
from hiveminer.errors import OperatorError
from hiveminer.protocol import MAX_BATCH_SIZE, MAX_ROWS, MAX_TIMEOUT_SECONDS

BUILTIN = "builtin"
"""Names the model or the data that comes with this package."""

LOCAL_SUFFIXES = frozenset({".txt", ".md", ".jsonl", ".ndjson", ".json", ".parquet"})
"""A name with one of these suffixes is a file's, never the hub's."""

RELEASE = r"^[0-9]{1,9}\.[0-9]{1,9}\.[0-9]{1,9}$"
"""The version of a release."""

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Beta = Annotated[float, Field(ge=0, lt=1)]


def _checked_name(name: str) -> str:
    files.expanded(name)  # that it names something
    return name


Name = Annotated[str, AfterValidator(_checked_name)]


class _Section(BaseModel):
    # Strict: TOML has types, and `rows = true` must not become one row.
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True
    )


class ModelSection(_Section):
    name: Name = BUILTIN
    """`builtin`, a local folder written by `save_pretrained`, or a hub name."""
    revision: str = ""
    """The hub's revision; empty for the newest."""
    hash: Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")] = ""
    """The weights' content hash, as `hiveminer run new` and a model's card give it; a machine
    that holds other weights refuses to start. Empty: not compared."""
    sequence_length: Annotated[int, Field(ge=2, le=65536)] = 512
    """Tokens to which a row is truncated."""


class DataSection(_Section):
    name: Name = BUILTIN
    """`builtin` (the Python standard library's source), a local .txt, .md, .jsonl, .json or
    .parquet file or a folder of them, or a hub name."""
    hash: str = ""
    """The data's content hash; a machine that holds other data refuses to start. Empty:
    not compared at start (it is in the run id all the same)."""
    column: str = "text"
    """The column that holds the text, for records."""
    config: str = ""
    """The hub data set's configuration."""
    split: str = "train"
    """The split of a hub data set, or of a local folder whose files' names tell of splits;
    `all` reads every file of a folder."""
    revision: str = ""
    """The hub data set's revision; empty for the newest."""
    streaming: bool = False
    """Do not download the hub data set whole: read numbered shards of it."""
    rows: Annotated[int, Field(ge=0)] = 0
    """The number of rows of a streaming source."""
    shard_rows: Annotated[int, Field(ge=1, le=1_000_000)] = 1024
    """Rows in a shard of a streaming source."""
    held_out: Annotated[float, Field(ge=0, lt=1)] = 0.01
    """The share of rows, at the end, that validators evaluate on and no miner is given."""


class OptimizerSection(_Section):
    name: Literal["adamw", "muon"] = "adamw"
    """`muon` is Muon for the matrices inside the model and AdamW for everything else. It
    moves a weight about as far per step as AdamW does at the same learning rate."""
    learning_rate: Positive = 3e-3
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Muon's, for the matrices inside the model."""
    embedding_rate: Positive = 1.0
    """With Muon, the learning rate of everything else as a multiple of `learning_rate`."""
    # TOML knows lists and no tuples.
    betas: Annotated[tuple[Beta, Beta], Field(strict=False)] = (0.9, 0.95)
    eps: Positive = 1e-8
    weight_decay: NotNegative = 0.1
    max_grad_norm: NotNegative = 1.0
    """Gradients are clipped to this norm; 0 means never."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_epochs: Annotated[int, Field(ge=0)] = 0
    """Epochs over which the rate rises from a tenth to its full height."""
    total_epochs: Annotated[int, Field(ge=0)] = 0
    """The epoch at which a linear or cosine schedule has come down to a tenth."""


class SwarmSection(_Section):
    epoch_samples: Annotated[int, Field(ge=1)] = 256
    """Rows that all peers together train between two averaging rounds."""
    matchmaking_seconds: Annotated[float, Field(ge=0.5, le=90)] = 3.0
    """How long a peer looks for a group when not all come. Its record in the DHT expires after
    this time, and no record lives longer than two minutes."""
    averaging_timeout_seconds: Annotated[float, Field(ge=5, le=3600)] = 30.0
    """Limit of an averaging round."""
    compression: Literal["float16", "none"] = "float16"
    """The format in which weights are sent."""


class SparselocoSection(_Section):
    """Rounds of strategy `sparseloco`; docs/sparseloco.md says what they are.

    The defaults of what is sent are the cell `h5-61-m0.9-lr0.02` of `scripts/bench frontier`.
    """

    round_blocks: Annotated[int, Field(ge=1, le=200)] = 50
    """Blocks per round. The embedded network's blocks are short: 15 there."""
    mark_blocks: Annotated[int, Field(ge=1, le=199)] = 10
    """Blocks between the deadline of records and that of marks, which end the round."""
    cut_blocks: Annotated[int, Field(ge=1, le=199)] = 4
    """Blocks between the earliest cut of an update and the deadline of records."""
    quorum: Annotated[float, Field(ge=0.5, le=1)] = 0.5
    """Share of all permitted stake that has to mark, or the round is empty."""
    density: Annotated[float, Field(gt=0, le=1)] = 0.015625
    """Share of the values that an update carries: by default 64 of each 4,096."""
    bits: Annotated[int, Field(ge=1, le=4)] = 2
    """Bits per value that is sent."""
    rho: Annotated[float, Field(ge=0, le=1)] = 0.9
    """Share of the compression error that its author keeps once its update counts."""
    outer_rate: Annotated[float, Field(gt=0, le=2)] = 1.0
    """Factor on the averaged update."""
    contributor_power: Annotated[float, Field(ge=0, le=1, multiple_of=0.25)] = 0.75
    """1 divides the sum of a coordinate by its contributors, 0 by all updates of the round."""
    max_contributors: Annotated[int, Field(ge=1, le=256)] = 20
    """Updates that count in one round."""

    @model_validator(mode="after")
    def _fits_round(self) -> SparselocoSection:
        if self.mark_blocks + self.cut_blocks >= self.round_blocks:
            raise ValueError("mark_blocks and cut_blocks together must be below round_blocks")
        return self


class LimitsSection(_Section):
    rows: Annotated[int, Field(ge=1, le=MAX_ROWS)] = 1024
    """Rows in one `Train`."""
    batch_size: Annotated[int, Field(ge=1, le=MAX_BATCH_SIZE)] = 256
    timeout_seconds: Annotated[float, Field(gt=0, le=MAX_TIMEOUT_SECONDS)] = 600.0


_FIRST_KEYS: dict[str, tuple[str, ...]] = {
    "": ("name", "strategy", "oldest_version"),
    "model": ("name", "revision", "sequence_length"),
    "data": (
        *("name", "hash", "column", "config", "split", "revision"),
        *("streaming", "rows", "shard_rows", "held_out"),
    ),
    "optimizer": (
        *("learning_rate", "betas", "eps", "weight_decay", "max_grad_norm"),
        *("schedule", "warmup_epochs", "total_epochs"),
    ),
    "swarm": ("epoch_samples", "matchmaking_seconds", "averaging_timeout_seconds", "compression"),
    "limits": ("rows", "batch_size", "timeout_seconds"),
}
"""The keys that are always part of a run's hash. A key that was added later is part of it only
where it differs from its default, so that an upgrade does not change the ids of existing runs."""


class Run(_Section):
    """The content of a `run.toml`; every key has a default."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_]{0,31}$")] = "embedded"
    """What the run is called; lower case, part of the run id."""
    strategy: Literal["hivemind", "sparseloco"] = "hivemind"
    """How peers learn from each other."""
    oldest_version: Annotated[str, Field(pattern=RELEASE)] = "0.1.0"
    """The oldest version of this package that may take part."""
    model: ModelSection = ModelSection()
    data: DataSection = DataSection()
    optimizer: OptimizerSection = OptimizerSection()
    swarm: SwarmSection = SwarmSection()
    sparseloco: SparselocoSection = SparselocoSection()
    limits: LimitsSection = LimitsSection()

    @model_validator(mode="after")
    def _keys_fit(self) -> Run:
        if self.optimizer.schedule != "constant" and not self.optimizer.total_epochs:
            raise ValueError(f"schedule {self.optimizer.schedule!r} needs optimizer.total_epochs")
        if self.optimizer.name == "muon" and self.strategy == "hivemind":
            raise ValueError(
                "optimizer.name 'muon' does not work with strategy 'hivemind', which takes one "
                "optimizer for all parameters: use 'adamw'"
            )
        if self.strategy == "sparseloco" and (
            self.optimizer.schedule != "constant" or self.optimizer.warmup_epochs
        ):
            raise ValueError(
                "strategy 'sparseloco' counts rounds by the chain's blocks, so a schedule has no "
                "first epoch: use optimizer.schedule 'constant' and warmup_epochs 0"
            )
        if self.data.streaming and not self.data.rows:
            raise ValueError("a streaming source needs data.rows, the number of its rows")
        return self

    @property
    def hash(self) -> str:
        """Hex SHA-256 of the run's values, without the paths of local models and data: the rest
        of the run id compares their content."""
        values = self.model_dump(mode="json", exclude={"sparseloco"})
        hashed = _without_later_defaults(values, type(self)().model_dump(mode="json"))
        if self.strategy == "sparseloco":  # all of it: it decides which bits the weights have
            hashed["sparseloco"] = self.sparseloco.model_dump(mode="json")
        for part in ("model", "data"):
            if is_local(hashed[part]["name"]):
                hashed[part]["name"] = "local"
        return hashlib.sha256(json.dumps(hashed, sort_keys=True).encode()).hexdigest()

    def check_version(self) -> None:
        """Raise OperatorError when this program is too old for the run."""
        if not self.accepts_version(__version__):
            raise OperatorError(
                f"this is version {__version__}, and the run wants {self.oldest_version} or "
                "newer: upgrade hiveminer"
            )

    def accepts_version(self, version: str) -> bool:
        """Whether a neuron of that version may take part; False for one that is not a release."""
        is_release = re.fullmatch(RELEASE, version) is not None
        return is_release and Version(version) >= Version(self.oldest_version)


@dataclass(frozen=True)
class RunId:
    """A run id, `name-run-schema-data`; the last three are shortened hashes."""

    name: str
    run: str
    schema: str
    data: str

    @classmethod
    def of(cls, run: Run, *, schema_hash: str, data_hash: str) -> RunId:
        return cls(run.name, run.hash[:12], schema_hash[:8], data_hash[:8])

    def __str__(self) -> str:
        return f"{self.name}-{self.run}-{self.schema}-{self.data}"

    def difference(self, other: str) -> str | None:
        """Why a peer with the run id `other` cannot train with us; None if it can."""
        names = ("run", "run.toml", "model schema", "data")
        here, there = str(self).split("-"), other.split("-")
        if len(there) != len(names):
            return f"run id {other!r} is none of ours ({self})"
        for what, ours, theirs in zip(names, here, there, strict=True):
            if ours != theirs:
                return f"{what} differs: {theirs} there, {ours} here (run ids {other} and {self})"
        return None


def is_local(name: str) -> bool:
    """Whether a model or data name is a path on this machine."""
    return name != BUILTIN and (
        name.startswith((".", "/", "~"))
        or "\\" in name
        or Path(name).suffix.lower() in LOCAL_SUFFIXES
        or os.path.exists(os.path.expanduser(name))  # never raises
    )


def load_run(path: Path | None) -> Run:
    """Read a `run.toml`; without a path, the built-in run. Raises OperatorError."""
    if path is None:
        return Run()
    try:
        said = files.read_toml(files.expanded(path))
    except FileNotFoundError:
        raise OperatorError(f"{path}: no such file; --neuron.run wants a run.toml") from None
    except OSError as error:
        raise OperatorError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise OperatorError(f"{path}: not TOML: {error}") from None
    return run_from_table(said, source=str(path))


_WORDS = {"extra_forbidden": "there is no such key", "model_type": "must be a section"}


def run_from_table(table: dict[str, Any], *, source: str) -> Run:
    """Validate the table of a `run.toml`. Raises OperatorError that names the source."""
    try:
        return Run.model_validate(table)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"]) or "the run"
        words = _WORDS.get(first["type"]) or first["msg"].removeprefix("Value error, ")
        raise OperatorError(f"{source}: {key}: {words}") from None


def _without_later_defaults(
    values: dict[str, Any], defaults: dict[str, Any], *, section: str = ""
) -> dict[str, Any]:
    """The values that are part of a run's hash; see `_FIRST_KEYS`."""
    kept: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            part = _without_later_defaults(value, defaults[key], section=key)
            kept |= {key: part} if part else {}
        elif key in _FIRST_KEYS.get(section, ()) or value != defaults[key]:
            kept[key] = value
    return kept
