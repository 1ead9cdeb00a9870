"""Stock model + Plan → absorbed model. The only code that writes weights, save the fine-tune."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from absorb.fold.neurons import remove_neurons
from absorb.fold.plan import Plan
from absorb.fold.residual import rescale_stream
from absorb.fold.sinks.forms import KeySink, LayerSink
from absorb.fold.sinks.place import place_keys, place_logits, shift_positions
from absorb.fold.smoothing import smooth
from absorb.models import modeling_absorb
from absorb.models.decoder import is_norm, layers_of
from absorb.models.family import Family
from absorb.runtime.quiet import quiet


@torch.no_grad()
def graft(model: PreTrainedModel, family: Family, plan: Plan) -> PreTrainedModel:
    """A new absorbed model that does without a prefix what `model` does with the plan's."""
    student = twin(model, family, plan.sinks)
    shift_positions(student, family, len(plan.prefix))
    for layer, sink in zip(layers_of(student, family), plan.sinks, strict=True):
        if isinstance(sink, KeySink):
            place_keys(layer, family, sink)
        else:
            place_logits(student, family, layer, sink)
    remove_neurons(student, family, plan.removals)
    rescale_stream(student, family, plan.residual.to(student.device))
    smooth(student, family, plan.smoothing)
    return student


def twin(
    model: PreTrainedModel, family: Family, sinks: Sequence[LayerSink] = ()
) -> PreTrainedModel:
    """The absorbed form of a stock model: copies of its weights, and neutral sinks and scales.

    A layer for which `sinks` holds keys has room for them, all others have logits.
    """
    cls: Any = modeling_absorb.absorbed(type(model))
    settings = model.config.to_dict()
    for ours in ("model_type", "architectures", "auto_map", "transformers_version"):
        settings.pop(ours, None)
    config = cls.config_class(**settings, absorb=sites(model, family, sinks))
    config._experts_implementation = model.config._experts_implementation
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with quiet():
        loading: Any = cls.from_pretrained(
            None, config=config, state_dict=weights, dtype=model.dtype, output_loading_info=True
        )
    student: PreTrainedModel = loading[0]
    assert not _drawn(loading[1]), loading[1]
    student.generation_config = copy.deepcopy(model.generation_config)
    module: nn.Module = student
    module.to(model.device).eval()
    return student


def _drawn(info: Mapping[str, Any]) -> bool:
    """Whether a load drew weights at random, or left some: it says so nowhere else."""
    missing = {key.rpartition(".")[2] for key in info["missing_keys"]}
    return bool(missing - modeling_absorb.NEUTRAL.keys() or info["unexpected_keys"])


def sites(
    model: PreTrainedModel, family: Family, sinks: Sequence[LayerSink]
) -> dict[str, list[str] | list[int]]:
    """Which modules carry which parameter, as patterns of names in the model without its head."""
    layer, count = layers_of(model, family)[0], len(layers_of(model, family))
    stem = f"{model.base_model_prefix}."
    layers = f"{family.layers.removeprefix(stem)}.*."

    def kept_apart(name: str) -> bool:
        # (1 + w) / c - 1 would lie near -1, where bfloat16 keeps few digits of the sum.
        return family.norm_offset != 0 and is_norm(layer, name)

    read_by_norms = [name for name in family.reads if is_norm(layer, name)]
    outputs = (*family.writes, *(norm for norm, _ in family.feeds))
    return {
        **_sites_of_sinks(family, layers, count, sinks),
        "input_scale": [*(layers + n for n in read_by_norms), family.final_norm.removeprefix(stem)],
        "output_scale": [
            family.embedding.removeprefix(stem),
            *(layers + name for name in outputs if kept_apart(name)),
        ],
    }


def _sites_of_sinks(
    family: Family, layers: str, count: int, sinks: Sequence[LayerSink]
) -> dict[str, list[str] | list[int]]:
    """The sites of sinks, and of the biases that go with logits, in `layers` of any number."""
    keyed = {i: list(sink.keys.shape) for i, sink in enumerate(sinks) if isinstance(sink, KeySink)}
    others = [index for index in range(count) if index not in keyed]

    def within(indices: Sequence[int], name: str) -> list[str]:
        numbers = ["*"] if len(indices) == count else [str(index) for index in indices]
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
