"""Checks of what is made by an entry: absorbed models that must do what the stock one does."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from inspect import signature
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from absorb.fold.decide import sinks_for
from absorb.fold.graft import graft, twin
from absorb.fold.plan import Plan
from absorb.fold.sinks.forms import LayerSink
from absorb.fold.sinks.prefix_cache import prefix_of
from absorb.fold.smoothing import searched_scales
from absorb.measure.outliers import measure
from absorb.models import modeling_absorb
from absorb.models.decoder import Decoder
from absorb.prove.edits import apart
from absorb.prove.subject import Subject, shows, still
from absorb.runtime.experts import mixed, neurons_of
from absorb.runtime.hooks import watching, watching_attention
from absorb.runtime.precision import autocast_bf16
from absorb.runtime.reading import led
from absorb.schema.findings import Removal, SpikeNeuron
from absorb.schema.proof import Check
from absorb.schema.settings import Sink

PREFIX = (5, 9)
_NEW = 8  # tokens that are generated
# Sinks are float32 in a student and float64 in the fit, and what a router computes in float32 is
# rounded to bfloat16 by both, either way. A sink in the wrong place moves outputs by 0.01 and more.
_SINKS = 1e-4


def neutral(subject: Subject) -> Iterator[Check]:
    """Sinks and scales that do nothing are the stock model, and scales change nothing."""
    decoder, tokens = subject.decoder(), subject.tokens
    before = _logits(decoder.model, tokens)
    yield still(
        "neutral sinks are the stock model", apart(_logits(twin(decoder).model, tokens), before)
    )
    hidden = decoder.config.hidden_size
    plan = _plan(decoder, "logit", tokens)
    plain = graft(decoder, plan)
    folded = graft(decoder, replace(plan, residual=2.0 ** (torch.arange(hidden) % 9 - 3)))
    before = _logits(plain.model, tokens)
    yield still("residual scales change nothing", apart(_logits(folded.model, tokens), before))
    smooth = replace(plan, smoothing=searched_scales(plain, tokens))
    yield still(
        "smoothing changes nothing", apart(_logits(graft(decoder, smooth).model, tokens), before)
    )


def keys(subject: Subject) -> Iterator[Check]:
    """The form `key` does what the stock model does behind the prefix."""
    decoder, tokens = subject.decoder(), subject.tokens
    behind = _logits(decoder.model, led(tokens, torch.tensor(PREFIX)))[:, len(PREFIX) :]
    yield shows("the prefix matters", apart(_logits(decoder.model, tokens), behind))
    student = graft(decoder, _plan(decoder, "key", tokens))
    yield still("the form key is exact", apart(_logits(student.model, tokens), behind))
    yield from _generation(decoder, student, tokens)


def _generation(decoder: Decoder, student: Decoder, tokens: Tensor) -> Iterator[Check]:
    said = _generated(student.model, tokens)
    other = _generated(student.model, tokens, use_cache=False)
    yield still("generation with a cache says what it says without", _differing(said, other))
    stock = _generated(decoder.model, led(tokens, torch.tensor(PREFIX)))
    yield still("it generates what the stock model does behind the prefix", _differing(said, stock))


def logits(subject: Subject) -> Iterator[Check]:
    """Logits, values and key biases land where the fit had them."""
    decoder, tokens = subject.decoder(), subject.tokens
    outputs = decoder.each(subject.family.output)[-1:]
    seen: list[Tensor] = []
    with watching(outputs, lambda _, out: seen.append(out)):
        plan = _plan(decoder, "logit", tokens)
    student = graft(decoder, plan)
    outputs = student.each(subject.family.output)[-1:]
    # As the fit does: a router that computes in float32 is hastened.
    with watching(outputs, lambda _, out: seen.append(out)), autocast_bf16(decoder.device):
        _logits(student.model, tokens)
    yield still("the grafted model does what the fit did", apart(seen[-1], seen[-2]), _SINKS)


def text(subject: Subject) -> Iterator[Check]:
    """Padding changes nothing, gradients are right, and attention and experts can be looked at."""
    decoder, tokens = subject.decoder(), subject.tokens
    student = graft(decoder, _plan(decoder, "logit", tokens))
    before = _logits(student.model, tokens)
    yield still("padding changes nothing", apart(_padded(student.model, tokens), before))
    yield from _gradients(student.model, tokens)
    measure(decoder, tokens, tokens[0, :1])  # as a conversion does, lest it fail there
    yield still("attention shows its weights", _weights(decoder, tokens))
    down = decoder.site(1, subject.family.down)
    if down.is_of_experts:
        # Else nothing of them would be smoothed, nor rounded where formats are compared.
        smooth = subject.family.up is not None
        yield still("neurons of experts can be smoothed", 0.0 if smooth else torch.inf)
        moved = _mixture(decoder, down.module, tokens)
        yield still("experts are what absorb takes them for", moved)


@torch.no_grad()
def _padded(model: PreTrainedModel, tokens: Tensor, by: int = 3) -> Tensor:
    """Logits of a text behind padding, as `generate` pads."""
    rows = torch.nn.functional.pad(tokens, (by, 0))
    places = torch.arange(rows.shape[1]).expand_as(rows) - by
    given = {"attention_mask": (places >= 0).long(), "position_ids": places.clamp_min(0)}
    known = signature(model.forward).parameters
    taken: dict[str, Any] = {name: tensor for name, tensor in given.items() if name in known}
    found: Tensor = model(rows, use_cache=False, **taken).logits
    return found[:, by:]


def _gradients(model: PreTrainedModel, tokens: Tensor) -> Iterator[Check]:
    """The gradients of both ways to compute attention: one is written by hand."""
    found = []
    for way in ("sdpa", "eager"):
        model.set_attn_implementation(way)
        model.zero_grad()
        with torch.enable_grad():  # whoever measures has none
            model(tokens, use_cache=False).logits.square().mean().backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    model.set_attn_implementation("sdpa")
    fast, exact = found
    reached = {name: grad for name, grad in exact.items() if grad is not None}
    largest = max(float(grad.abs().max()) for grad in reached.values())
    moved = max(_gap(fast[name], grad) for name, grad in reached.items()) / largest
    yield still("gradients are those of eager attention", moved)
    silent = [
        n for n, p in model.named_parameters() if n.endswith(".sink") and not _learns(exact[n])
    ]
    yield still("every sink has a gradient", float(len(silent)))


def _learns(grad: Tensor | None) -> bool:
    return grad is not None and bool(grad.isfinite().all() and grad.any())


def _gap(one: Tensor | None, other: Tensor) -> float:
    return torch.inf if one is None else float((one - other).abs().max())


def _weights(decoder: Decoder, tokens: Tensor) -> float:
    """How far the weights of any head are from one in sum."""
    found: list[Tensor] = []
    with watching_attention(decoder, lambda _, weights: found.append(weights)):
        _logits(decoder.model, tokens)
    return float((torch.stack(found).sum(-1) - 1).abs().max())


def _mixture(decoder: Decoder, experts: Any, tokens: Tensor) -> float:
    """How far experts are from what absorb reckons that they give."""
    seen: list[Any] = []
    handle = experts.register_forward_hook(lambda _, args, out: seen.append((args, out)))
    try:
        _logits(decoder.model, tokens)
    finally:
        handle.remove()
    [((stream, chosen, share), gave)] = seen
    return apart(mixed(experts, neurons_of(experts, stream, chosen), chosen, share), gave)


def reload(subject: Subject) -> Iterator[Check]:
    """A checkpoint gives back what was saved, loaded by the class that its config.json names."""
    student, tokens = mixed_student(subject).model, subject.tokens
    with TemporaryDirectory() as folder:
        student.save_pretrained(folder)
        again = _loaded(Path(folder))
    again.set_experts_implementation(student.config._experts_implementation)
    moved = apart(_logits(again, tokens), _logits(student, tokens))
    yield still("it says the same once saved and loaded", moved)


def mixed_student(subject: Subject) -> Decoder:
    """An absorbed model in float32 with all that there is: logits, keys in one layer, scales."""
    decoder = subject.decoder(torch.float32)
    plan = _plan(decoder, "auto", subject.tokens)
    spike = Removal(spike=SpikeNeuron(layer=1, neuron=7, contribution=1.0), divergence=0.0)
    scales = 2.0 ** (torch.arange(decoder.config.hidden_size) % 5)
    return graft(decoder, replace(plan, removals=(spike,), residual=scales))


def _loaded(folder: Path) -> PreTrainedModel:
    """The model in a folder, by its own word on what it is."""
    named = json.loads((folder / "config.json").read_text())["auto_map"]
    kind: Any = getattr(modeling_absorb, named["AutoModelForCausalLM"].rpartition(".")[2])
    config: Any = getattr(modeling_absorb, named["AutoConfig"].rpartition(".")[2])
    loading: Any = kind.from_pretrained(
        folder, config=config.from_pretrained(folder), dtype=torch.float32, output_loading_info=True
    )
    model, info = loading
    wrong = [key for found in info.values() for key in found]
    if wrong:
        raise RuntimeError(f"a saved model does not give back {sorted(map(str, wrong))[0]}")
    loaded: PreTrainedModel = model.eval()
    return loaded


@torch.no_grad()
def _logits(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    found: Tensor = model(tokens, use_cache=False).logits
    return found


def _generated(model: PreTrainedModel, tokens: Tensor, use_cache: bool = True) -> Tensor:
    """What a model goes on with: (rows, new tokens)."""
    settings = {"max_new_tokens": _NEW, "min_new_tokens": _NEW, "do_sample": False}
    generate: Any = model.generate
    whole: Tensor = generate(tokens, use_cache=use_cache, pad_token_id=0, **settings)
    return whole[:, tokens.shape[1] :]


def _differing(one: Tensor, other: Tensor) -> float:
    """The share of tokens that are not the same."""
    return float((one != other).double().mean()) if one.shape == other.shape else torch.inf


def _plan(decoder: Decoder, form: Sink, tokens: Tensor) -> Plan:
    """A plan of nothing but sinks. In the form `auto` one layer has keys."""
    prefix = prefix_of(decoder, torch.tensor(PREFIX))
    sinks: Sequence[LayerSink | None] = sinks_for(decoder, prefix, (), tokens, form, 0.0)
    if form == "auto":
        known = sinks_for(decoder, prefix, (), tokens, "key", 0.0)
        plain = sinks_for(decoder, prefix, (), tokens, "logit", 0.0)
        sinks = [known[i] if i == 1 else sink for i, sink in enumerate(plain)]
    return Plan(
        prefix=PREFIX,
        sinks=tuple(sinks),
        removals=(),
        residual=torch.ones(decoder.config.hidden_size),
        smoothing={},
    )
