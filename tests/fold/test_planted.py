"""Planted truth: a sink, a spike neuron and an outlier channel that were put there are found.

The plant works as in real models. A channel that is large on every token makes all queries alike. A
neuron that fires on BOS alone writes a massive activation; keys read it, so that every head of the
layers above gives BOS most of its weight.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from absorb.fold.graft import graft
from absorb.fold.residual import residual_scales
from absorb.measure.divergence import divergence
from absorb.measure.findings import find
from absorb.measure.outliers import measure
from absorb.models.decoder import Decoder
from absorb.models.families import family_of
from absorb.prove.edits import place_of, weight_of
from absorb.runtime.reading import led
from absorb.schema.findings import Findings
from absorb.schema.settings import Thresholds
from tests.helpers.plans import plan_of
from tests.helpers.tiny import HEAD_DIM, HEADS, INTERMEDIATE, LAYERS, tiny

BOS, DETECTOR, MASSIVE, OUTLIER, NEURON = 1, 3, 5, 7, 11
EXPERT = 2
LARGE = 40.0
NOTHING = torch.tensor([], dtype=torch.long)
FAMILIES = pytest.mark.parametrize(
    "model_type",
    [
        "llama",
        "mistral",
        "qwen2",
        "ernie4_5",
        "stablelm",
        "gemma",
        "starcoder2",
        "cohere",
        "cohere2",
        "mixtral",
        "qwen2_moe",
    ],
)


@pytest.fixture
def text() -> Tensor:
    draw = torch.Generator().manual_seed(2)
    return torch.randint(3, 64, (16, 24), generator=draw)


@torch.no_grad()
def planted(model_type: str) -> PreTrainedModel:
    model = tiny(model_type, torch.float32)
    family = family_of(model_type)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.fill_(1 - family.norm_offset)
        elif name.endswith(("q_proj.bias", "k_proj.bias")):
            parameter.zero_()
    embedding = model.get_input_embeddings().weight
    embedding[:, [DETECTOR, MASSIVE]] = 0
    embedding[:, OUTLIER] = LARGE
    embedding[BOS, DETECTOR] = LARGE
    for layer in model.model.layers:
        for write in family.writes:
            weight_of(layer, write)[..., [DETECTOR, MASSIVE, OUTLIER], :] = 0
            bias = getattr(place_of(layer, write), "bias", None)
            if bias is not None:
                bias[[DETECTOR, MASSIVE, OUTLIER]] = 0
        plant_sink(layer.self_attn, SLOW.get(model_type, HEAD_DIM // 2 - 1))
    PLANT.get(model_type, plant_gated)(model.model.layers[0].mlp)
    return model


def detects(rows: Tensor) -> None:
    """Rows of weights that give 0 for every token but BOS, behind a LayerNorm too."""
    rows[:] = 0
    rows[..., DETECTOR], rows[..., MASSIVE] = 10, -10


def writes(rows: Tensor, size: float) -> None:
    """Columns of weights, as rows, that write a massive activation."""
    rows[:] = 0
    rows[..., MASSIVE] = size


def plant_gated(mlp: torch.nn.Module) -> None:
    detects(mlp.gate_proj.weight[NEURON])
    detects(mlp.up_proj.weight[NEURON])
    writes(mlp.down_proj.weight[:, NEURON], 20)


def plant_ungated(mlp: torch.nn.Module) -> None:
    detects(mlp.c_fc.weight[NEURON])
    mlp.c_fc.bias[NEURON] = 0
    writes(mlp.c_proj.weight[:, NEURON], 800)


def plant_expert(mlp: torch.nn.Module) -> None:
    """One neuron of one expert, to which the router sends BOS."""
    gate_up = mlp.experts.gate_up_proj[EXPERT].view(2, INTERMEDIATE, -1)
    detects(gate_up[:, NEURON])
    mlp.gate.weight[:, DETECTOR] = 0
    mlp.gate.weight[EXPERT, DETECTOR] = 10
    writes(mlp.experts.down_proj[EXPERT, :, NEURON], 20)


PLANT = {"starcoder2": plant_ungated, "mixtral": plant_expert, "qwen2_moe": plant_expert}
PLANTED = dict.fromkeys(("mixtral", "qwen2_moe"), EXPERT * INTERMEDIATE + NEURON)
# Behind their LayerNorms the planted neuron fires louder.
HUGE = {"cohere", "cohere2", "stablelm"}
# Some turn neighbouring channels, the others channels that are half a head apart.
SLOW = dict.fromkeys(("cohere", "cohere2", "ernie4_5"), HEAD_DIM - 2)


def plant_sink(attention: torch.nn.Module, channel: int) -> None:
    """Queries read the outlier channel alone, keys the massive one, where RoPE hardly turns."""
    slow = torch.arange(channel, attention.q_proj.out_features, HEAD_DIM)
    attention.q_proj.weight.zero_()
    attention.q_proj.weight[slow, OUTLIER] = 0.7
    slow = slow[: attention.k_proj.out_features // HEAD_DIM]
    attention.k_proj.weight[:, [OUTLIER, DETECTOR, MASSIVE]] = 0
    attention.k_proj.weight[slow, MASSIVE] = 0.7
    attention.v_proj.weight[:, OUTLIER] = 0


def found_in(model: PreTrainedModel, text: Tensor, lead: Tensor, **changes: float) -> Findings:
    family = family_of(model.config.model_type.removeprefix("absorb_"))
    return find(measure(Decoder(model, family), text, lead), replace(Thresholds(), **changes))


@FAMILIES
def test_what_was_planted_is_found(model_type: str, text: Tensor) -> None:
    planted_neuron = PLANTED.get(model_type, NEURON)
    found = found_in(planted(model_type), text, torch.tensor([BOS]))
    assert [(spike.layer, spike.neuron) for spike in found.spike_neurons] == [(0, planted_neuron)]
    [massive] = found.massive_activations
    assert (massive.position, massive.channel) == (0, MASSIVE)
    assert massive.layers == tuple(range(LAYERS))
    heads = {(head.layer, head.head) for head in found.sink_heads}
    assert heads == {(layer, head) for layer in range(1, LAYERS) for head in range(HEADS)}
    assert [channel.channel for channel in found.outlier_channels] == [OUTLIER]


@FAMILIES
def test_nothing_is_found_where_nothing_was_planted(model_type: str, text: Tensor) -> None:
    found = found_in(tiny(model_type, torch.float32), text, torch.tensor([BOS]))
    assert not found.massive_activations
    assert not found.spike_neurons
    assert not found.outlier_channels


def test_thresholds_decide(text: Tensor) -> None:
    model, lead = planted("llama"), torch.tensor([BOS])
    assert not found_in(model, text, lead, massive_value=1e6).massive_activations
    assert not found_in(model, text, lead, sink_weight=0.999).sink_heads
    assert not found_in(model, text, lead, channel_ratio=1e4).outlier_channels


@FAMILIES
@torch.no_grad()
def test_what_was_planted_is_absorbed(model_type: str, text: Tensor) -> None:
    model, family = planted(model_type), family_of(model_type)
    measurement = measure(Decoder(model, family), text, torch.tensor([BOS]))
    findings = find(measurement, Thresholds())
    scales = residual_scales(measurement, findings, target=1)
    plan = plan_of(Decoder(model, family), findings, scales, (BOS,), text, budget=1e-6)
    assert [removal.spike.neuron for removal in plan.removals] == [PLANTED.get(model_type, NEURON)]
    assert plan.residual[OUTLIER] in (16, 32, 64, 128, 256)
    # A massive activation near the end of float16's range, as some are here, is scaled as well.
    near = (measurement.channel_peak > 2**15).nonzero().flatten().tolist()
    assert near == ([MASSIVE] if model_type in HUGE else [])
    assert (plan.residual != 1).nonzero().flatten().tolist() == [*near, OUTLIER]

    student = graft(Decoder(model, family), plan).model
    left = found_in(student, text, NOTHING)
    assert not left.massive_activations
    assert not left.spike_neurons
    assert not left.outlier_channels

    teacher = model(led(text, torch.tensor([BOS]))).logits[:, 1:].log_softmax(-1)
    alone = model(text).logits.log_softmax(-1)
    gap = (student(text).logits.log_softmax(-1) - teacher).abs().max()
    # The planted logit is as constant as the norm of a token: it varies by a few parts in a
    # thousand, and so does what a constant in its place gives.
    assert gap < 0.02
    assert (alone - teacher).abs().max() > 10 * gap


@torch.no_grad()
def test_keys_are_kept_where_no_logit_fits_and_only_there(text: Tensor) -> None:
    model, family, fitted, unseen = planted("llama"), family_of("llama"), text[:12], text[12:]
    # On its first channel RoPE turns a whole radian per token, and so this sink comes and goes.
    plant_sink(model.model.layers[1].self_attn, 0)
    found = found_in(model, fitted, torch.tensor([BOS]))
    nothing = torch.ones(model.config.hidden_size)
    logit, auto = (
        plan_of(Decoder(model, family), found, nothing, (BOS,), fitted, budget=1e-6, form=form)
        for form in ("logit", "auto")
    )
    assert logit.keyed_layers == ()
    assert auto.keyed_layers == (1,)
    left = [
        divergence(
            Decoder(model, family), graft(Decoder(model, family), plan), torch.tensor([BOS]), unseen
        )
        for plan in (logit, auto)
    ]
    assert left[1] < 0.1 * left[0]
