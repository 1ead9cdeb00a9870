"""A stand-in for the Hugging Face Hub on 127.0.0.1, whose repositories are folders.

It speaks what huggingface_hub does: metadata, downloads, and uploads by the protocol for large
files, which sends the content of a file only if the hub does not know it.
"""

import base64
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from huggingface_hub import constants

COMMIT = "0123456789" * 4
TOKEN = "hf_a_token_that_must_never_be_shown"
USER = "someone"


@dataclass
class Trouble:
    """What happens to requests whose "METHOD /path" matches: a status, or the line goes dead."""

    pattern: str
    status: int | None = None
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)
    error: str | None = None
    seconds: float = 0.0  # before any answer


@dataclass
class FakeHub:
    """A repository has one commit, which `main` names, and a new one after every upload."""

    root: Path
    url: str = ""
    folders: dict[str, Path] = field(default_factory=dict)
    commits: dict[str, str] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)
    branches: set[tuple[str, str]] = field(default_factory=set)
    gated: set[str] = field(default_factory=set)
    down: bool = False
    role: str = "write"
    orgs: list[str] = field(default_factory=list)
    troubles: list[Trouble] = field(default_factory=list)
    downloaded: list[str] = field(default_factory=list)
    uploaded: list[str] = field(default_factory=list)  # the SHA-256 of large files
    requests: list[str] = field(default_factory=list)

    def files(self, repository: str) -> list[str]:
        root = self.folders[repository]
        return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())

    def commit(self, repository: str) -> str:
        return self.commits.get(repository, COMMIT)

    def create(self, repository: str, private: bool = False) -> Path:
        folder = self.root / "repositories" / repository
        folder.mkdir(parents=True)
        (folder / ".gitattributes").write_text("*.safetensors filter=lfs\n")
        self.folders[repository] = folder
        if private:
            self.private.add(repository)
        return folder

    def large(self, digest: str) -> Path:
        return self.root / "large" / digest

    def trouble(self, request: str) -> Trouble | None:
        for trouble in self.troubles:
            if trouble.times and re.fullmatch(trouble.pattern, request):
                trouble.times -= 1
                return trouble
        return None


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def do_HEAD(self) -> None:
        self.route()

    def do_GET(self) -> None:
        self.route()

    def do_POST(self) -> None:
        self.route()

    def do_PUT(self) -> None:
        self.route()

    def route(self) -> None:
        path = unquote(urlsplit(self.path).path)
        request = f"{'GET' if self.command == 'HEAD' else self.command} {path}"
        self.hub.requests.append(request)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        trouble = self.hub.trouble(request)
        if trouble is not None:
            Event().wait(trouble.seconds)  # not time.sleep, which tests shorten
            if trouble.status is not None:
                return self.answer(trouble.status, headers=trouble.headers, error=trouble.error)
            if not trouble.seconds:
                return self.hang_up()
        if self.hub.down:
            return self.answer(503)
        for pattern, method in ROUTES:
            if match := re.fullmatch(pattern, request):
                return method(self, *match.groups())
        return self.answer(404)

    def hang_up(self) -> None:
        self.close_connection = True
        self.connection.close()

    def known(self, repository: str, revision: str | None = None) -> bool:
        """Whether there is such a repository and revision; answers if not."""
        known = (None, "main", COMMIT, self.hub.commit(repository))
        if repository not in self.hub.folders or (
            repository in self.hub.private and not self.authorized()
        ):
            # The real Hub tells strangers 401, lest they learn which private names exist.
            self.answer(404 if self.authorized() else 401, error="RepoNotFound")
            return False
        if revision not in known and (repository, revision) not in self.hub.branches:
            self.answer(404, error="RevisionNotFound")
            return False
        return True

    def authorized(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    # --- what is read

    def info(self, repository: str, revision: str | None) -> None:
        if self.known(repository, revision):
            content = {
                "id": repository,
                "sha": self.hub.commit(repository),
                "private": repository in self.hub.private,
                "siblings": [{"rfilename": file} for file in self.hub.files(repository)],
            }
            self.answer_json(content)

    def tree(self, repository: str, revision: str) -> None:
        if not self.known(repository, revision):
            return
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

    def resolve(self, repository: str, revision: str, file: str) -> None:
        if not self.known(repository, revision):
            return None
        if repository in self.hub.gated:
            return self.answer(403, error="GatedRepo")
        if file not in self.hub.files(repository):
            return self.answer(404, error="EntryNotFound")
        if self.command == "GET":
            self.hub.downloaded.append(file)
        content = (self.hub.folders[repository] / file).read_bytes()
        etag = hashlib.sha1(content).hexdigest()
        commit = self.hub.commit(repository)
        return self.answer(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": commit})

    def whoami(self) -> None:
        if not self.authorized():
            return self.answer(401)
        token = {"role": self.hub.role}
        orgs = [{"name": name} for name in self.hub.orgs]
        content = {"type": "user", "name": USER, "orgs": orgs, "auth": {"accessToken": token}}
        return self.answer_json(content)

    # --- what is written

    def may_write(self, repository: str) -> bool:
        owner = repository.partition("/")[0]
        if not self.authorized():
            self.answer(401)
            return False
        if self.hub.role == "read" or owner not in (USER, *self.hub.orgs):
            self.answer(403)
            return False
        return True

    def create(self) -> None:
        wish = json.loads(self.body)
        repository = f"{wish.get('organization') or USER}/{wish['name']}"
        if not self.may_write(repository):
            return
        url = f"{self.hub.url}/{repository}"
        if repository in self.hub.folders:
            self.answer_json({"error": "exists", "url": url}, 409)
            return
        self.hub.create(
            repository, wish.get("visibility") == "private" or bool(wish.get("private"))
        )
        self.answer_json({"url": url, "name": repository})

    def branch(self, repository: str, branch: str) -> None:
        if (repository, branch) in self.hub.branches:
            return self.answer(409)
        self.hub.branches.add((repository, branch))
        return self.answer_json({})

    def yaml(self) -> None:
        self.answer_json({"errors": [], "warnings": []})

    def preupload(self, repository: str, revision: str) -> None:
        if not self.known(repository, revision):
            return
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(self.body)["files"]
        ]
        self.answer_json({"files": files})

    def batch(self, repository: str) -> None:
        if not self.may_write(repository):
            return
        objects = []
        for wish in json.loads(self.body)["objects"]:
            href = f"{self.hub.url}/large/{wish['oid']}"
            known = self.hub.large(wish["oid"]).exists()
            actions = {} if known else {"actions": {"upload": {"href": href, "header": {}}}}
            objects.append({"oid": wish["oid"], "size": wish["size"], **actions})
        self.answer_json({"transfer": "basic", "objects": objects})

    def large(self, digest: str) -> None:
        assert hashlib.sha256(self.body).hexdigest() == digest
        self.hub.large(digest).parent.mkdir(exist_ok=True)
        self.hub.large(digest).write_bytes(self.body)
        self.hub.uploaded.append(digest)
        self.answer(200)

    def commit(self, repository: str, revision: str) -> None:
        """Everything of a commit, or nothing: the lines are read before any file is written."""
        asks = "create_pr" in parse_qs(urlsplit(self.path).query)
        if not self.known(repository, revision) or not (asks or self.may_write(repository)):
            return None
        lines = [json.loads(line) for line in self.body.decode().splitlines()]
        folder = self.hub.folders[repository]
        commit = hashlib.sha1(self.hub.commit(repository).encode() + self.body).hexdigest()
        answer = {"commitOid": commit, "commitUrl": f"{self.hub.url}/{repository}/commit/{commit}"}
        if asks:
            answer["pullRequestUrl"] = f"{self.hub.url}/{repository}/discussions/1"
            return self.answer_json(answer)
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                continue
            file = folder / value["path"]
            file.parent.mkdir(parents=True, exist_ok=True)
            if line["key"] == "file":
                file.write_bytes(base64.b64decode(value["content"]))
            elif line["key"] == "lfsFile":
                file.write_bytes(self.hub.large(value["oid"]).read_bytes())
            elif line["key"] == "deletedFile":
                file.unlink()
        self.hub.commits[repository] = commit
        return self.answer_json(answer)

    # --- answers

    def answer_json(self, content: Any, status: int = 200) -> None:
        self.answer(status, json.dumps(content).encode(), {"Content-Type": "application/json"})

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

_NAME = r"([^/]+/[^/]+)"
ROUTES: list[tuple[str, Route]] = [
    (r"GET /api/whoami-v2", Handler.whoami),
    (rf"GET /api/models/{_NAME}(?:/revision/([^/]+))?", Handler.info),
    (rf"GET /api/models/{_NAME}/tree/([^/]+)", Handler.tree),
    (rf"GET /{_NAME}/resolve/([^/]+)/(.+)", Handler.resolve),
    (r"POST /api/repos/create", Handler.create),
    (rf"POST /api/models/{_NAME}/branch/(.+)", Handler.branch),
    (r"POST /api/validate-yaml", Handler.yaml),
    (rf"POST /api/models/{_NAME}/preupload/(.+)", Handler.preupload),
    (rf"POST /{_NAME}\.git/info/lfs/objects/batch", Handler.batch),
    (r"PUT /large/([0-9a-f]+)", Handler.large),
    (rf"POST /api/models/{_NAME}/commit/(.+)", Handler.commit),
]


@contextmanager
def running(root: Path) -> Iterator[FakeHub]:
    """A hub that keeps its files in `root`."""
    hub = FakeHub(root=root)
    handler = type("BoundHandler", (Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def serving(monkeypatch: pytest.MonkeyPatch, root: Path) -> Iterator[FakeHub]:
    """A running hub to which huggingface_hub is pointed, with an empty cache and no token."""
    with running(root) as hub:
        # HF_ENDPOINT and HF_HOME are read at import, so it is too late to set them.
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(root / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(root / "token"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield hub
