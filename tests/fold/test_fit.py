"""Sinks that were put into a scene are found again, and no head is worse off than without any."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from absorb.fold.sinks import constants, key_bias
from absorb.fold.sinks.attention import LayerAttention, Rotate
from absorb.fold.sinks.choose import fit_sinks
from absorb.fold.sinks.fit import sink_of
from absorb.fold.sinks.forms import KeySink, LogitSink
from absorb.fold.sinks.prefix_cache import prefix_of
from absorb.models.decoder import Decoder
from absorb.models.families import FAMILIES
from absorb.models.modeling_absorb import NEUTRAL
from tests.helpers.tiny import tiny

HEADS, KV_HEADS, WIDTH, LENGTH = 4, 2, 6, 24
GROUPS = HEADS // KV_HEADS


class Turns(Rotate):
    """Any turns (rows or 1, length, width, width), where RoPE has those by an angle."""

    def __init__(self, turns: Tensor) -> None:
        super().__init__(nn.Identity(), None, LENGTH)
        self.turns = turns

    @property
    def rows(self) -> int:
        return len(self.turns)

    def of_row(self, row: int) -> Rotate:
        return Turns(self.turns[[row % self.rows]])

    def __call__(self, key_bias: Tensor) -> Tensor:
        return torch.einsum("hi,rlij->rhlj", key_bias, self.turns)


def scene(softcap: float | None = None, apart: bool = False) -> LayerAttention:
    """Random attention; with `apart` each row has positions, and so rotations, of its own."""
    draw = torch.Generator().manual_seed(0)

    def heads(count: int) -> Tensor:
        return torch.randn(3, count, LENGTH, WIDTH, generator=draw, dtype=torch.float64)

    sizes = (3 if apart else 1, LENGTH, WIDTH, WIDTH)
    rotate = Turns(torch.randn(sizes, generator=draw, dtype=torch.float64))

    blocked = ~torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool).tril()
    kv = heads(KV_HEADS), heads(KV_HEADS)
    return LayerAttention(heads(HEADS), *kv, blocked, WIDTH**-0.5, softcap, rotate)


def random_parameters(seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(KV_HEADS, GROUPS + 2 * WIDTH, generator=draw, dtype=torch.float64)


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_the_derivatives_are_those_of_autograd(softcap: float | None, apart: bool) -> None:
    made, parameters = scene(softcap, apart), random_parameters(1)
    target = torch.zeros_like(made.query)
    weight = torch.rand(3, LENGTH, generator=torch.Generator().manual_seed(7), dtype=torch.float64)

    def outputs(parameters: Tensor) -> Tensor:
        return made.with_sink(*constants.split(parameters, GROUPS))

    jacobian = torch.autograd.functional.jacobian(outputs, parameters)
    curvature, slope = key_bias._normal(made, target, weight, parameters)
    counts = weight[:, None, :, None].expand_as(target).flatten()
    for kv_head in range(KV_HEADS):
        mine = jacobian[..., kv_head, :].flatten(0, -2)
        weighted = mine.T * counts
        torch.testing.assert_close(curvature[kv_head], weighted @ mine)
        torch.testing.assert_close(slope[kv_head], weighted @ outputs(parameters).flatten())


class Sizes(TorchDispatchMode):
    """Notes how many numbers the largest tensor has that is made."""

    largest = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):  # type: ignore
        found = operation(*args, **kwargs or {})
        made = [one for one in pytree.tree_leaves(found) if isinstance(one, Tensor)]
        self.largest = max([self.largest, *(one.numel() for one in made)])
        return found


def test_the_weights_of_all_rows_are_never_there_at_once(in_float32: None) -> None:
    """A fit would need most memory for them."""
    length, rows = 96, 8
    model = tiny("llama", torch.float32, max_position_embeddings=4 * length)
    decoder = Decoder(model, FAMILIES["llama"])
    tokens = torch.randint(0, 60, (rows, length), generator=torch.Generator().manual_seed(0))
    prefix = prefix_of(decoder, torch.tensor([1]))
    with Sizes() as sizes:
        fit_sinks(decoder, prefix, tokens)
    one = decoder.heads[0] * length**2
    assert one <= sizes.largest < rows * one / 2  # the mask of all rows is among them


def descend(made: LayerAttention, target: Tensor, start: Tensor) -> Tensor:
    """Steps from `start`, free to leave any head worse off than a constant would."""
    free = torch.full((HEADS,), torch.inf, dtype=torch.float64)
    return key_bias.descended(made, target, start, free)[0]


def test_steps_find_the_sink_that_was_put_there() -> None:
    made, truth = scene(), 0.3 * random_parameters(2)
    target = made.with_sink(*constants.split(truth, GROUPS))
    start = truth.clone()
    start[:, GROUPS:] = 0
    for _ in range(4):
        start = descend(made, target, start)
    torch.testing.assert_close(start, truth, atol=1e-4, rtol=1e-4)


def test_constants_find_the_logits_and_the_value_that_were_put_there() -> None:
    made, truth = scene(), random_parameters(2)
    truth[:, GROUPS + WIDTH :] = 0
    logits, value, none = constants.split(truth, GROUPS)
    lse, alone = effect_without_sink(made)
    target = made.with_sink(logits, value, none)
    share = torch.sigmoid(logits[:, None, None] - lse)
    absorbed = made.spread(value[:, None]).expand_as(alone)
    effect = constants.Effect(
        lse=lse,
        share=share,
        within=torch.ones_like(share),
        alone=alone,
        absorbed=absorbed,
        target=target,
    )
    found, _, _ = constants.constants(made, effect)
    # The last grid of logits has steps of 0.05.
    torch.testing.assert_close(found[:, :GROUPS], truth[:, :GROUPS], atol=0.05, rtol=0)
    torch.testing.assert_close(found[:, GROUPS:], truth[:, GROUPS:], atol=0.05, rtol=0.05)


def effect_without_sink(made: LayerAttention) -> tuple[Tensor, Tensor]:
    scores = made.text_scores()
    return scores.logsumexp(-1, keepdim=True), made.mix(scores.softmax(-1), made.value)


def prefix(seed: int, size: float = 1.0) -> KeySink:
    draw = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, KV_HEADS, 2, WIDTH, generator=draw, dtype=torch.float64)
    return KeySink(keys=size * keys, values=values)


@pytest.mark.parametrize("size", [0.1, 1.0, 10.0, 100.0])
@pytest.mark.parametrize("biased", [True, False])
def test_no_head_is_worse_off_than_with_the_best_constant_or_with_none(
    size: float, biased: bool
) -> None:
    made, layer = scene(), prefix(3, size)
    effect = constants.effect_of(made, layer)
    fit, out = sink_of(made, layer, biased)
    assert isinstance(fit, LogitSink)
    value = made.spread(constants.mean_value(made, effect)[:, None])
    middle = effect.lse[..., 0].transpose(0, 1).flatten(1).median(1).values
    errors = [(effect.alone - effect.target).square().sum((0, 2, 3))]
    for distance in torch.linspace(-15, 25, 81):
        share = torch.sigmoid((middle + distance)[:, None, None] - effect.lse)
        constant = effect.alone + share * (value - effect.alone)
        errors.append((constant - effect.target).square().sum((0, 2, 3)))
    best = torch.stack(errors).amin(0)
    left = (out - effect.target).square().sum((0, 2, 3))
    # The grid of the fit has 80 points where this one has 81, so they differ by less than a step.
    assert (left <= 1.01 * best + 1e-12).all()
    assert fit.error <= 1


def test_a_query_that_alone_sees_the_prefix_is_not_lost_among_the_others() -> None:
    made, layer = scene(), prefix(4)
    made.query[..., 0], made.key[..., 0], layer.keys[..., 0] = -8, -1, 8
    made.query[:, :, 5, 0] = 8
    layer.values[:] += 3
    fit, out = sink_of(made, layer, biased=True)
    effect = constants.effect_of(made, layer)
    seen = effect.share.amax((0, 1, 3)) > 0.5
    assert seen.nonzero().flatten().tolist() == [5]
    left = (out - effect.target).square().sum((0, 1, 3))
    assert left[5] < 0.5 * (effect.alone - effect.target).square().sum((0, 1, 3))[5]
    assert fit.error < 0.5


def test_a_prefix_that_has_left_the_window_is_hidden_from_the_query() -> None:
    made, layer = scene(), prefix(5)
    made.window = 8
    scores = made.prefix_scores(layer.keys)
    for position in range(LENGTH):
        # The two tokens of the prefix lie two and one before position 0.
        hidden = [position + 2 >= 8, position + 1 >= 8]
        assert scores[0, 0, position].isinf().tolist() == hidden
    effect = constants.effect_of(made, layer)
    assert effect.target.isfinite().all()
    torch.testing.assert_close(effect.target[:, :, 8:], effect.alone[:, :, 8:])
    torch.testing.assert_close(effect.target, made.with_prefix(layer.keys, layer.values))


def test_keys_that_no_window_hides_are_kept_only_where_they_leave_out_less() -> None:
    made, layer = scene(), prefix(6)
    whole, _ = sink_of(made, layer, biased=True, most=0.0)
    assert isinstance(whole, KeySink)
    assert whole.error == 0
    assert whole.fit is not None
    made.window = 3
    narrow, _ = sink_of(made, layer, biased=True, most=0.0)
    assert isinstance(narrow, LogitSink)
    assert narrow.error <= 1


def test_a_head_whose_logits_are_far_below_zero_can_still_do_without_a_sink() -> None:
    made, layer = scene(), prefix(7)
    made.query[..., 0], made.key[..., 0], layer.keys[..., 0] = 60, -60, -400
    effect = constants.effect_of(made, layer)
    assert effect.lse.max() < -1000
    fit, out = sink_of(made, layer, biased=False)
    assert isinstance(fit, LogitSink)
    assert (fit.logits == NEUTRAL["sink"]).all()
    torch.testing.assert_close(out, effect.alone)


def test_without_a_key_bias_there_is_none() -> None:
    fit, _ = sink_of(scene(), prefix(5), biased=False)
    assert isinstance(fit, LogitSink)
    assert not fit.key_bias.any()
    assert fit.value.any()


def test_a_head_that_ignores_the_prefix_gets_a_finite_sink_that_takes_little() -> None:
    made = scene()
    made.query[..., 0] = 5
    keys = torch.zeros(KV_HEADS, 1, WIDTH, dtype=torch.float64)
    keys[..., 0] = -100
    layer, out = sink_of(made, KeySink(keys=keys, values=1 + keys), biased=True)
    assert isinstance(layer, LogitSink)
    alone = made.mix(made.text_scores().softmax(-1), made.value)
    assert layer.logits.isfinite().all()
    assert (out - alone).abs().mean() < 1e-3


@torch.no_grad()
def test_the_error_of_a_layer_is_what_its_fit_leaves_out(tokens: Tensor) -> None:
    model = tiny("llama")
    fits = fit_sinks(
        Decoder(model, FAMILIES["llama"]),
        prefix_of(Decoder(model, FAMILIES["llama"]), torch.tensor([1])),
        tokens,
    )
    assert all(0 < fit.error < 1 for fit in fits)


@torch.no_grad()
def test_a_fit_that_leaves_out_too_much_makes_room_for_keys(tokens: Tensor) -> None:
    model, family = tiny("llama"), FAMILIES["llama"]
    prefix = prefix_of(Decoder(model, FAMILIES["llama"]), torch.tensor([1, 9]))
    errors = [float(fit.error) for fit in fit_sinks(Decoder(model, family), prefix, tokens)]
    worst = max(errors)
    layer = errors.index(worst)
    [*before, keyed] = fit_sinks(Decoder(model, family), prefix, tokens, 0.999 * worst)[: layer + 1]
    assert isinstance(keyed, KeySink)
    assert keyed.fit is not None
    assert float(keyed.fit.error) == worst
    assert [float(fit.error) for fit in before] == errors[:layer]
    assert all(
        isinstance(sink, KeySink) for sink in fit_sinks(Decoder(model, family), prefix, tokens, 0.0)
    )
