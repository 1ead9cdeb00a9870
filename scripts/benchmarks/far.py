"""A long text by sinks that were fitted to near keys alone, and to far ones as well.

    absorb convert demo --sink logit --steps 0 --text c4.jsonl --out DIR
    python -m scripts.benchmarks.far DIR demo --text wikitext2_test.txt --calibration c4.jsonl \
        --json far.json

The plan of DIR, its sinks fitted again as logits, nothing trained, in float32. KL is from the
teacher on short rows. A row that is in the file already is not run again.
"""

import json
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor
from transformers import PreTrainedModel

from absorb.fold.decide import judged, sinks_for
from absorb.fold.graft import graft
from absorb.fold.plan import Plan
from absorb.fold.sinks import distances
from absorb.fold.sinks.prefix_cache import prefix_of
from absorb.load.source import Source, load
from absorb.schema.settings import ModelRef
from absorb.schema.training import LENGTH
from absorb.ship.plan_file import read_plan
from absorb.text.gather import CALIBRATION_ROWS, VALIDATION_ROWS
from absorb.text.windows import windows
from scripts import bench
from scripts.benchmarks.window import NEVER, losses

LONG = 8192
# Perplexity is also given of the tokens between these.
CUTS = (0, 512, 2048, 4096, LONG)
# Of the rows, those that skip positions; none of the original, which has no sinks to be fitted.
SHARES = {"a quarter of the rows skips": distances.SHARE, "original": None, "no row skips": 0.0}


@torch.no_grad()
def of_long(model: PreTrainedModel, row: Tensor) -> dict[str, Any]:
    """Perplexity of one long text (length,), as a whole and by how far into it."""
    found = torch.cat([*losses(model, row, NEVER, 0)]).double()
    parts = {f"{a}-{b}": found[a:b].mean().exp().item() for a, b in pairwise(CUTS)}
    return {"perplexity": found.mean().exp().item(), "parts": parts}


def refitted(
    source: Source, plan: Plan, rows: Tensor, held_out: Tensor, share: float, text: Tensor
) -> dict[str, Any]:
    """A student whose sinks are fitted to rows of which a share skips positions."""
    distances.SHARE = share
    start = time.process_time()
    known = prefix_of(source.decoder, torch.tensor(plan.prefix))
    sinks = sinks_for(source.decoder, known, plan.removals, rows, "logit", 0)
    seconds = time.process_time() - start
    plan = replace(plan, sinks=sinks)
    decision = judged(source.decoder, plan, graft(source.decoder, plan), held_out)
    model: Any = decision.student.model
    return {"fit_seconds": seconds, "kl": decision.divergence, **of_long(model, text)}


@click.command()
@click.argument("converted", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("stock")
@click.option("--text", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--calibration", type=click.Path(exists=True, path_type=Path), required=True)
@bench.kept_figures
def main(converted: Path, stock: str, text: Path, calibration: Path, out: Path) -> None:
    """Measure the model STOCK with the sinks of CONVERTED fitted in several ways."""
    source = load(ModelRef(name=stock))
    plan, _ = read_plan(converted, source)
    text_row = windows(source, text, 1, LONG)[0]
    sizes = [CALIBRATION_ROWS, VALIDATION_ROWS[source.decoder.device.type]]
    rows, held_out = windows(source, calibration, sum(sizes), LENGTH).split(sizes)
    found = bench.read(out) or {"length": LONG, "fitted_to": LENGTH, "rows": {}}
    for name, share in SHARES.items():
        if name in found["rows"]:
            continue
        if share is None:
            found["rows"][name] = of_long(source.model, text_row)
        else:
            found["rows"][name] = refitted(source, plan, rows, held_out, share, text_row)
        bench.write(out, found)
        print(name, found["rows"][name], flush=True)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
