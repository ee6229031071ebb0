"""The synapses' limits, on JSON as the axon parses it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from hiveminer.protocol import (
    MAX_ACCUMULATION_STEPS,
    MAX_BATCH_SIZE,
    MAX_ROWS,
    MAX_TIMEOUT_SECONDS,
    IsAlive,
    Train,
)

REQUEST: dict[str, Any] = {
    "request_id": "r-1",
    "run_id": "embedded-0-0-0",
    "data_hash": "ab",
    "dataset_indices": [3, 1, 2],
}


def train(**changed: Any) -> Train:
    return Train.model_validate_json(json.dumps(REQUEST | changed))


def test_a_request_keeps_its_order_and_gets_the_defaults() -> None:
    request = train()
    assert request.dataset_indices == [3, 1, 2]
    assert (request.batch_size, request.gradient_accumulation_steps) == (8, 1)
    assert request.timeout_seconds == 60.0
    assert request.loss is None
    assert request.losses == []


def test_the_bounds_themselves_are_allowed() -> None:
    request = train(
        dataset_indices=list(range(MAX_ROWS)),
        batch_size=MAX_BATCH_SIZE,
        gradient_accumulation_steps=MAX_ACCUMULATION_STEPS,
        timeout_seconds=MAX_TIMEOUT_SECONDS,
    )
    assert len(request.dataset_indices) == MAX_ROWS
    assert train(dataset_indices=[2**48 - 1], batch_size=1, timeout_seconds=1).batch_size == 1


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("dataset_indices", []),
        ("dataset_indices", list(range(MAX_ROWS + 1))),
        ("dataset_indices", [1, 2, 1]),
        ("dataset_indices", [-1]),
        ("dataset_indices", [2**48]),
        ("dataset_indices", [1.0]),
        ("dataset_indices", ["1"]),
        ("dataset_indices", [True]),
        ("dataset_indices", [None]),
        ("dataset_indices", 3),
        ("dataset_indices", "12"),
        ("dataset_indices", {"0": 1}),
        ("batch_size", 0),
        ("batch_size", -1),
        ("batch_size", 1_000_000),
        ("batch_size", MAX_BATCH_SIZE + 1),
        ("batch_size", 2.0),
        ("batch_size", "8"),
        ("batch_size", True),
        ("batch_size", None),
        ("gradient_accumulation_steps", 0),
        ("gradient_accumulation_steps", MAX_ACCUMULATION_STEPS + 1),
        ("timeout_seconds", 0),
        ("timeout_seconds", -5.0),
        ("timeout_seconds", MAX_TIMEOUT_SECONDS + 1),
        ("timeout_seconds", "60"),
        ("request_id", ""),
        ("request_id", "a" * 129),
        ("request_id", "with space"),
        ("request_id", "line\n"),
        ("request_id", 7),
        ("run_id", ""),
        ("run_id", "../etc"),
        ("data_hash", ""),
        ("version", "1 2"),
        ("colour", "red"),
        ("loss", "low"),
        ("losses", [0.1] * (MAX_ROWS + 1)),
        ("losses", [None]),
        ("epoch", -1),
        ("epoch_steps", -1),
        ("steps", -1),
        ("samples", -1),
        ("samples", 1.5),
        ("tokens", -1),
        ("discarded", -1),
    ],
)
def test_a_field_out_of_bounds_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ValidationError) as caught:
        train(**{field: value})
    assert {error["loc"][0] for error in caught.value.errors()} == {field}


@pytest.mark.parametrize("missing", REQUEST)
def test_a_missing_field_is_refused_by_name(missing: str) -> None:
    said = {key: value for key, value in REQUEST.items() if key != missing}
    with pytest.raises(ValidationError) as caught:
        Train.model_validate_json(json.dumps(said))
    assert [error["loc"] for error in caught.value.errors()] == [(missing,)]


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("field", ["timeout_seconds", "loss", "losses"])
def test_numbers_that_are_not_finite_are_refused(field: str, value: str) -> None:
    literal = f"[{value}]" if field == "losses" else value
    body = json.dumps(REQUEST)[:-1] + f', "{field}": {literal}}}'
    with pytest.raises(ValidationError) as caught:
        Train.model_validate_json(body)
    assert caught.value.errors()[0]["loc"][0] == field


@pytest.mark.parametrize("body", ["", "null", "[]", '"Train"', "3", "{", '{"a":', "\x00"])
def test_a_body_that_is_no_object_is_refused(body: str) -> None:
    with pytest.raises(ValidationError):
        Train.model_validate_json(body)


def test_is_alive_is_as_strict() -> None:
    assert IsAlive.model_validate_json("{}").completion is False
    for body in ('{"completion": 1}', '{"epoch": -1}', '{"queued": 0.5}', '{"run": "x"}'):
        with pytest.raises(ValidationError):
            IsAlive.model_validate_json(body)


def test_the_caller_is_not_read_from_the_wire_and_does_not_travel() -> None:
    for key in ("dendrite", "_dendrite"):
        with pytest.raises(ValidationError):
            train(**{key: {"hotkey": "5F", "ip": ""}})
    request = train()
    request.dendrite.hotkey = "5F"
    assert "5F" not in request.model_dump_json()
    assert train().dendrite.hotkey == "", "shared between requests"


def test_the_largest_messages_fit_into_their_caps() -> None:
    name = "n" * 128
    largest = train(
        request_id=name,
        run_id=name,
        data_hash=name,
        version=name,
        dataset_indices=list(range(2**48 - MAX_ROWS, 2**48)),
    )
    assert len(largest.model_dump_json()) <= Train.max_request_bytes
    largest.losses = [-1.2345678901234567e-300] * MAX_ROWS
    assert len(largest.model_dump_json()) <= Train.max_response_bytes
    alive = IsAlive(completion=True, version=name, run_id=name, data_hash=name, epoch=2**60)
    assert len(alive.model_dump_json()) <= IsAlive.max_response_bytes
