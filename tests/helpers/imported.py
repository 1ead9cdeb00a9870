"""What nearly every process of the tests imports first, and what takes it seconds.

absorb is not among it, so that a process with this behind it is still a stranger.
"""

import gc
import re
from pathlib import Path

import gguf
import transformers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    pipeline,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as STOCK

__all__ = [
    "AutoModelForCausalLM",
    "AutoModelForImageTextToText",
    "AutoTokenizer",
    "PreTrainedTokenizerFast",
    "gguf",
    "pipeline",
]

# The stock classes of all families: `import absorb` asks transformers for each of them.
_ENTRIES = Path(__file__).parents[2] / "absorb" / "models"
_NAMED = {
    name for file in _ENTRIES.glob("*.py") for name in re.findall(r'"(\w+)"', file.read_text())
}
for _name in _NAMED & STOCK.keys():
    getattr(transformers, STOCK[_name])

# All of this stays: a collection in a process forked from here would copy every page of it.
gc.freeze()
