"""What nearly every process of the tests imports first, and what takes it seconds; absorb is not
among it, so that a process with this behind it is still a stranger.
"""

import accelerate
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    pipeline,
)

__all__ = [
    "AutoModelForCausalLM",
    "AutoModelForImageTextToText",
    "AutoTokenizer",
    "LlamaForCausalLM",
    "PreTrainedTokenizerFast",
    "accelerate",
    "pipeline",
    "torch",
]
