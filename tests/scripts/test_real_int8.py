"""Real INT8 arithmetic gives what our fake quantiser says of it."""

import copy

import pytest
import torch
from torch import Tensor

from absorb.fold.graft import twin
from absorb.models.decoder import Decoder
from absorb.models.families import FAMILIES
from absorb.quantize.formats import FORMATS
from absorb.quantize.simulate import quantized
from absorb.runtime.inputs import input_peaks
from tests.helpers.tiny import tiny

pytest.importorskip("torchao")
LLAMA = FAMILIES["llama"]


@pytest.mark.parametrize("absorbed", [False, True])
@pytest.mark.parametrize("static", [False, True])
@torch.no_grad()
def test_integers_give_what_fake_quantisation_does(
    static: bool, absorbed: bool, tokens: Tensor
) -> None:
    from scripts.benchmarks.int8.arithmetic import size, to_int8

    model = tiny("llama", torch.float32)
    model = twin(Decoder(model, LLAMA)).model if absorbed else model
    peaks = input_peaks(Decoder(model, LLAMA), tokens)
    form, exact = FORMATS["w8a8-static" if static else "w8a8-token"], model(tokens).logits
    with quantized(Decoder(model, LLAMA), form, peaks if static else {}):
        faked = model(tokens).logits
    real = copy.deepcopy(model)
    to_int8(real, LLAMA, peaks if static else None, reduced=False)
    found = real(tokens).logits
    # Scales of torchao are the largest magnitude over 127.5 and ours that over 127, so the two
    # round some values apart; but both are as far from the model.
    errors = [float((logits - exact).norm()) for logits in (found, faked)]
    assert errors[0] == pytest.approx(errors[1], rel=0.15)
    assert 0 < errors[0] < 0.05 * float(exact.norm())
    weights = sum(linear.weight.numel() for linear in Decoder(model, LLAMA).linears.values())
    assert size(model) - 3 * weights < size(real) < size(model) - 2.5 * weights


@torch.no_grad()
def test_a_reduced_range_is_half_as_fine(tokens: Tensor) -> None:
    from scripts.benchmarks.int8.arithmetic import to_int8

    model = tiny("llama", torch.float32)
    peaks, exact = input_peaks(Decoder(model, LLAMA), tokens), model(tokens).logits
    errors = []
    for reduced in (False, True):
        real = copy.deepcopy(model)
        to_int8(real, LLAMA, peaks, reduced=reduced)
        errors.append(float((real(tokens).logits - exact).abs().mean()))
    assert 1.5 < errors[1] / errors[0] < 3
