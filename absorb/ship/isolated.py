"""What a checkpoint says, loaded as by somebody who has no absorb. Run as a script, in isolation:

    python -I isolated.py FOLDER TOKENS

prints as JSON what `logits_after` gives. It needs torch and transformers, and has no absorb to
import, nor has the checkpoint.
"""

import json
import sys
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

_POSITIONS = 4
_ENTRIES = 16


def probe_tokens(vocabulary: int) -> tuple[int, ...]:
    """The fixed tokens that are read: spread over the vocabulary, and the same for every model."""
    return tuple((7919 * place + 5) % vocabulary for place in range(32))


@torch.no_grad()
def logits_after(model: PreTrainedModel, tokens: Sequence[int]) -> list[list[float]]:
    """For each of the last 4 tokens: logits spread over the vocabulary, then their log-sum-exp."""
    ids = torch.tensor([list(tokens)], device=model.device)
    logits = model(ids).logits[0, -_POSITIONS:].float()
    every = -(-logits.shape[-1] // _ENTRIES)
    rows = torch.cat([logits[:, ::every], logits.logsumexp(-1, keepdim=True)], 1)
    return rows.tolist()


def main(folder: str, tokens: str) -> None:
    sys.modules["absorb"] = None  # type: ignore[assignment]  # as if it were not installed
    # Without the flag it would ask at the terminal, though no code of ours makes a tokenizer.
    AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    loading: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        trust_remote_code=True,
        use_safetensors=True,
        dtype=torch.float32,
        output_loading_info=True,
    )
    model, info = loading
    for wrong in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[wrong]:
            sys.exit(f"{wrong.replace('_', ' ')}: {sorted(info[wrong])[0]}")
    print(json.dumps(logits_after(model.eval(), json.loads(tokens))))


if __name__ == "__main__":
    main(*sys.argv[1:])
