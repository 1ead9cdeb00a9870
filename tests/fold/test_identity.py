"""What claims to be exact is exact, in every family.

The tiny models are float64, but stock norms and the eager softmax compute in float32 inside, so
logits agree to a few 1e-7 at best. The mistakes these tests are for move them by 0.01 and more.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from absorb.fold.graft import graft, twin
from absorb.fold.plan import Plan
from absorb.fold.sinks import choose
from absorb.fold.sinks.choose import fit_sinks
from absorb.fold.sinks.prefix_cache import prefix_of, prefixed
from absorb.fold.smoothing import searched_scales, smooth
from absorb.models.decoder import Decoder
from absorb.models.families import FAMILIES
from absorb.models.family import Family
from absorb.prove.edits import decoder_layers, has, weight_of
from absorb.runtime.hooks import replacing_attention
from absorb.runtime.precision import as_stored
from absorb.runtime.reading import led
from absorb.schema.findings import Removal, SpikeNeuron
from absorb.schema.settings import Sink
from tests.helpers.plans import neutral_plan, plan_of
from tests.helpers.tiny import HIDDEN, LAYERS, NOTHING, POSITIONS, attending, tiny


def those(
    admits: Callable[[Family], object], among: Iterable[Family] = FAMILIES.values()
) -> pytest.MarkDecorator:
    families = [family for family in among if admits(family)]
    return pytest.mark.parametrize("family", families, ids=lambda family: family.model_type)


def kind_of(family: Family) -> tuple[object, ...]:
    """All that an entry says of what a sink or a scale has to do with, but the names of norms."""
    attends = (family.attention in family.some, family.gated, family.positions, family.rotation)
    keys = (family.key, family.key_block, family.key_norm, family.interleaved, family.grouped)
    return (*attends, *keys, family.norm_offset, len(family.writes), "experts" in family.down)


# The first of each kind: where all that follows is the same for families of a kind.
KINDS = [*{kind_of(family): family for family in reversed(FAMILIES.values())}.values()]

EVERY = those(lambda family: True)
# In some every layer attends, in others some hand on a state, which keys and values cannot bring.
ATTEND = those(lambda family: family.attention not in family.some)
HAND_ON = those(lambda family: family.attention in family.some)
# A gate behind the heads lets no constant value pass.
UNGATED = those(lambda family: not family.gated)
BOTH_FORMS = those(
    lambda family: family.attention not in family.some and not family.gated, among=KINDS
)
EACH_KIND = those(lambda family: True, among=KINDS)
LEARNED_POSITIONS = pytest.mark.parametrize("family", [FAMILIES["gpt2"], FAMILIES["opt"]])
TIED = pytest.mark.parametrize(
    "model_type", ["llama", "gemma2", "gpt2", "opt", "cohere", "olmo", "nemotron"]
)
TOLERANCE = 1e-5


def tolerance(family: Family) -> float:
    """Delta rules add up a state in float32, token by token: transformers 5.17 is 4e-5 off."""
    return 1e-4 if "linear_attn.out_proj" in family.some else TOLERANCE


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Routers and states are float32 even here, and would be hastened like any other float32."""
    monkeypatch.setattr(choose, "autocast_bf16", lambda device: nullcontext())


def drift(after: Tensor, before: Tensor) -> float:
    """The largest difference, relative to the largest logit."""
    return float((after - before).abs().max() / before.abs().max())


def powers_of_two() -> Tensor:
    draw = torch.Generator().manual_seed(1)
    return 2.0 ** torch.randint(-3, 6, (HIDDEN,), generator=draw)


@EVERY
@torch.no_grad()
def test_a_neutral_twin_is_the_stock_model(family: Family, tokens: Tensor) -> None:
    model = tiny(family.model_type)
    assert (
        drift(twin(Decoder(model, family)).model(tokens).logits, model(tokens).logits) < TOLERANCE
    )


@EVERY
@torch.no_grad()
def test_residual_scales_change_nothing(family: Family, tokens: Tensor) -> None:
    model = tiny(family.model_type)
    student = graft(Decoder(model, family), neutral_plan(family, residual=powers_of_two())).model
    assert drift(student(tokens).logits, model(tokens).logits) < tolerance(family)


