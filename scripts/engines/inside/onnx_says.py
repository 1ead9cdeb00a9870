"""What models say as ONNX in float16. Runs in an environment with onnxruntime and no absorb.

    python -P onnx_says.py JOB.json OUT.json

JOB has `models` (folders) and `rows` of tokens for each. OUT has for each model how many nodes its
graph has and how many of them are Clip, and what two runtimes say: onnxruntime, which may compute
parts of a graph in float32, and the reference of onnx, which rounds every result to float16.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx.reference import ReferenceEvaluator
from transformers import AutoModelForCausalLM


class Logits(torch.nn.Module):
    def __init__(self, folder: str) -> None:
        super().__init__()
        kind = AutoModelForCausalLM
        self.model = kind.from_pretrained(folder, dtype=torch.float16, attn_implementation="eager")

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.model(tokens, use_cache=False).logits


def log_probabilities(logits: Any, row: list[int]) -> list[float] | None:
    """Of every token but the first; None where anything is no number."""
    logits = logits[0, :-1].astype(np.float64)
    if not np.isfinite(logits).all():
        return None
    top = logits.max(-1, keepdims=True)
    said = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
    return said[np.arange(len(row) - 1), row[1:]].tolist()


@torch.no_grad()
def said(folder: str, rows: list[list[int]]) -> dict[str, Any]:
    tokens = [np.array([row]) for row in rows]
    with TemporaryDirectory() as place:
        file = str(Path(place, "model.onnx"))
        example = (torch.tensor(tokens[0]),)
        torch.onnx.export(Logits(folder).eval(), example, file, dynamo=True, verbose=False)
        graph = onnx.load(file)
        kinds = [node.op_type for node in graph.graph.node]
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        (given,) = session.get_inputs()
        runtimes = {"onnxruntime": session, "reference": ReferenceEvaluator(graph)}
        found = {
            name: [
                log_probabilities(runtime.run(None, {given.name: ids})[0], row)
                for ids, row in zip(tokens, rows, strict=True)
            ]
            for name, runtime in runtimes.items()
        }
    return {"nodes": len(kinds), "clips": kinds.count("Clip"), "said": found}


def main(job_file: str, out: str) -> None:
    job = json.loads(Path(job_file).read_text())
    found = {name: said(folder, job["rows"][name]) for name, folder in job["models"].items()}
    packages = ("onnx", "onnxruntime", "torch", "transformers")
    versions = {package: version(package) for package in packages}
    Path(out).write_text(json.dumps({"versions": versions, "models": found}))


if __name__ == "__main__":
    main(*sys.argv[1:])
