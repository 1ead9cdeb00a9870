"""The weights of a student → the shards of a checkpoint."""

import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers.core_model_loading import revert_weight_conversion

from absorb.models.decoder import Decoder
from absorb.models.streaming import Streaming
from absorb.runtime.precision import as_stored, stored_type

_SHARD = 5_000_000_000  # bytes


def save(
    student: Decoder, folder: Path, dtype: torch.dtype, types: Mapping[str, torch.dtype]
) -> None:
    """Write configuration, code and weights as `save_pretrained` does, and stream if they do.

    Every parameter is written in the type of `types` under its name, or else in `dtype`.
    """
    if student.streaming is None:
        as_stored(student, dtype, types)
        student.model.save_pretrained(folder, max_shard_size=_SHARD)
        return
    student.model.save_pretrained(folder, state_dict={})
    for file in folder.glob("*.safetensors"):
        file.unlink()
    _save_shards(
        _tensors(student, student.streaming, partial(stored_type, dtype=dtype, types=types)), folder
    )


def _tensors(
    student: Decoder, streaming: Streaming, type_of: Callable[[str], torch.dtype | None]
) -> Iterator[dict[str, Tensor]]:
    """What each unit holds, under its names in a file. What is tied comes once."""
    names = {module: name for name, module in student.model.named_modules()}
    seen: set[nn.Parameter] = set()
    for unit in tqdm(streaming.units, desc="writing", unit="part"):
        with streaming.fetched(unit):
            found = {
                f"{names[unit]}.{name}": parameter.detach()
                for name, parameter in unit.named_parameters()
                if parameter not in seen
            }
            kept = {
                name: tensor.to("cpu", type_of(name) or tensor.dtype).contiguous()
                for name, tensor in found.items()
            }
        seen |= set(unit.parameters())
        yield revert_weight_conversion(student.model, kept)


def _save_shards(parts: Iterator[dict[str, Tensor]], folder: Path) -> None:
    shards: list[list[str]] = []
    tensors: dict[str, Tensor] = {}
    total = 0

    def close() -> None:
        save_file(tensors, folder / f"{len(shards)}.shard", metadata={"format": "pt"})
        shards.append(list(tensors))
        tensors.clear()

    for part in parts:
        if tensors and sum(t.nbytes for t in (*tensors.values(), *part.values())) > _SHARD:
            close()
        tensors |= part
        total += sum(tensor.nbytes for tensor in part.values())
    close()
    _name_shards(shards, folder, total)


def _name_shards(shards: list[list[str]], folder: Path, total: int) -> None:
    """Give shards the names that transformers looks for, and an index where there are several."""
    if len(shards) == 1:
        (folder / "0.shard").rename(folder / "model.safetensors")
        return
    index: dict[str, str] = {}
    for number, names in enumerate(shards):
        name = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        (folder / f"{number}.shard").rename(folder / name)
        index |= dict.fromkeys(names, name)
    content = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content, indent=2))
