"""Places that a user may name: a path, a text, a server, a repository. No torch here."""

import re
from dataclasses import dataclass
from errno import ENAMETOOLONG
from pathlib import Path
from urllib.parse import urlsplit

from absorb.errors import AbsorbError, MisuseError
from absorb.schema.declared import Checked, option

_DATASET = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?::([\w.+-]+(?:\[[\d:%]*\])?))?")
# A name that ends so is meant as a file, there or not.
_ENDINGS = "txt text md rst py json jsonl ndjson jsonlines jl csv tsv parquet arrow"
_ENDINGS += " gz bz2 xz zst zip pdf gguf safetensors"
_LONG = 200  # letters of a name that is refused


class Dataset(str):
    """A dataset on the Hub, OWNER/DATASET or OWNER/DATASET:SPLIT. A ValueError says it is none."""

    __slots__ = ()

    def __new__(cls, name: str) -> "Dataset":
        if not _DATASET.fullmatch(name):
            raise ValueError(f"{name!r} is not OWNER/DATASET[:split]")
        return super().__new__(cls, name)

    @property
    def repository(self) -> str:
        return self.partition(":")[0]

    @property
    def part(self) -> str:
        return self.partition(":")[2] or "train"


def is_dataset(name: str) -> bool:
    """Whether a name that is no file's means a dataset: what looks like a path is one."""
    if not _DATASET.fullmatch(name) or Path(name).exists():
        return False
    ending = Path(name).suffix[1:].lower()
    return ending not in _ENDINGS.split() and not Path(name.partition("/")[0]).exists()


def text_named(name: str | Path, option: str) -> Path | Dataset:
    """The text that a caller names, or a MisuseError where nothing is there."""
    if isinstance(name, str) and is_dataset(name):
        return Dataset(name)
    path = Path(name)
    if not _is_readable(path):
        value = f"{name}"[:_LONG]  # which may be the text itself
        raise MisuseError("{value} is no file to read text from; check {0}", option, value=value)
    return path


def _is_readable(path: Path) -> bool:
    try:
        return path.exists() and not path.is_dir()  # a pipe will do
    except OSError:  # no name is so long
        return False


def expanded(name: str | Path) -> Path:
    """The path that a user means, who may begin it with `~` or `~somebody`."""
    try:
        path = Path(name).expanduser()
    except RuntimeError:
        home = Path(name).parts[0]
        raise AbsorbError(
            f"{name}: there is no home folder {home}; write ./{home} for a folder of that name"
        ) from None
    if _is_too_long(path):
        raise AbsorbError(f"{str(name)[:_LONG]}... is too long for a path; check the name")
    return path


def _is_too_long(path: Path) -> bool:
    try:
        path.stat()
    except OSError as error:
        return error.errno == ENAMETOOLONG
    return False


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # of a port or a bracket
        return False


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint(Checked):
    """A running server that should say what a checkpoint says."""

    url: str | None = option(
        None,
        "Compare a server with it instead: vLLM, llama.cpp or SGLang, which drop a thing or two.",
        flag="--endpoint",
        metavar="URL",
    )
    served: str | None = option(
        None,
        "What the server calls the model.  [default: its first]",
        flag="--model",
        metavar="NAME",
    )

    def refuse_contradictions(self) -> None:
        if self.url is None:
            if self.served is not None:
                raise MisuseError("{0} is of {1}; add it, or drop {0}", "served", "url")
        elif not _is_address(self.url):
            raise MisuseError("{0} is an address such as http://localhost:8000", "url")


@dataclass(frozen=True, slots=True, kw_only=True)
class Destination(Checked):
    """Where a checkpoint is to go: a branch of a repository, or a pull request to it."""

    repository: str
    private: bool = option(False, "Make a new repository a private one.")
    create_pr: bool = option(False, "Open a pull request instead of changing REPO.")
    revision: str | None = option(
        None, "Branch to upload to; made if there is none.  [default: main]"
    )

    def refuse_contradictions(self) -> None:
        if self.create_pr and self.revision is not None:
            raise MisuseError(
                "a pull request is made for main; drop {0} or {1}", "create_pr", "revision"
            )
