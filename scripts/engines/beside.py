"""What an engine says of models, beside transformers: rows to read, and how far both are apart."""

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from absorb.load.source import load
from absorb.schema.settings import ModelRef
from scripts.engines.environments import Environment, asked
from scripts.engines.pairs import add_ratios, cell

ROOT = Path(__file__).resolve().parents[2]
EVIDENCE = ROOT / "model_cards" / "smollm2-135m-absorbed"
# In nats, of the log-probability of any token of a text, in float32.
TOLERANCE = 1e-3


def saved(model: str, folder: Path) -> Path:
    """The original that a name means, as a folder that engines read."""
    source = load(ModelRef(name=model), measured=True)
    source.model.save_pretrained(folder)
    source.tokenizer.save_pretrained(folder)
    return folder


def rows_for(folder: Path, count: int, length: int) -> list[list[int]]:
    """Rows of tokens of a text that every clone has."""
    ids = AutoTokenizer.from_pretrained(folder)((ROOT / "LICENSE").read_text())["input_ids"]
    return [ids[start : start + length] for start in range(0, count * length, length)]


@torch.no_grad()
def said_by_transformers(folder: Path, rows: list[list[int]]) -> list[list[float]]:
    """The log-probability of every token of the rows but the first."""
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    found = []
    for row in rows:
        tokens = torch.tensor([row])
        said = model.eval()(tokens).logits[0, :-1].log_softmax(-1)
        found.append(said.gather(1, tokens[0, 1:, None])[:, 0].tolist())
    return found


def compared(
    environment: Environment,
    script: str,
    models: Mapping[str, Path],
    rows: Mapping[str, list[list[int]]],
    rounds: int = 3,
    **more: Any,
) -> dict[str, Any]:
    """What the script makes of each model of its rows, and how far that is from transformers.

    A script of inside/ gets JOB.json, with `models` (folders), `rows` and `rounds` of timing, and
    writes OUT.json: `versions`, and for each of the `models` what is `said` and the
    `tokens_per_second`, one figure for each round.
    """
    with TemporaryDirectory() as place:
        job, out = Path(place, "job.json"), Path(place, "out.json")
        folders = {name: str(folder.resolve()) for name, folder in models.items()}
        job.write_text(json.dumps({"models": folders, "rows": rows, "rounds": rounds, **more}))
        asked(environment, script, job, out)
        found: dict[str, Any] = json.loads(out.read_text())
    found["versions"]["transformers"] = version("transformers")
    for name, folder in models.items():
        theirs = said_by_transformers(folder, rows[name])
        said = found["models"][name].pop("said")
        # What a script says nothing of is the beginning of a row.
        apart = [
            abs(one - other)
            for ours, them in zip(said, theirs, strict=True)
            for one, other in zip(ours, them[-len(ours) :], strict=True)
        ]
        found["models"][name]["largest_difference"] = max(apart)
    add_ratios(found["models"])
    return found


def report(found: dict[str, Any], out: Path | None) -> None:
    """Print the figures, and keep them if a file is named; end with 1 where any is too far off."""
    for name, one in found["models"].items():
        speeds = ", ".join(
            f"{work} {cell(one, work)} tokens/s" for work in one["tokens_per_second"]
        )
        print(f"{name:28} {one['largest_difference']:.1e} nats from transformers  {speeds}")
    if out is not None:
        out.write_text(json.dumps(found, indent=1) + "\n")
    far = [
        name for name, one in found["models"].items() if not one["largest_difference"] <= TOLERANCE
    ]
    if far:
        raise SystemExit(f"{', '.join(far)}: more than {TOLERANCE:g} nats from transformers")
