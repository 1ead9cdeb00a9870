"""Inside a mixture of experts: what its neurons are, how they mix, and what INT8 does to them."""

import pytest
import torch
from edits import decoder_layers, place_of, weight_of
from tiny import EXPERTS, INTERMEDIATE, tiny
from torch import Tensor
from transformers import AutoModelForCausalLM

from absorb.experts import experts_of, mixed, neurons_of
from absorb.families import FAMILIES, Family
from absorb.graft import twin
from absorb.quantize import input_peaks, int8_static

MIXTURES = [family for family in FAMILIES.values() if "experts" in family.down]
every_mixture = pytest.mark.parametrize("family", MIXTURES, ids=lambda family: family.model_type)


@every_mixture
@torch.no_grad()
def test_neurons_and_their_mixture_are_those_of_the_stock_experts(
    family: Family, tokens: Tensor
) -> None:
    model = tiny(family.model_type)
    seen: list[tuple[tuple[Tensor, ...], Tensor]] = []
    for module in experts_of(model, family).values():
        module.register_forward_hook(lambda _, args, out: seen.append((args, out)))
    model(tokens)
    for module, (args, out) in zip(experts_of(model, family).values(), seen, strict=True):
        stream, chosen, share = args
        neurons = neurons_of(module, stream, chosen)
        assert neurons.shape == (tokens.numel(), EXPERTS, INTERMEDIATE)
        assert (neurons.abs().sum(-1) > 0).sum() == chosen.numel()
        torch.testing.assert_close(mixed(module, neurons, chosen, share), out)


@every_mixture
@torch.no_grad()
def test_peaks_tell_the_experts_apart(family: Family, tokens: Tensor) -> None:
    model = tiny(family.model_type)
    peaks = input_peaks(model, family, tokens)
    for up, down in experts_of(model, family):
        assert peaks[up].shape == (model.config.hidden_size,)
        assert peaks[down].shape == (EXPERTS, INTERMEDIATE)
        assert len(peaks[down].unique()) > EXPERTS


@every_mixture
@torch.no_grad()
def test_int8_rounds_experts_and_lets_them_be_as_they_were(family: Family, tokens: Tensor) -> None:
    model = tiny(family.model_type)
    before = model(tokens).logits
    layer = next(decoder_layers(model, family))
    with int8_static(model, family, input_peaks(model, family, tokens)):
        for name in (family.up, family.down):
            steps = [len(row.unique()) for row in weight_of(layer, name).flatten(0, -2)]
            assert max(steps) <= 255
        rounded = model(tokens).logits
        # No hook reaches what lies between up and down: the whole forward is replaced.
        assert "forward" in vars(place_of(layer, family.down.rpartition(".")[0]))
    assert 0 < (rounded - before).abs().max() < before.abs().max()
    assert torch.equal(model(tokens).logits, before)


@every_mixture
def test_a_twin_has_the_fast_experts_of_its_stock_model(family: Family) -> None:
    config = tiny(family.model_type).config
    config._experts_implementation = None
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    assert model.config._experts_implementation == "grouped_mm"
    student = twin(model, family)
    assert student.config._experts_implementation == "grouped_mm"
    fresh = type(student)(type(student.config)(**student.config.to_dict()))
    assert fresh.config._experts_implementation == "grouped_mm"
