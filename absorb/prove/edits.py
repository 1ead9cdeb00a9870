"""Edits of a model that leave its logits alone if a family's entry is right, one for each claim.

They share no code with what folds, lest both make the same mistake.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from absorb.models.family import Family

Edit = Callable[[PreTrainedModel, Family], None]


@dataclass(frozen=True, slots=True)
class Heads:
    """How the rows and columns of a projection belong to heads."""

    heads: int
    kv_heads: int
    head_dim: int
    interleaved: bool
    key_block: int

    @property
    def values(self) -> int:
        return self.kv_heads * self.head_dim


Rows = Callable[[Heads, int, int], Tensor]


@torch.no_grad()
def drift(model: PreTrainedModel, family: Family, tokens: Tensor, edit: Edit) -> float:
    """How far an edit moves the logits of a model, relative to the largest one. The edit stays."""
    before = model(tokens, use_cache=False).logits
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        edit(model, family)
    return apart(model(tokens, use_cache=False).logits, before)


def apart(after: Tensor, before: Tensor) -> float:
    """The largest difference, relative to the largest number before. NaN is infinitely far."""
    return float(((after - before).abs().max() / before.abs().max()).nan_to_num(torch.inf))


def heads_of(model: PreTrainedModel, family: Family) -> Heads:
    config: Any = model.config
    heads = config.num_attention_heads
    attending = next(decoder_layers(model, family, family.output))
    columns = weight_of(attending, family.output).shape[-1]
    kv_heads = config.num_key_value_heads if family.grouped else heads
    return Heads(heads, kv_heads, columns // heads, family.interleaved, family.key_block)


def decoder_layers(
    model: PreTrainedModel, family: Family, *names: str | None
) -> Iterator[nn.Module]:
    """All layers, or those that have these places, where only some do."""
    layers = model.get_submodule(family.layers).children()
    return (layer for layer in layers if all(has(layer, family, name) for name in names))


def has(layer: nn.Module, family: Family, name: str | None) -> bool:
    if name is None or name not in family.some:
        return True
    place: Any = layer
    for part in name.split("."):
        place = getattr(place, part, None)
    return place is not None


def present(layer: nn.Module, family: Family, names: tuple[str, ...]) -> list[str]:
    """Those of the names that the layer has, where only some do."""
    return [name for name in names if has(layer, family, name)]


def place_of(layer: Any, name: str) -> Any:
    for part in name.split("."):
        layer = getattr(layer, part)
    return layer


def is_norm(place: Any) -> bool:
    return "Norm" in type(place).__name__


def weight_of(layer: nn.Module, name: str) -> Tensor:
    """Outputs in rows and inputs in columns, whatever holds them; experts come first."""
    place = place_of(layer, name)
    if isinstance(place, nn.Parameter):
        return place
    weight: Tensor = place.weight
    return weight.T if isinstance(place, Conv1D) else weight


def random_factors(family: Family, *shape: int) -> Tensor:
    """Factors that drive what is clamped beyond its bounds, up and down by a thousand.

    Smaller ones where norms add to their weights: they do so in float32, and 1 + w near zero would
    be rounded.
    """
    reach = 2 if family.norm_offset else 10
    return 2.0 ** ((2 * torch.rand(shape, dtype=torch.float64) - 1) * reach)


# Which rows of a projection and which columns of its reader belong together


def every_row(heads: Heads, total: int, count: int) -> Tensor:
    return torch.arange(total)


def last_rows(heads: Heads, total: int, count: int) -> Tensor:
    return torch.arange(total - count, total)


def first_rows(heads: Heads, total: int, count: int) -> Tensor:
    return torch.arange(count)


def value_rows(heads: Heads, total: int, count: int) -> Tensor:
    if not heads.interleaved:
        return last_rows(heads, total, count)
    return torch.arange(total).view(heads.kv_heads, -1)[:, -heads.head_dim :].flatten()


def key_rows(heads: Heads, total: int, count: int) -> Tensor:
    blocks = torch.arange(total).view(-1, heads.head_dim)
    per_block = heads.kv_heads
    if heads.interleaved:
        each = len(blocks) // per_block
        return blocks[each - heads.key_block :: each].flatten()
    end = len(blocks) - (heads.key_block - 1) * per_block
    return blocks[end - per_block : end].flatten()


def by_groups(heads: Heads) -> Tensor:
    """The value channel that each output column reads: neighbouring query heads share a KV head."""
    column, group = torch.arange(heads.heads * heads.head_dim), heads.heads // heads.kv_heads
    return column // heads.head_dim // group * heads.head_dim + column % heads.head_dim


def by_turns(heads: Heads) -> Tensor:
    """The wrong order, in which the KV heads take turns."""
    column = torch.arange(heads.heads * heads.head_dim)
    turn = column // heads.head_dim % heads.kv_heads
    return turn * heads.head_dim + column % heads.head_dim


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
    factors = random_factors(family, model.config.hidden_size)
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
            factors = random_factors(family, model.config.hidden_size)
            divide_output(layer, norm, factors, family.norm_offset)
            for name in present(layer, family, readers):
                multiply_input(layer, name, factors)


def smooth_values(
    model: PreTrainedModel,
    family: Family,
    rows: Rows = value_rows,
    columns: Callable[[Heads], Tensor] = by_groups,
) -> None:
    """Move a factor for each value channel into the columns that read it."""
    heads = heads_of(model, family)
    for layer in decoder_layers(model, family, family.value):
        factors = random_factors(family, heads.values)
        total = len(weight_of(layer, family.value))
        divide_rows(layer, family.value, factors, rows(heads, total, len(factors)))
        multiply_input(layer, family.output, factors[columns(heads)])


def smooth_neurons(model: PreTrainedModel, family: Family, rows: Rows = last_rows) -> None:
    """Move a factor for each neuron into the column that reads it."""
    heads = heads_of(model, family)
    pairs = family.neurons.items()
    for layer, (above, below) in product(decoder_layers(model, family), pairs):
        if not has(layer, family, above):
            continue
        up, down = weight_of(layer, above), weight_of(layer, below)
        factors = random_factors(family, *down.shape[:-2], down.shape[-1])
        divide_rows(layer, above, factors, rows(heads, up.shape[-2], down.shape[-1]))
        multiply_input(layer, below, factors)


def fold_values(
    model: PreTrainedModel,
    family: Family,
    rows: Rows = value_rows,
    columns: Callable[[Heads], Tensor] = by_groups,
) -> None:
    """Add a constant to every value; take what it becomes out of the output's bias."""
    heads = heads_of(model, family)
    for layer in decoder_layers(model, family, family.value):
        constant = torch.randn(heads.values, dtype=torch.float64)
        total = len(weight_of(layer, family.value))
        add_bias(layer, family.value, constant, rows(heads, total, len(constant)))
        folded = weight_of(layer, family.output) @ constant[columns(heads)]
        add_bias(layer, family.output, -folded, torch.arange(len(folded)))


def shift_keys(model: PreTrainedModel, family: Family, rows: Rows = key_rows) -> None:
    """Add a constant to every key: where nothing rotates it, all logits of a query move alike."""
    heads = heads_of(model, family)
    for layer in decoder_layers(model, family, family.value):
        constant = torch.randn(heads.values, dtype=torch.float64)
        total = len(weight_of(layer, str(family.key)))
        add_bias(layer, str(family.key), constant, rows(heads, total, len(constant)))
