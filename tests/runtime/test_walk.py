"""Text that goes through a model layer by layer comes to the same as in the model itself."""

import weakref
from dataclasses import fields, replace

import pytest
import torch
from torch.testing import assert_close

from absorb.fold.graft import twin
from absorb.fold.smoothing import norms_of
from absorb.measure import score
from absorb.measure.outliers import measure
from absorb.measure.score import losses
from absorb.models.decoder import Decoder
from absorb.models.families import FAMILIES
from absorb.models.resting.streaming import Streaming
from absorb.runtime import precision
from absorb.runtime.hooks import watching, watching_attention
from absorb.runtime.precision import in_bf16
from absorb.runtime.reading import Subject
from absorb.runtime.walk import Walk, logits, read
from tests.helpers.tiny import tiny

CPU = torch.device("cpu")


def streamed(family: str) -> Subject:
    model = tiny(family, torch.float32)
    decoder = Decoder(model, FAMILIES[family])
    return Subject(
        decoder=Decoder(model, FAMILIES[family], Streaming(model, decoder.layers, CPU)),
        lead=torch.tensor([3, 1]),
    )


def text() -> torch.Tensor:
    return torch.randint(0, 60, (5, 12), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", sorted(FAMILIES))
@torch.no_grad()
def test_logits_are_those_of_the_model(family: str, in_float32: None) -> None:
    """Rows come in parts of two, the last of one. The same products are taken in the same order.

    Parts that are made smaller on their way ask for no embedding. Experts sum fewer tokens at once
    then, in another order: logits are about 1, and float32 has 1e-7 of that.
    """
    subject = streamed(family)
    expected = torch.cat([subject.logits(part) for part in text().split(2)])
    found = torch.cat([*logits(subject, text(), 2, "")])
    assert_close(found, expected, rtol=0, atol=1e-6)
    walk = Walk(subject.decoder, [subject.led(part) for part in text().split(2)])
    walk.pass_on(0)
    with watching(
        [subject.decoder.model.get_input_embeddings()], lambda *_: pytest.fail("it is asked")
    ):
        walk.split(1)
    for layer in range(1, len(subject.decoder.layers)):
        walk.pass_on(layer)
    found = torch.cat([walk.logits(place) for place in range(5)])[:, len(subject.lead) :]
    assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", sorted(FAMILIES))
@torch.no_grad()
def test_in_bfloat16_logits_are_those_of_a_copy(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "_bfloat16_is_fast", lambda device: True)
    with in_bf16(Decoder(tiny(family, torch.float32), FAMILIES[family])) as copy:
        resident = Subject(decoder=Decoder(copy, FAMILIES[family]))
        expected = torch.cat([*logits(resident, text(), 2, "")])
    subject = replace(streamed(family), lead=resident.lead)
    with in_bf16(subject.decoder):
        found = torch.cat([*logits(subject, text(), 2, "")])
    assert found.dtype == expected.dtype == torch.bfloat16
    assert torch.equal(found, expected)
    [after] = logits(subject, text(), 5, "")
    assert after.dtype == torch.float32


@pytest.mark.parametrize("hastened", [False, True])
@torch.no_grad()
def test_what_is_measured_is_the_same(hastened: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what the last layer gives too, though no norm reads that where weights stream."""
    monkeypatch.setattr(precision, "_bfloat16_is_fast", lambda device: hastened)
    subject = streamed("llama")
    resident = Decoder(tiny("llama", torch.float32), FAMILIES["llama"])
    first, second = (measure(one, text(), subject.lead) for one in (resident, subject.decoder))
    for field in fields(first):
        assert_close(getattr(second, field.name), getattr(first, field.name), rtol=0, atol=0)


@torch.no_grad()
def test_a_model_may_be_on_two_walks_at_once(in_float32: None) -> None:
    """As the original is, which is measured and teaches: a tied head is then there for both."""
    model = tiny("llama", torch.float32, tie_word_embeddings=True)
    layers = Decoder(model, FAMILIES["llama"]).layers
    decoder = Decoder(model, FAMILIES["llama"], Streaming(model, layers, CPU))
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    subject, led = Subject(decoder=decoder), Subject(decoder=decoder, lead=torch.tensor([3, 1]))
    expected = [subject.logits(text()), led.logits(text())]
    walks = [logits(one, text(), 2, "") for one in (subject, led)]
    found = [torch.cat(parts) for parts in zip(*zip(*walks, strict=True), strict=True)]
    for own, known in zip(found, expected, strict=True):
        assert_close(own, known, rtol=0, atol=1e-6)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.named_parameters())


@torch.no_grad()
def test_watchers_see_each_layer_of_each_part_and_nothing_else(in_float32: None) -> None:
    subject = streamed("llama")
    decoder = subject.decoder
    streams: list[tuple[int, int]] = []
    weights: list[int] = []
    with (
        watching(decoder.layers, lambda layer, stream: streams.append((layer, len(stream)))),
        watching_attention(decoder, lambda layer, _: weights.append(layer)),
    ):
        read(decoder, text().split(2), "")
    layers = range(len(decoder.layers))
    assert streams == [(layer, rows) for layer in layers for rows in (2, 2, 1)]
    assert weights == [layer for layer in layers for _ in range(3)]


def test_a_student_that_streams_rests_where_the_original_does() -> None:
    """Nothing is copied: not to the CPU, as transformers would, nor to the type of most weights."""
    decoder = streamed("llama").decoder
    down = decoder.layers[-1].mlp.down_proj.weight
    down.data = down.data.bfloat16()
    student = dict(twin(decoder).model.named_parameters())
    for name, parameter in decoder.model.named_parameters():
        assert student[name].dtype == parameter.dtype
        assert student[name].data_ptr() == parameter.data_ptr(), name


def test_norms_of_weights_take_one_walk(in_float32: None) -> None:
    decoder = streamed("llama").decoder
    asked: list[int] = []
    assert decoder.streaming is not None
    decoder.streaming.edits.append(asked.append)
    norms = norms_of(decoder)
    assert asked == [*range(len(decoder.layers))]
    assert norms.keys() == decoder.linears.keys()
    for name, linear in decoder.linears.items():
        assert torch.equal(norms[name], linear.weight.abs().amax(0))


@pytest.mark.parametrize("streams", [False, True])
def test_logits_of_a_part_are_gone_when_those_of_the_next_are_made(
    streams: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As far as figures need nothing of them but losses: on a GPU they take gigabytes."""
    subject = streamed("llama")
    if not streams:
        subject = Subject(decoder=Decoder(tiny("llama", torch.float32), FAMILIES["llama"]))
    head = subject.decoder.model.get_output_embeddings()
    made: list[weakref.ref[torch.Tensor]] = []

    def look(*_: object) -> None:
        assert all(logits() is None for logits in made)

    head.register_forward_pre_hook(look)
    head.register_forward_hook(lambda _, __, given: made.append(weakref.ref(given)))
    monkeypatch.setattr(score, "_TOKENS", 1)  # lest all rows be read at once
    assert len(losses(subject, text(), "")) == len(made) == 5
