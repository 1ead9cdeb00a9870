"""Two processes write what one does, each a run of units."""

import errno
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from absorb.errors import AbsorbError
from absorb.fold.graft import graft
from absorb.load import source as loading
from absorb.load.files import INDEX
from absorb.runtime import ranks
from absorb.schema.settings import ModelRef
from absorb.ship import weights
from absorb.ship.staging import digests
from tests.helpers import warm
from tests.helpers.plans import neutral_plan
from tests.helpers.tiny import HIDDEN, tiny
from tests.helpers.tiny_tokenizer import tiny_tokenizer
from tests.helpers.wrappers import saved
from tests.pipelines.test_ranks import told

pytestmark = pytest.mark.slow


@pytest.fixture(params=["llama", "a whole with a tied head"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param != "llama":
        return saved("gemma3", tmp_path / "source", tied=True)
    tiny("llama", torch.bfloat16).save_pretrained(tmp_path / "source")
    tiny_tokenizer().save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def write(source: Path, out: Path, most: int) -> None:
    """What one process does, where weights stream: it says what units it asks for."""
    loading.free_memory = lambda device: 0  # type: ignore[assignment]
    weights._SHARD = most
    with ranks.joined("cpu"):
        found = loading.load(ModelRef(name=str(source)), device=torch.device("cpu"))
        plan = neutral_plan(found.family, residual=2.0 ** (torch.arange(HIDDEN) % 5))
        student = graft(found.decoder, plan)
        streaming = student.streaming
        assert streaming is not None
        names = {module: name for name, module in student.model.named_modules()}
        asked: list[str] = []
        fetch = streaming._fetch
        streaming._fetch = lambda unit: (asked.append(names[unit]), fetch(unit))[1]  # type: ignore
        how = found.dtype, found.types, found.whole
        if ranks.is_first():
            out.mkdir()
            known = weights.save(student, out, *how)[1]
            print(json.dumps([asked, known]))
        else:
            weights.help_save(student, out.with_name("none"), *how)
            print(json.dumps([asked, {}]))


def write_to_a_full_disk(source: Path, out: Path) -> None:
    """Nothing can be written by the second process, and the first waits until that is known."""
    save_file, over = weights.save_file, out / weights._OVER

    def refuse(*what: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def wait(*what: Any) -> None:
        save_file(*what)
        deadline = time.monotonic() + 60
        while not over.exists() and time.monotonic() < deadline:
            time.sleep(0.01)

    weights.save_file = refuse if os.environ["RANK"] == "1" else wait
    with pytest.raises(AbsorbError, match=f"^the disk that holds {out.parent} is full, so out was"):
        write(source, out, most=1)


def together(count: int, source: Path, most: int) -> tuple[Path, list[tuple[list[str], dict]]]:
    out = source.with_name(f"by-{count}")
    with ThreadPoolExecutor() as pool:
        envs = [os.environ | place for place in told(count)]
        done = [*pool.map(lambda env: warm.call(write, source, out, most, env=env), envs)]
    for one in done:
        assert one.returncode == 0, one.stderr
    return out, [json.loads(one.stdout) for one in done]


def tensors(folder: Path) -> dict[str, tuple[str, Tensor]]:
    """Each with the file that it is in."""
    files = sorted(folder.glob("*.safetensors"))
    return {name: (file.name, one) for file in files for name, one in load_file(file).items()}


def test_two_write_what_one_writes(source: Path) -> None:
    (alone, [(every, _)]), (both, said) = (together(n, source, 20_000) for n in (1, 2))
    (first, known), (second, _) = said
    assert first + second == every  # nothing is asked for twice, and all in order
    assert len(second) > 1
    expected, found = tensors(alone), tensors(both)
    assert found.keys() == expected.keys()
    for name, (_, tensor) in expected.items():
        assert torch.equal(found[name][1], tensor), name
        assert found[name][1].dtype == tensor.dtype
    index = json.loads((both / INDEX).read_text())
    assert index["weight_map"] == {name: file for name, (file, _) in found.items()}
    assert index["metadata"] == json.loads((alone / INDEX).read_text())["metadata"]
    assert known == {file: one for file, one in digests(both).items() if file in known}
    assert {*known} == {file for file, _ in found.values()}
    assert {path.name for path in both.iterdir()} == {
        path.name for path in alone.iterdir()
    } | known.keys()
    assert not source.with_name("none").exists()


@pytest.mark.parametrize("source", ["llama"], indirect=True)
def test_a_full_disk_of_one_ends_the_others(source: Path) -> None:
    out = source.with_name("out.partial")
    with ThreadPoolExecutor() as pool:
        envs = [os.environ | place for place in told(2)]
        done = pool.map(lambda env: warm.call(write_to_a_full_disk, source, out, env=env), envs)
    for one in done:
        assert one.returncode == 0, one.stderr
    assert 1 <= len([*out.glob("*.part")]) <= 2  # and not one of each unit of the first


@pytest.mark.parametrize("source", ["llama"], indirect=True)
def test_one_file_is_written_by_the_first(source: Path) -> None:
    out, ((first, known), (second, _)) = together(2, source, 10**9)
    assert first
    assert not second
    assert [*known] == ["model.safetensors"]
    assert not (out / INDEX).exists()
