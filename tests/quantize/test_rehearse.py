"""A rehearsal computes what quantisation would, trains what is stored, and leaves no trace."""

import copy
from itertools import cycle
from typing import get_args

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from absorb.fold.graft import twin
from absorb.measure.divergence import divergence
from absorb.models.decoder import Decoder
from absorb.models.families import FAMILIES
from absorb.quantize.formats import FORMATS
from absorb.quantize.simulate import quantized
from absorb.quantize.training import FORMAT_FOR, fake_quantized
from absorb.schema.settings import Distillation, Purpose
from absorb.tune.distill import distill
from absorb.tune.recipe import recipe
from tests.helpers.tiny import tiny
from tests.tune.test_distill import PREFIX, texts

PURPOSES = pytest.mark.parametrize("purpose", FORMAT_FOR)
# What is rounded depends on the family, and how on the purpose: every family has one purpose, and
# those whose matrices are of different kinds have all.
KINDS = ("llama", "gpt2", "mixtral")
CASES = {(name, purpose) for name in KINDS for purpose in FORMAT_FOR}
CASES |= set(zip(FAMILIES, cycle(FORMAT_FOR), strict=False))


def test_every_purpose_but_none_has_a_format() -> None:
    assert {*FORMAT_FOR, "none"} == set(get_args(Purpose))


@pytest.mark.parametrize(("model_type", "purpose"), sorted(CASES))
def test_a_rehearsal_is_what_it_is_for(model_type: str, purpose: Purpose, tokens: Tensor) -> None:
    model, family = tiny(model_type, torch.float32), FAMILIES[model_type]
    form = FORMATS[FORMAT_FOR[purpose]]
    ranges = {} if form.ranges is None else form.ranges(Decoder(model, family), tokens)
    with torch.no_grad(), quantized(Decoder(model, family), form, ranges):
        expected = model(tokens).logits
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with fake_quantized(Decoder(model, family), form, tokens):
        logits = model(tokens).logits
        logits.square().mean().backward()
    torch.testing.assert_close(logits, expected)  # another order of sums where experts are called
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    matrices = [p for p in model.parameters() if p.ndim > 1 and p.grad is not None]
    assert all(p.grad.isfinite().all() and p.grad.any() for p in matrices)


@PURPOSES
def test_a_student_learns_to_be_quantised(purpose: Purpose) -> None:
    teacher = tiny("llama", torch.float32)
    student = twin(Decoder(teacher, FAMILIES["llama"])).model
    family, form, text = FAMILIES["llama"], FORMATS[FORMAT_FOR[purpose]], texts()
    for up in (layer.mlp.up_proj for layer in student.model.layers):
        up.weight.data[0] *= 30  # one neuron far above the others: a coarse grid for all
    ranges = {} if form.ranges is None else form.ranges(Decoder(student, family), text.calibration)
    plain = copy.deepcopy(student)

    def gap(model: PreTrainedModel) -> float:
        with torch.no_grad(), quantized(Decoder(model, family), form, ranges):
            return divergence(
                Decoder(teacher, family), Decoder(model, family), PREFIX, text.validation
            )

    steps = {"nvfp4": 60, "w4a4": 60, "mxfp4": 100}.get(purpose, 30)  # four bits take longer
    fine_tune = recipe(Distillation(steps=steps, train="all", purpose=purpose), student.device)
    original = Decoder(teacher, family)
    distill(original, Decoder(plain, family), PREFIX, text, fine_tune, seed=0)
    with fake_quantized(Decoder(student, family), form, text.calibration):
        losses = distill(original, Decoder(student, family), PREFIX, text, fine_tune, seed=0)
    assert losses.kept > 0
    assert gap(student) < gap(plain)
