r"""Original and converted model in real INT8 on the CPU: perplexity, size and speed, JSON.

python -m scripts.benchmarks.int8 demo CONVERTED \
    --text wikitext2_test.txt --calibration c4.jsonl --json int8.json

torchao (pip install torchao) makes the integers, torch.compile the kernels: that takes minutes for
each row of the table. A row that is in the JSON already is not run again. One thread computes, and
its speed is by the time that it had a core, so that other work on the machine is not in it.
"""

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import click
import torch
import torchao
from torch import Tensor
from tqdm import tqdm

from absorb.cli.terminal import UserErrors
from absorb.load.opening.tokenizer import lead_of
from absorb.load.source import Source, load
from absorb.models.decoder import Decoder
from absorb.runtime.inputs import input_peaks
from absorb.runtime.reading import led
from absorb.schema.settings import ModelRef
from absorb.show.tables import table
from scripts import bench
from scripts.bench import SEEN, windows
from scripts.benchmarks.int8.arithmetic import needs_reducing, size, to_int8
from scripts.benchmarks.int8.table import int8_rows

ARITHMETIC = ("float32", "INT8, static", "INT8, per token")


@torch.no_grad()
def measured(source: Source, arithmetic: str, rows: Tensor, seen: Tensor) -> dict[str, Any]:
    """Perplexity on rows (rows, length), bytes of the model, and tokens per second of one core.

    The model is changed in place.
    """
    lead = lead_of(source.tokenizer)
    if arithmetic != "float32":
        static = arithmetic == "INT8, static"
        peaks = input_peaks(Decoder(source.model, source.family), seen, lead) if static else None
        to_int8(source.model, source.family, peaks, reduced=needs_reducing())
    losses, seconds = run_over(torch.compile(source.model, dynamic=False), rows, lead)
    return {
        "perplexity": float(torch.stack(losses).mean().exp()),
        "bytes": size(source.model),
        "tokens_per_second": (rows.shape[1] + len(lead)) / median(seconds),
    }


def run_over(
    model: Callable[..., Any], rows: Tensor, lead: Tensor
) -> tuple[list[Tensor], list[float]]:
    """The mean loss of each row, and the seconds of a core that it took."""
    losses, seconds = [], []
    model(led(rows[:1], lead), use_cache=False)  # compiles
    for row in tqdm(rows.split(1), desc="evaluating", unit="row"):
        start = time.process_time()
        logits = model(led(row, lead), use_cache=False).logits
        seconds.append(time.process_time() - start)
        predicted = logits[:, len(lead) : -1].float().mT
        losses.append(torch.nn.functional.cross_entropy(predicted, row[:, 1:]))
    return losses, seconds


@click.command()
@click.argument("original")
@click.argument("converted", type=click.Path(exists=True, file_okay=False, path_type=Path))
@bench.texts(8)
@click.option("--rows", "most", default=6, show_default=True, help="Run so many at most.")
@bench.kept_figures
def main(
    original: str,
    converted: Path,
    text: Path,
    count: int,
    calibration: Path,
    most: int,
    out: Path,
) -> None:
    """Measure ORIGINAL and CONVERTED in float32 and in INT8 arithmetic."""
    torch.set_num_threads(1)
    torch._inductor.config.freezing = True  # without it the weights are not packed for integers
    done = {"rows": {}, **bench.read(out)}
    rows = {
        f"{name}, {arithmetic}": (model, arithmetic)
        for arithmetic in ARITHMETIC
        for name, model in (("original", original), ("converted", str(converted)))
    }
    wanted = [row for row in rows if row not in done["rows"]][:most]
    with UserErrors():
        for row in wanted:
            click.echo(f"=== {row}", err=True)
            model, arithmetic = rows[row]
            source = load(ModelRef(name=model), measured=True)
            held_out, seen = windows(source, text, count), windows(source, calibration, SEEN)
            done["rows"][row] = measured(source, arithmetic, held_out, seen)
            done |= {
                "text": text.name,
                "windows": count,
                "reduced": needs_reducing(),
                "versions": {"torch": torch.__version__, "torchao": torchao.__version__},
            }
            bench.write(out, done)
    print(table(int8_rows(done)))


if __name__ == "__main__":
    main()
