"""The synapses: what a validator and a miner send each other, and within what limits.

A synapse is one JSON object that travels both ways: the caller fills in the request
fields, the miner the answer fields. The limits are declared here, on the fields, so that
code behind the axon only sees values within them.
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
"""Rows in one `Train`."""

MAX_BATCH_SIZE = 1024
"""Rows in one logical batch."""

MAX_ACCUMULATION_STEPS = 256
"""Batches in one optimizer step."""

MAX_TIMEOUT_SECONDS = 3600.0
"""The longest that a caller may ask a miner to train for."""

MAX_REASON = 300
"""Characters of another neuron's reason that are passed on."""

Name = Annotated[str, Field(max_length=128, pattern=r"^[A-Za-z0-9._:+-]*$")]
Index = Annotated[int, Field(ge=0, lt=2**48)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class InvalidBody(ValueError):
    """A body is not JSON, or does not fit the synapse; `is_json` tells which."""

    def __init__(self, reason: str, *, is_json: bool) -> None:
        super().__init__(reason)
        self.is_json = is_json


class Terminal(BaseModel):
    """One end of a call, as far as the axon knows it: `hotkey` is an ss58 address."""

    hotkey: str = ""
    ip: str = ""


class Synapse(BaseModel):
    """What all synapses share: a name on the wire, a cap on the body, the caller.

    `dendrite` is filled in by the axon and never travels.
    """

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
        """The synapse's name: the last part of its URL."""
        return cls.__name__

    @classmethod
    def from_json(cls, body: bytes) -> Self:
        """Parse a body. Raises `InvalidBody` with a one-line reason.

        A key given twice is refused: two parsers may disagree on which value counts.
        """
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
    """Whether a miner is up, and which run it trains. Answered at once, also while training."""

    completion: bool = False
    """Set by the miner: it is up and takes work."""
    version: Name = ""
    """Set by the miner: its version of this package."""
    run_id: Name = ""
    """Set by the miner: the run it trains, with the run's hash and the model's schema."""
    data_hash: Name = ""
    """Set by the miner: the hash of its data set."""
    epoch: Annotated[int, Field(ge=0)] = 0
    """Set by the miner: the swarm's epoch as it knows it."""
    queued: Annotated[int, Field(ge=0)] = 0
    """Set by the miner: requests that wait."""
    peer: Annotated[str, Field(max_length=256, pattern=r"^[!-~ ]*$")] = ""
    """Set by the miner: its address in the swarm, where that does not stand on the chain."""

    @model_serializer(mode="wrap")
    def _without_empty_peer(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = dump(self)
        if not fields.get("peer"):  # earlier versions refuse a key that they do not know
            fields.pop("peer", None)
        return fields


class Train(Synapse):
    """Train on these rows and report the loss."""

    max_request_bytes: ClassVar[int] = 128 * 1024
    max_response_bytes: ClassVar[int] = 512 * 1024

    request_id: Annotated[Name, Field(min_length=1)]
    """The caller's name for this request: the same one again is answered with the first
    one's result and trains once."""
    run_id: Annotated[Name, Field(min_length=1)]
    """The run; a miner in another one refuses."""
    data_hash: Annotated[Name, Field(min_length=1)]
    """The data set's hash; a miner that holds other data refuses."""
    dataset_indices: Annotated[list[Index], Field(min_length=1, max_length=MAX_ROWS)]
    """The rows to train on, each once, in this order."""
    version: Name = ""
    """The caller's version of this package."""
    batch_size: Annotated[int, Field(ge=1, le=MAX_BATCH_SIZE)] = 8
    """Rows in a logical batch; the miner may cut it to fit its memory."""
    gradient_accumulation_steps: Annotated[int, Field(ge=1, le=MAX_ACCUMULATION_STEPS)] = 1
    """Batches in an optimizer step; the last step may hold fewer."""
    timeout_seconds: Annotated[Finite, Field(gt=0, le=MAX_TIMEOUT_SECONDS)] = 60.0
    """Stop at a batch's edge before this many seconds, and answer with what was done."""

    loss: Finite | None = None
    """Answer: mean over the real tokens of all trained rows, nats per token."""
    losses: Annotated[list[Finite], Field(max_length=MAX_ROWS)] = []
    """Answer: the same by optimizer step, each before that step."""
    epoch: Annotated[int, Field(ge=0)] | None = None
    """Answer: the swarm's epoch when training began."""
    epoch_steps: Annotated[int, Field(ge=0)] = 0
    """Answer: how many of the steps were taken before the swarm averaged; what comes after
    cannot be replayed from the same state."""
    steps: Annotated[int, Field(ge=0)] = 0
    """Answer: optimizer steps taken."""
    samples: Annotated[int, Field(ge=0)] = 0
    """Answer: rows trained, counted from the first of `dataset_indices`."""
    tokens: Annotated[int, Field(ge=0)] = 0
    """Answer: real tokens (padding not counted) in those rows."""
    discarded: Annotated[int, Field(ge=0)] = 0
    """Answer: rows of these whose step the swarm threw away (they are not in `samples`)."""

    @field_validator("dataset_indices")
    @classmethod
    def _each_row_once(cls, indices: list[int]) -> list[int]:
        if len(set(indices)) != len(indices):
            raise ValueError("a row is given twice")
        return indices


def clean(text: str) -> str:
    """Text of another neuron, made safe for a terminal and a log: one line, printable."""
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
