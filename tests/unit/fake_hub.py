"""A local server with the parts of the Hugging Face hub that its client needs to download a model."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "c0ffee" + "0" * 34


@dataclass
class FakeHub:
    """Serves one folder as the repository `someone/tiny`. `sent` counts the bytes that were sent of each file."""

    folder: Path
    sent: dict[str, int] = field(default_factory=dict)
    breaks_after: int | None = None  # bytes, after which the connection is cut and no other request is answered
    refuses_with: tuple[int, str] | None = None  # status and the hub's error code, for every request
    garbles: bool = False

    def __post_init__(self) -> None:
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def info(self) -> dict[str, Any]:
        files = []
        for path in sorted(self.folder.iterdir()):
            file: dict[str, Any] = {"rfilename": path.name, "size": path.stat().st_size}
            if path.suffix == ".safetensors":
                file["lfs"] = {"sha256": _sha256(path), "size": file["size"], "pointerSize": 130}
            files.append(file)
        return {"id": "someone/tiny", "sha": COMMIT, "siblings": files}


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        hub = self.hub
        path = self.path.split("?")[0]
        if hub.refuses_with is not None:
            self._refuse(*hub.refuses_with)
        elif hub.breaks_after == 0:
            self._refuse(503, "")
        elif re.fullmatch(rf"/api/models/someone/tiny(/revision/(main|{COMMIT}))?", path):
            body = json.dumps(hub.info()).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
        elif path.startswith("/api/models/someone/tiny/revision/"):
            self._refuse(404, "RevisionNotFound")
        elif path.startswith(f"/someone/tiny/resolve/{COMMIT}/"):
            self._send_file(path.rpartition("/")[2], with_body=with_body)
        else:
            self._refuse(404, "RepoNotFound")

    def _send_file(self, name: str, *, with_body: bool) -> None:
        path = self.hub.folder / name
        if not path.is_file():
            self._refuse(404, "EntryNotFound")
            return
        content = path.read_bytes()
        start, end = 0, len(content)
        if ranged := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(ranged[1]), min(int(ranged[2]) + 1 if ranged[2] else end, end)
        self.send_response(206 if ranged else 200)
        self.send_header("Content-Length", str(end - start))
        self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(content)}")
        self.send_header("ETag", f'"{_sha256(path)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if with_body:
            self._send(name, content[start:end])

    def _send(self, name: str, content: bytes) -> None:
        hub = self.hub
        if hub.breaks_after is not None:
            content, hub.breaks_after = content[: hub.breaks_after], 0
            self.close_connection = True
        hub.sent[name] = hub.sent.get(name, 0) + len(content)
        self.wfile.write(bytes(len(content)) if hub.garbles else content)

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
