"""What engines are asked about: a model as stock, as converted, and as exported, in folders."""

import subprocess
import sys
from pathlib import Path
from resource import RUSAGE_CHILDREN, getrusage
from typing import Any

import click
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import absorb
from absorb.load.source import load
from absorb.models.families import FAMILIES
from absorb.models.modeling_absorb import __file__ as code
from absorb.schema.settings import ModelRef
from absorb.ship.export.targets import ROUTES
from scripts.bench import windows
from scripts.engines.environments import CACHE
from tests.helpers.tiny import kv_heads, tiny
from tests.helpers.tiny_tokenizer import tiny_tokenizer
from tests.ship.test_export import Case, converted, export

Folders = dict[str, Path]
HEADS, HEAD_DIM = 4, 32  # of tiny models: engines have kernels for some widths only
LENGTH, ROWS = 64, 2
_SETTINGS: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": HEAD_DIM},
    # vLLM's own GPT-2 has no such scale.
    "gpt2": {"scale_attn_by_inverse_layer_idx": False},
    # Windows shorter than the text, and a head that is tied.
    "gemma3_text": {
        "head_dim": HEAD_DIM,
        "query_pre_attn_scalar": HEAD_DIM,
        "sliding_window": 24,
        "tie_word_embeddings": True,
    },
}


def settings_of(family: str) -> dict[str, Any]:
    """Of a tiny model that engines take, with a sink and a bias that do much in every layer."""
    return {
        "hidden_size": HEADS * HEAD_DIM,
        "intermediate_size": 192,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS if kv_heads(family) > 2 else 2,
        "vocab_size": 512,
        "max_position_embeddings": 512,
        **_SETTINGS.get(family, {}),
    }


def tiny_folders(family: str, place: Path, known: frozenset[str]) -> Folders:
    """A tiny model in all forms: native only as an architecture among those that are known."""
    settings = settings_of(family)
    found = {"stock": place / "stock", "custom": place / "converted"}
    tiny(family, torch.float32, **settings).save_pretrained(found["stock"])
    student: Any = converted(Case(family, settings)).float()
    if family in ROUTES and ROUTES[family].target.model_type in known:
        found["native"] = export(student, place)
    else:
        student.save_pretrained(found["custom"])
    (found["custom"] / "modeling_absorb.py").write_text(Path(code).read_text())
    for folder in found.values():
        tiny_tokenizer().save_pretrained(folder)
    return found


def tiny_rows() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, 512, (ROWS, LENGTH), generator=generator)


def stock_folder(name: str, place: Path) -> Path:
    """A model as an engine wants it: of a .gguf file too, as a plain model of its configuration."""
    source = load(ModelRef(name=name))
    kind: Any = type(source.model)
    plain = kind(source.model.config)
    plain.load_state_dict(source.model.state_dict())
    plain.save_pretrained(place)
    source.tokenizer.save_pretrained(place)
    return place


def convert(original: str, place: Path, text: Path, purpose: str = "none") -> float:
    """Convert a model untrained, with sinks as logits: the seconds of a core that this takes."""
    words = ["convert", original, "--sink", "logit", "--steps", "0", "--device", "cpu"]
    more = ["--text", str(text), "--for", purpose, "--out", str(place)]
    before = getrusage(RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "absorb", *words, *more], check=True, stdout=sys.stderr)
    after = getrusage(RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


work = click.option(
    "--work",
    type=click.Path(file_okay=False, path_type=Path),
    default=CACHE.parent / "engine-models",
    show_default=True,
    help="Folder for the stock model and the export; what is there is used again.",
)


def folders_of(converted_model: Path, original: str, place: Path, text: Path) -> Folders:
    """A real model in all forms; what is not there yet is written to `place`."""
    found = {"custom": converted_model, "stock": place / "stock", "native": place / "native"}
    if not found["stock"].exists():
        stock_folder(original, found["stock"])
    if not found["native"].exists():
        absorb.export(converted_model, found["native"], text=text)
    return found


@torch.no_grad()
def said(folder: Path, rows: list[list[int]]) -> Tensor:
    """Log-probabilities of all tokens but the first, by transformers: (rows, length - 1)."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    for row in rows:
        tokens = torch.tensor([row])
        given = model(tokens, use_cache=False).logits[0, :-1].log_softmax(-1)
        found.append(given.gather(-1, tokens[0, 1:, None])[:, 0])
    return torch.stack(found)


assert {*_SETTINGS} <= {*FAMILIES}


def rows_of(native: Path, *texts: tuple[Path, int]) -> list[list[list[int]]]:
    """Of each text so many windows, the first ones, in tokens of an export."""
    source = load(ModelRef(name=str(native)), measured=True)
    return [windows(source, text, count).tolist() for text, count in texts]
