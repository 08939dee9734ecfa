"""A hub on this machine: as much of the Hugging Face hub's HTTP interface as pushing and fetching a file takes."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_stubSecretToken0123456789"


class StubHub:
    """Repositories in memory; ``fail`` maps the beginning of a request (``"POST /api/repos"``) to a status or ``"cut"``."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.commits = 0
        self.fail: dict[str, Any] = {}
        self.requests: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def do_GET(self) -> None:
                hub.answer(self, b"")

            def do_HEAD(self) -> None:
                hub.answer(self, b"")

            def do_POST(self) -> None:
                hub.answer(self, self.rfile.read(int(self.headers.get("Content-Length", 0))))

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    @property
    def revision(self) -> str:
        return hashlib.sha1(str(self.commits).encode()).hexdigest()

    def answer(self, request: Any, body: bytes) -> None:
        method, path = request.command, request.path.partition("?")[0]
        self.requests.append(f"{method} {path}")
        fault = next((how for start, how in self.fail.items() if f"{method} {path}".startswith(start)), None)
        allowed = request.headers.get("Authorization") == f"Bearer {TOKEN}"
        if isinstance(fault, int):
            self.send(request, fault, {"error": f"stub says {fault}"})
        elif method == "POST":
            self.post(request, path, body, allowed)
        else:
            self.get(request, path, allowed, fault == "cut")

    def post(self, request: Any, path: str, body: bytes, allowed: bool) -> None:
        if not allowed and path != "/api/validate-yaml":
            self.send(request, 401, {"error": "Invalid credentials"})
        elif path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked['organization']}/{asked['name']}"
            known = repo in self.repos
            self.repos.setdefault(repo, {})
            if asked.get("private") or asked.get("visibility") == "private":
                self.private.add(repo)
            about = {"url": f"{self.endpoint}/{repo}", "id": "1", "name": repo}
            self.send(request, 409 if known else 200, {**about, **({"error": "exists"} if known else {})})
        elif path == "/api/validate-yaml":
            self.send(request, 200, {"errors": [], "warnings": []})
        elif "/preupload/" in path:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            self.send(request, 200, {"files": files})
        elif "/commit/" in path:
            repo = "/".join(path.split("/")[3:5])
            lines = [json.loads(line) for line in body.splitlines()]
            self.repos[repo].update(
                {x["value"]["path"]: base64.b64decode(x["value"]["content"]) for x in lines if x["key"] == "file"}
            )
            self.commits += 1
            url = f"{self.endpoint}/{repo}/commit/{self.revision}"
            self.send(request, 200, {"commitUrl": url, "commitOid": self.revision, "pullRequestUrl": None})
        else:
            self.send(request, 404, {"error": f"no route {path}"})

    def get(self, request: Any, path: str, allowed: bool, cut: bool) -> None:
        parts = path.strip("/").split("/")
        repo = "/".join(parts[:2])
        if len(parts) < 5 or parts[2] != "resolve":
            return self.send(request, 404, {"error": f"no route {path}"})
        if repo not in self.repos or (repo in self.private and not allowed):
            return self.send(
                request, 401 if not allowed else 404, {"error": "no repo"}, {"X-Error-Code": "RepoNotFound"}
            )
        if parts[3] not in ("main", self.revision):
            return self.send(request, 404, {"error": "no revision"}, {"X-Error-Code": "RevisionNotFound"})
        content = self.repos[repo].get("/".join(parts[4:]))
        if content is None:
            return self.send(request, 404, {"error": "no entry"}, {"X-Error-Code": "EntryNotFound"})
        request.send_response(200)
        request.send_header("Content-Length", str(len(content)))
        request.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        request.send_header("X-Repo-Commit", self.revision)
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(content[: len(content) // 2] if cut else content)
        if cut:
            request.close_connection = True
        return None

    def send(self, request: Any, status: int, answer: Any, headers: dict[str, str] | None = None) -> None:
        content = json.dumps(answer).encode()
        request.send_response(status)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(content)))
        for name, value in (headers or {}).items():
            request.send_header(name, value)
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(content)
