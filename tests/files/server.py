"""A hub and a file server on the loopback address, which can be slow, break in the middle, lie, and refuse ranges."""

import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Host:
    """What the server has, and how it behaves.

    Attributes:
        files: contents by path, such as `/a.bin`.
        repos: of the hub, contents by file name.
        break_after: bytes after which an answer ends early, once for each entry.
        ranges: whether parts of a file are sent.
        lie: whether hashes of the hub are wrong.
        gated: whether repositories need a token.
        asked: method, path and range of every request.
    """

    files: dict = field(default_factory=dict)
    repos: dict = field(default_factory=dict)
    break_after: list = field(default_factory=list)
    ranges: bool = True
    lie: bool = False
    gated: bool = False
    asked: list = field(default_factory=list)
    url: str = ""

    def commit(self, repo):
        content = b"".join(name.encode() + value for name, value in sorted(self.repos[repo].items()))
        return hashlib.sha1(content).hexdigest()

    def info(self, repo):
        siblings = [
            {
                "rfilename": name,
                "size": len(value),
                "blobId": hashlib.sha1(value).hexdigest(),
                "lfs": {
                    "sha256": hashlib.sha256(value + b"!" * self.lie).hexdigest(),
                    "size": len(value),
                    "pointerSize": 134,
                },
            }
            for name, value in self.repos[repo].items()
        ]
        return {"id": repo, "sha": self.commit(repo), "siblings": siblings, "private": False, "tags": []}


class Handler(BaseHTTPRequestHandler):
    host: Host
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        host, path = self.host, self.path.partition("?")[0]
        host.asked.append((self.command, path, self.headers.get("Range")))
        if path.startswith("/api/models/"):
            return self.api(path.removeprefix("/api/models/"))
        parts = path.strip("/").split("/")
        if len(parts) > 4 and parts[2] == "resolve":
            repo, name = "/".join(parts[:2]), "/".join(parts[4:])
            return self.file(host.repos.get(repo, {}).get(name), body, repo)
        return self.file(host.files.get(path), body)

    def api(self, rest):
        host = self.host
        repo = "/".join(rest.split("/")[:2])
        if host.gated:
            return self.refuse(403, {"X-Error-Code": "GatedRepo"})
        if repo not in host.repos:
            return self.refuse(404, {"X-Error-Code": "RepoNotFound"})
        if "/tree/" in rest:
            entries = [
                {
                    "type": "file",
                    "path": file["rfilename"],
                    "size": file["size"],
                    "oid": file["blobId"],
                    "lfs": {**file["lfs"], "oid": file["lfs"]["sha256"]},
                }
                for file in host.info(repo)["siblings"]
            ]
            return self.send(200, json.dumps(entries).encode(), {"Content-Type": "application/json"})
        return self.send(200, json.dumps(host.info(repo)).encode(), {"Content-Type": "application/json"})

    def file(self, content, body, repo=None):
        if content is None:
            return self.refuse(404, {"X-Error-Code": "EntryNotFound"})
        tag = f'"{hashlib.sha256(content).hexdigest()}"'
        headers = {"ETag": tag, "Accept-Ranges": "bytes"}
        if repo is not None:
            headers["X-Repo-Commit"] = self.host.commit(repo)
        asked, status, first = self.headers.get("Range"), 200, 0
        if asked and self.host.ranges and self.headers.get("If-Range", tag) == tag:
            first = int(asked.removeprefix("bytes=").partition("-")[0])
            if first >= len(content):
                return self.refuse(416, {"Content-Range": f"bytes */{len(content)}"})
            status = 206
            headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
        return self.send(status, content[first:], headers, body)

    def refuse(self, status, headers):
        self.send(status, b"{}", headers)

    def send(self, status, content, headers, body=True):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if not body or self.command == "HEAD":
            return
        broken = (
            self.host.break_after.pop(0)
            if self.host.break_after and status in (200, 206) and len(content) > 1000
            else None
        )
        self.wfile.write(content[:broken])
        if broken is not None:
            self.wfile.flush()
            self.close_connection = True
            self.connection.close()

    def log_message(self, *args):
        pass


def serve(host):
    """Start a server in the background; returns it."""
    handler = type("HostHandler", (Handler,), {"host": host})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    host.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server
