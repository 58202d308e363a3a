"""A server on loopback that speaks the part of the Hugging Face Hub's HTTP API that its own client uses for a
dataset repository: commits of regular files, listings, paths, and ranged downloads. It counts commits, and
refuses two at once and one whose parent is not the last, as the Hub does.
"""

import base64
import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

_API = re.compile(
    r"/api/datasets/([^/]+/[^/]+)(?:/(revision|tree|paths-info|preupload|commit)/([^/]+)(?:/(.*))?)?"
)
_RESOLVE = re.compile(r"/datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.*)")


class Hub(ThreadingHTTPServer):
    """Repositories in memory: {repo id: {path: bytes}}."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.commits: list[list[str]] = []
        """Paths of each commit."""
        self.committing = threading.Lock()
        self.head = 0
        """Number of the last commit."""
        self.before_commit: Callable[[int], None] = lambda n: None
        """Called with how many commits came before; another writer's `put` fits here."""

    @property
    def oid(self) -> str:
        """Id of the last commit."""
        return f"{self.head:040x}"

    def put(self, repo: str, files: Mapping[str, bytes]) -> None:
        """A commit of somebody else."""
        self.repos[repo] |= files
        self.head += 1

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def hub() -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if found := _RESOLVE.fullmatch(path):
            self._download(self.server.repos.get(found[1], {}).get(found[3]))
        elif (found := _API.fullmatch(path)) and found[1] in self.server.repos:
            files = self.server.repos[found[1]]
            if found[2] == "tree":
                self._tree(files, found[4] or "")
            else:
                siblings = [{"rfilename": name} for name in files]
                self._reply(
                    {
                        "id": found[1],
                        "sha": self.server.oid,
                        "private": False,
                        "tags": [],
                        "siblings": siblings,
                    }
                )
        else:
            self._missing("RepoNotFound")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        path = unquote(urlsplit(self.path).path)
        if path == "/api/validate-yaml":
            self._reply({"errors": [], "warnings": []})
            return
        found = _API.fullmatch(path)
        if not found or found[1] not in self.server.repos:
            self._missing("RepoNotFound")
            return
        files = self.server.repos[found[1]]
        if found[2] == "preupload":
            wanted = [f["path"] for f in json.loads(body)["files"]]
            modes = [{"path": p, "uploadMode": "regular", "shouldIgnore": False, "oid": None} for p in wanted]
            self._reply({"files": modes})
        elif found[2] == "paths-info":
            paths = parse_qs(body.decode())["paths"]
            self._reply([e for p in paths for e in _entries(files, p) if e["path"] == p])
        else:
            self._commit(found[1], files, [json.loads(line) for line in body.splitlines()])

    def _commit(self, repo: str, files: dict[str, bytes], lines: list[dict[str, Any]]) -> None:
        self.server.before_commit(len(self.server.commits))
        parent = next((x["value"].get("parentCommit") for x in lines if x["key"] == "header"), None)
        if parent not in (None, self.server.oid) or not self.server.committing.acquire(blocking=False):
            self._reply({"error": "A commit has happened since. Please refresh and try again."}, 412)
            return
        try:
            added = {
                v["path"]: base64.b64decode(v["content"])
                for v in (x["value"] for x in lines)
                if "content" in v
            }
            files |= added
            self.server.commits.append(list(added))
            self.server.head += 1
        finally:
            self.server.committing.release()
        self._reply(
            {
                "success": True,
                "commitUrl": f"{self.server.endpoint}/datasets/{repo}/commit/{self.server.oid}",
                "commitOid": self.server.oid,
            }
        )

    def _tree(self, files: dict[str, bytes], folder: str) -> None:
        found = _entries(files, folder)
        if "recursive=true" not in self.path.lower():
            depth = len(folder.split("/")) if folder else 0
            found = [e for e in found if len(e["path"].split("/")) == depth + 1]
        found = [e for e in found if e["path"] != folder]
        if found or not folder:
            self._reply(found)
        else:
            self._missing("EntryNotFound")

    def _download(self, data: bytes | None) -> None:
        if data is None:
            self._missing("EntryNotFound")
            return
        status, headers, total = 200, {}, len(data)
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, stop = int(wanted[1]), min(total, int(wanted[2] or total - 1) + 1)
            data, status = data[start:stop], 206
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{total}"
        self._send(status, data, headers)

    def _missing(self, code: str) -> None:
        self._reply({"error": code}, 404, {"X-Error-Code": code})

    def _reply(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"} | (headers or {}))

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _entries(files: dict[str, bytes], under: str) -> list[dict[str, Any]]:
    """Files and folders at or below a path, as the Hub lists them."""
    prefix = f"{under}/" if under else ""
    below = {name: data for name, data in files.items() if name.startswith(prefix) or name == under}
    folders = {"/".join(name.split("/")[:i]) for name in below for i in range(1, name.count("/") + 1)}
    listed = [
        {"type": "directory", "path": f, "oid": "0" * 40, "size": 0}
        for f in sorted(folders)
        if f.startswith(under)
    ]
    commit = {"id": "0" * 40, "title": "push", "date": "2026-01-01T00:00:00.000Z"}
    shared = {"type": "file", "oid": "0" * 40, "lastCommit": commit}
    return listed + [shared | {"path": n, "size": len(d)} for n, d in below.items()]
