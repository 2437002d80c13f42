"""A Hugging Face Hub on loopback: files of model repositories by commit, and commits by `upload_folder`.

What it answers is what huggingface_hub asks for: https://huggingface.co/.well-known/openapi.json has the routes.
"""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass
class Repository:
    """Files of each commit, and the commits that branches and tags are."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    private: bool = False

    def commit(self, files: dict[str, bytes], *, name: str = "main") -> str:
        """A new commit, which the branch becomes."""
        key = hashlib.sha1(repr((sorted(files.items()), len(self.commits))).encode()).hexdigest()
        self.commits[key] = dict(files)
        self.names[name] = key
        return key


@dataclass
class Hub:
    """What the server holds; `log` has every request as `METHOD path`, `tokens` those that came along."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)
    tokens: set[str | None] = field(default_factory=set)
    cut: int | None = None
    """Bytes after which the next download breaks off."""
    url: str = ""

    def of(self, name: str) -> Repository:
        return self.repositories.setdefault(name, Repository())


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.route("HEAD")

    def do_GET(self) -> None:
        self.route("GET")

    def do_POST(self) -> None:
        self.route("POST")

    def route(self, method: str) -> None:
        path = urlsplit(self.path).path.strip("/")
        self.hub.log.append(f"{method} {path}")
        self.hub.tokens.add(self.headers.get("Authorization"))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = [unquote(part) for part in path.split("/")]
        if parts[:2] == ["api", "repos"]:
            sent = json.loads(body)
            self.hub.of(f"{sent.get('organization') or 'me'}/{sent['name'].rpartition('/')[2]}")
            self.send_json({"url": f"{self.hub.url}/{sent['name']}"})
        elif parts[:2] == ["api", "validate-yaml"]:
            self.send_json({"errors": [], "warnings": []})
        elif parts[:2] == ["api", "models"]:
            self.models("/".join(parts[2:4]), parts[4:], body)
        elif parts[2:3] == ["resolve"]:
            self.resolve(method, "/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        else:
            self.send_json({"error": "unknown"}, 404)

    def found(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """(commit, files), or None after an answer that says why not."""
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and self.headers.get("Authorization") != "Bearer hf_right"):
            self.send_json({"error": "Repository not found"}, 401, X_Error_Code="RepoNotFound")
            return None
        if repository.gated:
            self.send_json({"error": "gated"}, 403, X_Error_Code="GatedRepo")
            return None
        commit = repository.names.get(revision, revision)
        if commit not in repository.commits:
            self.send_json({"error": "Revision not found"}, 404, X_Error_Code="RevisionNotFound")
            return None
        return commit, repository.commits[commit]

    def resolve(self, method: str, name: str, revision: str, path: str) -> None:
        at = self.found(name, revision)
        if at is None:
            return
        commit, files = at
        if path not in files:
            self.send_json({"error": "none"}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
            return
        body = files[path]
        facts = {"X_Repo_Commit": commit, "ETag": f'"{hashlib.sha256(body).hexdigest()}"', "Accept_Ranges": "bytes"}
        start = 0
        if (asked := self.headers.get("Range", "")).startswith("bytes="):
            start = int(asked.removeprefix("bytes=").split("-")[0])
            facts["Content_Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        self.begin(206 if start else 200, len(body) - start, **facts)
        if method == "GET":
            cut, self.hub.cut = self.hub.cut, None
            self.wfile.write(body[start:][:cut])
            self.close_connection = cut is not None

    def models(self, name: str, rest: list[str], body: bytes) -> None:
        if rest[:1] == ["preupload"]:
            files = json.loads(body)["files"]
            self.send_json(
                {"files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]}
            )
        elif rest[:1] == ["commit"]:
            lines = [json.loads(line) for line in body.splitlines()]
            files = {
                line["value"]["path"]: base64.b64decode(line["value"]["content"])
                for line in lines
                if line["key"] == "file"
            }
            commit = self.hub.of(name).commit(files)
            self.send_json({"commitUrl": f"{self.hub.url}/{name}/commit/{commit}", "commitOid": commit})
        elif rest[:1] == ["tree"]:
            at = self.found(name, rest[1])
            if at is not None:
                found = at[1].items()
                self.send_json([{"type": "file", "path": p, "size": len(b), "oid": "0"} for p, b in found])
        elif rest[:1] in ([], ["revision"]):
            at = self.found(name, rest[1] if rest else "main")
            if at is not None:
                siblings = [{"rfilename": path} for path in at[1]]
                self.send_json({"id": name, "modelId": name, "sha": at[0], "siblings": siblings})
        else:
            self.send_json({"error": f"unknown {rest}"}, 404)

    def send_json(self, value: object, status: int = 200, **headers: str) -> None:
        body = json.dumps(value).encode()
        self.begin(status, len(body), Content_Type="application/json", **headers)
        if self.command != "HEAD":
            self.wfile.write(body)

    def begin(self, status: int, length: int, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content_Length": str(length), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub on loopback, empty, until the block ends."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("HubHandler", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
