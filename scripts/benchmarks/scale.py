"""What a conversion takes of a model of real shapes and random weights: seconds, and memory.

python -m scripts.benchmarks.scale --shape 8b --steps 0 --json scale.json

Each way runs in a process of its own: all weights at hand, and weights that stream. On a GPU its
peak is the most that torch allocated, on a CPU the most that the process held.
"""

import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import absorb
from absorb.load import source
from absorb.runtime.memory import keep_freed_memory
from absorb.show.tables import table
from scripts import bench
from tests.helpers.tiny_tokenizer import letters, tiny_tokenizer

SHAPES = {
    "135m": (576, 1536, 30, 9, 3),
    "360m": (960, 2560, 32, 15, 5),
    "1b": (2048, 8192, 16, 32, 8),
    "8b": (4096, 14336, 32, 32, 8),
    "70b": (8192, 28672, 80, 64, 8),
}
WAYS = {"at hand": 0, "streamed": 10**9}  # bytes that a weight is said to take


def model_of(shape: str, folder: Path) -> int:
    """Write a random Llama in bfloat16, layer by layer alike; how many weights it has."""
    hidden, inner, layers, heads, kv_heads = SHAPES[shape]
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=32_000,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def conversion(folder: Path, held: int, steps: int, device: str) -> dict[str, Any]:
    """Convert, and say what it took; for a process of its own."""
    keep_freed_memory()
    if held:
        source._HELD = held
    text = folder / "text.txt"
    text.write_text(letters(60_000))
    start = time.perf_counter()
    with TemporaryDirectory(dir=folder.parent) as out:
        target = Path(out) / "out"
        absorb.convert(folder, target, text=text, steps=steps, sink="logit", device=device)
    seconds = time.perf_counter() - start
    on_gpu = torch.cuda.is_available() and device != "cpu"
    host = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "seconds": seconds,
        "host": host,
        "gpu": torch.cuda.max_memory_allocated() if on_gpu else None,
    }


def row(way: str, found: dict[str, Any], weights: int) -> tuple[str, ...]:
    gpu = "" if found["gpu"] is None else f"{found['gpu'] / 1e9:.2f} GB"
    each = (found["gpu"] or found["host"]) / weights
    return way, f"{found['seconds']:.0f} s", gpu, f"{found['host'] / 1e9:.2f} GB", f"{each:.1f}"


@click.command()
@click.option("--shape", type=click.Choice(list(SHAPES)), default="135m", show_default=True)
@click.option("--steps", default=0, show_default=True, help="Of the fine-tune.")
@click.option("--way", "ways", type=click.Choice(list(WAYS)), multiple=True, help="Only this one.")
@bench.device
@bench.figures
def main(shape: str, steps: int, ways: tuple[str, ...], device: str, out: Path | None) -> None:
    """Time and memory of a conversion, with all weights at hand and with weights that stream."""
    rows: list[tuple[str, ...]] = [("", "time", "GPU", "host", "bytes a weight")]
    with TemporaryDirectory() as place:
        folder = Path(place) / "model"
        weights = model_of(shape, folder)
        found: dict[str, Any] = {"shape": shape, "weights": weights, "steps": steps}
        for way in ways or WAYS:
            words = [str(folder), str(WAYS[way]), str(steps), device]
            done = subprocess.run(
                [sys.executable, "-m", __spec__.name, *words], stdout=subprocess.PIPE, check=True
            )
            found[way] = json.loads(done.stdout.splitlines()[-1])
            rows.append(row(way, found[way], weights))
    click.echo(table(rows))
    bench.write(out, found)


if __name__ == "__main__":
    if len(sys.argv) == 5 and not sys.argv[1].startswith("-"):
        name, held, steps, device = sys.argv[1:]
        print(json.dumps(conversion(Path(name), int(held), int(steps), device)))
    else:
        main()
