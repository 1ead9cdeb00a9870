"""Sinks that were put into a scene are found again, by steps that know their derivatives."""

import pytest
import torch
from torch import Tensor

from absorb import fit
from absorb.families import FAMILIES
from absorb.scene import Scene
from absorb.sinks import fit_sinks, prefix_of
from tests.helpers.tiny import tiny

HEADS, KV_HEADS, WIDTH, LENGTH = 4, 2, 6, 24
GROUPS = HEADS // KV_HEADS


def scene(softcap: float | None = None) -> Scene:
    draw = torch.Generator().manual_seed(0)

    def heads(count: int) -> Tensor:
        return torch.randn(3, count, LENGTH, WIDTH, generator=draw, dtype=torch.float64)

    turns = torch.randn(LENGTH, WIDTH, WIDTH, generator=draw, dtype=torch.float64)

    def rotate(key_bias: Tensor) -> Tensor:
        return torch.einsum("hi,lij->hlj", key_bias, turns)[None]

    blocked = ~torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool).tril()
    kv = heads(KV_HEADS), heads(KV_HEADS)
    return Scene(heads(HEADS), *kv, blocked, WIDTH**-0.5, softcap, rotate)


def random_parameters(seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(KV_HEADS, GROUPS + 2 * WIDTH, generator=draw, dtype=torch.float64)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_the_derivatives_are_those_of_autograd(softcap: float | None) -> None:
    made, parameters = scene(softcap), random_parameters(1)
    target = torch.zeros_like(made.query)

    def outputs(parameters: Tensor) -> Tensor:
        return made.with_sink(*fit._split(parameters, GROUPS))

    jacobian = torch.autograd.functional.jacobian(outputs, parameters)
    curvature, slope = fit._normal(made, target, parameters, with_key_bias=True)
    for kv_head in range(KV_HEADS):
        mine = jacobian[..., kv_head, :].flatten(0, -2)
        torch.testing.assert_close(curvature[kv_head], mine.T @ mine)
        torch.testing.assert_close(slope[kv_head], mine.T @ outputs(parameters).flatten())


def test_steps_find_the_sink_that_was_put_there() -> None:
    made, truth = scene(), 0.3 * random_parameters(2)
    target = made.with_sink(*fit._split(truth, GROUPS))
    start = truth.clone()
    start[:, GROUPS:] = 0
    for _ in range(4):
        start = fit._descend(made, target, start, with_key_bias=True)
    torch.testing.assert_close(start, truth, atol=1e-4, rtol=1e-4)


def test_no_step_makes_the_output_worse() -> None:
    made, start = scene(), 5 * random_parameters(3)
    target = made.with_sink(*fit._split(random_parameters(4), GROUPS))
    before = fit._errors(made, target, start)
    after = fit._errors(made, target, fit._descend(made, target, start, with_key_bias=True))
    assert (after <= before).all()


def test_without_a_key_bias_there_is_none() -> None:
    made = scene()
    target = made.with_sink(*fit._split(random_parameters(5), GROUPS))
    start = torch.zeros(KV_HEADS, GROUPS + 2 * WIDTH, dtype=torch.float64)
    found = fit._descend(made, target, start, with_key_bias=False)
    assert not found[:, GROUPS + WIDTH :].any()
    assert found[:, : GROUPS + WIDTH].any()


def test_a_head_that_ignores_the_prefix_gets_a_finite_sink_that_takes_little() -> None:
    made = scene()
    made.query[..., 0] = 5
    keys = torch.zeros(KV_HEADS, 1, WIDTH, dtype=torch.float64)
    keys[..., 0] = -100
    prefix = fit.KeySink(keys=keys, values=1 + keys)
    layer, out = fit.fit_layer(made, prefix, with_key_bias=True)
    alone = made.mix(made.text_scores().softmax(-1), made.value)
    assert layer.logits.isfinite().all()
    assert (out - alone).abs().mean() < 1e-3


@torch.no_grad()
def test_the_error_of_a_layer_is_what_its_fit_leaves_out(tokens: Tensor) -> None:
    model = tiny("llama")
    fits = fit_sinks(model, FAMILIES["llama"], prefix_of(model, torch.tensor([1])), tokens)
    assert all(0 < fit.error < 1 for fit in fits)


@torch.no_grad()
def test_a_fit_that_leaves_out_too_much_is_none(tokens: Tensor) -> None:
    model, family = tiny("llama"), FAMILIES["llama"]
    prefix = prefix_of(model, torch.tensor([1, 9]))
    errors = [float(fit.error) for fit in fit_sinks(model, family, prefix, tokens)]
    worst = max(errors)
    layer = errors.index(worst)
    [*before, none] = fit_sinks(model, family, prefix, tokens, 0.999 * worst)[: layer + 1]
    assert none is None
    assert [float(fit.error) for fit in before] == errors[:layer]
    assert fit_sinks(model, family, prefix, tokens, 0.0) == [None] * len(errors)
