"""What a process without absorb finds of many checkpoints. Run as a script, in isolation:

    python -I stranger.py ROOT

prints as JSON, for each folder in ROOT, `fine` or the first thing that is not. It loads a model by
its auto_map, compares what it says with SAID, saves and loads it again, generates with a cache and
without, and looks at the gradients.
"""

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

SAID = "said.safetensors"
_NEAR = 1e-5  # experts may be computed in another order


def loaded(folder: Path) -> Any:
    """Raises where anything is missing or left."""
    load: Any = AutoModelForCausalLM.from_pretrained
    model, info = load(
        folder, trust_remote_code=True, dtype=torch.float32, output_loading_info=True
    )
    for what, keys in info.items():
        if keys:
            raise ValueError(f"{what}: {sorted(map(str, keys))[0]}")
    return model.eval()


def verdict(folder: Path) -> str:
    """What is wrong with a checkpoint, or `fine`."""
    known = load_file(folder / SAID)
    model, tokens, logits = loaded(folder), known["tokens"], known["logits"]
    with torch.no_grad():
        said = model(tokens, use_cache=False).logits
    if float((said - logits).abs().max() / logits.abs().max()) > _NEAR:
        return "it says something else"
    with TemporaryDirectory() as again, torch.no_grad():
        model.save_pretrained(again)
        if not torch.equal(loaded(Path(again))(tokens, use_cache=False).logits, said):
            return "it says something else once saved again"
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(tokens, use_cache=True, **settings)
    if not torch.equal(cached, model.generate(tokens, use_cache=False, **settings)):
        return "it generates something else with a cache"
    model(tokens, labels=tokens, use_cache=False).loss.backward()
    sinks = [p.grad for n, p in model.named_parameters() if n.rpartition(".")[2].startswith("sink")]
    if not all(grad is not None and grad.isfinite().all() and grad.any() for grad in sinks):
        return "a sink has no gradient"
    return "fine"


def main(root: str) -> None:
    sys.modules["absorb"] = None  # type: ignore[assignment]  # as if it were not installed
    found = {}
    for folder in sorted(path for path in Path(root).iterdir() if (path / SAID).is_file()):
        try:
            found[folder.name] = verdict(folder)
        except Exception as error:
            found[folder.name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    print(json.dumps(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
