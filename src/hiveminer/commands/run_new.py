"""`hiveminer run new`: writes a commented run.toml for a subnet owner to edit."""

from __future__ import annotations

from hiveminer.config.run import run_from_table
from hiveminer.config.run_file import to_toml
from hiveminer.config.settings import RunNewSettings
from hiveminer.errors import OperatorError
from hiveminer.runtime.files import write_atomically
from hiveminer.training.data import load_rows
from hiveminer.training.model import load_model, weights_hash
from hiveminer.training.model_folder import check_absent


def main(settings: RunNewSettings) -> int:
    """Write the file, with the hashes of this machine's data and model."""
    check_absent(settings.out)
    table = {
        "name": settings.name,
        "model": {"name": settings.model},
        "data": {"name": settings.data},
    }
    run = run_from_table(table, source="hiveminer run new")
    rows = load_rows(run.data)
    data = run.data.model_copy(update={"hash": rows.hash})
    model = run.model.model_copy(update={"hash": weights_hash(load_model(run.model.name))})
    text = to_toml(run.model_copy(update={"data": data, "model": model}), comments=True)
    try:
        write_atomically(settings.out, text.encode())
    except OSError as error:
        raise OperatorError(f"--out {settings.out}: {error.strerror}") from None
    print(f"{settings.out}: {len(rows):,} rows, hash {rows.hash}")
    print(f"Edit it, then: hiveminer run check {settings.out}")
    return 0
