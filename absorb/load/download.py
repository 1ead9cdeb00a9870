"""A Hub repository → a folder in the cache of huggingface_hub, which also finds the token."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from absorb.errors import AbsorbError
from absorb.load import files
from absorb.schema.settings import ModelRef

# Everything but the weights. A pattern without a slash before its first star stays at the root.
DESCRIPTION = (
    "config.json",
    "adapter_config.json",
    "generation_config.json",
    "*.safetensors.index.json",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "spiece.model",
    "tekken.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "additional_chat_templates/*",
    "README.md",
)
# Where a cache of huggingface_hub keeps a commit, below the folder of its repository.
_SNAPSHOTS = "snapshots"
_KINDS = "models--"


def is_repository(name: str) -> bool:
    """Whether a name can be that of a repository: `owner/name` or `name`, and no file."""
    return bool(re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name)) and not name.endswith(".gguf")


def description(ref: ModelRef) -> Path:
    """The folder with all but the weights, named like the commit that `ref` means now."""
    code = ("*.py",) if ref.trust_remote_code else ()
    return _download(ref, ref.revision, DESCRIPTION + code)


def weights(ref: ModelRef, folder: Path) -> Path:
    """The same folder, with the weights of that commit.

    Not every .safetensors file: some repositories hold the same weights twice under other names. An
    index, or the configuration, says which ones they are.
    """
    names = {files.WEIGHTS, *files.weight_names(folder, ref.name)}
    return _download(ref, folder.name, tuple(map(escape, sorted(names))))


def snapshot_in(folder: Path) -> Path | None:
    """The newest commit that was downloaded, in the folder that a cache keeps of a repository."""
    branch = folder / "refs" / "main"
    if not folder.name.startswith(_KINDS) or not branch.is_file():
        return None
    snapshot = folder / _SNAPSHOTS / branch.read_text(encoding="utf-8", errors="replace").strip()
    return snapshot if snapshot.is_dir() else None


def repository_of(folder: Path) -> tuple[str, str] | None:
    """The repository and its commit that a folder is, where it lies in a cache of the Hub."""
    kept = folder.parent.parent.name
    if folder.parent.name != _SNAPSHOTS or not kept.startswith(_KINDS):
        return None
    return kept.removeprefix(_KINDS).replace("--", "/"), folder.name


def everything(ref: ModelRef) -> Path:
    """The folder with all files of the commit that `ref` means now."""
    return _download(ref, ref.revision, ("*",))


def _download(ref: ModelRef, revision: str | None, patterns: tuple[str, ...]) -> Path:
    with _errors_explained(ref):
        return Path(snapshot_download(ref.name, revision=revision, allow_patterns=list(patterns)))


@contextmanager
def _errors_explained(ref: ModelRef) -> Iterator[None]:
    try:
        yield
    # Every version of huggingface_hub brings its own HTTP client, whose errors share no base.
    except Exception as error:
        raise AbsorbError(_explanation(error, ref)) from error


def _explanation(error: Exception, ref: ModelRef) -> str:
    """One sentence. The order matters: gated is a kind of not found, and all are HTTP errors."""
    name, cause = ref.name, error.__cause__
    if isinstance(error, LocalEntryNotFoundError) and isinstance(cause, HfHubHTTPError):
        return _explanation(cause, ref)
    if isinstance(error, GatedRepoError):
        return (
            f"access to {name} is restricted; accept its terms at {constants.ENDPOINT}/{name}, "
            "then run `hf auth login` or set HF_TOKEN"
        )
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"there is neither a folder nor a Hub repository {name}, or it is private; check the "
            "name, or run `hf auth login` or set HF_TOKEN"
        )
    if isinstance(error, RevisionNotFoundError):
        return f"{name} has no revision {ref.revision}; check --revision"
    if isinstance(error, HfHubHTTPError):
        return _status_explanation(error.response.status_code, name)
    if isinstance(error, LocalEntryNotFoundError):
        return (
            f"{name} is not in the cache and the Hub cannot be reached; check the network, and "
            "that HF_HUB_OFFLINE is not set"
        )
    first = (str(error).splitlines() or [""])[0] or type(error).__name__
    return f"{name} could not be downloaded ({first}); try again"


def _status_explanation(status: int, name: str) -> str:
    if status in (401, 403):
        return (
            f"the Hub does not let you read {name} (HTTP status {status}); "
            "run `hf auth login` or set HF_TOKEN to a token that may"
        )
    return f"the Hub cannot serve {name} now (HTTP status {status}); try again later"
