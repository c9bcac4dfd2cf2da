"""A small Hub on this machine: what `huggingface_hub` asks for to download, from a folder.

A repository `owner/name` is the folder `ROOT/owner/name/COMMIT`, and `main` its newest commit by
name. Requests are listed, so that a test sees what was asked for.
"""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

COMMIT = "c0ffee" + "0" * 34


class _Handler(BaseHTTPRequestHandler):
    root: Path
    asked: list[str]

    def log_message(self, *_words: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        self.asked.append(f"{self.command} {self.path}")
        info = re.fullmatch(r"/api/models/(\w+/\w+)(?:/revision/(\w+))?(\?.*)?", self.path)
        file = re.fullmatch(r"/(\w+/\w+)/resolve/(\w+)/(.+)", self.path)
        match = info or file
        folder = self.root / match[1] if match else self.root / "none"
        if not folder.is_dir():
            return self._send(404, b"", {"X-Error-Code": "RepoNotFound"})
        commits = sorted(f.name for f in folder.iterdir())
        asked = (match[2] or "main") if match else ""
        commit = commits[-1] if asked == "main" else asked
        if commit not in commits:
            return self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        if info:
            content = {"id": info[1], "sha": commit, "siblings": [], "tags": [], "private": True}
            return self._send(200, json.dumps(content).encode(), {})
        path = folder / commit / match[3]
        if not path.is_file():
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        content = path.read_bytes()
        etag = hashlib.sha256(content).hexdigest()
        self._send(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": commit}, body=body)

    def _send(self, status: int, content: bytes, more: dict[str, str], body: bool = True) -> None:
        self.send_response(status)
        for key, value in {**more, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if body and self.command == "GET":
            self.wfile.write(content)


@contextmanager
def hub(root: Path, cache: Path, patch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Let `huggingface_hub` ask a server over `root`; yield the requests as they come."""
    asked: list[str] = []
    handler = type("Handler", (_Handler,), {"root": root, "asked": asked})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    with patch.context() as inner:
        for name, value in {"ENDPOINT": address, "HF_HUB_CACHE": str(cache)}.items():
            inner.setattr(f"huggingface_hub.constants.{name}", value)
        inner.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        inner.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        inner.setenv("NO_PROXY", "127.0.0.1")
        try:
            yield asked
        finally:
            server.shutdown()
            thread.join()
            server.server_close()
