"""Several processes convert to what one does, and end together. Here they share a CPU (gloo).

Where they are to end, torchrun starts them; elsewhere they are started as it does, and warm:
torchrun and two new processes import for a quarter of a minute.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from socket import socket

import pytest
import torch
from safetensors.torch import load_file

from absorb.load.files import INDEX, WEIGHTS
from absorb.ship.staging import digests
from tests.helpers import warm
from tests.helpers.tiny import LAYERS, tiny
from tests.helpers.tiny_tokenizer import letters, tiny_tokenizer

pytestmark = pytest.mark.slow
# In ways other than `resident` no model fits the first process, and shards are small. Products are
# taken in float32 on every processor. What is `damaged` is what the second process writes, and the
# first takes its time to clear up.
PROGRAM = """
import os, shutil, sys, time
import pytest
from absorb.load import source
from absorb.runtime import precision
from absorb.ship import staging, weights
from tests.conftest import shorten_texts
shorten_texts(pytest.MonkeyPatch())
precision._bfloat16_is_fast = lambda device: False
rank, way = os.environ.get("RANK", "0"), sys.argv.pop(1)
if way != "resident":
    source.free_memory = lambda device: 10**12 * int(rank)
    weights._SHARD = 30_000
class slow:
    def rmtree(*place, **how):
        time.sleep(3)
        shutil.rmtree(*place, **how)
def damaged(tensors, *where):
    save_file({name: tensor / 0 for name, tensor in tensors.items()}, *where)
if way == "damaged" and rank == "0":
    staging.shutil = slow
elif way == "damaged":
    save_file, weights.save_file = weights.save_file, damaged
