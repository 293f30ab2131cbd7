"""A stand-in for the Hugging Face hub: one repository over HTTP, as huggingface_hub asks for it."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Serves the files of a directory as owner/name.

    `break_after` cuts the next longer download off after so many bytes.
    """

    def __init__(self, files: Path, repo: str, token: str = "") -> None:
        self.files, self.repo, self.token = files, repo, token
        self.requests: list[tuple[str, str, str]] = []
        """(method, path, Range) of every request."""
        self.break_after = 0
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub.answer(self)

            def do_HEAD(self) -> None:
                hub.answer(self)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Hub:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path = request.path.partition("?")[0]
        self.requests.append((request.command, path, request.headers.get("Range", "")))
        if self.token and request.headers.get("authorization") != f"Bearer {self.token}":
            return _send(request, 401, b"{}", {"X-Error-Code": "RepoNotFound"})
        info = re.fullmatch(rf"/api/models/{self.repo}(?:/revision/(main|{COMMIT}))?", path)
        file = re.fullmatch(rf"/{self.repo}/resolve/(?:main|{COMMIT})/(.+)", path)
        if info:
            return _send(request, 200, self._info(), {})
        if file and (self.files / file[1]).is_file():
            return self._file(request, self.files / file[1])
        code = "RevisionNotFound" if path.startswith(f"/api/models/{self.repo}/revision/") else "RepoNotFound"
        return _send(request, 404, b"{}", {"X-Error-Code": "EntryNotFound" if file else code})

    def _info(self) -> bytes:
        files = sorted(path for path in self.files.rglob("*") if path.is_file())
        siblings = [{"rfilename": p.relative_to(self.files).as_posix(), "size": p.stat().st_size} for p in files]
        return json.dumps({"id": self.repo, "sha": COMMIT, "siblings": siblings, "tags": [], "private": False}).encode()

    def _file(self, request: BaseHTTPRequestHandler, path: Path) -> None:
        data = path.read_bytes()
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        start = int((re.match(r"bytes=(\d+)-", request.headers.get("Range", "")) or [0, 0])[1])
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        cut = self.break_after if request.command == "GET" and len(data) - start > self.break_after else 0
        self.break_after = 0 if cut else self.break_after
        _send(request, 206 if start else 200, data[start:], headers, cut)


def _send(request: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str], cut: int = 0) -> None:
    request.send_response(status)
    for name, value in headers.items():
        request.send_header(name, value)
    request.send_header("Content-Length", str(len(body)))
    request.end_headers()
    if request.command == "GET":
        request.wfile.write(body[:cut] if cut else body)
    if cut:
        request.close_connection = True
