"""Native exports in MLX (its CPU build), beside the original there, and beside transformers.

    absorb export DIR --to native --mlx --out NATIVE
    python -m scripts.engines.mlx NATIVE demo

makes an environment with mlx-lm the first time. Beside the two models it compares tiny random ones
with every kind of RoPE and of window that absorb exports for MLX.
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from absorb.ship.export import mlx
from scripts.engines import beside
from scripts.engines.environments import Environment

MLX = Environment(("mlx-lm==0.32.2", "mlx[cpu]==0.32.4"))
COUNT, LENGTH = 2, 64
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.0},
    "llama3": _LLAMA3,
}
# The layers that slide, and the window.
WINDOWS = {"no window": (1, 2**24), "windows": (2, 7), "windows everywhere": (3, 7)}


@click.command()
@click.argument("native", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("stock")
@click.option(
    "--json",
    "out",
    type=click.Path(dir_okay=False, path_type=Path),
    default=beside.EVIDENCE / "engine-mlx.json",
    show_default=True,
)
def main(native: Path, stock: str, out: Path) -> None:
    """Compare the export NATIVE and the original STOCK in MLX with transformers."""
    if not (native / mlx.MODEL_FILE).is_file():
        raise SystemExit(f"{native} has no {mlx.MODEL_FILE}; export it with --mlx")
    with TemporaryDirectory() as place:
        models = {"stock": told(beside.saved(stock, Path(place, "stock"))), "native": native}
        rows = dict.fromkeys(models, beside.rows_for(native, COUNT, LENGTH))
        for rope, settings in ROPES.items():
            for window, (slides, size) in WINDOWS.items():
                name = f"tiny, {rope} RoPE, {window}"
                models[name] = tiny(Path(place, name), settings, slides, size)
                rows[name] = torch.randint(0, 64, (2, 48)).tolist()
        found = beside.compared(MLX, "mlx_says.py", models, rows, timed=["stock", "native"])
    beside.report(found, out)


def told(folder: Path) -> Path:
    """A stock model whose RoPE mlx-lm finds: it looks for it where transformers 4 had it.

    Without that it rotates by another base and says nothing of it.
    """
    file = folder / "config.json"
    settings = json.loads(file.read_text())
    settings["rope_theta"] = settings["rope_parameters"]["rope_theta"]
    file.write_text(json.dumps(settings))
    return folder


def tiny(folder: Path, rope: dict[str, Any], slides: int, window: int) -> Path:
    """A random model with sinks, biases, a layer without RoPE and multipliers, for MLX."""
    kinds = ["sliding_attention"] * slides + ["full_attention"] * (3 - slides)
    config = CONFIG_MAPPING["granite_swa"](
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
        rope_parameters={"rope_theta": 500.0, **rope},
        layer_rope_theta=[500.0, 0, 500.0],
        layer_types=kinds,
        sliding_window=window,
        attention_bias=True,
        attention_multiplier=0.3,
        embedding_multiplier=3.0,
        residual_multiplier=0.5,
        logits_scaling=2.0,
        tie_word_embeddings=slides == 1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model: Any = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    mlx.refuse(config)
    mlx.add(folder, config)
    return folder


if __name__ == "__main__":
    main()