@pytest.mark.parametrize(
    ("dtype", "family"),
    [
        pytest.param(dtype, family, id=f"{dtype}-{family.model_type}")
        for dtype, families in ((torch.bfloat16, FAMILIES.values()), (torch.float32, KINDS))
        for family in families
    ],
)
@torch.no_grad()
def test_residual_scales_are_exact_to_the_bit(
    dtype: torch.dtype, family: Family, tokens: Tensor
) -> None:
    model = tiny(family.model_type, torch.float32)
    plain, scaled = (
        twin(Decoder(model, family)).model,
        graft(Decoder(model, family), neutral_plan(family, residual=powers_of_two())).model,
    )
    for student in (plain, scaled):
        as_stored(Decoder(student, family), dtype)
    assert torch.equal(scaled(tokens).logits, plain(tokens).logits)


@EVERY
@torch.no_grad()
def test_a_forgotten_reader_of_the_scaled_stream_is_noticed(family: Family, tokens: Tensor) -> None:
    model = tiny(family.model_type)
    wrong = replace(family, reads=family.reads[1:])
    student = graft(Decoder(model, wrong), neutral_plan(family, residual=powers_of_two())).model
    assert drift(student(tokens).logits, model(tokens).logits) > 0.01


@EVERY
@torch.no_grad()
def test_smoothing_changes_nothing(family: Family, tokens: Tensor) -> None:
    model = tiny(family.model_type)
    student = twin(Decoder(model, family)).model
    scales = searched_scales(Decoder(student, family), tokens)
    assert max(float(scale.max() / scale.min()) for scale in scales.values()) > 2
    smooth(Decoder(student, family), scales)
    assert drift(student(tokens).logits, model(tokens).logits) < tolerance(family)


@ATTEND
@torch.no_grad()
def test_constant_keys_and_values_are_the_prefix(family: Family, tokens: Tensor) -> None:
    model = tiny(family.model_type)
    prefix = prefix_of(Decoder(model, family), torch.tensor([1, 9]))
    with prefixed(Decoder(model, family), prefix):
        positions = prefix.positions(tokens.shape[1])
        absorbed = model(tokens, position_ids=positions, use_cache=False).logits
    read = model(led(tokens, prefix.tokens)).logits[:, 2:]
    assert drift(absorbed, read) < TOLERANCE
    assert drift(model(tokens).logits, read) > 0.01


@contextmanager
def last_output(model: PreTrainedModel, family: Family) -> Iterator[list[Tensor]]:
    """What the last layer's attention writes, in every forward pass."""
    outputs: list[Tensor] = []
    last = Decoder(model, family).each(family.output)[-1]
    handle = last.register_forward_hook(lambda _, args, out: outputs.append(out))
    yield outputs
    handle.remove()


def attended(model: PreTrainedModel, family: Family, tokens: Tensor) -> Tensor:
    with last_output(model, family) as outputs:
        model(tokens)
    return outputs[0]


def planned(
    model: PreTrainedModel, family: Family, form: Sink, tokens: Tensor, most: float = 0.05
) -> Plan:
    """A plan of nothing but sinks, for a prefix of two tokens."""
    return plan_of(
        Decoder(model, family), NOTHING, torch.ones(HIDDEN), (1, 9), tokens, 0.0, form, most
    )


@UNGATED
@torch.no_grad()
def test_the_grafted_model_does_what_the_fit_did(family: Family, tokens: Tensor) -> None:
    """Logits, values and key biases land in the right rows of the right modules."""
    model = tiny(family.model_type)
    prefix = prefix_of(Decoder(model, family), torch.tensor([1, 9]))
    with last_output(model, family) as fitted:
        sinks = fit_sinks(Decoder(model, family), prefix, tokens)
    fits = [sink for sink in sinks if sink]
    assert all(sink.error < 1 for sink in fits)
    assert any(bool(sink.key_bias.any()) for sink in fits) == (family.key is not None)
    # Sinks are float32 in the student, and float64 in the fit.
    plan = neutral_plan(family, prefix=(1, 9), sinks=sinks)
    assert (
        drift(attended(graft(Decoder(model, family), plan).model, family, tokens), fitted[0]) < 1e-4
    )
    values_for_keys = replace(family, key=family.key and family.value, key_block=1)
    wrong = attended(graft(Decoder(model, values_for_keys), plan).model, family, tokens)
    assert family.key is None or drift(wrong, fitted[0]) > 1e-2


