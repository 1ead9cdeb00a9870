"""Two processes that torchrun starts convert to what one does. Here they share a CPU (gloo)."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.tiny import tiny
from tests.helpers.tiny_tokenizer import letters, tiny_tokenizer

pytestmark = pytest.mark.slow
# `streamed` says that no model fits. Products are taken in float32 on every processor.
PROGRAM = """
import sys
from absorb.load import source
from absorb.runtime import precision
precision._bfloat16_is_fast = lambda device: False
if sys.argv.pop(1) == "streamed":
    source.free_memory = lambda device: 0
from absorb.cli.main import main
main()
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    tiny("llama", torch.float32, max_position_embeddings=512).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    (tmp_path / "text.txt").write_text(letters(26_000))
    (tmp_path / "program.py").write_text(PROGRAM)
    return folder


def command(source: Path, out: str, way: str, processes: int) -> list[str]:
    home = source.parent
    alone = [sys.executable, str(home / "program.py")]
    several = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node", str(processes), str(home / "program.py")),
    ]
    return [
        *(alone if processes == 1 else several),
        *(way, "convert", str(source), "--out", str(home / out), "--text", str(home / "text.txt")),
        *("--steps", "6", "--train", "all", "--device", "cpu", "--json"),
    ]


def converted(source: Path, way: str, processes: int) -> tuple[dict[str, torch.Tensor], dict]:
    out = f"{way}-{processes}"
    done = subprocess.run(
        command(source, out, way, processes), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return load_file(source.parent / out / "model.safetensors"), json.loads(done.stdout)


@pytest.mark.parametrize("way", ["resident", "streamed"])
def test_two_processes_come_to_what_one_does(way: str, source: Path) -> None:
    """Sums of gradients in another order: AdamW turns differences of gradients near zero into
    steps, of which there are six of at most 2e-4."""
    (alone, first), (together, second) = (converted(source, way, n) for n in (1, 2))
    assert together.keys() == alone.keys()
    for name, tensor in alone.items():
        torch.testing.assert_close(together[name], tensor, rtol=1e-3, atol=2e-4, msg=name)
    for key in ("prefix", "removals", "residual_scales", "keyed_layers"):
        assert second["inspection"][key] == first["inspection"][key]
    assert second["losses"]["kept"] == first["losses"]["kept"]
    for (_, ours), (_, theirs) in zip(
        second["losses"]["held_out"], first["losses"]["held_out"], strict=True
    ):
        assert ours == pytest.approx(theirs, abs=1e-4)
    assert second["converted"]["perplexity"] == pytest.approx(
        first["converted"]["perplexity"], rel=1e-4
    )


def test_a_process_that_is_killed_ends_all_and_another_number_goes_on(source: Path) -> None:
    words = [*command(source, "out", "streamed", 2), "--resume"]
    words[words.index("--steps") + 1] = "80"
    log, kept = source.parent / "log", source.parent / "out.progress" / "layers"
    with (
        log.open("w") as said,
        subprocess.Popen(words, stderr=said, stdout=subprocess.DEVNULL) as both,
    ):
        deadline = time.monotonic() + 120
        while not (kept / "0.safetensors").exists() and time.monotonic() < deadline:
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
    trained = load_file(kept / "0.safetensors")
    alone = [*command(source, "out", "streamed", 1), "--resume"]
    alone[alone.index("--steps") + 1] = "80"
    done = subprocess.run(alone, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "resumed" in done.stderr
    written = load_file(source.parent / "out" / "model.safetensors")
    for name, tensor in trained.items():
        assert torch.equal(written[f"model.layers.0.{name}"], tensor), name
    assert not kept.exists()


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
