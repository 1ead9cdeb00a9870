"""Models in float16 as ONNX, before and after `absorb convert --to stock`: is any Clip needed?

    python -m scripts.engines.onnx_float16

makes an environment with onnxruntime the first time. The models are tiny and random, and planted:
they say what they always did, by numbers far beyond float16 in the stream, in values and neurons.
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from absorb.fold.float16 import Rescaling, rescale, rescaling
from absorb.measure.headroom import ranges
from absorb.models.decoder import Decoder
from absorb.models.families import FAMILIES
from scripts.engines import beside
from scripts.engines.environments import Environment, asked

ONNX = Environment(
    ("onnxruntime==1.32.0", "onnx", "onnxscript", "torch==2.13.0", "transformers==5.24.0")
)
NAMES = ("llama", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt_neox")
TOLERANCE = 0.05  # nats: float16 keeps 11 bits, and every result is rounded to them
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@torch.no_grad()
def planted(name: str) -> Decoder:
    """A random model whose intermediates overflow float16."""
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(CONFIG_MAPPING[name](**SIZES)).eval()
    decoder, family = Decoder(model, FAMILIES[name]), FAMILIES[name]
    layers, (heads, kv_heads) = len(decoder.layers), decoder.heads
    channels = {family.value: torch.full((layers, kv_heads * 32 // heads), 2.0**-22)}
    if family.up is not None:
        channels[family.up] = torch.full((layers, 48), 2.0**-22)
    # A norm that writes with an offset must not be divided by much.
    stream = 2.0**-14 if name.startswith("gemma") else 2.0**-20
    rescale(decoder, Rescaling(stream=stream, channels=channels))
    return decoder


@click.command()
@click.option(
    "--json",
    "out",
    type=click.Path(dir_okay=False, path_type=Path),
    default=beside.EVIDENCE / "engine-onnx-float16.json",
    show_default=True,
)
def main(out: Path) -> None:
    """Export every model to ONNX before and after, and compare both with float32."""
    rows = torch.randint(3, 64, (2, 24), generator=torch.Generator().manual_seed(1)).tolist()
    with TemporaryDirectory() as place:
        models, expected = {}, {}
        for name in NAMES:
            decoder = planted(name)
            decoder.model.save_pretrained(Path(place, name))
            expected[name] = beside.said_by_transformers(Path(place, name), rows)
            rescale(decoder, rescaling(decoder, ranges(decoder, torch.tensor(rows))))
            after = f"{name}, rescaled"
            decoder.model.save_pretrained(Path(place, after))
            models |= {name: str(Path(place, name)), after: str(Path(place, after))}
            expected[after] = expected[name]
        job, said = Path(place, "job.json"), Path(place, "said.json")
        job.write_text(json.dumps({"models": models, "rows": dict.fromkeys(models, rows)}))
        asked(ONNX, "onnx_says.py", job, said)
        found = json.loads(said.read_text())
    for name, one in found["models"].items():
        one["apart"] = {
            runtime: furthest(rows_said, expected[name])
            for runtime, rows_said in one.pop("said").items()
        }
        told = ", ".join(
            f"{runtime}: {'no numbers' if apart is None else f'{apart:.4f} nats off'}"
            for runtime, apart in one["apart"].items()
        )
        print(f"{name:24} {one['nodes']} nodes, {one['clips']} of them Clip; {told}")
    out.write_text(json.dumps(found, indent=1) + "\n")
    judge(found["models"])


def furthest(said: list[Any], expected: list[list[float]]) -> float | None:
    """How far log-probabilities are from those in float32 at most; None where some are none."""
    if None in said:
        return None
    pairs = zip(said, expected, strict=True)
    return max(abs(a - b) for one, other in pairs for a, b in zip(one, other, strict=True))


def judge(models: dict[str, Any]) -> None:
    """End with 1 where a rescaled model needs a Clip or is off, or a planted one is not."""
    for name in NAMES:
        before, after = models[name], models[f"{name}, rescaled"]
        well = all(apart is not None and apart < TOLERANCE for apart in after["apart"].values())
        if after["clips"] or not well or before["apart"]["reference"] is not None:
            raise SystemExit(f"{name} is not what it should be")


if __name__ == "__main__":
    main()
