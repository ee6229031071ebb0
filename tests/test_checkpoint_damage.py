"""A damaged checkpoint is skipped in favor of the previous one, whatever the damage."""

from __future__ import annotations

import json
import logging
import random
from pathlib import Path

import pytest
import torch
from checkpoints import (
    is_number,
    length_and_hash,
    look_in,
    rewrite,
    tensors,
    the_one_before,
    written,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from hiveminer.training.checkpoint import (
    MANIFEST,
    MAX_MANIFEST_BYTES,
    STATE,
    Checkpoints,
    of_run,
)

# --- what is refused ------------------------------------------------------------------------


@pytest.mark.parametrize("name", [MANIFEST, STATE])
def test_a_cut_and_a_flipped_bit_anywhere_are_seen(tmp_path: Path, name: str) -> None:
    written(tmp_path)
    chance = random.Random(5)
    path = tmp_path / "checkpoint-000002" / name
    whole = path.read_bytes()
    for place in range(len(whole)):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << chance.randrange(8)
        for damaged in (whole[:place], flipped):
            path.write_bytes(damaged)
            the_one_before(tmp_path, name)
    path.write_bytes(whole)
    assert is_number(look_in(tmp_path)[0], 2)


@settings(max_examples=300)
@given(data=st.data())
def test_whatever_is_done_to_the_newest_a_sound_one_is_loaded(
    tmp_path: Path, data: st.DataObject
) -> None:
    """Any bytes in place of any others, in either file."""
    folder = tmp_path / "kept"
    if not folder.exists():
        written(folder)
    path = folder / "checkpoint-000002" / data.draw(st.sampled_from([MANIFEST, STATE]))
    whole = path.read_bytes()
    start = data.draw(st.integers(0, len(whole)))
    stop = data.draw(st.integers(start, len(whole)))
    changed = whole[:start] + data.draw(st.binary(max_size=64)) + whole[stop:]
    path.write_bytes(changed)
    try:
        found = look_in(folder)[0]
        # White space in the manifest may change without changing what it says.
        assert (
            is_number(found, 1)
            or (is_number(found, 2) and path.name == MANIFEST)
            or (is_number(found, 2) and changed == whole)
        )
    finally:
        path.write_bytes(whole)


def _swap(first: Path, second: Path) -> None:
    aside = first.with_name("aside")
    first.rename(aside)
    second.rename(first)
    aside.rename(second)


@pytest.mark.parametrize(
    ("file", "why"), [(MANIFEST, "it was written as number"), (STATE, "its hash differs")]
)
def test_swapped_files_are_refused_both(tmp_path: Path, file: str, why: str) -> None:
    written(tmp_path)
    _swap(tmp_path / "checkpoint-000001" / file, tmp_path / "checkpoint-000002" / file)
    found, refused = look_in(tmp_path)
    assert found is None
    assert [why in line for line in refused] == [True, True]


@pytest.mark.parametrize("name", [MANIFEST, STATE])
def test_a_missing_file_and_a_folder_in_its_place_are_refused(tmp_path: Path, name: str) -> None:
    written(tmp_path)
    path = tmp_path / "checkpoint-000002" / name
    path.unlink()
    the_one_before(tmp_path, f"{name} cannot be read")
    path.mkdir()
    the_one_before(tmp_path, name)


def test_a_signed_checkpoint_of_version_0_1_still_loads(tmp_path: Path) -> None:
    written(tmp_path)
    path = tmp_path / "checkpoint-000002" / MANIFEST
    content = json.loads(path.read_bytes())
    del content["sha256"]
    content["signature"] = "5a" * 64
    path.write_text(json.dumps(content, sort_keys=True, separators=(",", ":")) + "\n")
    found, refused = look_in(tmp_path)
    assert (is_number(found, 2), refused) == (True, [])
    state = path.with_name(STATE)
    state.write_bytes(state.read_bytes()[:-1] + b"\x7f")
    the_one_before(tmp_path, "its hash differs")


@pytest.mark.parametrize(
    "text", [b"", b"[]", b"1", b"[" * 100_000, b'{"a":' * 5000, b"\xff\xfe", b"9" * 5000, b"NaN"]
)
def test_what_is_no_manifest_is_refused(tmp_path: Path, text: bytes) -> None:
    written(tmp_path)
    (tmp_path / "checkpoint-000002" / MANIFEST).write_bytes(text)
    the_one_before(tmp_path, MANIFEST)


def test_a_manifest_is_not_read_beyond_its_limit(tmp_path: Path) -> None:
    kept = written(tmp_path)
    with (tmp_path / "checkpoint-000002" / MANIFEST).open("wb") as stream:
        stream.truncate(2**40)  # it takes no room, but a reader's memory
    the_one_before(tmp_path, f"longer than {MAX_MANIFEST_BYTES} bytes")
    assert kept.save(None, {"text": "x" * MAX_MANIFEST_BYTES}) is None


def test_a_newer_format_is_refused_and_nothing_is_unpickled(tmp_path: Path) -> None:
    written(tmp_path)
    path = tmp_path / "checkpoint-000002" / STATE
    torch.save({"a": torch.zeros(1)}, path)
    rewrite(path.with_name(MANIFEST), state=length_and_hash(path))
    the_one_before(tmp_path, f"{STATE} cannot be read")
    rewrite(path.with_name(MANIFEST), format=2)
    the_one_before(tmp_path, "its format is 2, and this version reads 1")


def test_each_refusal_is_one_line_of_the_event(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept = Checkpoints(tmp_path)
    for number, run in enumerate(["ours", "theirs", "ours"], start=1):
        kept.save(tensors(number), {"run_id": run})
    (tmp_path / "checkpoint-000003" / STATE).unlink()
    with caplog.at_level(logging.WARNING):
        found = kept.load(of_run("ours"))
    assert found is not None
    assert found.name == "checkpoint-000001"
    assert [record.__dict__["event"] for record in caplog.records] == ["checkpoint"] * 2
    assert caplog.messages[0].startswith(f"checkpoint-000003 is refused: {STATE} cannot be read (")
    words = "checkpoint-000002 is refused: it is of run theirs, and this is ours"
    assert caplog.messages[1].startswith(words)
