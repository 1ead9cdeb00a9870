"""Stock model + Plan → absorbed model: the executor of a plan.

Each kind of absorption is a module with `write(student, plan, layer)`, which changes a layer that
does nothing new yet. Nothing else writes weights, save the fine-tune. A layer is a function of the
original's weights and the plan: where weights stream, it is made anew whenever it is asked for.
"""

import copy
import gc
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from absorb.fold import gates, neurons, order, place, residual, smoothing
from absorb.fold.plan import Plan
from absorb.fold.sinks.forms import KeySink, LayerSink
from absorb.models import modeling_absorb
from absorb.models.decoder import Decoder
from absorb.models.family import Family
from absorb.models.resting.streaming import Streaming
from absorb.runtime.quiet import quiet

# All of a plan counts channels as the original does, so what puts them in order comes last.
_FOLDS = (place, neurons, residual, gates, smoothing, order)
_END_FOLDS = (residual, order)


@torch.no_grad()
def graft(decoder: Decoder, plan: Plan) -> Decoder:
    """A new absorbed model that does without a prefix what the stock one does with the plan's."""
    if decoder.streaming:
        gc.collect()  # the student before may hold page-locked memory
    student = twin(decoder, plan.sinks, plan.gates)
    place.shift_positions(student, len(plan.prefix))
    write_ends(student, plan)

    def write(layer: int) -> None:
        for fold in _FOLDS:
            fold.write(student, plan, layer)

    if student.streaming:
        student.streaming.fold = write
    else:
        for layer in range(len(student.layers)):
            write(layer)
    return student


def write_ends(student: Decoder, plan: Plan) -> None:
    """Fold what stands before and behind the layers: at once, or whenever it has come."""

    def write(unit: Any) -> None:
        for fold in _END_FOLDS:
            fold.write_end(student, plan, unit)

    family, streaming = student.family, student.streaming
    if streaming is not None:
        streaming.fold_end = write
        return
    for name in filter(None, (family.embedding, family.positions, family.final_norm)):
        write(student.named(name).module)
    if not (student.is_part or student.config.tie_word_embeddings):
        write(student.model.get_output_embeddings())


def twin(
    decoder: Decoder,
    sinks: Sequence[LayerSink | None] = (),
    gated: Mapping[str, Tensor] = MappingProxyType({}),
) -> Decoder:
    """The absorbed form of a stock model: its weights, and neutral sinks and scales.

    A layer for which `sinks` holds keys has room for them, all others have logits. The norms named
    in `gated` have gates like those there. The weights are copies, save where they stream: there
    both models share them.
    """
    model: Any = decoder.model
    cls: Any = modeling_absorb.absorbed(model.__class__)
    settings = model.config.to_dict()
    for ours in ("model_type", "architectures", "auto_map", "transformers_version"):
        settings.pop(ours, None)
    config = cls.config_class(**settings, absorb=sites(decoder, sinks, gated))
    config._experts_implementation = model.config._experts_implementation
    own = dict(model.named_parameters(remove_duplicate=False))
    weights = model.state_dict()
    if decoder.streaming is None:
        weights = {name: tensor.clone() for name, tensor in weights.items()}
    else:  # transformers would bring all of them to the CPU
        weights |= {name: _stand_in(parameter) for name, parameter in own.items()}
    with quiet():
        loading: Any = cls.from_pretrained(
            None, config=config, state_dict=weights, dtype=model.dtype, output_loading_info=True
        )
    student: PreTrainedModel = loading[0]
    assert not _drawn(loading[1]), loading[1]
    student.generation_config = copy.deepcopy(model.generation_config)
    module: nn.Module = student
    module.eval()
    plain = Decoder(student, decoder.family, is_part=decoder.is_part)
    if decoder.streaming is None:
        module.to(model.device)
    else:
        for name, parameter in student.named_parameters(remove_duplicate=False):
            if name in own:
                parameter.data = own[name].data
        plain.streaming = Streaming(student, plain.layers, decoder.device)
    return plain


def _stand_in(parameter: Tensor) -> Tensor:
    """What looks like a parameter, and takes no room."""
    return torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)


def _drawn(info: Mapping[str, Any]) -> bool:
    """Whether a load drew weights at random, or left some: it says so nowhere else."""
    missing = {key.rpartition(".")[2] for key in info["missing_keys"]}
    return bool(missing - modeling_absorb.NEUTRAL.keys() or info["unexpected_keys"])


def sites(
    decoder: Decoder, sinks: Sequence[LayerSink | None], gated: Mapping[str, Tensor]
) -> dict[str, list[str] | list[int]]:
    """Which modules carry which parameter, as patterns of names in the model without its head."""
    family = decoder.family
    stem = f"{decoder.model.base_model_prefix}."
    layers = f"{family.layers.removeprefix(stem)}.*."

    def is_norm(name: str) -> bool:
        return decoder.sites(name)[0].is_norm

    def kept_apart(name: str) -> bool:
        # (1 + w) / c - 1 would lie near -1, where bfloat16 keeps few digits of the sum.
        return family.norm_offset != 0 and is_norm(name)

    read_by_norms = [name for name in family.reads if is_norm(name)]
    outputs = (*family.writes, *(norm for norm, _ in family.feeds))
    return {
        **_sites_of_sinks(family, layers, decoder.having(family.attention), sinks),
        "input_scale": [*(layers + n for n in read_by_norms), family.final_norm.removeprefix(stem)],
        "output_scale": [
            *([family.embedding.removeprefix(stem)] if decoder.is_part else []),
            *([family.final_norm.removeprefix(stem)] if residual.has_end_apart(decoder) else []),
            *(layers + name for name in outputs if kept_apart(name)),
        ],
        **_sites_of_gates(layers, gated),
    }


def _sites_of_gates(layers: str, gated: Mapping[str, Tensor]) -> dict[str, list[str] | list[int]]:
    if not gated:
        return {}
    shape = next(iter(gated.values())).shape[1:]
    return {"gate_in": [layers + name for name in gated], "gate_shape": list(shape)}


def _sites_of_sinks(
    family: Family, layers: str, attending: list[int], sinks: Sequence[LayerSink | None]
) -> dict[str, list[str] | list[int]]:
    """The sites of sinks, and of the biases that go with logits, in `layers` of any number."""
    keyed = {i: list(sink.keys.shape) for i, sink in enumerate(sinks) if isinstance(sink, KeySink)}
    others = [index for index in attending if index not in keyed]

    def within(indices: Sequence[int], name: str) -> list[str]:
        numbers = ["*"] if len(indices) == len(attending) else [str(index) for index in indices]
        return [layers.replace("*", number) + name for number in numbers]

    biased = {family.value, family.output, family.key} - {None}
    found: dict[str, list[str] | list[int]] = {
        "bias": sorted(site for name in biased for site in within(others, str(name)))
    }
    if others:
        found["sink"] = within(others, family.attention)
    if keyed:
        found["sink_key"] = within(list(keyed), family.attention)
        found["sink_shape"] = next(iter(keyed.values()))
    return found
