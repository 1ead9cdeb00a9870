"""The weights of a student → the shards of a checkpoint."""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, chain
from pathlib import Path
from typing import Self

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from absorb.errors import AbsorbError
from absorb.load.files import INDEX, WEIGHTS
from absorb.models.decoder import Decoder
from absorb.models.resting.streaming import units_of
from absorb.models.whole import Whole
from absorb.runtime import ranks
from absorb.runtime.precision import as_stored, stored_type
from absorb.ship.files import full_disk_explained
from absorb.ship.staging import digest

_SHARD = 10**9  # bytes; two of these are in the memory of a process at once, one being written
Refuse = Callable[[Path], None]  # raises an AbsorbError for a file that nobody could use
_READERS = 2  # threads that read again what was written
_OVER = "over"  # a file: there where a process has refused to go on, so that others need not

_Unit = tuple[nn.Module, dict[str, nn.Parameter], dict[str, Tensor]]  # parameters, buffers


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """A file that is written, and has no name yet."""

    file: Path
    names: list[str]
    size: int  # bytes of tensors
    digest: str  # SHA-256


def save(
    student: Decoder,
    folder: Path,
    dtype: torch.dtype,
    types: Mapping[str, torch.dtype],
    whole: Whole | None = None,
    refuse: Refuse | None = None,
) -> tuple[PreTrainedModel, dict[str, str]]:
    """Write configuration, code and weights as `save_pretrained` does, and stream if they do.

    Every parameter is written in the type of `types` under its name, or else in `dtype`. What was
    taken out of a `whole` is written in its place there. Gives the model that was written, which
    may have no weights of its own, and the SHA-256 of files that `refuse` has seen already.

    Of several processes the first calls this, and all others `help_save` with the same.
    """
    if student.streaming is None:
        as_stored(student, dtype, types)
        if whole is None:
            student.model.save_pretrained(folder, max_shard_size=_SHARD)
            return student.model, {}
    writing = _Writing(student, dtype, types, whole)
    model = writing.model
    model.config.dtype = dtype
    model.save_pretrained(folder, state_dict={})
    for file in folder.glob("*.safetensors"):
        file.unlink()
    return model, name_shards(folder, writing.shards(folder, refuse))


def help_save(
    student: Decoder,
    folder: Path,
    dtype: torch.dtype,
    types: Mapping[str, torch.dtype],
    whole: Whole | None = None,
    refuse: Refuse | None = None,
) -> None:
    """Write this process's share of the weights, if it has one, to where the first writes.

    Nothing is written to `folder`, which is its own.
    """
    writing = _Writing(student, dtype, types, whole)
    if writing.is_shared_out:
        writing.shards(folder, refuse)


class _Writing:
    """Who writes what of a student's weights.

    Where they stream and fill several shards, the processes of one host share them out: each writes
    a run of units, as what comes after a unit is sent for while that is at work.
    """

    def __init__(
        self,
        student: Decoder,
        dtype: torch.dtype,
        types: Mapping[str, torch.dtype],
        whole: Whole | None,
    ):
        self.student, self.whole = student, whole
        self.model = whole.shell(student) if whole else student.model
        self.type_of = partial(stored_type, dtype=dtype, types=types)
        self.units, self.apart = _units(student)
        several = student.streaming is not None and ranks.share_a_host()
        sizes = [sum(map(self._bytes, own, own.values())) for _, own, _ in self.units]
        alone = not several or sum(sizes) <= _SHARD
        self.writers = [0] * len(sizes) if alone else _runs(sizes, ranks.count())

    @property
    def is_shared_out(self) -> bool:
        return any(self.writers)

    def _bytes(self, name: str, parameter: Tensor) -> int:
        """What a parameter takes in a file: where weights stream, they come as float32."""
        return parameter.numel() * (self.type_of(name) or torch.float32).itemsize

    def shards(self, folder: Path, refuse: Refuse | None) -> list[Shard]:
        """What was written to the folder of the first process, by all that have a share."""
        if not self.is_shared_out:
            return self._filled(folder, refuse)
        place = ranks.path_of_first(folder)
        out = place.with_suffix("")  # which is .partial until all is there

        def fill() -> list[Shard]:
            try:
                with full_disk_explained(out):
                    return self._filled(place, refuse)
            except AbsorbError:
                with suppress(OSError):
                    (place / _OVER).touch()
                raise

        return list(chain.from_iterable(ranks.together(fill)))

    def _filled(self, folder: Path, refuse: Refuse | None) -> list[Shard]:
        """What this process writes. The first has, besides, what belongs to no unit."""
        named = self.whole.name_of(self.student) if self.whole else str
        with Shards(folder, _SHARD, refuse) as shards:
            for tensors in self._tensors():
                if (folder / _OVER).exists():
                    return []  # for all raise what that process has refused
                kept = {named(key): tensor for key, tensor in tensors.items()}
                shards.add(revert_weight_conversion(self.model, kept))
            if self.whole and ranks.is_first():
                shards.add(revert_weight_conversion(self.model, dict(self.whole.others())))
            return shards.written()

    def _tensors(self) -> Iterator[dict[str, Tensor]]:
        """What each unit that this process writes holds, under its names in the student.

        Parameters come in the types that they are saved in, buffers as they are.
        """
        streaming, here = self.student.streaming, ranks.number()
        both = zip(self.units, self.writers, strict=True)
        mine = [unit for unit, writer in both if writer == here]
        for unit, parameters, buffers in tqdm(mine, desc="writing", unit="part"):
            with streaming.fetched(unit) if streaming else nullcontext():
                kept = {
                    name: one.detach().to("cpu", self.type_of(name) or one.dtype).contiguous()
                    for name, one in parameters.items()
                }
            yield kept | {name: one.cpu() for name, one in buffers.items()}
        if ranks.is_first():
            yield {name: one.cpu() for name, one in self.apart.items()}


