"""Fake quantisation gives what integer arithmetic gives, and leaves the model as it was."""

import copy
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from absorb.fold.graft import twin
from absorb.models.decoder import Decoder
from absorb.models.families import FAMILIES
from absorb.quantize import ranges as clipping
from absorb.quantize.formats import FORMATS, Format
from absorb.quantize.grids import INT4_ROW, INT8_ROW, INT8_TENSOR, rounded
from absorb.quantize.ranges import clipped_ranges
from absorb.quantize.simulate import quantized
from absorb.runtime.hooks import replacing_attention
from absorb.runtime.inputs import input_peaks
from absorb.schema.settings import FormatName
from tests.helpers.tiny import tiny

LLAMA = FAMILIES["llama"]
STATIC = FORMATS["w8a8-static"]

every_format = pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS.keys())


def integers(values: Tensor, step: Tensor) -> Tensor:
    return torch.clamp(torch.round(values / step), -127, 127).to(torch.int8)


@torch.no_grad()
def test_a_linear_computes_what_int8_arithmetic_would(tokens: Tensor) -> None:
    model = tiny("llama", torch.float32)
    name = "model.layers.1.mlp.gate_proj"
    linear = model.get_submodule(name)
    inputs = torch.randn(5, linear.in_features)
    peaks = input_peaks(Decoder(model, LLAMA), tokens)
    x_step, w_step = peaks[name].max() / 127, linear.weight.abs().amax(1, keepdim=True) / 127
    product = integers(inputs, x_step).int() @ integers(linear.weight, w_step).int().T
    with quantized(Decoder(model, LLAMA), STATIC, peaks):
        faked = linear(inputs)
    assert (faked - product * x_step * w_step.T).abs().max() < 1e-5 * faked.abs().max()


def test_the_grid_is_symmetric_and_reaches_to_the_peak() -> None:
    values = torch.linspace(-3, 3, 1001)
    grid = rounded(values, INT8_TENSOR, torch.tensor(2.0))
    assert grid.unique().numel() == 255
    assert grid.max() == -grid.min() == 2
    inside = values.abs() <= 2
    assert (grid - values)[inside].abs().max() <= 1 / 127 + 1e-6


def test_the_gradient_goes_straight_through_inside_the_grid() -> None:
    values = torch.tensor([-3.0, -1.0, 0.3, 2.5], requires_grad=True)
    out = rounded(values, INT8_TENSOR, torch.tensor(2.0))
    torch.testing.assert_close(
        out.detach(), rounded(values.detach(), INT8_TENSOR, torch.tensor(2.0))
    )
    out.backward(torch.arange(1.0, 5.0))
    assert values.grad is not None
    assert values.grad.tolist() == [0, 2, 3, 0]


def test_a_channel_of_zeros_stays_zero() -> None:
    assert not rounded(torch.zeros(3), INT8_TENSOR, torch.tensor(0.0)).any()


@torch.no_grad()
def test_peaks_are_the_largest_inputs(tokens: Tensor) -> None:
    model = tiny("llama", torch.float32)
    peaks = input_peaks(Decoder(model, LLAMA), tokens)
    assert peaks.keys() == Decoder(model, LLAMA).linears.keys()
    normed = model.model.layers[0].input_layernorm(model.model.embed_tokens(tokens))
    expected = normed.abs().flatten(0, 1).amax(0)
    torch.testing.assert_close(peaks["model.layers.0.self_attn.q_proj"], expected)


def ranges_of(form: Format, model: PreTrainedModel, tokens: Tensor) -> dict[str, Tensor]:
    family = FAMILIES[model.config.model_type]
    return {} if form.ranges is None else form.ranges(Decoder(model, family), tokens)


