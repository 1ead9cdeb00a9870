"""Edits of a model that leave its logits alone if a family's entry is right, one for each claim.

They share no code with absorb, lest both make the same mistake.
"""

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from absorb.models.family import Family
from tests.helpers.tiny import HEAD_DIM, HEADS, HIDDEN, kv_heads, tiny

Edit = Callable[[PreTrainedModel, Family], None]
Rows = Callable[[Family, int, int], Tensor]


@torch.no_grad()
def drift(family: Family, tokens: Tensor, edit: Edit, **settings: Any) -> float:
    """How far an edit moves the logits of the family's tiny model, relative to the largest one."""
    model = tiny(family.model_type, **settings)
    before = model(tokens).logits
    torch.manual_seed(0)
    edit(model, family)
    after = model(tokens).logits
    return ((after - before).abs().max() / before.abs().max()).item()


def decoder_layers(
    model: PreTrainedModel, family: Family, *names: str | None
) -> Iterator[nn.Module]:
    """All layers, or those that have these places, where only some do."""
    layers = model.get_submodule(family.layers).children()
    return (layer for layer in layers if all(has(layer, family, name) for name in names))


def has(layer: nn.Module, family: Family, name: str | None) -> bool:
    if name is None or name not in family.some:
        return True
    *above, last = name.split(".")
    for part in above:
        layer = getattr(layer, part, None)
    return getattr(layer, last, None) is not None


def present(layer: nn.Module, family: Family, names: tuple[str, ...]) -> list[str]:
    """Those of the names that the layer has, where only some do."""
    return [name for name in names if has(layer, family, name)]


def place_of(layer: nn.Module, name: str) -> nn.Module | nn.Parameter:
    for part in name.split("."):
        layer = getattr(layer, part)
    return layer


def is_norm(place: nn.Module | nn.Parameter) -> bool:
    return "Norm" in type(place).__name__


def weight_of(layer: nn.Module, name: str) -> Tensor:
    """Outputs in rows and inputs in columns, whatever holds them; experts come first."""
    place = place_of(layer, name)
    if isinstance(place, nn.Parameter):
        return place
    return place.weight.T if isinstance(place, Conv1D) else place.weight


def random_factors(*shape: int) -> Tensor:
    return torch.rand(shape, dtype=torch.float64) * 4 + 0.25


# Which rows of a projection and which columns of its reader belong together


def every_row(family: Family, total: int, count: int) -> Tensor:
    return torch.arange(total)


def last_rows(family: Family, total: int, count: int) -> Tensor:
    return torch.arange(total - count, total)


def first_rows(family: Family, total: int, count: int) -> Tensor:
    return torch.arange(count)


def value_rows(family: Family, total: int, count: int) -> Tensor:
    if not family.interleaved:
        return last_rows(family, total, count)
    heads = kv_heads(family.model_type)
    return torch.arange(total).view(heads, -1)[:, -HEAD_DIM:].flatten()


def key_rows(family: Family, total: int, count: int) -> Tensor:
    blocks = torch.arange(total).view(-1, HEAD_DIM)
    per_block = kv_heads(family.model_type)
    if family.interleaved:
        each = len(blocks) // per_block
        return blocks[each - family.key_block :: each].flatten()
    end = len(blocks) - (family.key_block - 1) * per_block
    return blocks[end - per_block : end].flatten()


def by_groups(family: Family) -> Tensor:
    """The value channel that each output column reads: neighbouring query heads share a KV head."""
    column, group = torch.arange(HEADS * HEAD_DIM), HEADS // kv_heads(family.model_type)
    return column // HEAD_DIM // group * HEAD_DIM + column % HEAD_DIM


def by_turns(family: Family) -> Tensor:
    """The wrong order, in which the KV heads take turns."""
    column = torch.arange(HEADS * HEAD_DIM)
    return column // HEAD_DIM % kv_heads(family.model_type) * HEAD_DIM + column % HEAD_DIM


# The smallest edits


def divide_rows(layer: nn.Module, name: str, factors: Tensor, rows: Tensor) -> None:
    weight_of(layer, name)[..., rows, :] /= factors[..., None]
    bias = getattr(place_of(layer, name), "bias", None)
    if bias is not None:
        bias[rows] /= factors


