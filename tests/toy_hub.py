"""A local stand-in of the Hugging Face Hub: as much of its API as a push and a pull use, repositories in memory."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

REGULAR = (".json", ".md", ".toml", ".txt")
"""Files that are kept in git itself; the others go to LFS."""


class ToyHub:
    """Repositories by "models/owner/name" or "datasets/owner/name": path -> bytes; and what was asked of it."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.cards: dict[str, dict[str, Any]] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.n_uploads = 0
        self.refuse: tuple[str, int] | None = None
        """(part of a path, status) of the requests that are refused."""
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def commit(self, repo: str) -> str:
        """Of a repository as it is."""
        state = sorted((path, hashlib.sha256(data).hexdigest()) for path, data in self.repos[repo].items())
        return hashlib.sha1(json.dumps(state).encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: ToyHub

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        path, body, hub = unquote(urlsplit(self.path).path), self._body(), self.hub
        hub.requests.append(f"{self.command} {path}")
        if hub.refuse and hub.refuse[0] in path:
            self._json({"error": "no"}, hub.refuse[1])
        elif path == "/api/repos/create":
            asked = json.loads(body)
            kind = asked.get("type", "model")
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            hub.repos.setdefault(f"{kind}s/{name}", {})
            self._json({"url": f"{hub.url}/{'datasets/' if kind == 'dataset' else ''}{name}"})
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif path.startswith("/blob/"):
            hub.blobs[path.removeprefix("/blob/")] = body
            hub.n_uploads += 1
            self._answer(200)
        elif path.endswith(".git/info/lfs/objects/batch"):
            self._json({"transfer": "basic", "objects": [self._place(one) for one in json.loads(body)["objects"]]})
        elif path.startswith("/api/"):
            self._api(path, body)
        else:
            self._file(path)

    do_GET = do_PUT = do_HEAD = do_POST  # noqa: N815  http.server's names

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while n := int(self.rfile.readline().strip(), 16):
            parts.append(self.rfile.read(n))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _answer(self, status: int, data: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _json(self, value: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._answer(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _place(self, one: dict[str, Any]) -> dict[str, Any]:
        there = one["oid"] in self.hub.blobs
        actions = {} if there else {"actions": {"upload": {"href": f"{self.hub.url}/blob/{one['oid']}"}}}
        return {"oid": one["oid"], "size": one["size"], **actions}

    def _api(self, path: str, body: bytes) -> None:
        kind, owner, name, *rest = path.removeprefix("/api/").split("/")
        repo, hub = f"{kind}/{owner}/{name}", self.hub
        files = hub.repos.get(repo)
        if files is None:
            self._json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        elif rest[:1] == ["preupload"]:
            modes = {one["path"]: "regular" if one["path"].endswith(REGULAR) else "lfs" for one in _files(body)}
            answers = [{"path": one, "uploadMode": mode, "shouldIgnore": False} for one, mode in modes.items()]
            self._json({"files": answers})
        elif rest[:1] == ["commit"]:
            for entry in map(json.loads, body.decode().splitlines()):
                if entry["key"] == "file":
                    files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
                elif entry["key"] == "lfsFile":
                    files[entry["value"]["path"]] = hub.blobs[entry["value"]["oid"]]
            oid = hub.commit(repo)
            self._json({"success": True, "commitOid": oid, "commitUrl": f"{hub.url}/{owner}/{name}/commit/{oid}"})
        elif rest[:1] == ["tree"]:
            self._json([self._entry(one, data) for one, data in sorted(files.items())])
        else:
            about = {"id": f"{owner}/{name}", "sha": hub.commit(repo), "cardData": hub.cards.get(repo), "tags": []}
            self._json({**about, "siblings": [{"rfilename": one} for one in files]})

    def _entry(self, path: str, data: bytes) -> dict[str, Any]:
        digest = hashlib.sha256(data).hexdigest()
        lfs = {"lfs": {"oid": digest, "size": len(data), "pointerSize": 130}} if digest in self.hub.blobs else {}
        return {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest(), **lfs}

    def _file(self, path: str) -> None:
        parts = path.strip("/").split("/")
        kind = "datasets" if parts[0] == "datasets" else "models"
        owner, name, _, _, *rest = parts[kind == "datasets" :]
        repo = f"{kind}/{owner}/{name}"
        data = self.hub.repos.get(repo, {}).get("/".join(rest))
        if data is None:
            self._json({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
            return
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": self.hub.commit(repo)}
        self._answer(200, data, headers)


def _files(body: bytes) -> list[dict[str, Any]]:
    return json.loads(body)["files"]