@BOTH_FORMS
@torch.no_grad()
def test_keys_in_some_layers_do_what_the_fit_of_the_others_reckoned_with(
    family: Family, tokens: Tensor
) -> None:
    model = tiny(family.model_type)
    prefix = prefix_of(Decoder(model, family), torch.tensor([1, 9]))
    errors = [float(fit.error) for fit in fit_sinks(Decoder(model, family), prefix, tokens)]
    with last_output(model, family) as fitted:
        plan = planned(model, family, "auto", tokens, 0.999 * max(errors))
    assert errors.index(max(errors)) in plan.keyed_layers
    assert 0 < len(plan.keyed_layers) < LAYERS
    assert [error > 0 for error in plan.fit_error] == [
        layer not in plan.keyed_layers for layer in range(LAYERS)
    ]
    student = graft(Decoder(model, family), plan).model
    assert drift(attended(student, family, tokens), fitted[-1]) < 1e-4
    before = student(tokens).logits
    smooth(Decoder(student, family), searched_scales(Decoder(student, family), tokens))
    assert drift(student(tokens).logits, before) < TOLERANCE


@EACH_KIND
@torch.no_grad()
def test_keys_in_every_layer_are_the_form_key(family: Family, tokens: Tensor) -> None:
    model = tiny(family.model_type)
    auto, key = (
        graft(Decoder(model, family), planned(model, family, form, tokens, 0.0)).model
        for form in ("auto", "key")
    )
    assert auto.config.absorb == key.config.absorb
    weights = key.state_dict()
    assert auto.state_dict().keys() == weights.keys()
    assert all(torch.equal(auto.state_dict()[name], weights[name]) for name in weights)


@LEARNED_POSITIONS
@torch.no_grad()
def test_text_starts_at_the_position_where_it_stood_behind_the_prefix(
    family: Family, tokens: Tensor
) -> None:
    model, plan = tiny(family.model_type), neutral_plan(family, prefix=(1, 9))
    behind = model(tokens, position_ids=torch.arange(2, 2 + tokens.shape[1])[None]).logits
    student = graft(Decoder(model, family), plan).model
    assert drift(student(tokens).logits, behind) < TOLERANCE
    assert student.config.max_position_embeddings == POSITIONS - 2
    last = torch.full((1, POSITIONS - 2), 5)
    assert torch.isfinite(student(last).logits).all()
    wrong = replace(family, position_offset=family.position_offset + 3)
    assert drift(graft(Decoder(model, wrong), plan).model(tokens).logits, behind) > 0.01
    forgotten = replace(family, positions=None)
    assert drift(graft(Decoder(model, forgotten), plan).model(tokens).logits, behind) > 0.01


@LEARNED_POSITIONS
@torch.no_grad()
def test_without_rotation_one_token_is_absorbed_exactly(family: Family, tokens: Tensor) -> None:
    model = tiny(family.model_type)
    sinks = fit_sinks(
        Decoder(model, family), prefix_of(Decoder(model, family), torch.tensor([1])), tokens
    )
    student = graft(Decoder(model, family), neutral_plan(family, prefix=(1,), sinks=sinks)).model
    teacher = model(led(tokens, torch.tensor([1]))).logits[:, 1:]
    assert drift(student(tokens).logits, teacher) < TOLERANCE
    assert drift(model(tokens).logits, teacher) > 0.01
    values_for_keys = replace(family, key=family.value, key_block=1)
    for wrong in (values_for_keys, replace(family, positions=None)):
        other = graft(Decoder(model, wrong), neutral_plan(family, prefix=(1,), sinks=sinks)).model
        assert drift(other(tokens).logits, teacher) > 0.01


@TIED
@torch.no_grad()
def test_a_tied_embedding_stays_tied_and_has_no_scale(model_type: str, tokens: Tensor) -> None:
    family, model = FAMILIES[model_type], tiny(model_type, tie_word_embeddings=True)
    student = graft(Decoder(model, family), neutral_plan(family, residual=powers_of_two())).model
    assert drift(student(tokens).logits, model(tokens).logits) < TOLERANCE
    assert student.get_output_embeddings().weight is student.get_input_embeddings().weight
    assert type(student.get_input_embeddings()) is type(model.get_input_embeddings())


