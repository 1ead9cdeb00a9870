"""A converted model against the one it came from under stock attention: time and memory, JSON.

python -m scripts.benchmarks.model --model ORIGINAL --converted DIR
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from absorb.families import family_of
from absorb.graft import twin
from absorb.report import table
from absorb.timing import growth, interleaved
from scripts import bench

# The shape of SmolLM2-135M: a model of this size shows what every extra kernel costs.
SMALL = {
    "num_hidden_layers": 30,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
}


def random_pair(dtype: torch.dtype) -> dict[str, PreTrainedModel]:
    """A random model and its absorbed twin, with sinks that take weight."""
    torch.manual_seed(0)
    original = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL), dtype=dtype)
    converted = twin(original, family_of("llama"))
    for name, parameter in converted.named_parameters():
        if name.endswith(".sink"):
            parameter.data.normal_()
    return {"original": original, "converted": converted}


def prefill(model: PreTrainedModel, tokens: Tensor) -> None:
    with torch.no_grad():
        model(tokens, logits_to_keep=1)


def decode(model: Any, tokens: Tensor, new: int) -> None:
    settings = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
    model.generate(tokens, attention_mask=torch.ones_like(tokens), pad_token_id=0, **settings)


def train(optimizer: torch.optim.Optimizer, model: PreTrainedModel, tokens: Tensor) -> None:
    model(tokens, labels=tokens).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def training(model: PreTrainedModel) -> Callable[[PreTrainedModel, Tensor], None]:
    # A rate of zero: the work of a step, and the same model after it.
    return partial(train, torch.optim.AdamW(model.parameters(), lr=0.0))


@click.command()
@click.option("--model", "original", help="A folder or Hub id; random weights if left out.")
@click.option("--converted", help="The folder that absorb wrote for it.")
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="bfloat16")
@click.option("--batch", default=1, show_default=True)
@click.option("--length", default=1024, show_default=True, help="Of the prompt, and of training.")
@click.option("--new", default=32, show_default=True, help="Tokens to decode.")
@click.option("--repeats", default=7, show_default=True)
@bench.figures
def main(
    original: str | None,
    converted: str | None,
    device: str,
    dtype: str,
    batch: int,
    length: int,
    new: int,
    repeats: int,
    out: Path | None,
) -> None:
    """Prefill, decode and training step of a converted model, as multiples of the original's."""
    if (original is None) != (converted is None):
        raise click.UsageError("give both --model and --converted, or neither")
    if original is None:
        models = random_pair(getattr(torch, dtype))
    else:
        paths = {"original": original, "converted": converted}
        options: dict[str, Any] = {"dtype": getattr(torch, dtype), "trust_remote_code": True}
        load = AutoModelForCausalLM.from_pretrained
        models = {name: load(path, **options) for name, path in paths.items()}
    tokens = torch.randint(3, models["original"].config.vocab_size, (batch, length), device=device)
    for model in models.values():
        model.to(device)
    steps = {
        "prefill": {n: partial(prefill, m, tokens) for n, m in models.items()},
        "decode": {n: partial(decode, m, tokens[:, : length // 2], new) for n, m in models.items()},
        "training step": {n: partial(training(m), m, tokens) for n, m in models.items()},
    }
    figures: dict[str, Any] = {}
    for work, runs in steps.items():
        figures[work] = {"seconds": interleaved(runs, device, repeats)}
        if device == "cuda":
            figures[work]["bytes"] = {n: growth(run, device) for n, run in runs.items()}
    for work in figures.values():
        work["ratios"] = {
            unit: values["converted"] / values["original"] for unit, values in work.items()
        }
    head = ("converted as a multiple of the original", *figures["prefill"]["ratios"])
    rows = [(work, *(f"{r:.3f}" for r in f["ratios"].values())) for work, f in figures.items()]
    print(table([head, *rows]))
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    settings = {"device": name, "torch": torch.__version__, "dtype": dtype, "batch": batch}
    bench.write(out, {**settings, "length": length, **figures})


if __name__ == "__main__":
    main()
