"""A small server that speaks the part of the hub's HTTP interface that downloads need.

`folders` are repositories by name: "models/tiny/llama" and "datasets/tiny/notes". Every
revision is the one commit that there is.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, folders: Mapping[str, Path]):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folders = dict(folders)
        self.requests: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        self.server.requests.append(f"{self.command} {self.path}")

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer(self.rfile.read(int(self.headers.get("Content-Length") or 0)))

    def _answer(self, body: bytes = b"") -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts[0] == "api" and parts[1] in ("models", "datasets"):
            self._api(f"{parts[1]}/{'/'.join(parts[2:4])}", parts[4:], body)
        elif "resolve" in parts:
            at = parts.index("resolve")
            kind = "" if parts[0] == "datasets" else "models/"
            self._file(kind + "/".join(parts[:at]), "/".join(parts[at + 2 :]))
        else:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound"})

    def _api(self, name: str, rest: list[str], body: bytes) -> None:
        folder = self.server.folders.get(name)
        if folder is None:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            return
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        entries = [
            {
                "type": "file", "path": str(path.relative_to(folder)), "size": path.stat().st_size,
                "oid": _etag(path),
            }
            for path in files
        ]  # fmt: skip
        if rest[:1] == ["tree"]:
            below = "/".join(rest[2:])
            self._json([each for each in entries if str(each["path"]).startswith(below)])
        elif rest[:1] == ["paths-info"]:
            asked = body.decode()
            self._json([each for each in entries if str(each["path"]) in unquote(asked)])
        else:
            owner_and_name = name.partition("/")[2]
            siblings = [{"rfilename": each["path"]} for each in entries]
            self._json(
                {"id": owner_and_name, "sha": COMMIT, "private": False, "siblings": siblings}
            )

    def _file(self, name: str, path: str) -> None:
        folder = self.server.folders.get(name)
        if folder is None:
            self._send(404, b"", {"X-Error-Code": "RepoNotFound"})
        elif not (folder / path).is_file():
            self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        else:
            headers = {"ETag": f'"{_etag(folder / path)}"', "X-Repo-Commit": COMMIT}
            self._send(200, (folder / path).read_bytes(), headers)

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes(), usedforsecurity=False).hexdigest()


@contextlib.contextmanager
def serving(folders: Mapping[str, Path]) -> Iterator[Hub]:
    """The hub, for as long as the block lasts."""
    with Hub(folders) as hub:
        thread = threading.Thread(target=hub.serve_forever, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join(60)