def divide_output(layer: nn.Module, name: str, factors: Tensor, norm_offset: float) -> None:
    place = place_of(layer, name)
    if isinstance(place, nn.Embedding):
        place.weight /= factors
    elif is_norm(place):
        place.weight.copy_((place.weight + norm_offset) / factors - norm_offset)
        if getattr(place, "bias", None) is not None:
            place.bias /= factors
    else:
        divide_rows(layer, name, factors, torch.arange(len(factors)))


def multiply_input(layer: nn.Module, name: str, factors: Tensor) -> None:
    place = place_of(layer, name)
    if is_norm(place):
        place.register_forward_pre_hook(lambda _, inputs: (inputs[0] * factors, *inputs[1:]))
    else:
        weight_of(layer, name).mul_(factors[..., None, :])


def add_bias(layer: nn.Module, name: str, bias: Tensor, rows: Tensor) -> None:
    linear = place_of(layer, name)
    if linear.bias is None:
        linear.bias = nn.Parameter(linear.weight.new_zeros(linear.out_features))
    linear.bias[rows] += bias


# One edit for each claim that an entry makes


def rescale_stream(model: PreTrainedModel, family: Family) -> None:
    """Divide channel i of the stream by a factor wherever it is written; undo it at every read."""
    factors = random_factors(HIDDEN)
    for table in (family.embedding, family.positions):
        if table is not None:
            divide_output(model, table, factors, family.norm_offset)
    multiply_input(model, family.final_norm, factors)
    for layer in decoder_layers(model, family):
        for name in present(layer, family, family.writes):
            divide_output(layer, name, factors, family.norm_offset)
        for name in present(layer, family, family.reads):
            multiply_input(layer, name, factors)


def smooth_norms(model: PreTrainedModel, family: Family) -> None:
    """Move a factor for each channel from every norm into what it feeds."""
    for layer in decoder_layers(model, family):
        for norm, readers in family.feeds:
            factors = random_factors(HIDDEN)
            divide_output(layer, norm, factors, family.norm_offset)
            for name in present(layer, family, readers):
                multiply_input(layer, name, factors)


def smooth_values(
    model: PreTrainedModel,
    family: Family,
    rows: Rows = value_rows,
    columns: Callable[[Family], Tensor] = by_groups,
) -> None:
    """Move a factor for each value channel into the columns that read it."""
    for layer in decoder_layers(model, family, family.value):
        factors = random_factors(kv_heads(family.model_type) * HEAD_DIM)
        total = len(weight_of(layer, family.value))
        divide_rows(layer, family.value, factors, rows(family, total, len(factors)))
        multiply_input(layer, family.output, factors[columns(family)])


def smooth_neurons(model: PreTrainedModel, family: Family, rows: Rows = last_rows) -> None:
    """Move a factor for each neuron into the column that reads it."""
    pairs = [pair for pair in ((family.up, family.down), family.shared, family.dense) if pair]
    for layer, (above, below) in product(decoder_layers(model, family), pairs):
        if not has(layer, family, above):
            continue
        up, down = weight_of(layer, above), weight_of(layer, below)
        factors = random_factors(*down.shape[:-2], down.shape[-1])
        divide_rows(layer, above, factors, rows(family, up.shape[-2], down.shape[-1]))
        multiply_input(layer, below, factors)


def fold_values(
    model: PreTrainedModel,
    family: Family,
    rows: Rows = value_rows,
    columns: Callable[[Family], Tensor] = by_groups,
) -> None:
    """Add a constant to every value; take what it becomes out of the output's bias."""
    for layer in decoder_layers(model, family, family.value):
        constant = torch.randn(kv_heads(family.model_type) * HEAD_DIM, dtype=torch.float64)
        total = len(weight_of(layer, family.value))
        add_bias(layer, family.value, constant, rows(family, total, len(constant)))
        folded = weight_of(layer, family.output) @ constant[columns(family)]
        add_bias(layer, family.output, -folded, torch.arange(len(folded)))


def shift_keys(model: PreTrainedModel, family: Family, rows: Rows = key_rows) -> None:
    """Add a constant to every key: where nothing rotates it, all logits of a query move alike."""
    for layer in decoder_layers(model, family, family.value):
        constant = torch.randn(kv_heads(family.model_type) * HEAD_DIM, dtype=torch.float64)
        total = len(weight_of(layer, family.key))
        add_bias(layer, family.key, constant, rows(family, total, len(constant)))
