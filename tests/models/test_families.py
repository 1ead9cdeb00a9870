"""Every entry of FAMILIES is true of the implementation in transformers, name by name.

Each claim is an edit of a tiny random model that leaves its logits alone if the entry is right.
RMSNorm and eager softmax compute in float32 even in a float64 model, so a right entry may
drift by some 1e-6 of the largest logit; a wrong one drifts by more than 0.01.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
from torch import Tensor, nn

from absorb.models.families import FAMILIES, INSIDE
from absorb.models.family import Family
from absorb.prove.edits import (
    Edit,
    by_turns,
    decoder_layers,
    first_rows,
    fold_values,
    is_norm,
    place_of,
    present,
    rescale_stream,
    shift_keys,
    smooth_neurons,
    smooth_norms,
    smooth_values,
    weight_of,
)
from absorb.prove.subject import CHANGED, UNCHANGED, without_each, without_each_fed
from tests.helpers.drifting import drift
from tests.helpers.tiny import HEADS, HIDDEN, kv_heads, tiny

# Where `up` is None, the Linear whose output passes an activation that is not homogeneous.
BENT = {
    "starcoder2": "mlp.c_fc",
    "arcee": "mlp.up_proj",
    "jais2": "mlp.up_proj",
    "nemotron": "mlp.up_proj",
    "apertus": "mlp.up_proj",
    "phi": "mlp.fc1",
    "gpt2": "mlp.c_fc",
    "gpt_neox": "mlp.dense_h_to_4h",
}


def for_each(admits: Callable[[Family], Any]) -> pytest.MarkDecorator:
    families = [f for f in (*FAMILIES.values(), *INSIDE.values()) if admits(f)]
    return pytest.mark.parametrize("family", families, ids=lambda family: family.model_type)


every_family = for_each(lambda family: True)
families_that_feed = for_each(lambda family: family.feeds)
families_that_smooth_neurons = for_each(lambda family: family.up)
families_with_learned_positions = for_each(lambda family: family.positions)
families_with_groups = for_each(lambda family: kv_heads(family.model_type) < HEADS)
families_with_a_fused_projection = for_each(lambda family: family.value == family.key)
families_with_fused_gate_and_up = for_each(lambda family: "gate_up" in (family.up or ""))


# The residual stream


@every_family
def test_rescaling_the_stream_where_the_entry_says_changes_nothing(
    family: Family, tokens: Tensor
) -> None:
    assert drift(family, tokens, rescale_stream) < UNCHANGED


@every_family
@pytest.mark.parametrize("field", ["reads", "writes"])
def test_leaving_out_any_read_or_write_shows(family: Family, field: str, tokens: Tensor) -> None:
    for name, wrong in without_each(family, field):
        assert drift(wrong, tokens, rescale_stream) > CHANGED, name


@families_with_learned_positions
def test_leaving_out_the_table_of_positions_shows(family: Family, tokens: Tensor) -> None:
    assert drift(replace(family, positions=None), tokens, rescale_stream) > CHANGED


def scales_a_norm(family: Family) -> bool:
    return bool(family.feeds) or any("norm" in name for name in family.writes)


@for_each(scales_a_norm)
def test_the_wrong_norm_offset_shows(family: Family, tokens: Tensor) -> None:
    wrong = replace(family, norm_offset=1.0 - family.norm_offset)
    # OLMo 2 has no norm that feeds a Linear, but its norms write the stream.
    edit = smooth_norms if family.feeds else rescale_stream
    assert drift(wrong, tokens, edit) > CHANGED


@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text", "glm4"])
def test_llamas_names_of_the_stream_all_exist_elsewhere_and_are_wrong_there(
    model_type: str, tokens: Tensor
) -> None:
    llama, right = FAMILIES["llama"], FAMILIES[model_type]
    wrong = replace(right, reads=llama.reads, writes=llama.writes)
    assert drift(wrong, tokens, rescale_stream) > CHANGED


# The links that smoothing uses


@families_that_feed
def test_a_norm_feeds_what_is_named_and_nothing_else(family: Family, tokens: Tensor) -> None:
    # A state is added up in float32, whatever the type of the model.
    unchanged = 10 * UNCHANGED if family.attention in family.some else UNCHANGED
    assert drift(family, tokens, smooth_norms) < unchanged


@families_that_feed
def test_leaving_out_any_reader_of_a_norm_shows(family: Family, tokens: Tensor) -> None:
    for name, wrong in without_each_fed(family):
        assert drift(wrong, tokens, smooth_norms) > CHANGED, name


@every_family
def test_every_norm_with_a_weight_that_reads_the_stream_has_its_readers_named(
    family: Family,
) -> None:
    layer = next(decoder_layers(tiny(family.model_type), family, *family.reads))
    norms = {name for name in family.reads if is_norm(place_of(layer, name))}
    weighted = {name for name in norms if hasattr(place_of(layer, name), "weight")}
    assert weighted == {norm for norm, _ in family.feeds}


@every_family
def test_a_factor_moves_from_values_to_the_output(family: Family, tokens: Tensor) -> None:
    assert drift(family, tokens, smooth_values) < UNCHANGED


@families_that_smooth_neurons
def test_a_factor_moves_from_a_neuron_to_its_column(family: Family, tokens: Tensor) -> None:
    assert drift(family, tokens, smooth_neurons) < UNCHANGED


@pytest.mark.parametrize("model_type", BENT)
def test_no_factor_moves_through_an_activation_that_is_not_homogeneous(
    model_type: str, tokens: Tensor
) -> None:
    wrong = replace(FAMILIES[model_type], up=BENT[model_type])
    assert drift(wrong, tokens, smooth_neurons) > CHANGED


@families_with_groups
@pytest.mark.parametrize("edit", [smooth_values, fold_values])
def test_the_wrong_order_of_heads_shows(family: Family, edit: Edit, tokens: Tensor) -> None:
    assert drift(family, tokens, partial(edit, columns=by_turns)) > CHANGED


@for_each(lambda family: family.value == "self_attn.v_proj")
@pytest.mark.parametrize("edit", [smooth_values, fold_values])
def test_keys_in_place_of_values_show(family: Family, edit: Edit, tokens: Tensor) -> None:
    assert drift(replace(family, value="self_attn.k_proj"), tokens, edit) > CHANGED


@for_each(lambda family: family.up == "mlp.up_proj")
def test_the_gate_in_place_of_up_shows(family: Family, tokens: Tensor) -> None:
    assert drift(replace(family, up="mlp.gate_proj"), tokens, smooth_neurons) > CHANGED


@families_with_a_fused_projection
@pytest.mark.parametrize("edit", [smooth_values, fold_values])
def test_the_first_rows_of_a_fused_projection_are_not_values(
    family: Family, edit: Edit, tokens: Tensor
) -> None:
    assert drift(family, tokens, partial(edit, rows=first_rows)) > CHANGED


@families_with_a_fused_projection
@pytest.mark.parametrize("edit", [smooth_values, fold_values])
def test_the_wrong_layout_of_a_fused_projection_shows(
    family: Family, edit: Edit, tokens: Tensor
) -> None:
    wrong = replace(family, interleaved=not family.interleaved)
    assert drift(wrong, tokens, edit) > CHANGED


@families_with_fused_gate_and_up
def test_the_first_rows_of_gate_and_up_are_the_gate(family: Family, tokens: Tensor) -> None:
    assert drift(family, tokens, partial(smooth_neurons, rows=first_rows)) > CHANGED


# The biases that stand for the sink's value and key


@for_each(lambda family: not family.gated)
def test_attention_weights_sum_to_one_so_a_constant_value_folds_into_the_output_bias(
    family: Family, tokens: Tensor
) -> None:
    assert drift(family, tokens, fold_values) < UNCHANGED


@for_each(lambda family: family.gated)
def test_no_constant_value_passes_a_gate(family: Family, tokens: Tensor) -> None:
    assert drift(family, tokens, fold_values) > CHANGED


@for_each(lambda family: family.some)
def test_some_layers_lack_each_of_these_places_and_some_have_it(family: Family) -> None:
    layers = [*decoder_layers(tiny(family.model_type), family)]
    for name in family.some:
        having = [layer for layer in layers if present(layer, family, (name,))]
        assert 0 < len(having) < len(layers), name


@families_with_learned_positions
def test_a_constant_key_changes_nothing_where_nothing_rotates(
    family: Family, tokens: Tensor
) -> None:
    assert drift(family, tokens, shift_keys) < UNCHANGED


@families_with_learned_positions
def test_rows_that_are_not_keys_show(family: Family, tokens: Tensor) -> None:
    wrong = replace(family, key=family.value, key_block=1)
    assert drift(wrong, tokens, shift_keys) > CHANGED


# Names, and what they name


@every_family
def test_every_name_resolves_to_a_place_of_the_right_kind(family: Family) -> None:
    model = tiny(family.model_type)
    assert isinstance(place_of(model, family.embedding), nn.Embedding)
    assert family.positions is None or isinstance(place_of(model, family.positions), nn.Embedding)
    assert is_norm(place_of(model, family.final_norm))
    for layer in decoder_layers(model, family):
        places = present(layer, family, family.reads + family.writes)
        norms = [name for name in places if is_norm(place_of(layer, name))]
        assert {norm for norm, _ in family.feeds} <= {*norms}
        matrices = {name for readers in family.links.values() for name in readers}
        matrices |= {family.value, family.output, family.up or family.down, family.down}
        matrices |= {name for name in places if name not in norms}
        matrices = {*present(layer, family, tuple(matrices))}
        assert all(weight_of(layer, name).ndim >= 2 for name in matrices)
        assert all(
            weight_of(layer, name).shape[-2] == HIDDEN for name in matrices & {*family.writes}
        )


@every_family
def test_attention_holds_value_and_output(family: Family) -> None:
    layer = next(decoder_layers(tiny(family.model_type), family, family.attention))
    children = {*place_of(layer, family.attention).children()}
    assert {place_of(layer, family.value), place_of(layer, family.output)} <= children
