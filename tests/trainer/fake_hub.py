"""A Hub of one's own on 127.0.0.1: the few endpoints that creating a repository and pushing to it use."""

from __future__ import annotations

import base64
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# Sent as large files, as the Hub does; everything else goes into the commit itself.
_LARGE = (".safetensors", ".bin", ".png", ".pt")


class FakeHub(ThreadingHTTPServer):
    """Takes what is pushed with `token` and keeps it.

    Attributes:
        files: path in the repository → content, after all commits.
        commits: their messages, in order.
        bodies: every body that was sent, whatever became of it.
        requests: "METHOD path" of every request.
        refuse: status to answer everything with that needs a right to write.
        drop: a regular expression; a request whose path it matches is cut off without an answer.
    """

    daemon_threads = True

    def __init__(self, token: str = "hf_right") -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.token = token
        self.files: dict[str, bytes] = {}
        self.commits: list[str] = []
        self.bodies: list[bytes] = []
        self.requests: list[str] = []
        self.refuse: int | None = None
        self.drop: str | None = None
        self.large: dict[str, bytes] = {}
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def sent(self) -> bytes:
        """Every byte that was ever sent to it, base64 in commits decoded."""
        return b"\n".join([*self.bodies, *self.files.values(), *self.large.values()])


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        """Silent."""

    def _serve(self) -> None:
        hub = self.server
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = self._chunks()
        path = self.path.split("?")[0]
        with hub.lock:
            hub.requests.append(f"{self.command} {path}")
            hub.bodies.append(body)
        if hub.drop is not None and re.search(hub.drop, path):
            self.close_connection = True
            self.connection.close()
            return
        if path == "/api/validate-yaml":
            return self._answer({"errors": [], "warnings": []})
        if path.startswith("/large/"):
            with hub.lock:
                hub.large[path.rsplit("/", 1)[1]] = body
            return self._answer({})
        if self.headers.get("Authorization") != f"Bearer {hub.token}":
            return self._answer({"error": "Invalid username or password."}, 401)
        if hub.refuse is not None:
            return self._answer({"error": "You may not."}, hub.refuse)
        if path == "/api/whoami-v2":
            return self._answer({"name": "me", "type": "user", "auth": {"accessToken": {"role": "write"}}})
        if path == "/api/repos/create":
            asked = json.loads(body)
            return self._answer({"url": f"{hub.url}/{asked.get('organization') or 'me'}/{asked['name']}"})
        if "/preupload/" in path:
            files = json.loads(body)["files"]
            modes = ["lfs" if file["path"].endswith(_LARGE) else "regular" for file in files]
            answers = zip(files, modes, strict=True)
            return self._answer(
                {"files": [{"path": f["path"], "uploadMode": mode, "shouldIgnore": False} for f, mode in answers]}
            )
        if path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**entry, "actions": {"upload": {"href": f"{hub.url}/large/{entry['oid']}"}}}
                for entry in json.loads(body)["objects"]
            ]
            return self._answer({"objects": objects, "transfer": "basic"})
        if "/commit/" in path:
            return self._commit(body)
        if re.fullmatch(r"/api/models/[\w.-]+/[\w.-]+(/revision/\w+)?", path):
            return self._answer({"id": "me/model", "sha": "0" * 40, "siblings": [], "tags": []})
        return self._answer({"error": f"not known here: {path}"}, 404)

    do_GET = do_POST = do_PUT = _serve

    def _commit(self, body: bytes) -> None:
        hub = self.server
        with hub.lock:
            for line in body.splitlines():
                entry = json.loads(line)
                value = entry["value"]
                if entry["key"] == "header":
                    hub.commits.append(value["summary"])
                elif entry["key"] == "file":
                    hub.files[value["path"]] = base64.b64decode(value["content"])
                elif entry["key"] == "lfsFile":
                    hub.files[value["path"]] = hub.large[value["oid"]]
            number = len(hub.commits)
        self._answer(
            {"success": True, "commitUrl": f"{hub.url}/me/model/commit/{number:040x}", "commitOid": f"{number:040x}"}
        )

    def _chunks(self) -> bytes:
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _answer(self, values: Any, status: int = 200) -> None:
        content = json.dumps(values).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
