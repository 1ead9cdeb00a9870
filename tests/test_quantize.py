"""Fake quantisation gives what integer arithmetic gives, and leaves the model as it was."""

import torch
from tiny import tiny
from torch import Tensor, nn

from absorb.families import FAMILIES
from absorb.quantize import clipped_ranges, input_peaks, int8_static, rounded
from absorb.watch import linears_of

LLAMA = FAMILIES["llama"]


def integers(values: Tensor, step: Tensor) -> Tensor:
    return torch.clamp(torch.round(values / step), -127, 127).to(torch.int8)


@torch.no_grad()
def test_a_linear_computes_what_int8_arithmetic_would(tokens: Tensor) -> None:
    model = tiny("llama", torch.float32)
    name = "model.layers.1.mlp.gate_proj"
    linear = model.get_submodule(name)
    inputs = torch.randn(5, linear.in_features)
    peaks = input_peaks(model, LLAMA, tokens)
    x_step, w_step = peaks[name].max() / 127, linear.weight.abs().amax(1, keepdim=True) / 127
    product = integers(inputs, x_step).int() @ integers(linear.weight, w_step).int().T
    with int8_static(model, LLAMA, peaks):
        faked = linear(inputs)
    assert (faked - product * x_step * w_step.T).abs().max() < 1e-5 * faked.abs().max()


def test_the_grid_is_symmetric_and_reaches_to_the_peak() -> None:
    values = torch.linspace(-3, 3, 1001)
    grid = rounded(values, torch.tensor(2.0))
    assert grid.unique().numel() == 255
    assert grid.max() == -grid.min() == 2
    inside = values.abs() <= 2
    assert (grid - values)[inside].abs().max() <= 1 / 127 + 1e-6


def test_the_gradient_goes_straight_through_inside_the_grid() -> None:
    values = torch.tensor([-3.0, -1.0, 0.3, 2.5], requires_grad=True)
    out = rounded(values, torch.tensor(2.0))
    torch.testing.assert_close(out.detach(), rounded(values.detach(), torch.tensor(2.0)))
    out.backward(torch.arange(1.0, 5.0))
    assert values.grad is not None
    assert values.grad.tolist() == [0, 2, 3, 0]


def test_a_channel_of_zeros_stays_zero() -> None:
    assert not rounded(torch.zeros(3), torch.tensor(0.0)).any()


@torch.no_grad()
def test_peaks_are_the_largest_inputs(tokens: Tensor) -> None:
    model = tiny("llama", torch.float32)
    peaks = input_peaks(model, LLAMA, tokens)
    assert peaks.keys() == linears_of(model, LLAMA).keys()
    normed = model.model.layers[0].input_layernorm(model.model.embed_tokens(tokens))
    expected = normed.abs().flatten(0, 1).amax(0)
    torch.testing.assert_close(peaks["model.layers.0.self_attn.q_proj"], expected)


@torch.no_grad()
def test_the_model_is_left_as_it_was(tokens: Tensor) -> None:
    model = tiny("llama", torch.float32)
    before = model(tokens).logits
    peaks = input_peaks(model, LLAMA, tokens)
    with int8_static(model, LLAMA, peaks):
        assert not torch.equal(model(tokens).logits, before)
    assert torch.equal(model(tokens).logits, before)
    hooks = [m._forward_pre_hooks for m in model.modules() if isinstance(m, nn.Linear)]
    assert not any(hooks)


@torch.no_grad()
def test_a_range_is_clipped_where_rare_values_cost_more_than_they_are_worth(tokens: Tensor) -> None:
    model = tiny("llama", torch.float32)
    peaks, ranges = input_peaks(model, LLAMA, tokens), clipped_ranges(model, LLAMA, tokens)
    assert peaks.keys() == ranges.keys()
    assert all(0 < ranges[name] <= peaks[name].max() * (1 + 1e-6) for name in peaks)
    # A channel that hardly matters would coarsen the grid of all.
    name = "model.layers.1.mlp.down_proj"
    down, seen = model.get_submodule(name), {}
    down.weight[:, 3] = 1e-6
    up = model.get_submodule("model.layers.1.mlp.up_proj")
    up.weight[3] *= 20
    watched = down.register_forward_pre_hook(lambda _, args: seen.update(inputs=args[0]))
    ranges = clipped_ranges(model, LLAMA, tokens)
    watched.remove()
    inputs = seen["inputs"].flatten(0, 1)
    errors = [
        ((rounded(inputs, end) - inputs) @ down.weight.T).square().sum()
        for end in (ranges[name], inputs.abs().max())
    ]
    assert errors[0] < errors[1] / 10
