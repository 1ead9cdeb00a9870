"""What onnxruntime-genai says of models. Runs in an environment with it and no absorb.

    python -P genai_says.py JOB.json OUT.json

JOB and OUT are described in scripts/engines/beside.py. Its builder knows no granite_swa; that of
Granite makes the same graph, with two traps. It drops sinks without a word unless `attention_attrs`
asks for them. And it takes a window for one that bounds the cache: where none hides anything, the
layers must say that they see all.
"""

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnxruntime_genai as genai
from onnxruntime_genai.models import builder

NEW = 64  # tokens that a decode adds
_GRANITE = builder.GraniteModel


class GraniteWithSinks(_GRANITE):
    """Granite, whose attention reads the sinks of its module."""

    def __init__(self, config: Any, *args: Any) -> None:
        super().__init__(config, *args)
        self.attention_attrs["sinks"] = True


def built(folder: str, out: str, cache: str) -> None:
    """Write the ONNX model of a folder, in float32."""
    where = (None, folder, out, "fp32", "cpu", cache)
    options = builder.parse_extra_options(*where, [])
    config = options["hf_details"]["hf_config"]
    if config.model_type == "granite_swa":
        config.architectures = ["GraniteForCausalLM"]
        builder.GraniteModel = GraniteWithSinks
        if config.sliding_window >= config.max_position_embeddings:
            config.layer_types = ["full_attention"] * config.num_hidden_layers
            config.sliding_window = None
    builder.create_model(*where, **options)


def generator_of(model: Any, length: int) -> Any:
    settings = genai.GeneratorParams(model)
    settings.set_search_options(max_length=length, do_sample=False)
    return genai.Generator(model, settings)


def log_probabilities(model: Any, row: list[int]) -> list[float]:
    """Of every token but the first: half of the text at once, then token by token."""
    generator, found = generator_of(model, len(row)), []
    half = len(row) // 2
    generator.append_tokens(row[:half])
    for after in row[half:]:
        logits = generator.get_logits().reshape(-1).astype(np.float64)
        top = logits.max()
        found.append(float(logits[after] - top - np.log(np.exp(logits - top).sum())))
        if half + len(found) < len(row):
            generator.append_tokens([after])
    return found


def speed(model: Any, row: list[int]) -> dict[str, float]:
    generator, start = generator_of(model, len(row) + NEW), time.perf_counter()
    generator.append_tokens(row)
    generator.generate_next_token()
    middle = time.perf_counter()
    for _ in range(NEW - 1):
        generator.generate_next_token()
    end = time.perf_counter()
    return {"prefill": len(row) / (middle - start), "decode": (NEW - 1) / (end - middle)}


def main(job_file: str, out: str) -> None:
    job = json.loads(Path(job_file).read_text())
    found: dict[str, Any] = {}
    with TemporaryDirectory() as place:
        models = {}
        for number, (name, folder) in enumerate(job["models"].items()):
            made = str(Path(place, str(number)))
            built(folder, made, str(Path(place, "cache")))
            models[name] = genai.Model(made)
        for name, model in models.items():
            rows = job["rows"][name]
            found[name] = {"said": [log_probabilities(model, row) for row in rows]}
        timed: dict[str, dict[str, list[float]]] = {name: {} for name in job["timed"]}
        for _ in range(job["rounds"]):
            for name in job["timed"]:
                for work, value in speed(models[name], job["rows"][name][0]).items():
                    timed[name].setdefault(work, []).append(value)
        for name, speeds in timed.items():
            found[name]["tokens_per_second"] = speeds
    versions = {package: version(package) for package in ("onnxruntime-genai", "onnxruntime")}
    Path(out).write_text(json.dumps({"versions": versions, "models": found}))


if __name__ == "__main__":
    main(*sys.argv[1:])
