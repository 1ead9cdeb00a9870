"""A checkpoint and a server → what this drops of it.

The checkpoint is read as it is, and with each kind of what absorb adds at the value where it does
nothing. Which of these the server says is what it computes.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from absorb.errors import AbsorbError
from absorb.models.families import FAMILIES
from absorb.models.modeling_absorb import NEUTRAL
from absorb.schema.exported import Exported
from absorb.schema.places import Endpoint
from absorb.schema.report import Report
from absorb.ship.served.endpoint import Answers, server_at

# Of a mean log-probability, in nats. bfloat16 moves it by some hundredths, a dropped sink by more.
TOLERANCE = 0.1
# How much nearer a server must be to what it is said to compute.
_CLEARLY = 4.0
_LENGTH = 32
_TEXT = (
    "The old lighthouse had two keepers. One of them wrote down the weather every morning, and the "
    "other, who had been a sailor, never believed what she wrote before he had seen the sky."
)
Finding = tuple[str, list[str]]  # as in ship/verify.py
Kinds = Mapping[str, Sequence[str]]  # names of parameters, by what they are


def compared(folder: Path, report: Report | Exported, wish: Endpoint) -> Finding:
    """Whether a server says what the checkpoint in a folder says."""
    if isinstance(report, Exported) and report.target == "gguf":
        raise AbsorbError(
            f"{folder.name} holds a .gguf file, which transformers reads as another model; name "
            "the converted checkpoint or its native export, and compare the server with that"
        )
    server = server_at(wish)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    tokens: list[int] = tokenizer(_TEXT)["input_ids"]
    wrong = _other_tokens(len(tokens), server.tokens_of(_TEXT))
    answers = server.said(tokens[:_LENGTH])
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    kinds = kinds_in(model, report)
    far = distances(model, kinds, tokens[:_LENGTH], answers)
    wrong += judged(far)
    return f"{server.model} at {server.url} is {far['']:.1e} nats per token from it", wrong


def _other_tokens(ours: int, theirs: int | None) -> list[str]:
    if theirs is None or theirs == ours:
        return []
    if theirs > ours:
        return [
            f"the server reads a text as {theirs} tokens and the tokenizer here as {ours}: it puts "
            "a BOS or a template before it, which the sinks stand for; switch that off"
        ]
    return [f"the server reads a text as {theirs} tokens and not as {ours}: serve this tokenizer"]


def kinds_in(model: nn.Module, report: Report | Exported) -> Kinds:
    """What an engine may drop: nothing, sinks, biases of attention, scales, gates, or several."""
    names = [name for name, _ in model.named_parameters()]
    family = FAMILIES[report.family if isinstance(report, Exported) else report.inspection.family]
    # The architectures that are exported to have Llama's names.
    attention = "self_attn" if isinstance(report, Exported) else family.attention
    biases: dict[str, list[str]] = {}
    for name in names:
        if name.endswith(".bias") and f".{attention}." in name:
            biases.setdefault(f"the biases of {name.split('.')[-2]}", []).append(name)
    if len(biases) > 1:
        biases["all biases of attention"] = [name for some in biases.values() for name in some]
    sinks = {"the sinks": [name for name in names if name.endswith((".sink", ".sinks"))]}
    scales = {"the scales": [name for name in names if name.endswith("put_scale")]}
    gates = {"the gates": [name for name in names if name.endswith(".gate_out")]}
    choices = [
        [("", []), *((kind, some) for kind, some in kinds.items() if some)]
        for kinds in (sinks, biases, scales, gates)
    ]
    return {
        " and ".join(kind for kind, _ in several if kind): [n for _, some in several for n in some]
        for several in product(*choices)
    }


@torch.no_grad()
def distances(
    model: Any, kinds: Kinds, tokens: Sequence[int], answers: Answers
) -> dict[str, float]:
    """How far a server is from the model without each of the kinds: mean difference in nats."""
    found = {}
    for kind, names in kinds.items():
        with _without(model, names):
            said = model(torch.tensor([[*tokens]]), use_cache=False).logits[0].log_softmax(-1)
        pairs = [
            (said[place, token].item(), value)
            for place, answer in enumerate(answers)
            for token, value in answer.items()
            if token < said.shape[-1]
        ]
        found[kind] = sum(abs(ours - theirs) for ours, theirs in pairs) / max(1, len(pairs))
    return found


@contextmanager
def _without(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """A model in which parameters do nothing for a while."""
    kept = {name: model.get_parameter(name).clone() for name in names}
    for name in names:
        kind = name.rpartition(".")[2]
        model.get_parameter(name).fill_(NEUTRAL["sink" if kind == "sinks" else kind])
    yield
    for name, before in kept.items():
        model.get_parameter(name).copy_(before)


def judged(far: Mapping[str, float]) -> list[str]:
    """What is wrong, by the distances of a server from a model without each kind of parameter."""
    best = min(far, key=lambda kind: far[kind])
    if best and far[best] * _CLEARLY < far[""] and far[best] < TOLERANCE:
        return [
            f"the server drops {best}: it is {far[best]:.1e} nats per token from the checkpoint "
            f"without them, and {far['']:.1e} from it as it is; serve it by another engine, or a "
            "newer one"
        ]
    if not far[""] <= TOLERANCE:  # NaN is not
        return [
            f"the server is {far['']:.2g} nats per token from the checkpoint, and {TOLERANCE:g} is "
            "allowed; nothing that absorb adds accounts for it, so it serves another model, or "
            "this one in low precision"
        ]
    return []
