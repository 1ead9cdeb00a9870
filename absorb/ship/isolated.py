"""What a checkpoint says, loaded as by somebody who has no absorb. Run as a script, in isolation:

    python -I isolated.py FOLDER TOKENS DTYPE [REFERENCE]

prints as JSON what `logits_after` gives and, of a file with tokens and the logits of another model,
how far this one is from that, computed in the type DTYPE. It needs torch and transformers, and has
no absorb to import, nor has the checkpoint.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedModel,
)

_CODE = "modeling_absorb.py"
_POSITIONS = 4
_ENTRIES = 16


def probe_tokens(vocabulary: int) -> tuple[int, ...]:
    """The fixed tokens that are read: spread over the vocabulary, and the same for every model."""
    return tuple((7919 * place + 5) % vocabulary for place in range(32))


@torch.no_grad()
def logits_after(
    model: PreTrainedModel, tokens: Sequence[int], device: torch.device | None = None
) -> list[list[float]]:
    """For each of the last 4 tokens: logits spread over the vocabulary, then their log-sum-exp.

    `device` is where the model computes, unless its weights are there.
    """
    ids = torch.tensor([list(tokens)], device=device or model.device)
    logits = model(ids).logits[0, -_POSITIONS:].float()
    every = -(-logits.shape[-1] // _ENTRIES)
    rows = torch.cat([logits[:, ::every], logits.logsumexp(-1, keepdim=True)], 1)
    return rows.tolist()


@torch.no_grad()
def divergence_from(reference: str, model: PreTrainedModel) -> float:
    """Mean KL in nats per token from the `logits` (rows, length, vocabulary) that a file holds.

    Another model gave them for its `tokens` (rows, length).
    """
    known = load_file(reference)
    total = 0.0
    for tokens, logits in zip(known["tokens"], known["logits"], strict=True):
        theirs, ours = logits.log_softmax(-1), model(tokens[None]).logits[0].float().log_softmax(-1)
        total += (theirs.exp() * (theirs - ours)).sum(dtype=torch.float64).item()
    return max(total / known["tokens"].numel(), 0.0)  # rounding may bring it below; NaN stays


def auto_class(folder: str) -> Any:
    """What a folder is loaded by: a model that reads pictures too is no causal one to all."""
    settings = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))
    pictures = "AutoModelForImageTextToText" in settings.get("auto_map", {})
    return AutoModelForImageTextToText if pictures else AutoModelForCausalLM


def main(folder: str, tokens: str, dtype: str, reference: str | None = None) -> None:
    sys.modules["absorb"] = None  # type: ignore[assignment]  # as if it were not installed
    # What brings no code of ours is to be loaded without any. With the flag nothing is asked for at
    # the terminal, though no code of ours makes a tokenizer.
    trusted = Path(folder, _CODE).is_file()
    AutoTokenizer.from_pretrained(folder, trust_remote_code=trusted)
    loading: Any = auto_class(folder).from_pretrained(
        folder,
        trust_remote_code=trusted,
        use_safetensors=True,
        dtype=dtype,
        output_loading_info=True,
    )
    model, info = loading[0].eval(), loading[1]
    for wrong in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[wrong]:
            sys.exit(f"{wrong.replace('_', ' ')}: {sorted(info[wrong])[0]}")
    apart = None if reference is None else divergence_from(reference, model)
    said = logits_after(model, json.loads(tokens))
    print(json.dumps({"logits": said, "divergence": apart}))


if __name__ == "__main__":
    main(*sys.argv[1:])
