"""The rival rotates as QuaRot does, where its own implementation and paper say how."""

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from absorb.fold.graft import twin
from absorb.models.decoder import Decoder, site_at
from absorb.models.families import FAMILIES
from absorb.models.family import Family
from absorb.quantize.formats import FORMATS
from absorb.quantize.rotation import rotated
from absorb.quantize.simulate import quantized
from absorb.runtime.inputs import watching_inputs
from scripts.benchmarks.rivals.quarot import turn
from tests.helpers.tiny import HEAD_DIM, HIDDEN, tiny

LLAMA = FAMILIES["llama"]


@torch.no_grad()
def merged(model: PreTrainedModel) -> PreTrainedModel:
    """A Llama as QuaRot writes it: no weight in any norm, and one rotation for the whole stream.

    The values of a head are rotated by their matrix, and only what o_proj and down_proj read is
    rotated while the model runs.
    """
    stream, head = rotated(torch.eye(HIDDEN)), rotated(torch.eye(HEAD_DIM))
    model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight @ stream)
    into = [(model.model.norm, [model.lm_head])]
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        into += [
            (layer.input_layernorm, [attention.q_proj, attention.k_proj, attention.v_proj]),
            (layer.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj]),
        ]
        for writer in (attention.o_proj, mlp.down_proj):
            writer.weight.copy_(stream.T @ rotated(writer.weight))
            writer.register_forward_pre_hook(lambda _, args: (rotated(args[0]),))
        # What o_proj reads is rotated as the heads gave it, so it takes them back first.
        turned = attention.v_proj.weight.view(-1, HEAD_DIM, HIDDEN)
        attention.v_proj.weight.copy_((head.T @ turned).flatten(0, 1))
        attention.v_proj.register_forward_hook(
            lambda _, __, out: (out.unflatten(-1, (-1, HEAD_DIM)) @ head.T).flatten(-2)
        )
    for norm, readers in into:
        for reader in readers:
            reader.weight.copy_(reader.weight * norm.weight @ stream)
        norm.weight.fill_(1)
    return model


def read(model: PreTrainedModel, tokens: Tensor) -> dict[str, Tensor]:
    """What every Linear is given, under its name."""
    seen: dict[str, Tensor] = {}
    with watching_inputs(Decoder(model, LLAMA), lambda name, values: seen.update({name: values})):
        model(tokens)
    return seen


@torch.no_grad()
def test_all_that_is_rounded_is_what_a_merged_rotation_has(tokens: Tensor) -> None:
    ours = turn(twin(Decoder(tiny("llama", torch.float32), LLAMA))).model
    theirs = merged(tiny("llama", torch.float32))
    for name in Decoder(theirs, LLAMA).linears:
        torch.testing.assert_close(site_at(ours, name).weight, site_at(theirs, name).weight)
    found, expected = read(ours, tokens), read(theirs, tokens)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, rtol=1e-3, atol=1e-4)
    with (
        quantized(Decoder(ours, LLAMA), FORMATS["w4a4"], {}),
        quantized(Decoder(theirs, LLAMA), FORMATS["w4a4"], {}),
    ):
        logits = ours(tokens).logits, theirs(tokens).logits
    exact = theirs(tokens).logits
    assert (logits[0] - logits[1]).norm() < 0.1 * (logits[0] - exact).norm()


@pytest.mark.parametrize("name", ["llama", "gemma2", "phi3", "gpt2", "gpt_neox", "olmo2"])
@torch.no_grad()
def test_a_rotation_changes_all_weights_and_nothing_else(name: str, tokens: Tensor) -> None:
    family: Family = FAMILIES[name]
    model = twin(Decoder(tiny(name, torch.float32), family)).model
    before, weights = model(tokens).logits, {}
    for linear in Decoder(model, family).linears:
        weights[linear] = site_at(model, linear).weight.clone()
    turn(Decoder(model, family))
    torch.testing.assert_close(model(tokens).logits, before, rtol=1e-3, atol=1e-4)
    for linear, weight in weights.items():
        assert not torch.allclose(site_at(model, linear).weight, weight, atol=1e-3)
