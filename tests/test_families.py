"""Every entry of FAMILIES is true of the implementation in transformers, name by name.

Each claim is an edit of a tiny random model that leaves its logits alone if the entry is right.
RMSNorm and eager softmax compute in float32 even in a float64 model, so a right entry may
drift by some 1e-6 of the largest logit; a wrong one drifts by more than 0.01.
"""

import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial

import pytest
import torch
from tiny import HEAD_DIM, HEADS, HIDDEN, INTERMEDIATE, KV_HEADS, tiny
from torch import Tensor, nn
from transformers import PreTrainedModel

from absorb.errors import AbsorbError
from absorb.families import FAMILIES, Family, UnsupportedFamilyError, family_of

UNCHANGED = 1e-5
CHANGED = 1e-2

Edit = Callable[[PreTrainedModel, Family], None]
Rows = Callable[[int], slice]


def for_each(families: Iterable[Family]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("family", list(families), ids=lambda family: family.model_type)


every_family = for_each(FAMILIES.values())
families_that_feed = for_each(family for family in FAMILIES.values() if family.feeds)
families_with_a_value_projection = for_each(
    family for family in FAMILIES.values() if family.value == "self_attn.v_proj"
)

# Which value channel each column of the output reads: the right order, in which a group of
# neighbouring query heads shares a KV head, and the wrong one, in which the KV heads take turns.
COLUMN = torch.arange(HEADS * HEAD_DIM)
BY_GROUPS = COLUMN // HEAD_DIM // (HEADS // KV_HEADS) * HEAD_DIM + COLUMN % HEAD_DIM
BY_TURNS = COLUMN // HEAD_DIM % KV_HEADS * HEAD_DIM + COLUMN % HEAD_DIM


def last(count: int) -> slice:
    return slice(-count, None)


def first(count: int) -> slice:
    return slice(count)


@torch.no_grad()
def drift(family: Family, tokens: Tensor, edit: Edit) -> float:
    """How far an edit moves the logits of the family's tiny model, relative to the largest one."""
    model = tiny(family.model_type)
    before = model(tokens).logits
    torch.manual_seed(0)
    edit(model, family)
    after = model(tokens).logits
    return ((after - before).abs().max() / before.abs().max()).item()


def decoder_layers(model: PreTrainedModel, family: Family) -> Iterator[nn.Module]:
    return model.get_submodule(family.layers).children()


def is_norm(module: nn.Module) -> bool:
    return type(module).__name__.endswith("RMSNorm") and module.weight.shape == (HIDDEN,)


def random_factors(count: int) -> Tensor:
    return torch.rand(count, dtype=torch.float64) * 4 + 0.25


# The smallest edits


def divide_rows(linear: nn.Linear, factors: Tensor, rows: slice) -> None:
    linear.weight[rows] /= factors[:, None]
    if linear.bias is not None:
        linear.bias[rows] /= factors


def divide_output(module: nn.Module, factors: Tensor, norm_offset: float) -> None:
    if isinstance(module, nn.Linear):
        divide_rows(module, factors, slice(None))
    elif isinstance(module, nn.Embedding):
        module.weight /= factors
    else:
        module.weight.copy_((module.weight + norm_offset) / factors - norm_offset)


def multiply_input(module: nn.Module, factors: Tensor) -> None:
    if isinstance(module, nn.Linear):
        module.weight *= factors
    else:
        module.register_forward_pre_hook(lambda _, inputs: (inputs[0] * factors, *inputs[1:]))


def add_bias(linear: nn.Linear, bias: Tensor, rows: slice) -> None:
    if linear.bias is None:
        linear.bias = nn.Parameter(linear.weight.new_zeros(linear.out_features))
    linear.bias[rows] += bias


# One edit for each claim that an entry makes


def rescale_stream(model: PreTrainedModel, family: Family) -> None:
    """Divide channel i of the stream by a factor wherever it is written; undo it at every read."""
    factors = random_factors(HIDDEN)
    divide_output(model.get_submodule(family.embedding), factors, family.norm_offset)
    multiply_input(model.get_submodule(family.final_norm), factors)
    for layer in decoder_layers(model, family):
        for name in family.writes:
            divide_output(layer.get_submodule(name), factors, family.norm_offset)
        for name in family.reads:
            multiply_input(layer.get_submodule(name), factors)


def smooth_norms(model: PreTrainedModel, family: Family) -> None:
    """Move a factor for each channel from every norm into the Linears that it feeds."""
    for layer in decoder_layers(model, family):
        for norm, linears in family.feeds:
            factors = random_factors(HIDDEN)
            divide_output(layer.get_submodule(norm), factors, family.norm_offset)
            for name in linears:
                multiply_input(layer.get_submodule(name), factors)


def smooth_values(
    model: PreTrainedModel, family: Family, rows: Rows = last, columns: Tensor = BY_GROUPS
) -> None:
    """Move a factor for each value channel into the columns that read it."""
    for layer in decoder_layers(model, family):
        factors = random_factors(KV_HEADS * HEAD_DIM)
        divide_rows(layer.get_submodule(family.value), factors, rows(len(factors)))
        multiply_input(layer.get_submodule(family.output), factors[columns])


def smooth_neurons(model: PreTrainedModel, family: Family, rows: Rows = last) -> None:
    """Move a factor for each neuron into the column that reads it."""
    for layer in decoder_layers(model, family):
        factors = random_factors(INTERMEDIATE)
        divide_rows(layer.get_submodule(family.up), factors, rows(len(factors)))
        multiply_input(layer.get_submodule(family.down), factors)


def fold_values(
    model: PreTrainedModel, family: Family, rows: Rows = last, columns: Tensor = BY_GROUPS
) -> None:
    """Add a constant to every value; take what it becomes out of the output's bias."""
    for layer in decoder_layers(model, family):
        constant = torch.randn(KV_HEADS * HEAD_DIM, dtype=torch.float64)
        output = layer.get_submodule(family.output)
        add_bias(layer.get_submodule(family.value), constant, rows(len(constant)))
        add_bias(output, -output.weight @ constant[columns], slice(None))


# Entries with one mistake


def without_each(family: Family, field: str) -> Iterator[Family]:
    names = getattr(family, field)
    for name in names:
        yield replace(family, **{field: tuple(other for other in names if other != name)})


def without_each_fed_linear(family: Family) -> Iterator[Family]:
    for position, (norm, linears) in enumerate(family.feeds):
        for name in linears:
            feeds = list(family.feeds)
            feeds[position] = (norm, tuple(other for other in linears if other != name))
            yield replace(family, feeds=tuple(feeds))


# The residual stream


@every_family
def test_rescaling_the_stream_where_the_entry_says_changes_nothing(
    family: Family, tokens: Tensor
) -> None:
    assert drift(family, tokens, rescale_stream) < UNCHANGED


@every_family
@pytest.mark.parametrize("field", ["reads", "writes"])
def test_leaving_out_any_read_or_write_shows(family: Family, field: str, tokens: Tensor) -> None:
    for wrong in without_each(family, field):
        assert drift(wrong, tokens, rescale_stream) > CHANGED, getattr(wrong, field)


@every_family
def test_the_wrong_norm_offset_shows(family: Family, tokens: Tensor) -> None:
    wrong = replace(family, norm_offset=1.0 - family.norm_offset)
    # OLMo 2 has no norm that feeds a Linear, but its norms write the stream.
    edit = smooth_norms if family.feeds else rescale_stream
    assert drift(wrong, tokens, edit) > CHANGED


@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text"])
def test_llamas_names_all_exist_in_gemma_and_are_wrong_there(
    model_type: str, tokens: Tensor
) -> None:
    wrong = replace(FAMILIES["llama"], model_type=model_type, norm_offset=1.0)
    assert drift(wrong, tokens, rescale_stream) > CHANGED


# The links that smoothing uses


@families_that_feed
def test_a_norm_feeds_the_named_linears_and_nothing_else(family: Family, tokens: Tensor) -> None:
    assert drift(family, tokens, smooth_norms) < UNCHANGED


@families_that_feed
def test_leaving_out_any_fed_linear_shows(family: Family, tokens: Tensor) -> None:
    for wrong in without_each_fed_linear(family):
        assert drift(wrong, tokens, smooth_norms) > CHANGED, wrong.feeds


@every_family
def test_every_norm_that_reads_the_stream_has_its_linears_named(family: Family) -> None:
    layer = next(decoder_layers(tiny(family.model_type), family))
    norms = {name for name in family.reads if is_norm(layer.get_submodule(name))}
    assert norms == {norm for norm, _ in family.feeds}


@every_family
@pytest.mark.parametrize("edit", [smooth_values, smooth_neurons])
def test_a_factor_moves_along_the_link_and_changes_nothing(
    family: Family, edit: Edit, tokens: Tensor
) -> None:
    assert drift(family, tokens, edit) < UNCHANGED


@every_family
@pytest.mark.parametrize("edit", [smooth_values, fold_values])
def test_the_wrong_order_of_heads_shows(family: Family, edit: Edit, tokens: Tensor) -> None:
    assert drift(family, tokens, partial(edit, columns=BY_TURNS)) > CHANGED


@families_with_a_value_projection
@pytest.mark.parametrize(
    ("mistake", "edit"),
    [
        ({"value": "self_attn.k_proj"}, smooth_values),
        ({"value": "self_attn.k_proj"}, fold_values),
        ({"up": "mlp.gate_proj"}, smooth_neurons),
    ],
    ids=["smooth keys", "fold keys", "smooth gate"],
)
def test_keys_in_place_of_values_or_the_gate_in_place_of_up_show(
    family: Family, mistake: dict[str, str], edit: Edit, tokens: Tensor
) -> None:
    assert drift(replace(family, **mistake), tokens, edit) > CHANGED


@pytest.mark.parametrize("edit", [smooth_values, fold_values, smooth_neurons])
def test_the_first_rows_of_a_fused_projection_are_neither_values_nor_up(
    edit: Edit, tokens: Tensor
) -> None:
    assert drift(FAMILIES["phi3"], tokens, partial(edit, rows=first)) > CHANGED


# The bias that stands for the sink's value


@every_family
def test_attention_weights_sum_to_one_so_a_constant_value_folds_into_the_output_bias(
    family: Family, tokens: Tensor
) -> None:
    assert drift(family, tokens, fold_values) < UNCHANGED


# Names, and what they name


@every_family
def test_every_name_resolves_to_a_module_of_the_right_kind(family: Family) -> None:
    model = tiny(family.model_type)
    assert isinstance(model.get_submodule(family.embedding), nn.Embedding)
    assert is_norm(model.get_submodule(family.final_norm))
    for layer in decoder_layers(model, family):
        for norm, linears in family.feeds:
            assert is_norm(layer.get_submodule(norm)), norm
            assert all(isinstance(layer.get_submodule(name), nn.Linear) for name in linears)
        for name in (family.value, family.output, family.up, family.down):
            assert isinstance(layer.get_submodule(name), nn.Linear), name
        for name in (*family.reads, *family.writes):
            module = layer.get_submodule(name)
            assert is_norm(module) or isinstance(module, nn.Linear), name


@every_family
def test_attention_holds_value_and_output_and_the_mlp_up_and_down(family: Family) -> None:
    layer = next(decoder_layers(tiny(family.model_type), family))
    for block, names in (
        (family.attention, (family.value, family.output)),
        (family.mlp, (family.up, family.down)),
    ):
        children = {*layer.get_submodule(block).children()}
        assert {layer.get_submodule(name) for name in names} <= children


@every_family
def test_a_config_finds_its_family(family: Family) -> None:
    assert family_of(tiny(family.model_type).config.model_type) is family


def test_an_unknown_family_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedFamilyError, match=r"'mamba'.*gemma2.*smollm3.*add an entry"):
        family_of("mamba")
    assert issubclass(UnsupportedFamilyError, AbsorbError)


def test_looking_up_a_family_does_not_import_torch() -> None:
    code = "import sys, absorb.families; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
