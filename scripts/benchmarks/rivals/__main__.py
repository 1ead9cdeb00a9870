r"""absorb beside what one would do instead of it: one run, a table, JSON.

python -m scripts.benchmarks.rivals demo CONVERTED \
    --text wikitext2_test.txt --calibration c4.jsonl
"""

import hashlib
import sys
import time
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from absorb.cli.terminal import UserErrors
from absorb.measure.score import losses, quantized_losses
from absorb.pipelines.compare import interval
from absorb.quantize.formats import FORMATS
from absorb.schema.report import versions
from absorb.show.tables import table
from scripts import bench as shared
from scripts.bench import windows
from scripts.benchmarks.rivals.rivals import RIVALS, Bench, Rival, bench_of
from scripts.benchmarks.rivals.table import formats, rival_rows


def all_losses(bench: Bench, rival: Rival, rows: Tensor) -> dict[str, Tensor]:
    """Mean loss of every row (rows,) in float, and in each format."""
    found = {"float": losses(rival.subject, rows, "float")}
    for name in formats():
        # What is rotated already is not rotated again.
        form = FORMATS["w4a4" if rival.turned and name == "w4a4-hadamard" else name]
        found[name] = quantized_losses(rival.subject, form, rows, bench.seen)
    return found


def figure(losses: Tensor, absorbed: Tensor) -> dict[str, Any]:
    """A perplexity and its interval, and those of its ratio to absorb's, row by row."""
    return {
        "perplexity": float(losses.mean().exp()),
        "interval": interval(losses),
        "of_absorb": float((losses - absorbed).mean().exp()),
        "interval_of_absorb": interval(losses - absorbed),
    }


def measure(bench: Bench, rows: Tensor) -> dict[str, Any]:
    """Every rival: what was chosen for it, the seconds that took, and its figures."""
    found: dict[str, Any] = {}
    each: dict[str, dict[str, Tensor]] = {}
    for name, make in RIVALS.items():
        click.echo(f"=== {name}", err=True)
        start = time.perf_counter()
        rival = make(bench)
        found[name] = {"seconds": time.perf_counter() - start, "chosen": rival.chosen}
        each[name] = all_losses(bench, rival, rows)
    for name, parts in each.items():
        found[name]["figures"] = {c: figure(part, each["absorb"][c]) for c, part in parts.items()}
    return found


@click.command()
@click.argument("original")
@click.argument("converted", type=click.Path(exists=True, file_okay=False, path_type=Path))
@shared.texts(32)
@shared.device
@shared.figures
def main(
    original: str,
    converted: Path,
    text: Path,
    count: int,
    calibration: Path,
    device: str,
    out: Path | None,
) -> None:
    """Perplexity of ORIGINAL, CONVERTED and their rivals, as they are and in low precision."""
    start = time.perf_counter()
    with UserErrors():
        bench = bench_of(original, converted, calibration, device)
        rows = windows(bench.source, text, count)
        rivals = measure(bench, rows)
    on_gpu = bench.model.device.type == "cuda"
    run = {
        "model": bench.source.name,
        "conversion": str(bench.report.recipe),
        "trained_on": bench.texts.origin,
        # A GPU of another kind samples other text.
        "trained_on_the_same": bench.texts.fingerprint == bench.report.inspection.text_sha256,
        "text": text.name,
        "text_sha256": hashlib.sha256(rows.numpy().tobytes()).hexdigest(),
        "calibration": calibration.name,
        "windows": len(rows),
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "versions": versions(),
        "seconds": time.perf_counter() - start,
        "rivals": rivals,
    }
    print(table(rival_rows(run)))
    print(f"{run['seconds']:.0f} seconds", file=sys.stderr)
    shared.write(out, run)


if __name__ == "__main__":
    main()
