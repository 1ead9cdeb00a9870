"""Shards are the files that safetensors writes, hashed and flushed while others are filled."""

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from absorb.errors import AbsorbError
from absorb.load.files import INDEX, WEIGHTS
from absorb.ship.weights import Refuse, Shards, name_shards


def tensors(count: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {f"{n}.weight": torch.randn(8, 4, generator=draw).bfloat16() for n in range(count)}


def written(folder: Path, count: int, most: int, refuse: Refuse | None = None) -> dict[str, str]:
    with Shards(folder, most, refuse) as shards:
        for name, tensor in tensors(count).items():
            shards.add({name: tensor})
        return name_shards(folder, shards.written())


def test_digests_are_those_of_the_files(tmp_path: Path) -> None:
    digests = written(tmp_path, 7, most=2 * 64)
    assert [*digests] == [f"model-{n:05}-of-00004.safetensors" for n in (1, 2, 3, 4)]
    for file, digest in digests.items():
        assert hashlib.sha256((tmp_path / file).read_bytes()).hexdigest() == digest
    assert {path.name for path in tmp_path.iterdir()} == {*digests, INDEX}
    found = {name: value for file in digests for name, value in load_file(tmp_path / file).items()}
    assert found.keys() == tensors(7).keys()
    for name, tensor in tensors(7).items():
        assert torch.equal(found[name], tensor)


def test_one_shard_has_the_bytes_that_safetensors_writes(tmp_path: Path) -> None:
    save_file(tensors(3), tmp_path / "theirs", {"format": "pt"})
    assert [*written(tmp_path, 3, most=10**6)] == [WEIGHTS]
    assert (tmp_path / WEIGHTS).read_bytes() == (tmp_path / "theirs").read_bytes()


def test_a_file_that_is_refused_ends_the_writing(tmp_path: Path) -> None:
    def refuse(file: Path) -> None:
        raise AbsorbError(f"{file.name} is of no use")

    with pytest.raises(AbsorbError, match=r"^0-0\.part is of no use$"):
        written(tmp_path, 4, most=64, refuse=refuse)
