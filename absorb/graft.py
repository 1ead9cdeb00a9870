"""Stock model + Plan → absorbed model. The only code that writes weights, save the fine-tune."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from absorb import modeling_absorb
from absorb.families import Family
from absorb.forms import KeySink, LayerSink, LogitSink
from absorb.plan import Plan
from absorb.watch import layers_of, quiet
from absorb.weights import (
    bias_at,
    column,
    fused_rows,
    heads_of,
    is_norm,
    place_at,
    read_by_heads,
    weight_at,
)


@torch.no_grad()
def graft(model: PreTrainedModel, family: Family, plan: Plan) -> PreTrainedModel:
    """A new absorbed model that does without a prefix what `model` does with the plan's."""
    student = twin(model, family, plan.sinks)
    _shift_positions(student, family, len(plan.prefix))
    for layer, sink in zip(layers_of(student, family), plan.sinks, strict=True):
        if isinstance(sink, KeySink):
            _place_keys(layer, family, sink)
        else:
            _place_logits(student, family, layer, sink)
    _remove_neurons(student, family, plan)
    _rescale_stream(student, family, plan.residual.to(student.device))
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
        student: PreTrainedModel = cls.from_pretrained(
            None, config=config, state_dict=weights, dtype=model.dtype
        )
    student.generation_config = copy.deepcopy(model.generation_config)
    module: nn.Module = student
    module.to(model.device).eval()
    return student


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


def _shift_positions(student: PreTrainedModel, family: Family, count: int) -> None:
    """Let text start at the learned position where it stood behind a prefix of `count` tokens."""
    if family.positions is None:
        return
    table: Any = student.get_submodule(family.positions)
    start = family.position_offset
    table.weight = nn.Parameter(torch.cat([table.weight[:start], table.weight[start + count :]]))
    table.num_embeddings -= count
    student.config.max_position_embeddings -= count


def _place_keys(layer: nn.Module, family: Family, sink: KeySink) -> None:
    attention: Any = layer.get_submodule(family.attention)
    attention.sink_key.copy_(sink.keys)
    attention.sink_value.copy_(sink.values)


def _place_logits(
    student: PreTrainedModel, family: Family, layer: nn.Module, sink: LogitSink
) -> None:
    """Sink logits, and the sink value and key bias as biases of the stock Linears.

    `Σ p_j v_j + p v = Σ p_j (v_j - v) + v` for `p + Σ p_j = 1`: v goes from the value bias to the
    output bias, and costs nothing at run time.
    """
    value, output = place_at(layer, family.value), place_at(layer, family.output)
    sink_value = sink.value.to(output.weight)
    place_at(layer, family.attention).sink.copy_(sink.logits)
    value.bias[_rows(student, family, layer, family.value, sink_value)] -= sink_value.flatten()
    read = read_by_heads(sink_value, student.config, family)
    output.bias += weight_at(layer, family.output) @ read
    if family.key is not None:
        key = place_at(layer, family.key)
        key_bias = sink.key_bias.to(key.bias)
        rows = _rows(student, family, layer, family.key, key_bias, family.key_block)
        key.bias[rows] += key_bias.flatten()


def _rows(
    student: PreTrainedModel,
    family: Family,
    layer: nn.Module,
    name: str,
    vectors: Tensor,
    block: int = 1,
) -> Tensor:
    """The rows of a projection that give a vector for every KV head: (kv_heads, head_dim)."""
    outputs = len(weight_at(layer, name))
    return fused_rows(family, outputs, block, *vectors.shape).to(student.device)


def _remove_neurons(student: PreTrainedModel, family: Family, plan: Plan) -> None:
    layers = layers_of(student, family)
    for removal in plan.removals:
        weight = weight_at(layers[removal.spike.layer], family.down)
        column(weight, removal.spike.neuron).zero_()


def _rescale_stream(student: PreTrainedModel, family: Family, scale: Tensor) -> None:
    """Write the stream divided by `scale` (hidden,), and read it multiplied: the same function."""
    # A table of tokens may be tied to the language model head, one of positions is tied to nothing.
    place_at(student, family.embedding).output_scale /= scale
    if family.positions is not None:
        place_at(student, family.positions).weight /= scale
    _multiply_input(student, family.final_norm, scale)
    for layer in layers_of(student, family):
        for name in family.writes:
            _divide_output(layer, name, scale)
        for name in family.reads:
            _multiply_input(layer, name, scale)


@torch.no_grad()
def smooth(student: PreTrainedModel, family: Family, smoothing: dict[str, Tensor]) -> None:
    """Divide outputs that few matrices read, and multiply the columns of those matrices.

    smoothing holds the divisors (layers, channels), for experts (layers, experts, channels), under
    the name of what is divided.
    """
    for name, scales in smoothing.items():
        for layer, scale in zip(layers_of(student, family), scales.to(student.device), strict=True):
            if name == family.value:
                columns = _smooth_values(student, family, layer, scale)
            else:
                _divide_output(layer, name, scale)
                columns = scale
            for reader in family.links[name]:
                _multiply_input(layer, reader, columns)


def _smooth_values(
    student: PreTrainedModel, family: Family, layer: nn.Module, scale: Tensor
) -> Tensor:
    """Divide values by `scale` (kv_heads * head_dim,); what columns are to be multiplied by."""
    vectors = scale.view(heads_of(student.config, family)[1], -1)
    rows = _rows(student, family, layer, family.value, vectors)
    _divide_output(layer, family.value, scale, rows)
    attention: Any = layer.get_submodule(family.attention)
    if hasattr(attention, "sink_value"):
        attention.sink_value /= vectors[:, None]
    return read_by_heads(scale, student.config, family)


def _divide_output(
    layer: nn.Module, name: str, scale: Tensor, rows: Tensor | slice | None = None
) -> None:
    """Divide what a norm or matrix gives by `scale`: in the rows given, or its last ones."""
    module = place_at(layer, name)
    if hasattr(module, "output_scale"):
        module.output_scale /= scale
        return
    rows = slice(-scale.shape[-1], None) if rows is None else rows
    if is_norm(layer, name):
        module.weight /= scale
    else:
        weight_at(layer, name)[..., rows, :] /= scale[..., None]
    bias = bias_at(layer, name)
    if bias is not None:
        bias[rows] /= scale


def _multiply_input(layer: nn.Module, name: str, scale: Tensor) -> None:
    if is_norm(layer, name):
        place_at(layer, name).input_scale *= scale
    else:
        weight_at(layer, name).mul_(scale[..., None, :])
