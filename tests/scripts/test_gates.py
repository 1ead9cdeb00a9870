"""What the trial of gates compares is what it says."""

import torch
from torch import Tensor

from absorb.fold.gates import RANK, gated_norms
from absorb.fold.graft import graft
from absorb.fold.plan import STREAM, Plan
from absorb.models.decoder import Decoder
from absorb.models.families import FAMILIES
from absorb.quantize.formats import FORMATS
from absorb.quantize.simulate import quantized
from absorb.runtime.reading import Subject
from scripts.trials.gates import apart, penalised, tie_channels
from tests.helpers.plans import neutral_plan
from tests.helpers.tiny import HIDDEN, LAYERS, tiny

OUTLIERS = [7, 30]
LLAMA = FAMILIES["llama"]


def planned() -> tuple[Decoder, Plan]:
    decoder = Decoder(tiny("llama"), LLAMA)
    draw = torch.Generator().manual_seed(1)
    rows = torch.randn(LAYERS, RANK, HIDDEN, generator=draw) / 6
    gates = dict.fromkeys(gated_norms(decoder), rows)
    order = {STREAM: torch.randperm(HIDDEN, generator=draw)}
    return decoder, neutral_plan(LLAMA, gates=gates, orders=order)


@torch.no_grad()
def test_outlier_channels_apart_are_the_same_function_and_are_not_rounded(tokens: Tensor) -> None:
    decoder, plan = planned()
    decoder.model.get_input_embeddings().weight[:, OUTLIERS] = 30.0
    student = graft(decoder, plan)

    def error() -> float:
        with quantized(student, FORMATS["mxfp4"], {}):
            return float((student.model(tokens).logits - exact).square().mean())

    exact = student.model(tokens).logits
    whole = error()
    with apart(student, plan, OUTLIERS):
        torch.testing.assert_close(student.model(tokens).logits, exact, rtol=0, atol=1e-6)
        assert error() < whole
    assert torch.equal(student.model(tokens).logits, exact)


def test_a_scalar_gate_learns_one_number_for_all_channels(tokens: Tensor) -> None:
    student = graft(*planned())
    tie_channels(student)
    parameters = [p for n, p in student.model.named_parameters() if n.endswith("gate_out")]
    step = torch.optim.AdamW(parameters, lr=1e-2)
    for _ in range(2):
        student.model(tokens).logits[..., 5].square().mean().backward()
        step.step()
    for parameter in parameters:
        assert parameter.any()
        assert torch.equal(parameter, parameter[:, :1].expand_as(parameter))


def test_a_penalty_on_peaks_has_a_gradient_of_its_own(tokens: Tensor) -> None:
    decoder, plan = planned()
    student = graft(decoder, plan)
    weight = student.layers[0].mlp.up_proj.weight
    both = Subject(decoder=decoder), Subject(decoder=student)
    slopes = []
    for share in (0.0, 0.1):
        student.model.zero_grad()
        loss = penalised(*both, share)(tokens)
        loss.backward()
        slopes.append(weight.grad.clone())
        assert loss > share  # log(peak / rms) is above zero
    assert not torch.allclose(*slopes)
