"""Checkpoint or export → a repository on the Hub, in one commit.

A repeated upload sends only what the Hub does not have: it knows large files by their content. The
token is found by huggingface_hub, and never seen here.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelInfo, constants
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from absorb.errors import AbsorbError
from absorb.schema.places import Destination
from absorb.schema.settings import ModelRef
from absorb.ship.staging import REPORT
from absorb.ship.verify import CODE, read_report, verify
from absorb.show.tables import size_of

Say = Callable[[str], None]
# What the Hub puts into a new repository, and what people put there before the first upload.
_HARMLESS = {".gitattributes", "README.md", "LICENSE"}
_AGAIN = "run the same command again, and only what is missing is uploaded"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pushed:
    """What became of an upload: `url` is that of the commit or pull request."""

    repository: str
    commit: str
    url: str


def push(folder: Path, request: Destination, say: Say) -> Pushed:
    """Upload a checkpoint that is as absorb wrote it; `say` is told what is being done."""
    destination = checked_target(request)
    for reason in verify(ModelRef(name=str(folder)), say).wrong:
        raise AbsorbError(f"{reason}, so {folder} was not uploaded")
    return upload(folder, destination, say)


def checked_target(request: Destination) -> Destination:
    """The destination under its full name, or an AbsorbError that says why nothing may go there.

    Asks the Hub for the account and the repository, and changes nothing.
    """
    _refuse_name(request.repository)
    with _explained(request.repository):
        account = HfApi().whoami()
    owner, _, name = request.repository.rpartition("/")
    destination = replace(request, repository=f"{owner or account['name']}/{name}")
    _refuse_account(account, destination)
    found = _found(destination)
    if found is None:
        if request.create_pr:
            raise AbsorbError(
                f"there is no repository {destination.repository} to open a pull request for, or "
                "it is private; check the name, or drop --create-pr"
            )
    else:
        _refuse_occupied(found, destination)
    return destination


def upload(folder: Path, destination: Destination, say: Say) -> Pushed:
    """Make the repository unless it is there, and put a verified checkpoint into it, as a whole."""
    names = [*read_report(folder, folder.name).files, REPORT]
    size = size_of(sum((folder / name).stat().st_size for name in names))
    repository, api = destination.repository, HfApi()
    say(f"uploading {len(names)} files, {size}, to {constants.ENDPOINT}/{repository}")
    with _explained(repository):
        if not destination.create_pr:
            api.create_repo(repository, private=destination.private or None, exist_ok=True)
        revision = destination.revision
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repository, branch=revision, exist_ok=True)
        present = api.list_repo_files(repository, revision=revision)
    _refuse_other_form(repository, present, names)
    with _explained(repository):
        additions = [
            CommitOperationAdd(path_in_repo=name, path_or_fileobj=folder / name) for name in names
        ]
        stale = set(present) - {*names, ".gitattributes"}
        commit = api.create_commit(
            repository,
            [*additions, *map(CommitOperationDelete, sorted(stale))],
            commit_message="Upload a model converted by absorb",
            revision=revision,
            create_pr=destination.create_pr,
        )
    url = commit.pr_url or commit.commit_url
    return Pushed(repository=repository, commit=commit.oid, url=url)


def _refuse_name(repository: str) -> None:
    if not re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]{0,95}", repository, re.ASCII) or re.search(
        r"--|\.\.|\.git$|[.-]$", repository
    ):
        raise AbsorbError(
            f"{repository!r} is no name for a repository; use letters, digits, single - and ., and "
            "_, as in owner/name"
        )


def _refuse_account(account: dict[str, Any], destination: Destination) -> None:
    token = account.get("auth", {}).get("accessToken", {})
    if token.get("role") == "read":
        raise AbsorbError(
            f"your token for the Hub may only read; run `hf auth login`, or set HF_TOKEN, with one "
            f"that may write to {destination.repository}"
        )
    owner = destination.repository.partition("/")[0]
    mine = [account["name"], *(one["name"] for one in account.get("orgs", []))]
    if owner not in mine and not destination.create_pr:
        raise AbsorbError(
            f"you are {account['name']} on the Hub and cannot write to {owner}; push to one of "
            f"{', '.join(mine)}, or pass --create-pr"
        )


def _found(destination: Destination) -> ModelInfo | None:
    with _explained(destination.repository):
        try:
            return HfApi().model_info(destination.repository)
        except RepositoryNotFoundError:
            return None


def _refuse_occupied(found: ModelInfo, destination: Destination) -> None:
    """Refuse a repository that absorb did not fill, as all in it would be replaced."""
    names = {file.rfilename for file in found.siblings or []}
    if REPORT not in names and names - _HARMLESS:
        raise AbsorbError(
            f"{destination.repository} holds other files and no {REPORT}, so absorb did not fill "
            "it and will not replace it; choose another name"
        )
    if destination.private and not found.private:
        raise AbsorbError(
            f"{destination.repository} is there already and public; make it private in its "
            "settings, or choose another name"
        )


def _refuse_other_form(repository: str, present: list[str], names: list[str]) -> None:
    """Refuse to put an export in place of the model that it was made from, or the other way."""
    there, here = _form(present), _form(names)
    if REPORT in present and there and there != here:
        raise AbsorbError(
            f"{repository} holds {there}, and this is {here}, which would replace it; choose "
            "another name"
        )


def _form(names: list[str]) -> str | None:
    """What a repository with these files holds, if it holds a model."""
    if any(name.endswith(".gguf") for name in names):
        return "an export to llama.cpp"
    if CODE in names:
        return "a converted model"
    return "a native export" if "config.json" in names else None


@contextmanager
def _explained(repository: str) -> Iterator[None]:
    try:
        yield
    # Every version of huggingface_hub brings its own HTTP client, whose errors share no base.
    except Exception as error:
        raise AbsorbError(_explanation(error, repository)) from error


def _explanation(error: BaseException, repository: str) -> str:
    """One sentence. The error of a single file is the cause of a general one."""
    cause = error
    while not isinstance(cause, HfHubHTTPError) and cause.__cause__ is not None:
        cause = cause.__cause__
    if isinstance(error, LocalTokenNotFoundError):
        return "you are not logged in to the Hub; run `hf auth login` or set HF_TOKEN"
    if isinstance(cause, RevisionNotFoundError):
        return f"{repository} has no such revision; check --revision"
    if isinstance(cause, HfHubHTTPError):
        return _status_explanation(cause, repository)
    reason = (str(cause).splitlines() or [""])[0] or type(cause).__name__
    # huggingface_hub uploads by xet wherever hf_xet is installed, and a mirror may not know it.
    without = " (with HF_HUB_DISABLE_XET=1 where the Hub has no xet)" if "xet" in reason else ""
    return f"the connection to the Hub was lost ({reason}); {_AGAIN}{without}"


def _status_explanation(error: HfHubHTTPError, repository: str) -> str:
    status, headers = error.response.status_code, error.response.headers
    if status == 401:
        return (
            "the Hub does not accept your token; run `hf auth login`, or set HF_TOKEN to a new one"
        )
    if status == 403:
        return (
            f"your token may not write to {repository}; run `hf auth login`, or set HF_TOKEN to "
            "one that may"
        )
    if status == 404:
        return f"there is no repository {repository}, or it is private; check the name"
    if status in (409, 412):
        return f"somebody else is changing {repository}; {_AGAIN}"
    if status == 429:
        wait = headers.get("Retry-After")
        when = f"in {wait} seconds" if wait else "later"
        return f"the Hub has had too many requests from you; {when}, {_AGAIN}"
    if status >= 500:
        return f"the Hub has a fault (HTTP status {status}); {_AGAIN}"
    reason = (error.server_message or "no reason given").splitlines()[0]
    return f"the Hub refused what was sent to {repository} (HTTP status {status}: {reason})"
