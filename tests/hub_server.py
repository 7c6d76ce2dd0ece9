"""A small Hub on loopback: the endpoints that uploading and loading a model use, with rights and failures.

    with HubServer() as server:
        run(..., **server.environment(tmp_path))        # what a process needs to use it
    server.fail("POST", "/commit/", 500, times=2)       # the next two commits
    server.repositories["user/name"].files              # {name: bytes}

Written after what huggingface_hub 1.3 and 2.4 ask for. Files go the way of Git LFS, not of xet.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

WRITER = "hf_WriterWriterWriter"  # may write to user/*
READER = "hf_ReaderReaderReader"
LFS_SUFFIXES = (".safetensors", ".png")


@dataclass
class Repository:
    private: bool
    files: dict = field(default_factory=lambda: {".gitattributes": b"*.safetensors filter=lfs\n"})
    commits: list = field(default_factory=list)  # summaries, oldest first

    @property
    def sha(self) -> str:
        return hashlib.sha1(str(len(self.commits)).encode()).hexdigest()


class HubServer(ThreadingHTTPServer):
    """`requests`: (method, path) of everything that was asked, in order."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.repositories, self.blobs = {}, {}
        self.requests, self.failures = [], []
        self.lock = threading.Lock()

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self.shutdown()
        self.server_close()

    def environment(self, home: Path, token: str = WRITER) -> dict:
        """Environment variables of a process that uses this Hub, with its caches in the empty folder `home`."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_TOKEN": token,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
        }

    def fail(self, method: str, part: str, status: int, times: int) -> None:
        """Answer the next `times` requests with `part` in their path with `status`."""
        self.failures.append([method, part, status, times])

    def count(self, method: str, part: str) -> int:
        return sum(asked == method and part in path for asked, path in self.requests)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *arguments) -> None:
        """Not on stderr."""

    def do_any(self) -> None:
        path, body = unquote(urlsplit(self.path).path), self.body()
        with self.server.lock:
            self.server.requests.append((self.command, path))
            for failure in self.server.failures:
                if failure[0] == self.command and failure[1] in path and failure[3] > 0:
                    failure[3] -= 1
                    # the token in the answer: a message that repeats it must not reach anybody
                    return self.answer(failure[2], {"error": f"failure for {self.headers['Authorization']}"})
            for methods, pattern, function in ROUTES:
                found = re.fullmatch(pattern, path)
                if found and self.command in methods:
                    return function(self, body, *found.groups())
            self.answer(404, {"error": "no such page"}, **{"X-Error-Code": "EntryNotFound"})

    do_GET = do_HEAD = do_POST = do_PUT = do_any

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def answer(self, status: int, content, **headers) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    # ------------------------------------------------------------------------------------------------------ rights

    def token(self) -> str:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ")

    def may_write(self, name: str) -> bool:
        """Answers the request where it may not."""
        if self.token() not in (WRITER, READER):
            self.answer(401, {"error": f"Invalid username or password: {self.token()}"})
        elif self.token() == READER or not name.startswith("user/"):
            self.answer(403, {"error": f"You don't have the rights to write to {name} with {self.token()}"})
        else:
            return True
        return False

    def find(self, name: str):
        """The repository; None, and the request is answered, where there is none that the token may read."""
        repository = self.server.repositories.get(name)
        if repository is None or (repository.private and self.token() != WRITER):
            self.answer(401, {"error": "Repository not found"}, **{"X-Error-Code": "RepoNotFound"})
            return None
        return repository

    # --------------------------------------------------------------------------------------------------- uploading

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        if self.may_write(name):
            status = 409 if name in self.server.repositories else 200
            private = asked.get("visibility") == "private" or bool(asked.get("private"))
            self.server.repositories.setdefault(name, Repository(private))
            self.answer(status, {"url": f"{self.server.endpoint}/{name}", "name": name})

    def validate_card(self, body: bytes) -> None:
        valid = json.loads(body)["content"].startswith("---\n")
        self.answer(200 if valid else 400, {"errors": [] if valid else [{"message": "no metadata"}], "warnings": []})

    def preupload(self, body: bytes, name: str) -> None:
        if self.may_write(name) and self.find(name):
            paths = [file["path"] for file in json.loads(body)["files"]]
            modes = {path: "lfs" if path.endswith(LFS_SUFFIXES) else "regular" for path in paths}
            files = [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes.items()]
            self.answer(200, {"files": files})

    def lfs_batch(self, body: bytes, name: str) -> None:
        if self.may_write(name):
            objects = []
            for item in json.loads(body)["objects"]:
                actions = {"upload": {"href": f"{self.server.endpoint}/lfs/{item['oid']}"}}
                objects.append({**item, **({} if item["oid"] in self.server.blobs else {"actions": actions})})
            self.answer(200, {"transfer": "basic", "objects": objects})

    def lfs_put(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() == oid:
            self.server.blobs[oid] = body
        self.answer(200 if oid in self.server.blobs else 400, {})

    def commit(self, body: bytes, name: str) -> None:
        if not (self.may_write(name) and self.find(name)):
            return
        repository, files = self.server.repositories[name], dict(self.server.repositories[name].files)
        for line in body.decode().splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "header":
                summary = value["summary"]
            elif operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.server.blobs[value["oid"]]
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
        repository.files = files
        repository.commits.append(summary)
        address = f"{self.server.endpoint}/{name}/commit/{repository.sha}"
        self.answer(200, {"success": True, "commitOid": repository.sha, "commitUrl": address})

    # ----------------------------------------------------------------------------------------------------- reading

    def info(self, body: bytes, name: str) -> None:
        if repository := self.find(name):
            siblings = [{"rfilename": file} for file in repository.files]
            content = {"id": name, "sha": repository.sha, "private": repository.private, "siblings": siblings}
            self.answer(200, content)

    def tree(self, body: bytes, name: str) -> None:
        if repository := self.find(name):
            files = [(file, content) for file, content in repository.files.items()]
            self.answer(200, [{"type": "file", "path": f, "size": len(c), "oid": "0" * 40} for f, c in files])

    def resolve(self, body: bytes, name: str, file: str) -> None:
        if repository := self.find(name):
            headers = {"X-Repo-Commit": repository.sha}
            content = repository.files.get(file)
            if content is None:
                return self.answer(404, b"", **headers, **{"X-Error-Code": "EntryNotFound"})
            etag = f'"{hashlib.sha256(content).hexdigest()}"'
            self.answer(200, content, ETag=etag, **headers)


NAME = r"([^/]+/[^/]+)"
ROUTES = (
    (("POST",), "/api/repos/create", Handler.create),
    (("POST",), "/api/validate-yaml", Handler.validate_card),
    (("POST",), f"/api/models/{NAME}/preupload/main", Handler.preupload),
    (("POST",), f"/{NAME}.git/info/lfs/objects/batch", Handler.lfs_batch),
    (("PUT",), "/lfs/([0-9a-f]+)", Handler.lfs_put),
    (("POST",), f"/api/models/{NAME}/commit/main", Handler.commit),
    (("GET",), f"/api/models/{NAME}(?:/revision/[^/]+)?", Handler.info),
    (("GET",), f"/api/models/{NAME}/tree/[^/]+", Handler.tree),
    (("GET", "HEAD"), f"/{NAME}/resolve/[^/]+/(.+)", Handler.resolve),
)
