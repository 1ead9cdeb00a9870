"""One layer's sink: constants fitted to what its heads give with the prefix, or its keys."""

from dataclasses import replace
from math import inf

from torch import Tensor

from absorb.fold.sinks.attention import LayerAttention
from absorb.fold.sinks.constants import Effect, constants, effect_of, left_out, split
from absorb.fold.sinks.forms import KeySink, LayerSink, LogitSink
from absorb.fold.sinks.key_bias import descended, shifted, where_it_pays


def sink_of(
    scene: LayerAttention, prefix: KeySink, biased: bool, most: float = inf
) -> tuple[LayerSink, Tensor]:
    """A layer's sink, and the output (rows, heads, length, head_dim) with it.

    It is the prefix itself where a fit leaves out more than the share `most`, and the prefix less.
    """
    effect = effect_of(scene, prefix)
    fit, out = fitted(scene, effect, *_fit(scene, effect, prefix, biased))
    if fit.error <= most:
        return fit, out
    # No window hides a student's sink.
    kept = replace(scene, window=None).with_prefix(prefix.keys, prefix.values)
    leaves = scene.leaves(prefix.keys.shape[1])
    error = left_out(effect, kept) if leaves else fit.error.new_zeros(())
    return (replace(prefix, error=error, fit=fit), kept) if error < fit.error else (fit, out)


def _fit(
    scene: LayerAttention, effect: Effect, prefix: KeySink, biased: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (heads,), value and key bias (kv_heads, head_dim) that stand for the prefix."""
    if biased and scene.moves_with_keys and prefix.keys.shape[1] == 1:
        # Less its key, the prefix has the logit zero for every query.
        zero = prefix.keys.new_zeros(len(prefix.keys) * scene.groups)
        return zero, prefix.values[:, 0], -prefix.keys[:, 0]
    parameters, error, most = constants(scene, effect)
    if biased:
        start = shifted(scene, effect, prefix, parameters, error, most)
        better, less = descended(scene, effect.target, start, most)
        parameters = where_it_pays(scene, parameters, error, better, less)
    return split(parameters, scene.groups)


def fitted(
    scene: LayerAttention, effect: Effect, logits: Tensor, value: Tensor, key_bias: Tensor
) -> tuple[LogitSink, Tensor]:
    """Constants as a sink, and the output (rows, heads, length, head_dim) with them."""
    out = scene.with_sink(logits, value, key_bias)
    error = left_out(effect, out)
    return LogitSink(logits=logits, value=value, key_bias=key_bias, error=error), out
