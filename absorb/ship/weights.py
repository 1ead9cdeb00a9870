"""The weights of a student → the shards of a checkpoint."""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Self

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from absorb.load.files import INDEX, WEIGHTS
from absorb.models.decoder import Decoder
from absorb.models.resting.streaming import units_of
from absorb.models.whole import Whole
from absorb.runtime.precision import as_stored, stored_type
from absorb.ship.staging import digest

_SHARD = 10**9  # bytes; two of these are in memory at once, one being written
Refuse = Callable[[Path], None]  # raises an AbsorbError for a file that nobody could use
_READERS = 2  # threads that read again what was written


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
    """
    if student.streaming is None:
        as_stored(student, dtype, types)
        if whole is None:
            student.model.save_pretrained(folder, max_shard_size=_SHARD)
            return student.model, {}
    model = whole.shell(student) if whole else student.model
    model.config.dtype = dtype
    model.save_pretrained(folder, state_dict={})
    for file in folder.glob("*.safetensors"):
        file.unlink()
    type_of = partial(stored_type, dtype=dtype, types=types)
    named = whole.name_of(student) if whole else str
    with Shards(folder, _SHARD, refuse) as shards:
        for tensors in _tensors(student, type_of):
            kept = {named(key): tensor for key, tensor in tensors.items()}
            shards.add(revert_weight_conversion(model, kept))
        if whole:
            shards.add(revert_weight_conversion(model, dict(whole.others())))
        return model, shards.finish()


def _tensors(
    student: Decoder, type_of: Callable[[str], torch.dtype | None]
) -> Iterator[dict[str, Tensor]]:
    """What each unit holds, under its names in the model. What is tied comes once.

    Parameters come in the types that they are saved in, buffers as they are.
    """
    model, streaming = student.model, student.streaming
    names = {module: name for name, module in model.named_modules()}
    buffers = {name: one for name, one in model.named_buffers() if name in model.state_dict()}
    seen: set[Tensor] = set()
    for unit in tqdm(units_of(model, student.layers), desc="writing", unit="part"):
        stem = f"{names[unit]}."
        with streaming.fetched(unit) if streaming else nullcontext():
            found = {
                stem + name: parameter.detach()
                for name, parameter in unit.named_parameters()
                if parameter not in seen
            }
            kept = {
                name: tensor.to("cpu", type_of(name) or tensor.dtype).contiguous()
                for name, tensor in found.items()
            }
        seen |= set(unit.parameters())
        mine = [name for name in buffers if name.startswith(stem)]
        yield kept | {name: buffers.pop(name).cpu() for name in mine}
    yield {name: one.cpu() for name, one in buffers.items()}


class Shards:
    """Safetensors files in a folder, each filled up to `most` bytes before the next is begun.

    While one is filled the one before is written, and others are read again, hashed and flushed to
    the disk. Nothing of that goes on once the block has ended.
    """

    def __init__(self, folder: Path, most: int, refuse: Refuse | None = None):
        self.folder, self.most, self.refuse = folder, most, refuse
        self._names: list[list[str]] = []
        self._part: dict[str, Tensor] = {}
        self._size = self._total = 0
        self._writer, self._readers = ThreadPoolExecutor(1), ThreadPoolExecutor(_READERS)
        self._written: Future[None] | None = None  # the last
        self._digests: list[Future[str]] = []

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
        self._total += size

    def finish(self) -> dict[str, str]:
        """Write what is left, and give the files the names that loaders look for.

        Gives the SHA-256 of each by its name.
        """
        self._close()
        waiting = tqdm(self._digests, "hashing", delay=2, unit="file")
        digests = [future.result() for future in waiting]
        count = len(self._names)
        if count == 1:
            self._partial(0).rename(self.folder / WEIGHTS)
            return {WEIGHTS: digests[0]}
        files = [f"model-{number + 1:05}-of-{count:05}.safetensors" for number in range(count)]
        places: dict[str, str] = {}
        for number, (file, names) in enumerate(zip(files, self._names, strict=True)):
            self._partial(number).rename(self.folder / file)
            places |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": self._total}, "weight_map": places}
        (self.folder / INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")
        return dict(zip(files, digests, strict=True))

    def _close(self) -> None:
        if self._written is not None:
            self._written.result()  # no third part in memory
        for found in filter(Future.done, self._digests):
            found.result()  # what is refused is refused before more is written
        file = self._partial(len(self._names))
        self._written = self._writer.submit(save_file, self._part, file, {"format": "pt"})
        self._digests.append(self._readers.submit(self._read_again, file, self._written))
        self._names.append(list(self._part))
        self._part, self._size = {}, 0

    def _read_again(self, file: Path, written: Future[None]) -> str:
        written.result()
        if self.refuse is not None:
            self.refuse(file)
        found = digest(file)
        with file.open("rb") as content:
            os.fsync(content.fileno())
        return found

    def _partial(self, number: int) -> Path:
        return self.folder / f"{number}.part"
