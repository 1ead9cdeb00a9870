"""A small model trained from nothing in a few minutes, and what sinks it has grown.

python -m scripts.trials.train_small qwen3 --out DIR

DIR is then a checkpoint that `absorb convert` takes, with two texts that the model was not trained
on beside it: held_out.jsonl to measure on, calibration.jsonl to take ranges from. Without --text it
learns Python, from the sources of all that is installed beside this interpreter.
"""

import json
import math
import random
import sysconfig
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from absorb.cli.terminal import UserErrors
from absorb.errors import AbsorbError
from absorb.load.opening.tokenizer import lead_of
from absorb.measure.findings import find
from absorb.measure.outliers import measure
from absorb.models.decoder import Decoder
from absorb.models.families import FAMILIES
from absorb.models.family import Family
from absorb.runtime.precision import autocast_bf16, device_of
from absorb.schema.settings import Thresholds
from absorb.show.tables import Row, table
from absorb.text.corpus import documents
from scripts import bench

LENGTH = 576  # tokens of a row, BOS among them: windows of 512 behind a prefix stay inside it
PIECE = 5_000  # characters that documents are cut into
KEPT = 64  # pieces that are measured on, and as many that ranges are taken from
MOST = 300_000_000  # characters that are trained on
LEARNED = 10_000_000  # characters that the tokenizer is made from
MEASURED = 8  # rows
BOS, EOS = "<s>", "</s>"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What sinks grow from, in time: depth, a high rate, weight decay, BOS at the head of all."""

    minutes: float = 4.0
    vocabulary: int = 8192
    rate: float = 1e-3
    decay: float = 0.1
    rows: int = 32  # in a step
    warm_up: float = 0.05  # of the time; then the rate falls along a cosine
    shape: tuple[tuple[str, int], ...] = (
        ("num_hidden_layers", 10),
        ("hidden_size", 384),
        ("num_attention_heads", 6),
    )


SHAPES: dict[str, dict[str, Any]] = {
    "qwen3": {"num_key_value_heads": 2, "head_dim": 64, "intermediate_size": 1024},
    "gpt_neox": {"intermediate_size": 1536},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """Pieces of text. No piece is in two of the parts."""

    training: list[str]
    held_out: list[str]
    calibration: list[str]


def corpus(paths: list[Path]) -> Corpus:
    """The text of files, and of all Python files in folders, in one random order."""
    texts = [text for path in paths for text in texts_of(path)]
    cut = [text[i : i + PIECE] for text in texts for i in range(0, len(text), PIECE)]
    pieces = list(dict.fromkeys(cut))  # files of libraries repeat each other
    if len(pieces) < 3 * KEPT:
        names = ", ".join(map(str, paths))
        raise AbsorbError(
            f"{names}: {len(pieces)} pieces of {PIECE} characters, and {3 * KEPT} are needed; "
            "give more --text"
        )
    random.Random(0).shuffle(pieces)
    training = pieces[2 * KEPT :]
    return Corpus(
        training=training[: MOST // PIECE],
        held_out=pieces[:KEPT],
        calibration=pieces[KEPT : 2 * KEPT],
    )


def texts_of(path: Path) -> list[str]:
    if path.is_file():
        return [*documents(path)]
    files = sorted(file for file in path.rglob("*.py") if file.is_file())
    return [file.read_text(encoding="utf-8", errors="ignore") for file in files]


def sources() -> list[Path]:
    """The folders of Python's own library and of the packages that are installed."""
    library, packages = (Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib"))
    return [library] if packages.is_relative_to(library) else [library, packages]


def tokenizer_of(pieces: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE that puts BOS before every text."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(pieces[: LEARNED // PIECE], trainer)
    bos = backend.token_to_id(BOS)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, bos)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=BOS, eos_token=EOS)


def encoded(tokenizer: PreTrainedTokenizerFast, pieces: list[str]) -> Tensor:
    """The tokens of all pieces, EOS behind each: (n,)."""
    ids: list[Tensor] = []
    for start in tqdm(range(0, len(pieces), 1000), desc="reading text", unit="thousand"):
        batch = tokenizer(pieces[start : start + 1000], add_special_tokens=False)["input_ids"]
        ends = [token for piece in batch for token in (*piece, tokenizer.eos_token_id)]
        ids.append(torch.tensor(ends, dtype=torch.int32))
    return torch.cat(ids)


