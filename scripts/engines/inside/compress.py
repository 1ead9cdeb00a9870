"""llm-compressor on a folder. Runs in an environment with it and no absorb.

    python -P compress.py JOB.json OUT.json

JOB has the folders `model` and `out`, `rows` of tokens to calibrate on, if any, and a `recipe`.
That is INT8 weights by channel and INT8 activations, `static` or not, with SmoothQuant's
`smoothing` or null; or a `scheme` that llm-compressor has by name, by `gptq` or rounded to the
nearest. OUT has the seconds of a core that `oneshot` took, whether sinks and biases are what they
were, and for each row of tokens in `say` the log-probability of each but the first, by transformers
on what was saved.
"""

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any


def steps(recipe: dict[str, Any]) -> list[Any]:
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier

    if "scheme" not in recipe:
        return integers(recipe["static"], recipe["smoothing"])
    modifier = GPTQModifier if recipe["gptq"] else QuantizationModifier
    return [modifier(targets="Linear", scheme=recipe["scheme"], ignore=["lm_head"])]


def integers(static: bool, smoothing: float | None) -> list[Any]:
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    whole = {"num_bits": 8, "type": "int", "symmetric": True}
    weights = {**whole, "strategy": "channel", "dynamic": False}
    read = {**whole, "strategy": "tensor" if static else "token", "dynamic": not static}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": read}
    found: list[Any] = [QuantizationModifier(ignore=["lm_head"], config_groups={"group_0": group})]
    if smoothing is not None:
        found.insert(0, SmoothQuantModifier(smoothing_strength=smoothing))
    return found


def said(folder: str, rows: list[list[int]]) -> list[list[float]]:
    """The log-probability of every token of the rows but the first; inputs are rounded, too."""
    import torch
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    how: Any = CompressedTensorsConfig(dequantize=True)
    # What is unpacked comes in bfloat16.
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=how).float().eval()
    found = []
    with torch.no_grad():
        for row in rows:
            tokens = torch.tensor([row])
            given = model(tokens, use_cache=False).logits[0, :-1].log_softmax(-1)
            found.append(given.gather(-1, tokens[0, 1:, None])[:, 0].tolist())
    return found


def main(job_file: str, out: str) -> None:
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from transformers import AutoModelForCausalLM, AutoTokenizer

    job = json.loads(Path(job_file).read_text())
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    ours = (".sinks", ".bias")
    before = {n: t.clone() for n, t in model.state_dict().items() if n.endswith(ours)}
    rows: dict[str, Any] = {}
    if job["rows"]:
        masks = [[1] * len(row) for row in job["rows"]]
        data = Dataset.from_dict({"input_ids": job["rows"], "attention_mask": masks})
        rows = {"dataset": data, "num_calibration_samples": len(masks)}
        rows["max_seq_length"] = len(job["rows"][0])
        # Fixed ranges are moving averages of what each row has, which the order changes.
        rows["shuffle_calibration_samples"] = False
    start = time.process_time()
    oneshot(model=model, recipe=steps(job["recipe"]), **rows)
    seconds = time.process_time() - start
    after = model.state_dict()
    model.save_pretrained(job["out"], save_compressed=True)
    AutoTokenizer.from_pretrained(job["model"]).save_pretrained(job["out"])
    found = {
        "oneshot_seconds": seconds,
        "sinks_and_biases_unchanged": all(torch.equal(t, after[n]) for n, t in before.items()),
        "versions": {name: version(name) for name in ("llmcompressor", "transformers")},
    }
    if job["say"]:
        del model, before, after
        found["said"] = said(job["out"], job["say"])
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
