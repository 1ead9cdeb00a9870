"""The files of a model folder: which of them hold its weights, and what they say of themselves."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from absorb.errors import AbsorbError, is_failure
from absorb.schema.codec import parse_json

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
# The entry of a config.json that names the weights, or their index, where they have another name.
NAMED = "transformers_weights"
# What safetensors calls the types of weights that are not quantised.
STORED = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}

_POINTER = b"version https://git-lfs"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
    """What the header of a file says of a tensor in it."""

    kind: str  # as safetensors calls the type
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return prod(self.shape)


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Make one sentence of whatever the libraries below raise for a damaged file."""
    try:
        yield
    except AbsorbError:
        raise
    except BaseException as error:
        if not is_failure(error):
            raise
        raise AbsorbError(
            f"{name} could not be read ({first_line(error)}); "
            "check that its files are complete and belong together"
        ) from error


def first_line(error: BaseException) -> str:
    """What an error says first, with what it announces there and says on the next line."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    said = " ".join(lines[:2]) if lines and lines[0].endswith(":") else "".join(lines[:1])
    return said.rstrip(".:") or type(error).__name__


def read_json(file: Path, name: str) -> dict[str, Any]:
    """The object in a JSON file of the model that people call `name`."""
    if not file.is_file():
        raise AbsorbError(
            f"{name} has no {file.name}, so it is not a transformers model; "
            "name a folder or repository that holds one, or a .gguf file"
        )
    try:
        content = parse_json(file.read_bytes())
    except ValueError as error:
        raise AbsorbError(
            f"the {file.name} of {name} is not JSON ({error}); fetch it again"
        ) from error
    if not isinstance(content, dict):
        raise AbsorbError(f"the {file.name} of {name} is not a JSON object; fetch it again")
    return content


def refuse_no_numbers(folder: Path, name: str, remedy: str) -> None:
    """Refuse NaN and infinity in what was written: they are no JSON."""
    for file in sorted(folder.glob("*.json")):
        found: list[str] = []
        json.loads(file.read_bytes(), parse_constant=found.append)
        if found:
            raise AbsorbError(f"the {file.name} of {name} would hold {found[0]}; {remedy}")


def refuse_pointers(folder: Path, name: str) -> None:
    """Refuse a clone in which Git has put a few lines in place of every large file."""
    for file in sorted(folder.glob("*")):
        large = file.suffix in (".json", ".model", ".safetensors", ".gguf") and file.is_file()
        if large and is_pointer(file):
            raise AbsorbError(
                f"the {file.name} of {name} is a pointer of Git LFS and not the file; run `git lfs "
                "pull` there"
            )


def is_pointer(file: Path) -> bool:
    with file.open("rb") as content:
        return content.read(len(_POINTER)) == _POINTER


def weight_names(folder: Path, name: str) -> tuple[str, ...]:
    """The files that are to hold the model: one, or those that an index names. Sorted.

    Where a folder has both it is the one, as transformers has it. Empty where nothing says.
    """
    named = _named(folder, name)
    if named is None and (folder / WEIGHTS).is_file():
        return (WEIGHTS,)
    if named is not None and not named.endswith(".index.json"):
        return (named,)
    index = folder / (named or INDEX)
    return _shards(read_json(index, name), index.name, name) if index.is_file() else ()


def index_name(folder: Path, name: str) -> str:
    """The name of the index of several files, which need not be there."""
    named = _named(folder, name)
    return named if named is not None and named.endswith(".index.json") else INDEX


def _named(folder: Path, name: str) -> str | None:
    """What a config.json says of the name of the weights."""
    named = read_json(folder / "config.json", name).get(NAMED)
    if named is None:
        return None
    if not isinstance(named, str) or not _beside(named):
        raise AbsorbError(
            f"the config.json of {name} names {named!r} as its weights, which is no file beside "
            "it; fetch it again"
        )
    return named


def weight_files(folder: Path, name: str) -> list[Path]:
    """The safetensors files that hold the model, all of them there."""
    names = weight_names(folder, name)
    if not names and not (folder / index_name(folder, name)).is_file():
        raise AbsorbError(
            f"{name} has no weights in the safetensors format, and absorb reads no pickle files "
            "(.bin, .pt), which can run any code; save the model again with save_pretrained"
        )
    files = [folder / file for file in names]
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        raise AbsorbError(f"{name} lacks {', '.join(missing) or 'its weights'}; fetch it again")
    return files


def _shards(index: Mapping[str, Any], file: str, name: str) -> tuple[str, ...]:
    """The files that an index names. They lie beside it: one elsewhere is nobody's business."""
    places = index.get("weight_map")
    shards = {str(shard) for shard in places.values()} if isinstance(places, dict) else set()
    for shard in shards:
        if not _beside(shard):
            raise AbsorbError(
                f"the {file} of {name} names {shard!r}, which is no file beside it; fetch it again"
            )
    return tuple(sorted(shards))


def _beside(file: str) -> bool:
    """Whether a name is that of a file in the same folder. No other format than ours is opened."""
    return Path(file).name == file and "\0" not in file and file.endswith((".safetensors", ".json"))


@contextmanager
def unchanged(files: list[Path]) -> Iterator[None]:
    """Refuse files that somebody writes to meanwhile: what is read of them may belong to two."""

    def marks() -> list[tuple[int, int, int]]:
        return [(s.st_ino, s.st_size, s.st_mtime_ns) for s in map(Path.stat, files)]

    before = marks()
    yield
    for file, then, now in zip(files, before, marks(), strict=True):
        if then != now:
            raise AbsorbError(f"{file} changed while it was read; try again once it is complete")


def headers(files: list[Path]) -> dict[str, Tensor]:
    """What the files hold, by the name of the tensor."""
    found: dict[str, Tensor] = {}
    for file in files:
        with reading(str(file)), safe_open(file, "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 - not a mapping
                part = tensors.get_slice(key)
                found[key] = Tensor(kind=part.get_dtype(), shape=tuple(part.get_shape()))
    return found
