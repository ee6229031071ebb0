"""A model and a dataset by hub name, through huggingface_hub itself, from a server of our own."""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from tiny import save_tiny

from hiveminer.training.model import load_model, weights_hash
from programs import Program

COMMIT = "0123456789abcdef0123456789abcdef01234567"
"""The one revision that there is."""

LOAD = """
import json
from hiveminer.config.run import Run
from hiveminer.training.task import load_task
from hiveminer.training.model import weights_hash
run = Run.model_validate({
    "model": {"name": "tiny/llama", "sequence_length": 32}, "data": {"name": "tiny/notes"},
})
task = load_task(run)
print(json.dumps({
    "weights": weights_hash(task.model), "rows": task.dataset.texts(range(len(task.dataset))),
}), flush=True)
"""


class Hub(ThreadingHTTPServer):
    """The part of the hub's HTTP interface that downloads need.

    folders: repositories by name, such as "models/tiny/llama" and "datasets/tiny/notes".
    """

    daemon_threads = True

    def __init__(self, folders: dict[str, Path]):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folders = folders
        self.requests: list[str] = []


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        self.server.requests.append(f"{self.command} {self.path}")

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        match unquote(urlsplit(self.path).path).strip("/").split("/"):
            case ["api", "models" | "datasets" as kind, owner, name, *rest]:
                self._api(f"{kind}/{owner}/{name}", rest)
            case ["datasets", owner, name, "resolve", _, *path]:
                self._file(self.server.folders[f"datasets/{owner}/{name}"].joinpath(*path))
            case [owner, name, "resolve", _, *path]:
                self._file(self.server.folders[f"models/{owner}/{name}"].joinpath(*path))
            case _:
                self._send(404, b"", {})

    def _api(self, name: str, rest: list[str]) -> None:
        folder = self.server.folders[name]
        files = {str(path.relative_to(folder)): path for path in folder.rglob("*")}
        answer: Any = {
            "id": name.partition("/")[2], "sha": COMMIT, "private": False,
            "siblings": [{"rfilename": path} for path in files],
        }  # fmt: skip
        if rest[:1] == ["tree"]:
            answer = [
                {"type": "file", "path": path, "size": file.stat().st_size, "oid": _etag(file)}
                for path, file in files.items()
                if path.startswith("/".join(rest[2:]))
            ]
        self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _file(self, path: Path) -> None:
        headers = {"X-Repo-Commit": COMMIT}
        if path.is_file():
            self._send(200, path.read_bytes(), headers | {"ETag": f'"{_etag(path)}"'})
        else:
            self._send(404, b"", headers | {"X-Error-Code": "EntryNotFound"})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes(), usedforsecurity=False).hexdigest()


@pytest.mark.timeout(240)
def test_a_model_and_a_dataset_come_from_the_hub_by_name(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model")
    (tmp_path / "notes").mkdir()
    rows = [f"note {n}: buy {n} apples" for n in range(40)]
    lines = "".join(json.dumps({"text": row}) + "\n" for row in rows)
    (tmp_path / "notes" / "train.jsonl").write_text(lines)
    script = tmp_path / "load.py"
    script.write_text(LOAD)
    folders = {"models/tiny/llama": tmp_path / "model", "datasets/tiny/notes": tmp_path / "notes"}
    with Hub(folders) as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        env = {
            "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
            "HF_HOME": str(tmp_path / "cache"),
            "HF_HUB_OFFLINE": "0",
        }
        # A fresh interpreter: huggingface_hub reads its environment when it is imported.
        with Program([str(script)], folder=tmp_path / "load", env=env, fresh=True) as program:
            words = program.says('"weights"', seconds=200)
        hub.shutdown()
    answer = json.loads(next(x for x in words.splitlines() if x.startswith("{")))
    assert answer["rows"] == rows
    assert answer["weights"] == weights_hash(load_model(str(tmp_path / "model")))
    asked = "\n".join(hub.requests)
    assert "/tiny/llama/resolve/" in asked
    assert "/datasets/tiny/notes/resolve/" in asked
