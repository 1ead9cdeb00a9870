"""Converted models against the one they came from under stock attention: time and memory, JSON.

python -m scripts.benchmarks.model --model ORIGINAL --converted DIR --converted OTHER_DIR
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from absorb.fold.graft import twin
from absorb.fold.sinks.forms import KeySink
from absorb.measure.timing import growth, interleaved
from absorb.models.decoder import Decoder
from absorb.models.families import family_of
from absorb.show.tables import table
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


# Which layers have keys: with `auto` the few whose sinks no logit stands for.
KEYED = {"logit": (), "auto": range(0, 30, 6), "key": range(30)}
PREFIX = 2  # tokens


def random_models(dtype: torch.dtype) -> dict[str, PreTrainedModel]:
    """A random model and its absorbed twins, with sinks that take weight."""
    torch.manual_seed(0)
    original = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL), dtype=dtype)
    return {"original": original, **{form: with_sinks(original, form) for form in KEYED}}


def with_sinks(original: PreTrainedModel, form: str) -> PreTrainedModel:
    config = original.config
    room = torch.zeros(config.num_key_value_heads, PREFIX, config.head_dim)
    keys = KeySink(keys=room, values=room)
    layers = [keys if i in KEYED[form] else None for i in range(config.num_hidden_layers)]
    converted = twin(Decoder(original, family_of("llama")), layers).model
    for name, parameter in converted.named_parameters():
        if "sink" in name:
            parameter.data.normal_()
    return converted


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


def without_kernels(model: PreTrainedModel, run: Callable[[], object]) -> None:
    """The same by torch's operators alone."""
    code: Any = sys.modules[type(model).__module__]
    before = code.FUSED_FROM
    code.FUSED_FROM = dict.fromkeys(before, sys.maxsize)
    try:
        run()
    finally:
        code.FUSED_FROM = before


def rows_of(figures: dict[str, Any]) -> list[tuple[str, ...]]:
    return [
        (f"{work}, {unit}", *(f"{ratio:.3f}" for ratio in ratios.values()))
        for work, found in figures.items()
        for unit, ratios in found["ratios"].items()
    ]


@click.command()
@click.option("--model", "original", help="A folder or Hub id; random weights if left out.")
@click.option("--converted", multiple=True, help="A folder that absorb wrote for it.")
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="bfloat16")
@click.option("--batch", default=1, show_default=True)
@click.option("--length", default=1024, show_default=True, help="Of the prompt, and of training.")
@click.option("--new", default=32, show_default=True, help="Tokens to decode.")
@click.option("--kernels", is_flag=True, help="Also compare with what our kernels stand for.")
@click.option("--repeats", default=7, show_default=True)
@bench.figures
def main(
    original: str | None,
    converted: tuple[str, ...],
    device: str,
    dtype: str,
    batch: int,
    length: int,
    new: int,
    kernels: bool,
    repeats: int,
    out: Path | None,
) -> None:
    """Prefill, decode and training step of converted models, as multiples of the original's.

    With random weights: of one with logits, one with keys in every sixth layer, one with keys.
    """
    if (original is None) != (not converted):
        raise click.UsageError("give both --model and --converted, or neither")
    if original is None:
        models = random_models(getattr(torch, dtype))
    else:
        paths = {"original": original, **{Path(folder).name: folder for folder in converted}}
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
    if kernels:
        for runs in steps.values():
            plain = {n: partial(without_kernels, models[n], run) for n, run in runs.items()}
            runs |= {f"{name}, no kernels": plain[name] for name in models if name != "original"}
    figures: dict[str, Any] = {}
    for work, runs in steps.items():
        figures[work] = {"seconds": interleaved(runs, device, repeats)}
        if device == "cuda":
            figures[work]["bytes"] = {n: growth(run, device) for n, run in runs.items()}
    for work in figures.values():
        work["ratios"] = {
            unit: {name: value / values["original"] for name, value in values.items()}
            for unit, values in work.items()
        }
    head = ("as a multiple of the original", *figures["prefill"]["seconds"])
    print(table([head, *rows_of(figures)]))
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    settings = {"device": name, "torch": torch.__version__, "dtype": dtype, "batch": batch}
    bench.write(out, {**settings, "length": length, **figures})


if __name__ == "__main__":
    main()