@every_format
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mixtral"])
@torch.no_grad()
def test_a_format_changes_the_model_for_a_while(
    model_type: str, form: Format, tokens: Tensor
) -> None:
    model, family = tiny(model_type, torch.float32), FAMILIES[model_type]
    before = model(tokens).logits
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    ranges = ranges_of(form, model, tokens)
    with quantized(Decoder(model, family), form, ranges):
        changed = (model(tokens).logits - before).abs().max()
    assert 0 < changed < 2 * before.abs().max()
    assert torch.equal(model(tokens).logits, before)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert not any("forward" in vars(module) for module in Decoder(model, family).experts.values())


@every_format
@torch.no_grad()
def test_a_linear_multiplies_a_rounded_input_by_a_rounded_weight(
    form: Format, tokens: Tensor
) -> None:
    model = tiny("llama", torch.float32)
    linear = model.get_submodule("model.layers.1.mlp.down_proj")
    weight, bias = linear.weight.clone(), linear.bias
    inputs = torch.randn(1, 5, linear.in_features, generator=torch.Generator().manual_seed(0))
    ranges = ranges_of(form, model, tokens)
    peak = ranges["model.layers.1.mlp.down_proj"].max() if ranges else None
    left = rounded(form.rotate(inputs), form.inputs, peak)
    expected = nn.functional.linear(left, rounded(form.rotate(weight), form.weights), bias)
    with quantized(Decoder(model, LLAMA), form, ranges):
        torch.testing.assert_close(linear(inputs), expected)


@torch.no_grad()
def test_a_failure_within_leaves_the_model_as_it_was(tokens: Tensor) -> None:
    model = tiny("llama", torch.float32)
    before = model(tokens).logits
    with pytest.raises(RuntimeError), quantized(Decoder(model, LLAMA), FORMATS["w4a4"], {}):
        raise RuntimeError
    assert torch.equal(model(tokens).logits, before)


