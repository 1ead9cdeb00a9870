"""llm-compressor on a folder: INT8 weights by channel, INT8 activations. Runs beside no absorb.

    python -P compress.py JOB.json OUT.json

JOB has the folders `model` and `out`, `static` or not, `smoothing` (SmoothQuant's strength, or
null), and `rows` of tokens to calibrate on. OUT has the seconds of a core that `oneshot` took, and
whether sinks and biases are what they were.
"""

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any


def recipe(static: bool, smoothing: float | None) -> list[Any]:
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    integers = {"num_bits": 8, "type": "int", "symmetric": True}
    weights = {**integers, "strategy": "channel", "dynamic": False}
    read = {**integers, "strategy": "tensor" if static else "token", "dynamic": not static}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": read}
    steps: list[Any] = [QuantizationModifier(ignore=["lm_head"], config_groups={"group_0": group})]
    if smoothing is not None:
        steps.insert(0, SmoothQuantModifier(smoothing_strength=smoothing))
    return steps


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
    if job["static"] or job["smoothing"] is not None:
        masks = [[1] * len(row) for row in job["rows"]]
        data = Dataset.from_dict({"input_ids": job["rows"], "attention_mask": masks})
        rows = {"dataset": data, "num_calibration_samples": len(masks)}
        rows["max_seq_length"] = len(job["rows"][0])
    start = time.process_time()
    oneshot(model=model, recipe=recipe(job["static"], job["smoothing"]), **rows)
    seconds = time.process_time() - start
    after = model.state_dict()
    model.save_pretrained(job["out"], save_compressed=True)
    AutoTokenizer.from_pretrained(job["model"]).save_pretrained(job["out"])
    found = {
        "oneshot_seconds": seconds,
        "sinks_and_biases_unchanged": all(torch.equal(t, after[n]) for n, t in before.items()),
        "versions": {name: version(name) for name in ("llmcompressor", "transformers")},
    }
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
