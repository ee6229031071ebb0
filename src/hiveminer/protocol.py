"""The synapses: what validators and miners send each other, with the limits of each field.

A synapse is one JSON object that travels both ways: the caller fills in the request fields, the
miner the answer fields.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
)

MAX_ROWS = 4096
MAX_BATCH_SIZE = 1024
MAX_ACCUMULATION_STEPS = 256
MAX_TIMEOUT_SECONDS = 3600.0

MAX_REASON = 300
"""Characters of another neuron's reason that are logged or passed on."""

Name = Annotated[str, Field(max_length=128, pattern=r"^[A-Za-z0-9._:+-]*$")]
Index = Annotated[int, Field(ge=0, lt=2**48)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class InvalidBody(ValueError):
    """A body is not JSON (`is_json` False), or does not fit the synapse."""

    def __init__(self, reason: str, *, is_json: bool) -> None:
        super().__init__(reason)
        self.is_json = is_json


class Terminal(BaseModel):
    """The caller as the axon knows it; hotkey: an ss58 address."""

    hotkey: str = ""
    ip: str = ""


class Synapse(BaseModel):
    """Base class of synapses. `dendrite` is filled in by the axon, and is never sent."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    max_request_bytes: ClassVar[int] = 4096
    max_response_bytes: ClassVar[int] = 4096

    _dendrite: Terminal = PrivateAttr(default_factory=Terminal)

    @property
    def dendrite(self) -> Terminal:
        """Who called."""
        return self._dendrite

    @classmethod
    def name(cls) -> str:
        """The last part of the synapse's URL."""
        return cls.__name__

    @classmethod
    def from_json(cls, body: bytes) -> Self:
        """Parse a body. Raises `InvalidBody` with a one-line reason, also for a duplicate key."""
        try:
            synapse = cls.model_validate_json(body)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False, include_context=False)[0]
            if first["type"] == "json_invalid":
                raise InvalidBody("the body is not JSON", is_json=False) from None
            where = ".".join(str(part) for part in first["loc"])[:100]
            reason = f"{where}: {first['msg']}" if where else first["msg"]
            raise InvalidBody(clean(reason), is_json=True) from None
        _refuse_duplicate_keys(body)
        return synapse


class IsAlive(Synapse):
    """Whether a miner is up, and its run; answered at once, also while it trains."""

    completion: bool = False
    """Answer: it is up and takes work."""
    version: Name = ""
    """Answer: its version of this package."""
    run_id: Name = ""
    """Answer: the id of its run."""
    data_hash: Name = ""
    """Answer: the hash of its data."""
    epoch: Annotated[int, Field(ge=0)] = 0
    """Answer: its epoch."""
    queued: Annotated[int, Field(ge=0)] = 0
    """Answer: the number of waiting requests."""
    peer: Annotated[str, Field(max_length=256, pattern=r"^[!-~ ]*$")] = ""
    """Answer: its address in the swarm, if that is not on chain."""

    @model_serializer(mode="wrap")
    def _without_empty_peer(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = dump(self)
        if not fields.get("peer"):  # earlier versions refuse a key that they do not know
            fields.pop("peer", None)
        return fields


class Train(Synapse):
    """Train these rows and report the loss."""

    max_request_bytes: ClassVar[int] = 128 * 1024
    max_response_bytes: ClassVar[int] = 512 * 1024

    request_id: Annotated[Name, Field(min_length=1)]
    """Chosen by the caller; a repeated request is answered with the first one's result."""
    run_id: Annotated[Name, Field(min_length=1)]
    """A miner in another run refuses."""
    data_hash: Annotated[Name, Field(min_length=1)]
    """A miner with other data refuses."""
    dataset_indices: Annotated[list[Index], Field(min_length=1, max_length=MAX_ROWS)]
    """The rows to train, each once, in this order."""
    version: Name = ""
    """The caller's version of this package."""
    batch_size: Annotated[int, Field(ge=1, le=MAX_BATCH_SIZE)] = 8
    """Rows in a batch; the miner may split it to fit its memory."""
    gradient_accumulation_steps: Annotated[int, Field(ge=1, le=MAX_ACCUMULATION_STEPS)] = 1
    """Batches in an optimizer step; the last step may hold fewer."""
    timeout_seconds: Annotated[Finite, Field(gt=0, le=MAX_TIMEOUT_SECONDS)] = 60.0
    """Stop between two steps before this time is up, and answer with what was done."""

    loss: Finite | None = None
    """Answer: mean over the real tokens of all trained rows, in nats per token."""
    losses: Annotated[list[Finite], Field(max_length=MAX_ROWS)] = []
    """Answer: the same per optimizer step, each before that step."""
    epoch: Annotated[int, Field(ge=0)] | None = None
    """Answer: the swarm's epoch when training began."""
    epoch_steps: Annotated[int, Field(ge=0)] = 0
    """Answer: steps taken before the swarm averaged; only these can be replayed from the
    epoch's state."""
    steps: Annotated[int, Field(ge=0)] = 0
    """Answer: optimizer steps taken."""
    samples: Annotated[int, Field(ge=0)] = 0
    """Answer: rows trained, counted from the first of `dataset_indices`."""
    tokens: Annotated[int, Field(ge=0)] = 0
    """Answer: real tokens (without padding) in those rows."""
    discarded: Annotated[int, Field(ge=0)] = 0
    """Answer: rows whose step the swarm discarded; not counted in `samples`."""

    @field_validator("dataset_indices")
    @classmethod
    def _each_row_once(cls, indices: list[int]) -> list[int]:
        if len(set(indices)) != len(indices):
            raise ValueError("a row is given twice")
        return indices


def clean(text: str) -> str:
    """Another neuron's text, made safe for a terminal and a log: one printable line."""
    printable = "".join(mark if mark.isprintable() else " " for mark in text[: 2 * MAX_REASON])
    short = " ".join(printable.split())
    return short if len(short) <= MAX_REASON else short[: MAX_REASON - 1] + "…"


def _refuse_duplicate_keys(body: bytes) -> None:
    def check(pairs: list[tuple[str, Any]]) -> None:
        if len(dict(pairs)) != len(pairs):
            raise InvalidBody("the body contains a key twice", is_json=False)

    try:
        # Numbers stay text: converting a long one takes time quadratic in its length.
        json.loads(body.decode(), object_pairs_hook=check, parse_int=str, parse_float=str)
    except json.JSONDecodeError:
        raise InvalidBody("the body is not JSON", is_json=False) from None
