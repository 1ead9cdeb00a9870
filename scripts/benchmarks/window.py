"""Perplexity of long texts where every layer sees a window, for an original and its conversion.

    absorb convert demo --to native --out NATIVE
    python -m scripts.benchmarks.window NATIVE demo --text wikitext2_test.txt --json window.json

Text goes through a model in parts, with a cache that keeps the last tokens of the window and drops
what is older, as an engine that streams does; some rows keep the first tokens of the text as well,
at the positions where they stood (StreamingLLM, arXiv 2309.17453, moves them up).
"""

import json
from collections.abc import Iterator
from importlib.metadata import version
from math import exp
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from absorb.load.source import load
from absorb.runtime.reading import new_cache
from absorb.schema.settings import ModelRef
from absorb.text.windows import windows
from scripts import bench

PART = 512  # tokens that go through a model at once
NEVER = 2**40  # a window that drops nothing


class _Window(DynamicLayer):
    """Keys and values of the first tokens and of the last ones."""

    def __init__(self, first: int, last: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.first, self.last = first, last

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> Any:
        new = (key_states, value_states)
        if not self.is_initialized:
            self.is_initialized = True
            self.keys, self.values = (tensor[..., :0, :] for tensor in new)
        both = [torch.cat(pair, -2) for pair in zip((self.keys, self.values), new, strict=True)]
        self.keys, self.values = (kept(tensor, self.first, self.last, -2) for tensor in both)
        return both


def kept(tensor: Tensor, first: int, last: int, dim: int) -> Tensor:
    """Of many tokens the first ones and the last ones."""
    size = tensor.shape[dim]
    if size <= first + last:
        return tensor
    return torch.cat([tensor.narrow(dim, 0, first), tensor.narrow(dim, size - last, last)], dim)


def losses(model: PreTrainedModel, row: Tensor, window: int, first: int) -> Iterator[Tensor]:
    """The loss of every token but the first, part by part."""
    cache: DynamicCache
    cache, remember = new_cache(model)
    cache.layers = [_Window(first, window - 1) for _ in range(model.config.num_hidden_layers)]
    seen = torch.empty(0, dtype=torch.long)
    for start in range(0, len(row) - 1, PART):
        places = torch.arange(start, min(start + PART, len(row) - 1))
        keys = torch.cat([seen, places])
        ago = places[:, None] - keys
        visible = (ago >= 0) & ((ago < window) | (keys < first))
        mask = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
        logits = model(
            row[None, places],
            attention_mask=mask[None, None],
            position_ids=places[None],
            **remember,
        ).logits[0]
        yield torch.nn.functional.cross_entropy(logits, row[places + 1], reduction="none")
        seen = kept(keys, first, window - 1, 0)


@torch.no_grad()
def perplexity(model: PreTrainedModel, rows: Tensor, window: int, first: int, name: str) -> float:
    """Of rows (rows, length), over all tokens but the first of each."""
    parts = (part for row in rows for part in losses(model, row, window, first))
    total = -(-rows.shape[1] // PART) * len(rows)
    found = torch.cat([*tqdm(parts, name, total=total, unit="part", mininterval=10)])
    return exp(found.double().mean().item())


@click.command()
@click.argument("native", type=click.Path(exists=True, file_okay=False))
@click.argument("stock")
@click.option("--text", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--window", default=512, show_default=True, help="In tokens, of every layer.")
@click.option("--first", default=4, show_default=True, help="Tokens that are kept in some rows.")
@click.option(
    "--length",
    "lengths",
    multiple=True,
    type=(int, int),
    default=[(2048, 4), (8192, 2), (32768, 1)],
    show_default=True,
    help="Tokens of a text, and how many texts; may be repeated.",
)
@bench.kept_figures
def main(
    native: str,
    stock: str,
    text: Path,
    window: int,
    first: int,
    lengths: tuple[tuple[int, int], ...],
    out: Path,
) -> None:
    """Measure the original STOCK and its conversion NATIVE, in float32."""
    found = bench.read(out) or {"window": window, "first": first, "rows": {}}
    names = ("torch", "transformers")
    found["versions"] = {name: version(name) for name in names}
    for name, model in (("original", stock), ("converted", native)):
        source = load(ModelRef(name=model), measured=True)
        longest = source.model.config.max_position_embeddings
        for length, count in lengths:
            rows = windows(source, text, count, length)
            ways = {
                "full": (NEVER, 0),
                "window": (window, 0),
                "window, first kept": (window, first),
            }
            for way, (size, keep) in ways.items():
                key = f"{name}, {way}, {length}"
                # RoPE goes by distance: of a window all are known, whatever the length.
                if key in found["rows"] or (size == NEVER and length > longest):
                    continue
                value = perplexity(source.model, rows, size, keep, key)
                found["rows"][key] = {"perplexity": value, "texts": len(rows)}
                bench.write(out, found)
                print(f"{key}: {value:.3f}")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
