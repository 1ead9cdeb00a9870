"""Stock model + Plan → absorbed model. The only code that writes weights, save the fine-tune."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from absorb import modeling_absorb
from absorb.families import Family
from absorb.plan import Plan
from absorb.watch import each_layers, layers_of, quiet


@torch.no_grad()
def graft(model: PreTrainedModel, family: Family, plan: Plan) -> PreTrainedModel:
    """A new absorbed model that does without a prefix what `model` does with the plan's."""
    student = twin(model, family)
    _place_sinks(student, family, plan)
    _remove_neurons(student, family, plan)
    _rescale_stream(student, family, plan.residual.to(student.device))
    smooth(student, family, plan.smoothing)
    return student


def twin(model: PreTrainedModel, family: Family) -> PreTrainedModel:
    """The absorbed form of a stock model: copies of its weights, and neutral sinks and scales."""
    cls: Any = modeling_absorb.absorbed(type(model))
    settings = model.config.to_dict()
    for ours in ("model_type", "architectures", "auto_map", "transformers_version"):
        settings.pop(ours, None)
    config = cls.config_class(**settings, absorb=sites(model, family))
    with torch.device("meta"):
        neutral = cls(config)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, parameter in neutral.named_parameters():
        if name not in weights:
            value = modeling_absorb.NEUTRAL[name.rpartition(".")[2]]
            weights[name] = torch.full(parameter.shape, value, device=model.device)
    with quiet():
        student: PreTrainedModel = cls.from_pretrained(
            None, config=config, state_dict=weights, dtype=model.dtype
        )
    student.generation_config = copy.deepcopy(model.generation_config)
    module: nn.Module = student
    module.to(model.device).eval()
    return student


def sites(model: PreTrainedModel, family: Family) -> dict[str, list[str]]:
    """Which modules carry which parameter, as patterns of names in the model without its head."""
    layer = layers_of(model, family)[0]
    stem = f"{model.base_model_prefix}."
    layers = f"{family.layers.removeprefix(stem)}.*."

    def kept_apart(name: str) -> bool:
        # (1 + w) / c - 1 would lie near -1, where bfloat16 keeps few digits of the sum.
        return family.norm_offset != 0 and not isinstance(layer.get_submodule(name), nn.Linear)

    read_by_norms = [n for n in family.reads if not isinstance(layer.get_submodule(n), nn.Linear)]
    outputs = (*family.writes, *(norm for norm, _ in family.feeds))
    biased = {family.value, family.output, family.key} - {None}
    return {
        "sink": [layers + family.attention],
        "input_scale": [*(layers + n for n in read_by_norms), family.final_norm.removeprefix(stem)],
        "output_scale": [
            family.embedding.removeprefix(stem),
            *(layers + name for name in outputs if kept_apart(name)),
        ],
        "bias": sorted(layers + str(name) for name in biased),
    }


def _place_sinks(student: PreTrainedModel, family: Family, plan: Plan) -> None:
    """Sink logits, and the sink values and key biases as biases of the stock Linears.

    `Σ p_j v_j + p v = Σ p_j (v_j - v) + v` for `p + Σ p_j = 1`: v goes from the value bias to the
    output bias, and costs nothing at run time.
    """
    width = plan.sinks.values[0].numel()
    for index, layer in enumerate(layers_of(student, family)):
        value, output = layer.get_submodule(family.value), layer.get_submodule(family.output)
        sink_value = plan.sinks.values[index].to(output.weight)
        layer.get_submodule(family.attention).sink.copy_(plan.sinks.logits[index])
        value.bias[-width:] -= sink_value.flatten()
        groups = output.in_features // width
        output.bias += output.weight @ sink_value.repeat_interleave(groups, 0).flatten()
        if family.key is not None:
            key = layer.get_submodule(family.key)
            rows = slice(-family.key_block * width, (1 - family.key_block) * width or None)
            key.bias[rows] += plan.sinks.key_biases[index].to(key.bias).flatten()


def _remove_neurons(student: PreTrainedModel, family: Family, plan: Plan) -> None:
    down = each_layers(student, family, family.down)
    for removal in plan.removals:
        down[removal.spike.layer].weight[:, removal.spike.neuron] = 0


def _rescale_stream(student: PreTrainedModel, family: Family, scale: Tensor) -> None:
    """Write the stream divided by `scale` (hidden,), and read it multiplied: the same function."""
    _divide_output(student.get_submodule(family.embedding), scale)
    _multiply_input(student.get_submodule(family.final_norm), scale)
    for layer in layers_of(student, family):
        for name in family.writes:
            _divide_output(layer.get_submodule(name), scale)
        for name in family.reads:
            _multiply_input(layer.get_submodule(name), scale)


@torch.no_grad()
def smooth(student: PreTrainedModel, family: Family, smoothing: dict[str, Tensor]) -> None:
    """Divide outputs that few Linears read, and multiply the columns of those Linears.

    smoothing holds the divisors (layers, channels) under the name of the module that is divided.
    """
    readers = {**dict(family.feeds), family.value: (family.output,), family.up: (family.down,)}
    for name, scales in smoothing.items():
        for layer, scale in zip(layers_of(student, family), scales.to(student.device), strict=True):
            _divide_output(layer.get_submodule(name), scale)
            columns = _per_query_head(scale, student) if name == family.value else scale
            for reader in readers[name]:
                _multiply_input(layer.get_submodule(reader), columns)


def _divide_output(module: Any, scale: Tensor) -> None:
    """Divide the last channels that a module gives by `scale`: all, or those of a fused Linear."""
    width = len(scale)
    if hasattr(module, "output_scale"):
        module.output_scale /= scale
    elif isinstance(module, nn.Linear):
        module.weight[-width:] /= scale[:, None]
        if module.bias is not None:
            module.bias[-width:] /= scale
    else:
        module.weight /= scale


def _multiply_input(module: Any, scale: Tensor) -> None:
    if isinstance(module, nn.Linear):
        module.weight *= scale
    else:
        module.input_scale *= scale


def _per_query_head(scale: Tensor, student: PreTrainedModel) -> Tensor:
    """A scale (kv_heads * head_dim,) of values, once for each query head: (heads * head_dim,)."""
    kv_heads = student.config.num_key_value_heads
    groups = student.config.num_attention_heads // kv_heads
    return scale.view(kv_heads, -1).repeat_interleave(groups, 0).flatten()
