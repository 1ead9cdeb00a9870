"""Smoothing scales share the range between what is read and the matrix that reads it."""

from math import inf

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from absorb.fold import smoothing
from absorb.fold.graft import twin
from absorb.fold.smoothing import searched_scales, smooth, smoothing_scales
from absorb.models.decoder import Decoder, site_at
from absorb.models.families import FAMILIES
from absorb.quantize.grids import INT4_ROW, INT8_ROW, INT8_TENSOR, rounded
from absorb.quantize.rotation import rotated
from absorb.runtime.inputs import ROWS, input_peaks, power_mean, watching_inputs
from tests.helpers.tiny import HIDDEN, LAYERS, tiny

LLAMA = FAMILIES["llama"]
ORDERS = pytest.mark.parametrize("order", [2, inf])
NEURONS = 512
DOWN = "model.layers.0.mlp.down_proj"


def uneven(seed: int = 0) -> PreTrainedModel:
    """A model whose neurons are of very different sizes."""
    model = tiny("llama", torch.float32, intermediate_size=NEURONS)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.weight *= torch.randn(NEURONS, 1, generator=draw).exp2() ** 2
    return model


@pytest.mark.usefixtures("in_float32")
@ORDERS
def test_every_channel_is_read_as_large_as_its_weights_are(tokens: Tensor, order: float) -> None:
    model = uneven()
    before = input_peaks(Decoder(model, LLAMA), tokens, order=order)[DOWN]
    smooth(Decoder(model, LLAMA), smoothing_scales(Decoder(model, LLAMA), tokens, order=order))
    read = input_peaks(Decoder(model, LLAMA), tokens, order=order)[DOWN]
    weight = power_mean(model.get_submodule(DOWN).weight.detach(), order, 0)
    # Where the largest values count, only those that were as large as most already.
    judged = before >= (before.median() if order == inf else 0)
    ratio = (read / weight)[judged]
    torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=1e-3, atol=0)


@pytest.mark.usefixtures("in_float32")
@torch.no_grad()
def test_a_neuron_that_was_quiet_may_fire_on_other_text(tokens: Tensor) -> None:
    model = uneven()
    before = input_peaks(Decoder(model, LLAMA), tokens)[DOWN]
    quiet = before <= before.quantile(0.1)
    smooth(Decoder(model, LLAMA), smoothing_scales(Decoder(model, LLAMA), tokens))
    divisor = (before / input_peaks(Decoder(model, LLAMA), tokens)[DOWN])[quiet]
    as_loud_as_most = before.median() / divisor
    weight = model.get_submodule(DOWN).weight.detach().abs().amax(0)[quiet]
    assert (as_loud_as_most <= 1.001 * weight).all()  # read no larger than its weights are


@pytest.mark.parametrize("exponent", smoothing._ALPHAS)
@torch.no_grad()
def test_the_exponent_is_the_one_with_the_least_error(
    tokens: Tensor, exponent: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    def errors(decoder: Decoder, *_: object) -> dict[str, Tensor]:
        best = torch.tensor([float(tried != exponent) for tried in smoothing._ALPHAS])
        return {link: best[:, None].expand(-1, LAYERS) for link in decoder.family.links}

    model = uneven()
    monkeypatch.setattr(smoothing, "_errors", errors)
    found = searched_scales(Decoder(model, LLAMA), tokens)
    for link, scale in smoothing_scales(Decoder(model, LLAMA), tokens, exponent).items():
        assert torch.equal(found[link], scale)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma2"])
@torch.no_grad()
def test_the_errors_are_those_of_a_model_with_these_scales(
    tokens: Tensor, model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smoothing, "_EVERY", 1)
    family, model = FAMILIES[model_type], tiny(model_type)
    decoder = Decoder(model, family)
    scales = smoothing_scales(decoder, tokens)
    found = smoothing._errors(decoder, tokens, input_peaks(decoder, tokens), [scales])
    for link, readers in family.links.items():
        student = twin(Decoder(model, family)).model
        smooth(Decoder(student, family), {link: scales[link]})
        read: dict[str, Tensor] = {}
        with watching_inputs(Decoder(student, family), read.__setitem__):
            student.base_model(tokens)
        for layer in range(LAYERS):
            names = [Decoder(student, family).names(reader)[layer] for reader in readers]
            expected = sum(int8_error(read[name], site_at(student, name).weight) for name in names)
            assert float(found[link][0, layer]) == pytest.approx(float(expected), rel=1e-3)


def int8_error(inputs: Tensor, weight: Tensor) -> Tensor:
    on_grid = rounded(inputs, INT8_TENSOR) @ rounded(weight, INT8_ROW).T
    return (on_grid - inputs @ weight.T).square().sum()


@ORDERS
def test_what_is_read_is_measured(tokens: Tensor, order: float) -> None:
    """However uneven the parts are: there is one row more than is read at once."""
    rows = torch.cat([tokens, tokens.flip(1), tokens[:1].sort().values])
    assert len(rows) == ROWS + 1
    model, seen = uneven(), []
    linear = model.get_submodule("model.layers.0.self_attn.q_proj")
    linear.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    found = input_peaks(Decoder(model, LLAMA), rows, order=order)["model.layers.0.self_attn.q_proj"]
    read = torch.cat(seen)
    size = read.abs().amax(0) if order == inf else read.square().mean(0).sqrt()
    assert found.shape == (HIDDEN,)
    torch.testing.assert_close(found, size)


@torch.no_grad()
def test_root_mean_squares_are_better_for_what_is_rotated(tokens: Tensor) -> None:
    # On average: which values are the largest of a rotated row is up to chance.
    two, largest, without = (
        sum(rounding_error(uneven(seed), tokens, order) for seed in range(8))
        for order in (2, inf, None)
    )
    assert two < 0.95 * min(largest, without)


def rounding_error(model: PreTrainedModel, tokens: Tensor, order: float | None) -> float:
    """The mean squared error of one product in four bits, rotated, after smoothing."""
    seen: list[Tensor] = []
    down = model.get_submodule(DOWN)
    down.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    model(tokens)
    inputs, weight = seen[0], down.weight.detach()
    scale = torch.ones(NEURONS)
    if order is not None:
        scale = smoothing_scales(Decoder(model, LLAMA), tokens, order=order)["mlp.up_proj"][0]
    read, matrix = rotated(inputs / scale), rotated(weight * scale)
    product = rounded(read, INT4_ROW) @ rounded(matrix, INT4_ROW).T
    return float((product - inputs @ weight.T).square().mean())