@EVERY
@torch.no_grad()
def test_one_neuron_goes_and_the_stock_model_stays_as_it_was(family: Family) -> None:
    model = tiny(family.model_type)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    stock = [neurons(layer, family) for layer in decoder_layers(model, family)]
    neuron = len(stock[1]) - 5  # of the last expert, where there are several
    spike = SpikeNeuron(layer=1, neuron=neuron, contribution=1.0)
    removal = Removal(spike=spike, divergence=0.0)
    student = graft(Decoder(model, family), neutral_plan(family, removals=(removal,))).model
    stock[1][neuron] = 0
    left = [neurons(layer, family) for layer in decoder_layers(student, family)]
    assert all(torch.equal(*pair) for pair in zip(left, stock, strict=True))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def neurons(layer: torch.nn.Module, family: Family) -> Tensor:
    """What each neuron writes, expert after expert: (neurons, hidden)."""
    places = [family.down, *(family.dense[1:] if family.dense else ())]
    name = next(name for name in places if has(layer, family, name))
    return weight_of(layer, name).movedim(-1, -2).reshape(-1, HIDDEN).clone()


def test_watching_attention_leaves_no_trace(tokens: Tensor) -> None:
    model = tiny("llama")
    before = model.config._attn_implementation
    with replacing_attention(model, lambda *args, **kwargs: None):
        assert model.config._attn_implementation != before
    assert model.config._attn_implementation == before


@ATTEND
@torch.no_grad()
def test_the_key_form_is_the_teacher(family: Family, tokens: Tensor) -> None:
    is_the_teacher(family, (1, 9), tokens)


@pytest.mark.slow
@those(lambda family: family.attention not in family.some, among=KINDS)
@torch.no_grad()
def test_the_key_form_of_one_token_is_the_teacher(family: Family, tokens: Tensor) -> None:
    is_the_teacher(family, (1,), tokens)


def is_the_teacher(family: Family, prefix: tuple[int, ...], tokens: Tensor) -> None:
    """Keys, values, residual scales and smoothing together: nothing but a prefix less to read."""
    model = tiny(family.model_type)
    start = 0 if family.positions else -len(prefix)
    constants = prefix_of(Decoder(model, family), torch.tensor(prefix), start)
    plan = neutral_plan(family, prefix=prefix, sinks=constants.layers, residual=powers_of_two())
    student = graft(Decoder(model, family), plan).model
    smooth(Decoder(student, family), searched_scales(Decoder(student, family), tokens))
    behind = model(led(tokens, constants.tokens)).logits[:, len(prefix) :]
    assert drift(student(tokens).logits, behind) < TOLERANCE
    assert drift(model(tokens).logits, behind) > 0.01


@HAND_ON
@torch.no_grad()
def test_where_layers_hand_on_a_state_the_key_form_is_the_prefix_to_those_that_attend(
    family: Family, tokens: Tensor
) -> None:
    """The others start from nothing, as they do without a prefix; scales are for all layers."""
    model = tiny(family.model_type)
    decoder = Decoder(model, family)
    constants, moved = (prefix_of(decoder, torch.tensor([1, 9]), start) for start in (-2, 0))
    assert [i for i, sink in enumerate(constants.layers) if sink] == attending(family)
    with prefixed(decoder, moved):
        behind = model(tokens, position_ids=moved.positions(tokens.shape[1]), use_cache=False)
    plan = neutral_plan(family, prefix=(1, 9), sinks=constants.layers, residual=powers_of_two())
    student = graft(decoder, plan).model
    smooth(Decoder(student, family), searched_scales(Decoder(student, family), tokens))
    assert drift(student(tokens).logits, behind.logits) < tolerance(family)
    assert drift(model(tokens).logits, behind.logits) > 0.01
    for reader in (name for readers in family.links.values() for name in readers):
        for name in decoder.names(reader):
            changed = Decoder(student, family).named(name).weight
            assert not torch.equal(changed, decoder.named(name).weight), name