@torch.no_grad()
def test_a_rotation_alone_changes_nothing(tokens: Tensor) -> None:
    fine = replace(INT8_ROW, top=2.0**22)  # as good as float32
    form = replace(FORMATS["w4a4-hadamard"], weights=fine, inputs=fine)
    for model_type in ("llama", "gpt2", "mixtral"):
        model = tiny(model_type, torch.float32)
        before = model(tokens).logits
        with quantized(Decoder(model, FAMILIES[model_type]), form, {}):
            torch.testing.assert_close(model(tokens).logits, before, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_rotation_helps_four_bits_against_an_outlier_channel(tokens: Tensor) -> None:
    model = tiny("llama", torch.float32)
    linear = model.get_submodule("model.layers.1.mlp.down_proj")
    inputs = torch.randn(1, 64, linear.in_features, generator=torch.Generator().manual_seed(0))
    inputs[..., 3] *= 50
    exact, errors = linear(inputs), []
    for name in ("w4a4", "w4a4-hadamard"):
        form = replace(FORMATS[name], weights=INT8_ROW)  # an outlier multiplies the weights' errors
        with quantized(Decoder(model, LLAMA), form, {}):
            errors.append(float((linear(inputs) - exact).square().mean()))
    assert errors[1] < errors[0] / 4


def test_every_name_has_a_format() -> None:
    assert tuple(FORMATS) == get_args(FormatName)
    assert len({form.label for form in FORMATS.values()}) == len(FORMATS)


@torch.no_grad()
def test_a_range_is_clipped_where_rare_values_cost_more_than_they_are_worth(tokens: Tensor) -> None:
    model = tiny("llama", torch.float32)
    peaks, ranges = (
        input_peaks(Decoder(model, LLAMA), tokens),
        clipped_ranges(Decoder(model, LLAMA), tokens),
    )
    assert peaks.keys() == ranges.keys()
    assert all(0 < ranges[name] <= peaks[name].max() * (1 + 1e-6) for name in peaks)
    # A channel that hardly matters would coarsen the grid of all.
    name = "model.layers.1.mlp.down_proj"
    down, seen = model.get_submodule(name), {}
    down.weight[:, 3] = 1e-6
    up = model.get_submodule("model.layers.1.mlp.up_proj")
    up.weight[3] *= 20
    watched = down.register_forward_pre_hook(lambda _, args: seen.update(inputs=args[0]))
    ranges = clipped_ranges(Decoder(model, LLAMA), tokens)
    watched.remove()
    inputs = seen["inputs"].flatten(0, 1)
    errors = [
        ((rounded(inputs, INT8_TENSOR, end) - inputs) @ down.weight.T).square().sum()
        for end in (ranges[name], inputs.abs().max())
    ]
    assert errors[0] < errors[1] / 10


@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe"])
def test_a_range_is_the_same_however_many_rows_are_read_at_once(
    model_type: str, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, family, rows = tiny(model_type), FAMILIES[model_type], tokens.view(4, 8)
    monkeypatch.setattr(clipping, "_TRIED", 9)  # every third token: not as many of every row
    found = []
    for at_once in (1, 3, 4):
        monkeypatch.setattr(clipping, "ROWS", at_once)
        found.append(clipped_ranges(Decoder(model, family), rows))
    for name, value in found[-1].items():
        assert all(float(ranges[name]) == pytest.approx(float(value)) for ranges in found)


@every_format
@pytest.mark.parametrize("model_type", ["llama", "opt", "qwen2_moe"])
@torch.no_grad()
def test_a_text_is_rounded_alike_whatever_texts_are_read_with_it(
    form: Format, model_type: str, tokens: Tensor
) -> None:
    # In OPT, and in experts, matrices are given the tokens of all texts in one row.
    model = tiny(model_type, torch.float64)
    model.get_input_embeddings().weight[tokens[1]] *= 7  # its first row has the smaller values
    decoder = Decoder(model, FAMILIES[model_type])
    ranges = {} if form.ranges is None else form.ranges(decoder, tokens)
    with quantized(decoder, form, ranges):
        together, alone = model(tokens[:2]).logits[0], model(tokens[:1]).logits[0]
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("absorbed", [False, True])
@torch.no_grad()
def test_a_stream_in_a_format_is_rounded_behind_every_layer(absorbed: bool, tokens: Tensor) -> None:
    model: Any = tiny("llama", torch.float32)
    expected = copy.deepcopy(model)
    model = twin(Decoder(model, LLAMA)).model if absorbed else model

    def halved(_: object, __: object, out: Tensor) -> Tensor:
        return out.half().float()

    for layer in expected.model.layers:
        layer.register_forward_hook(halved)
    with quantized(Decoder(model, LLAMA), FORMATS["stream-fp16"], {}):
        found = model(tokens, use_cache=False).logits
    torch.testing.assert_close(found, expected(tokens).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_what_does_not_fit_into_float16_is_no_number(tokens: Tensor) -> None:
    model = tiny("llama", torch.float32)
    model.model.layers[1].mlp.down_proj.weight *= 1e7
    assert model(tokens).logits.isfinite().all()
    with quantized(Decoder(model, LLAMA), FORMATS["stream-fp16"], {}):
        assert not model(tokens).logits.isfinite().all()


@pytest.mark.parametrize("absorbed", [False, True])
@torch.no_grad()
def test_attention_reads_the_rounded_keys_and_values_of_a_cache(
    absorbed: bool, tokens: Tensor
) -> None:
    model = tiny("llama", torch.float32)

    def attend(module: Any, query: Tensor, *pair: Tensor, **_: Any) -> tuple[Tensor, None]:
        keys, values = (
            rounded(part, INT4_ROW).repeat_interleave(module.num_key_value_groups, 1)
            for part in pair[:2]
        )
        out = nn.functional.scaled_dot_product_attention(query, keys, values, is_causal=True)
        return out.transpose(1, 2), None

    with replacing_attention(model, attend):
        expected = model(tokens, use_cache=False).logits
    subject = twin(Decoder(model, LLAMA)).model if absorbed else model
    plain = subject(tokens, use_cache=False).logits
    with quantized(Decoder(subject, LLAMA), FORMATS["cache-int4"], {}):
        found = subject(tokens, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, plain, atol=1e-2)