def _units(student: Decoder) -> tuple[list[_Unit], dict[str, Tensor]]:
    """Every unit with what it holds, under its names in the model, and the buffers of none.

    What is tied comes once.
    """
    model = student.model
    names = {module: name for name, module in model.named_modules()}
    saved = model.state_dict()
    buffers = {name: one for name, one in model.named_buffers() if name in saved}
    seen: set[nn.Parameter] = set()
    units: list[_Unit] = []
    for unit in units_of(model, student.layers):
        stem = f"{names[unit]}."
        found = {stem + name: one for name, one in unit.named_parameters() if one not in seen}
        inside = [name for name in buffers if name.startswith(stem)]
        units.append((unit, found, {name: buffers.pop(name) for name in inside}))
        seen |= {*found.values()}
    return units, buffers


def _runs(sizes: Sequence[int], parts: int) -> list[int]:
    """The part that each of several sizes belongs to: runs that come to about the same."""
    whole = sum(sizes)
    return [
        (2 * end - size) * parts // (2 * whole)  # where its middle is
        for size, end in zip(sizes, accumulate(sizes), strict=True)
    ]


def name_shards(folder: Path, shards: Sequence[Shard]) -> dict[str, str]:
    """Give shards the names that loaders look for: the SHA-256 of each by its name."""
    count = len(shards)
    if count == 1:
        shards[0].file.rename(folder / WEIGHTS)
        return {WEIGHTS: shards[0].digest}
    digests: dict[str, str] = {}
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{count:05}.safetensors"
        shard.file.rename(folder / file)
        digests[file] = shard.digest
        places |= dict.fromkeys(shard.names, file)
    size = sum(shard.size for shard in shards)
    index = {"metadata": {"total_size": size}, "weight_map": places}
    (folder / INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")
    return digests


class Shards:
    """Safetensors files in a folder, each filled up to `most` bytes before the next is begun.

    While one is filled the one before is written, and others are read again, hashed and flushed to
    the disk. Nothing of that goes on once the block has ended.
    """

    def __init__(self, folder: Path, most: int, refuse: Refuse | None = None):
        self.folder, self.most, self.refuse = folder, most, refuse
        self._part: dict[str, Tensor] = {}
        self._size = 0
        self._writer, self._readers = ThreadPoolExecutor(1), ThreadPoolExecutor(_READERS)
        self._last: Future[None] | None = None  # that is written
        self._shards: list[Future[Shard]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for pool in (self._writer, self._readers):
            pool.shutdown(cancel_futures=True)

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Tensors that are to be in one file."""
        size = sum(tensor.nbytes for tensor in tensors.values())
        if self._part and self._size + size > self.most:
            self._close()
        self._part |= tensors
        self._size += size

    def written(self) -> list[Shard]:
        """Write what is left: all files, in order."""
        if self._part:
            self._close()
        return [shard.result() for shard in tqdm(self._shards, "hashing", delay=2, unit="file")]

    def _close(self) -> None:
        if self._last is not None:
            self._last.result()  # no third part in memory
        for shard in filter(Future.done, self._shards):
            shard.result()  # what is refused is refused before more is written
        # Other processes may write to the same folder.
        file = self.folder / f"{ranks.number()}-{len(self._shards)}.part"
        self._last = self._writer.submit(save_file, self._part, file, {"format": "pt"})
        names, size = list(self._part), self._size
        self._shards.append(self._readers.submit(self._read_again, self._last, file, names, size))
        self._part, self._size = {}, 0

    def _read_again(self, written: Future[None], file: Path, names: list[str], size: int) -> Shard:
        written.result()
        if self.refuse is not None:
            self.refuse(file)
        found = digest(file)
        with file.open("rb") as content:
            os.fsync(content.fileno())
        return Shard(file=file, names=names, size=size, digest=found)