from absorb.cli.main import main
main()
"""
# All weights of a model that does not fit are shared out among processes.
TRAINED = {"resident": "all", "streamed": "scales", "sharded": "all", "damaged": "scales"}
ROOT = Path(__file__).parents[2]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    tiny("llama", torch.float32, max_position_embeddings=512).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    (tmp_path / "text.txt").write_text(letters(26_000))
    (tmp_path / "program.py").write_text(PROGRAM)
    return folder


def arguments(source: Path, out: str, way: str) -> list[str]:
    home = source.parent
    return [
        *(way, "convert", str(source), "--out", str(home / out), "--text", str(home / "text.txt")),
        *("--steps", "3", "--train", TRAINED[way], "--device", "cpu", "--json"),
        *("--prefix", "a", "--sink", "logit"),  # which leave something to learn
    ]


def run(words: list[str], processes: int) -> subprocess.CompletedProcess[str]:
    """The first of so many processes, all of which end well."""
    command = [sys.executable, "-c", PROGRAM, *words]
    with ThreadPoolExecutor() as pool:
        places = told(processes)
        ranks = [*pool.map(lambda place: warm.run(command, env=os.environ | place), places)]
    for done in ranks:
        assert done.returncode == 0, done.stderr
    return ranks[0]


def converted(source: Path, way: str, processes: int) -> tuple[dict[str, torch.Tensor], dict]:
    out = f"{way}-{processes}"
    report = json.loads(run(arguments(source, out, way), processes).stdout)
    assert report["files"] == digests(source.parent / out)
    return weights_of(source.parent / out), report


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """By one file or an index, which says rightly where everything is."""
    index = folder / INDEX
    if not index.exists():
        return load_file(folder / WEIGHTS)
    places = json.loads(index.read_text())["weight_map"]
    shards = {file: load_file(folder / file) for file in set(places.values())}
    assert {name: file for file, tensors in shards.items() for name in tensors} == places
    return {name: tensor for tensors in shards.values() for name, tensor in tensors.items()}


def told(processes: int) -> list[dict[str, str]]:
    """What torchrun tells each process."""
    with socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    meeting |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    return [meeting | {"RANK": str(n), "LOCAL_RANK": str(n)} for n in range(processes)]


# Of three processes not all read the same number of rows of a step.
@pytest.mark.parametrize(
    ("one", "several"),
    [("resident", {"resident": 2, "sharded": 2}), ("streamed", {"streamed": 3})],
    ids=["resident", "streamed"],
)
def test_several_processes_come_to_what_one_does(
    one: str, several: dict[str, int], source: Path
) -> None:
    alone = converted(source, one, 1)
    for way, processes in several.items():
        is_that_of_one(alone, converted(source, way, processes), way)


def is_that_of_one(
    one: tuple[dict[str, torch.Tensor], dict],
    several: tuple[dict[str, torch.Tensor], dict],
    way: str,
) -> None:
    """Sums of gradients in another order: AdamW turns differences of gradients near zero into
    steps, of which there are three of at most 2e-4."""
    (alone, first), (together, second) = one, several
    assert together.keys() == alone.keys()
    for name, tensor in alone.items():
        torch.testing.assert_close(together[name], tensor, rtol=1e-3, atol=2e-4, msg=name)
    for key in ("prefix", "removals", "residual_scales", "keyed_layers"):
        assert second["inspection"][key] == first["inspection"][key]
    assert second["losses"]["kept"] == first["losses"]["kept"] > 0
    layers = second["losses"]["layers"]
    assert len(layers) == (LAYERS if way == "streamed" else 0)
    assert all(after < before for before, after in layers)
    for ours, theirs in zip(layers, first["losses"]["layers"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    for (_, ours), (_, theirs) in zip(
        second["losses"]["held_out"], first["losses"]["held_out"], strict=True
    ):
        assert ours == pytest.approx(theirs, abs=1e-4)
    assert second["converted"]["perplexity"] == pytest.approx(
        first["converted"]["perplexity"], rel=1e-4
    )


def test_what_one_process_may_not_write_ends_all_with_one_sentence(source: Path) -> None:
    words = arguments(source, "out", "damaged")
    done = subprocess.run(by_torchrun(source, words), env=found(), capture_output=True, text=True)
    assert done.returncode != 0
    assert done.stderr.count("the model converted from source has NaN or infinity in ") == 1
    assert "has ended" not in done.stderr
    assert "absorb/cli" not in done.stderr  # no traceback of ours
    assert not list(source.parent.glob("out*"))


def test_a_process_that_is_killed_ends_all_and_another_number_goes_on(source: Path) -> None:
    words = [*arguments(source, "out", "streamed"), "--resume"]
    words[words.index("--steps") + 1] = "40"
    kept = source.parent / "out.progress" / "layers"
    killed(source, words, lambda: (kept / "0.safetensors").exists())
    trained = load_file(kept / "0.safetensors")
    done = warm.run([sys.executable, "-c", PROGRAM, *words])
    assert done.returncode == 0, done.stderr
    assert "resumed" in done.stderr
    written = weights_of(source.parent / "out")
    for name, tensor in trained.items():
        if "proj.weight" in name:  # what is small is trained again, with all other layers
            assert torch.equal(written[f"model.layers.0.{name}"], tensor), name
    assert not kept.exists()


def test_weights_that_are_shared_out_are_gone_on_from(source: Path) -> None:
    words = [*arguments(source, "out", "sharded"), "--resume"]
    words[words.index("--steps") + 1] = "8"
    kept = source.parent / "out.progress" / "shards"
    killed(source, words, lambda: (kept / "2").exists())
    done = run(words, 2)
    assert "resumed" in done.stderr
    assert "with weights shared out among 2 processes" in done.stderr
    assert "fine-tuning:  25%" in done.stderr
    assert "fine-tuning:  12%" not in done.stderr  # the first step of a run that begins
    assert len(json.loads(done.stdout)["losses"]["training"]) == 8
    assert (source.parent / "out" / INDEX).exists()
    assert not kept.exists()


def by_torchrun(source: Path, words: list[str]) -> list[str]:
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *(str(source.parent / "program.py"), *words),
    ]


def found() -> dict[str, str]:
    """An environment in which new processes find the tests."""
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}


def killed(source: Path, words: list[str], there: Callable[[], bool]) -> None:
    """A conversion by two processes, of which one is killed when something is `there`."""
    log = source.parent / "log"
    with (
        log.open("w") as said,
        subprocess.Popen(
            by_torchrun(source, words), env=found(), stderr=said, stdout=subprocess.DEVNULL
        ) as both,
    ):
        deadline = time.monotonic() + 120
        while not there() and time.monotonic() < deadline:
            time.sleep(0.1)
        [helper] = [pid for pid in _children(both.pid) if _environment(pid).get("RANK") == "1"]
        os.kill(helper, signal.SIGKILL)
        both.wait(timeout=60)
    assert both.returncode != 0
    text = log.read_text()
    assert text.count("another process than 0 of torchrun has ended, so nothing was written") == 1
    assert "absorb/cli" not in text  # no traceback of ours
    assert not (source.parent / "out").exists()
    assert not list(source.parent.glob("out.partial*"))


def _children(parent: int) -> list[int]:
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[1]) == parent:
            found.append(int(status.parent.name))
    return found


def _environment(pid: int) -> dict[str, str]:
    try:
        entries = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return {}
    return dict(entry.decode().partition("=")[::2] for entry in entries if entry)
