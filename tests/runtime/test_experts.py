"""Inside a mixture of experts: what its neurons are, how they mix, and what INT8 does to them."""

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from absorb.fold.graft import twin
from absorb.measure.outliers import measure
from absorb.models.decoder import Decoder
from absorb.models.families import FAMILIES
from absorb.models.family import Family
from absorb.quantize.formats import FORMATS
from absorb.quantize.simulate import quantized
from absorb.runtime.experts import mixed, neurons_of
from absorb.runtime.inputs import input_peaks
from tests.helpers.tiny import EXPERTS, INTERMEDIATE, tiny

MIXTURES = [family for family in FAMILIES.values() if "experts" in family.down]
every_mixture = pytest.mark.parametrize("family", MIXTURES, ids=lambda family: family.model_type)


@every_mixture
@torch.no_grad()
def test_neurons_and_their_mixture_are_those_of_the_stock_experts(
    family: Family, tokens: Tensor
) -> None:
    model = tiny(family.model_type)
    seen: list[tuple[tuple[Tensor, ...], Tensor]] = []
    for module in Decoder(model, family).experts.values():
        module.register_forward_hook(lambda _, args, out: seen.append((args, out)))
    model(tokens)
    for module, (args, out) in zip(Decoder(model, family).experts.values(), seen, strict=True):
        stream, chosen, share = args
        neurons = neurons_of(module, stream, chosen)
        assert neurons.shape == (tokens.numel(), EXPERTS, INTERMEDIATE)
        assert (neurons.abs().sum(-1) > 0).sum() == chosen.numel()
        torch.testing.assert_close(mixed(module, neurons, chosen, share), out)


@every_mixture
@torch.no_grad()
def test_neurons_are_seen_under_autocast_too(family: Family, tokens: Tensor) -> None:
    model = tiny(family.model_type, torch.float32)
    exact = input_peaks(Decoder(model, family), tokens)
    with torch.autocast("cpu", torch.bfloat16):
        coarse = input_peaks(Decoder(model, family), tokens)
        measured = measure(Decoder(model, family), tokens, tokens[0, :0])
    first = next(down for _, down in Decoder(model, family).experts)
    # All but a few: rounding sends a token that stands between two experts to the other.
    near = (coarse[first] - exact[first]).abs() < 0.1 * exact[first].max()
    assert near.float().mean() > 0.95
    assert measured.neuron_peak.shape[1] == EXPERTS * INTERMEDIATE


@every_mixture
@torch.no_grad()
def test_peaks_tell_the_experts_apart(family: Family, tokens: Tensor) -> None:
    model = tiny(family.model_type)
    peaks = input_peaks(Decoder(model, family), tokens)
    for up, down in Decoder(model, family).experts:
        assert peaks[up].shape == (model.config.hidden_size,)
        assert peaks[down].shape == (EXPERTS, INTERMEDIATE)
        assert len(peaks[down].unique()) > EXPERTS


@every_mixture
@torch.no_grad()
def test_int8_rounds_what_lies_between_up_and_down(family: Family, tokens: Tensor) -> None:
    model = tiny(family.model_type)
    peaks = input_peaks(Decoder(model, family), tokens)
    coarse = {**peaks, **{down: 1000 * peaks[down] for _, down in Decoder(model, family).experts}}
    logits = []
    for ranges in (peaks, coarse):
        with quantized(Decoder(model, family), FORMATS["w8a8-static"], ranges):
            logits.append(model(tokens).logits)
    assert (logits[0] - logits[1]).abs().max() > 0.01 * logits[0].abs().max()


@every_mixture
def test_a_twin_has_the_fast_experts_of_its_stock_model(family: Family) -> None:
    config = tiny(family.model_type).config
    config._experts_implementation = None
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    assert model.config._experts_implementation == "grouped_mm"
    student = twin(Decoder(model, family)).model
    assert student.config._experts_implementation == "grouped_mm"
    fresh = type(student)(type(student.config)(**student.config.to_dict()))
    assert fresh.config._experts_implementation == "grouped_mm"