def fresh(model_type: str, recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """A model with random weights, of a stock class."""
    config = AutoConfig.for_model(
        model_type,
        **{**dict(recipe.shape), **SHAPES[model_type]},
        vocab_size=len(tokenizer),
        max_position_embeddings=2 * LENGTH,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def train(model: PreTrainedModel, tokens: Tensor, recipe: Recipe) -> tuple[int, float]:
    """Train on windows of the tokens (n,) until the time is over: the steps, and the last loss."""
    device = model.device
    tokens, draw = tokens.to(device), torch.Generator().manual_seed(0)
    bos = torch.full((recipe.rows, 1), model.config.bos_token_id, device=device)
    places = torch.arange(LENGTH - 1, device=device)
    weights = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": weights}, {"params": others, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        weight_decay=recipe.decay,
        fused=device.type == "cuda",
    )
    model.train()
    predict = torch.compile(model) if device.type == "cuda" else model  # launches cost the most
    loss, start = torch.tensor(math.inf), time.monotonic()
    with tqdm(desc="training", unit="step") as bar:
        while (past := (time.monotonic() - start) / 60 / recipe.minutes) < 1:
            for group in optimizer.param_groups:
                group["lr"] = recipe.rate * pace(past, recipe.warm_up)
            first = torch.randint(len(tokens) - LENGTH, (recipe.rows, 1), generator=draw)
            rows = torch.cat([bos, tokens[first.to(device) + places].long()], 1)
            with autocast_bf16(device):
                loss = predict(input_ids=rows, labels=rows, use_cache=False).loss
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            bar.update()
            if bar.n % 50 == 1:  # a GPU is waited for
                bar.set_postfix(loss=f"{loss.item():.3f}")
                if not loss.isfinite():
                    raise AbsorbError(
                        f"the loss is {loss.item()} after {bar.n} steps; lower the rate of Recipe"
                    )
    model.eval()
    return bar.n, loss.item()


def pace(past: float, warm_up: float) -> float:
    """The share of the learning rate, when so large a share of the time is past."""
    return min(past / warm_up, 0.5 * (1 + math.cos(math.pi * past)))


def found(model: PreTrainedModel, family: Family, rows: Tensor, lead: Tensor) -> str:
    """The sinks and the largest activations of every layer on text (rows, length), as a table."""
    thresholds = Thresholds()
    measurement = measure(Decoder(model, family), rows, lead)
    findings = find(measurement, thresholds)
    weight, peak = measurement.first_weight, measurement.token_peak.flatten(1).amax(1)
    table_rows: list[Row] = [("layer", "weight on BOS", "of a head", "largest |x|", "/ median")]
    for layer, (mean, most, reach, ratio) in enumerate(
        zip(weight.mean(1), weight.amax(1), peak, peak / measurement.median, strict=True)
    ):
        table_rows.append(
            (f"{layer}", f"{mean:.3f}", f"{most:.3f}", f"{reach:,.1f}", f"{ratio:,.0f} x")
        )
    heads, massive = len(findings.sink_heads), len(findings.massive_activations)
    share = f"{heads} of {weight.numel()} heads give BOS more than {thresholds.sink_weight}"
    sinks = f"sinks: {share}" if heads else "no head has a sink: train longer, or on more text"
    spikes = f"massive activations: {massive}" if massive else "there are no massive activations"
    return f"{table(table_rows)}\n\n{sinks}\n{spikes}"


def write(out: Path, model: PreTrainedModel, tokenizer: Any, text: Corpus) -> None:
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    for name, pieces in (("held_out", text.held_out), ("calibration", text.calibration)):
        lines = (json.dumps({"text": piece}) + "\n" for piece in pieces)
        (out / f"{name}.jsonl").write_text("".join(lines))


def make(model_type: str, paths: list[Path], out: Path, recipe: Recipe, device: str) -> str:
    """Train a model and write it: what was found in it."""
    place = device_of(device)
    text = corpus(paths)
    click.echo(f"making a tokenizer of {recipe.vocabulary} tokens", err=True)
    tokenizer = tokenizer_of(text.training, recipe.vocabulary)
    tokens = encoded(tokenizer, text.training)
    model = fresh(model_type, recipe, tokenizer).to(place)
    steps, loss = train(model, tokens, recipe)
    write(out, model, tokenizer, text)
    size = f"{model.num_parameters() / 1e6:.1f} million weights, {len(tokens) / 1e6:.1f} of tokens"
    seen = f"{steps} steps of {recipe.rows} x {LENGTH}, loss {loss:.3f}"
    held_out = encoded(tokenizer, text.held_out)
    rows = held_out[: len(held_out) // (LENGTH - 1) * (LENGTH - 1)].view(-1, LENGTH - 1).long()
    table = found(model, FAMILIES[model_type], rows[:MEASURED], lead_of(tokenizer))
    return f"{model_type}: {size}; {seen}\n\n{table}"


@click.command()
@click.argument("model_type", type=click.Choice(list(SHAPES)))
@click.option("--out", required=True, type=click.Path(path_type=Path))
@click.option(
    "--text",
    "paths",
    multiple=True,
    type=click.Path(exists=True, path_type=Path),
    help="A file (plain, or JSON lines with `text`), or a folder whose Python files are read.",
)
@click.option("--minutes", default=Recipe().minutes, show_default=True)
@bench.device
def main(model_type: str, out: Path, paths: tuple[Path, ...], minutes: float, device: str) -> None:
    """Train a small model of the architecture MODEL_TYPE, and say what sinks it has."""
    with UserErrors():
        if out.exists() and any(out.iterdir()):
            raise AbsorbError(f"{out} is not empty; choose another --out")
        recipe = replace(Recipe(), minutes=minutes)
        print(make(model_type, list(paths) or sources(), out, recipe, device))


if __name__ == "__main__":
    main()
