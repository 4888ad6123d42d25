"""A local HTTP server that speaks as much of the Hub's API as huggingface_hub's client needs."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

HANG = "hang"  # as a fault: take the request and never answer


@dataclass
class Commit:
    """One commit: its message, the files it brought, and all files after it."""

    oid: str
    message: str
    added: dict[str, bytes]
    files: dict[str, bytes]


@dataclass
class Repo:
    gated: bool = False
    commits: list[Commit] = field(default_factory=list)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, message: str, added: dict[str, bytes]) -> Commit:
        files = (self.commits[-1].files if self.commits else {}) | added
        oid = hashlib.sha1(f"{len(self.commits)} {message}".encode()).hexdigest()
        self.commits.append(Commit(oid, message, added, files))
        return self.commits[-1]

    def at(self, revision: str) -> Commit | None:
        if revision == "main":
            return self.commits[-1] if self.commits else None
        oid = self.tags.get(revision, revision)
        return next((commit for commit in self.commits if commit.oid == oid), None)


class HubServer:
    """Serves `repos` on 127.0.0.1; writing needs `token`.

    `faults` makes requests fail: {"user/repo": [("commit", 503), ("commit", HANG)]} spoils the
    next two requests of that repository whose path contains the word, one after the other.
    `account` is whom the token belongs to.
    `requests` lists what came in.
    """

    def __init__(self, token: str, port: int = 0):
        self.token = token
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.faults: dict[str, list[tuple[str, int | str]]] = {}
        self.requests: list[str] = []
        self.account = {"type": "user", "name": "me", "orgs": []}
        self.stopping = threading.Event()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", port), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stopping.set()
        self._server.shutdown()
        self._server.server_close()

    def next_fault(self, path: str) -> int | str | None:
        for repo_id, faults in self.faults.items():
            if repo_id in path and faults and faults[0][0] in path:
                return faults.pop(0)[1]
        return None


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.handle_request()

    do_GET = do_POST = do_PUT = do_HEAD

    def handle_request(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.hub.next_fault(path)
        if fault == HANG:
            self.hub.stopping.wait()
            self.close_connection = True
        elif fault:
            # Servers quote what they were sent: the client must not pass it on to the screen.
            self.answer(fault, {"error": f"refused {self.headers.get('Authorization')}"})
        elif "/resolve/" in path:
            self.resolve(path)
        else:
            self.api(path)

    # --- Reading ------------------------------------------------------------------------

    def resolve(self, path: str) -> None:
        repo_id, _, rest = path.strip("/").partition("/resolve/")
        revision, _, name = rest.partition("/")
        repo = self.hub.repos.get(repo_id)
        if repo is None:
            return self.answer(404, code="RepoNotFound")
        if repo.gated and not self.authorized():
            return self.answer(403, code="GatedRepo")
        commit = repo.at(revision)
        if commit is None:
            return self.answer(404, code="RevisionNotFound")
        if name not in commit.files:
            return self.answer(404, code="EntryNotFound", commit=commit.oid)
        content = commit.files[name]
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        self.answer(200, content, commit=commit.oid, etag=etag)

    # --- Writing ------------------------------------------------------------------------

    def api(self, path: str) -> None:
        parts = path.strip("/").split("/")
        if parts[0] == "lfs" and self.command == "PUT":
            self.hub.blobs[parts[1]] = self.body  # as on the Hub, the address is the permission
            return self.answer(200)
        if not self.authorized():
            return self.answer(401, {"error": "Invalid credentials in Authorization header"})
        if path == "/api/whoami-v2":
            return self.answer(200, self.hub.account)
        if path == "/api/repos/create":
            return self.create()
        if path == "/api/validate-yaml":
            return self.validate()
        if path.endswith(".git/info/lfs/objects/batch"):
            return self.lfs_batch()
        if parts[:2] == ["api", "models"] and len(parts) == 6:
            repo_id = "/".join(parts[2:4])
            repo = self.hub.repos.get(repo_id)
            if repo is None:
                return self.answer(404, code="RepoNotFound")
            if parts[4] == "preupload":
                return self.preupload()
            if parts[4] == "commit":
                return self.commit(repo_id, repo)
        self.answer(404)

    def create(self) -> None:
        asked = json.loads(self.body)
        repo_id = f"{asked['organization']}/{asked['name']}"
        url = f"{self.hub.url}/{repo_id}"
        if fault := self.hub.next_fault(f"{repo_id} create"):
            return self.answer(fault)
        if repo_id in self.hub.repos:
            return self.answer(409, {"error": "You already created this model repo", "url": url})
        self.hub.repos[repo_id] = Repo()
        self.answer(200, {"url": url})

    def validate(self) -> None:
        front_matter = json.loads(self.body)["content"].startswith("---\n")
        errors = [] if front_matter else [{"message": "no metadata"}]
        self.answer(400 if errors else 200, {"errors": errors, "warnings": []})

    def preupload(self) -> None:
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(self.body)["files"]
        ]
        self.answer(200, {"files": files})

    def lfs_batch(self) -> None:
        objects = json.loads(self.body)["objects"]
        for item in objects:
            if item["oid"] not in self.hub.blobs:
                item["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{item['oid']}"}}
        self.answer(200, {"objects": objects, "transfer": "basic"})

    def commit(self, repo_id: str, repo: Repo) -> None:
        lines = [json.loads(line) for line in self.body.splitlines()]
        added = {}
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                added[value["path"]] = base64.b64decode(value["content"])
            elif value["oid"] not in self.hub.blobs:
                return self.answer(400, {"error": f"LFS object {value['oid']} was not uploaded"})
            else:
                blob = self.hub.blobs[value["oid"]]
                assert hashlib.sha256(blob).hexdigest() == value["oid"]
                added[value["path"]] = blob
        commit = repo.commit(lines[0]["value"]["summary"], added)
        url = f"{self.hub.url}/{repo_id}/commit/{commit.oid}"
        self.answer(200, {"commitUrl": url, "commitOid": commit.oid})

    # --- Answers ------------------------------------------------------------------------

    def authorized(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {self.hub.token}"

    def answer(
        self,
        status: int,
        content: dict | bytes = b"",
        *,
        code: str | None = None,
        commit: str | None = None,
        etag: str | None = None,
    ) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        headers = {"X-Error-Code": code, "X-Repo-Commit": commit, "ETag": etag}
        for name, value in headers.items():
            if value:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
