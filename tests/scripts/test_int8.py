"""Fake INT8 reaches every matrix of a layer but a router, and leaves nothing behind."""

import pytest
import torch
from torch import Tensor

from absorb.models.decoder import Decoder
from absorb.models.families import FAMILIES
from absorb.models.family import Family
from absorb.prove.edits import decoder_layers, present, weight_of
from absorb.quantize.formats import FORMATS
from absorb.quantize.simulate import quantized
from absorb.runtime.inputs import input_peaks
from tests.helpers.tiny import tiny

ROUTERS = {
    "mlp.gate",
    "mlp.router.gate",
    "block_sparse_moe.router",
    "feed_forward.gate",
    "feed_forward.router",
}


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())
@torch.no_grad()
def test_every_matrix_is_rounded_for_a_while(family: Family, tokens: Tensor) -> None:
    model = tiny(family.model_type)
    before = model(tokens).logits
    named = {name for readers in family.links.values() for name in readers} | {family.down}
    peaks = input_peaks(Decoder(model, family), tokens)
    with quantized(Decoder(model, family), FORMATS["w8a8-static"], peaks):
        for layer in decoder_layers(model, family):
            for name in present(layer, family, tuple(named - ROUTERS)):
                rows = weight_of(layer, name).flatten(0, -2)
                levels = rows / rows.abs().amax(1, True) * 127
                torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-4)
        rounded = model(tokens).logits
    assert 0 < (rounded - before).abs().max() < before.abs().max()
    assert torch.equal(model(tokens).logits, before)
