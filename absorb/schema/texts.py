"""What a user may name as text: a file, or a dataset on the Hub. No torch here."""

import re
from pathlib import Path

from absorb.errors import MisuseError

_DATASET = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?::([\w.+-]+(?:\[[\d:%]*\])?))?")
# A name that ends so is meant as a file, there or not.
_ENDINGS = "txt text md rst py json jsonl ndjson jsonlines jl csv tsv parquet arrow"
_ENDINGS += " gz bz2 xz zst zip pdf gguf safetensors"


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
    if not path.exists() or path.is_dir():  # a pipe will do
        raise MisuseError("{value} is no file to read text from; check {0}", option, value=name)
    return path
