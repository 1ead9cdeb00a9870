"""A stand-in for the Hugging Face Hub on 127.0.0.1, which serves folders as repositories."""

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

COMMIT = "0123456789" * 4


@dataclass
class FakeHub:
    """Every repository has one commit, which `main` names."""

    url: str = ""
    folders: dict[str, Path] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    down: bool = False
    downloaded: list[str] = field(default_factory=list)

    def files(self, repository: str) -> list[str]:
        root = self.folders[repository]
        return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if self.hub.down:
            return self.answer(503)
        for pattern, method in ROUTES:
            if match := re.fullmatch(pattern, path):
                return self.serve(method, *match.groups())
        return self.answer(404)

    def serve(self, method: "Route", repository: str, revision: str | None, *rest: str) -> None:
        if repository not in self.hub.folders:
            # The real Hub tells strangers 401, lest they learn which private names exist.
            self.answer(401, error="RepoNotFound")
        elif revision not in (None, "main", COMMIT):
            self.answer(404, error="RevisionNotFound")
        else:
            method(self, repository, *rest)

    def info(self, repository: str) -> None:
        siblings = [{"rfilename": file} for file in self.hub.files(repository)]
        self.answer_json({"id": repository, "sha": COMMIT, "siblings": siblings})

    def tree(self, repository: str) -> None:
        root = self.hub.folders[repository]
        self.answer_json(
            [
                {
                    "type": "file",
                    "path": file,
                    "size": (root / file).stat().st_size,
                    "oid": hashlib.sha1((root / file).read_bytes()).hexdigest(),
                }
                for file in self.hub.files(repository)
            ]
        )

    def resolve(self, repository: str, file: str) -> None:
        if repository in self.hub.gated:
            return self.answer(403, error="GatedRepo")
        if file not in self.hub.files(repository):
            return self.answer(404, error="EntryNotFound")
        if self.command == "GET":
            self.hub.downloaded.append(file)
        content = (self.hub.folders[repository] / file).read_bytes()
        etag = hashlib.sha1(content).hexdigest()
        return self.answer(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})

    def answer_json(self, content: Any) -> None:
        self.answer(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def answer(
        self,
        status: int,
        content: bytes = b"",
        headers: dict[str, str] | None = None,
        error: str | None = None,
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if error:
            self.send_header("X-Error-Code", error)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
        """Nothing: the standard error is for the tests."""


Route = Callable[..., None]

ROUTES: list[tuple[str, Route]] = [
    (r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", Handler.info),
    (r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", Handler.tree),
    (r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", Handler.resolve),
]


@contextmanager
def serving(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[FakeHub]:
    """A running hub, to which huggingface_hub is pointed, with a cache of its own."""
    hub = FakeHub()
    handler = type("BoundHandler", (Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    # HF_ENDPOINT and HF_HOME are read at import, so it is too late to set them.
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
