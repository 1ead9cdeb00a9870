"""One pass over the original model: everything that the findings are drawn from."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from absorb.device import hastened
from absorb.experts import watching_neurons
from absorb.families import Family
from absorb.quantize import watching_inputs
from absorb.watch import each_layers, eager, layers_of, led, watching
from absorb.weights import module_at, weight_at

_ROWS = 4
# A token is ordinary unless its peak is this many times the median token's: a channel that is
# large on the sink token alone is no residual sink.
_ORDINARY = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """What a model does on text. The stream of a layer is what that layer hands on.

    Tokens count the lead, which is where most sinks are.
    """

    tokens: Tensor  # (rows, length): the ids that were read, lead included
    channel_mean: Tensor  # (layers, hidden): mean magnitude of each channel, on ordinary tokens
    channel_share: Tensor  # (layers, hidden): its mean share of the squared norm, likewise
    channel_peak: Tensor  # (hidden,): largest magnitude of each, wherever it is read or written
    median: Tensor  # (layers,): median magnitude of the stream
    token_peak: Tensor  # (layers, rows, length): largest magnitude of each token
    token_channel: Tensor  # (layers, rows, length): the channel that has it
    first_weight: Tensor  # (layers, heads): mean attention weight on the first token
    token_weight: Tensor  # (layers, rows, length): mean weight a token gets from later ones
    neuron_peak: Tensor  # (layers, neurons): most that one MLP neuron adds to the stream
    input_peak: dict[str, Tensor]  # (): largest magnitude that a matrix reads, under its name


class _Tally:
    """What the hooks of a measurement collect."""

    def __init__(self, model: PreTrainedModel, family: Family) -> None:
        self.layers, layers = len(layers_of(model, family)), len(layers_of(model, family))
        self.mean: list[list[Tensor]] = [[] for _ in range(layers)]
        self.share: list[list[Tensor]] = [[] for _ in range(layers)]
        self.reach: list[Tensor] = []
        self.median: list[list[Tensor]] = [[] for _ in range(layers)]
        self.peak: list[list[Tensor]] = [[] for _ in range(layers)]
        self.channel: list[list[Tensor]] = [[] for _ in range(layers)]
        self.first: list[list[Tensor]] = [[] for _ in range(layers)]
        self.received: list[list[Tensor]] = [[] for _ in range(layers)]
        self.neuron: list[list[Tensor]] = [[] for _ in range(layers)]
        self.columns = [
            weight_at(layer, family.down).detach().abs().amax(-2).flatten()
            for layer in layers_of(model, family)
        ]
        self.fired: dict[int, Tensor] = {}
        self.down_peak: dict[int, Tensor] = {}
        self.read: dict[str, Tensor] = {}

    def stream(self, layer: int, stream: Tensor) -> None:
        size = stream.float().abs()
        peak, channel = size.max(-1)
        ordinary = size[peak <= _ORDINARY * peak.median()]
        energy = ordinary.square()
        self.mean[layer].append(ordinary.mean(0))
        self.share[layer].append((energy / energy.sum(-1, keepdim=True)).mean(0))
        self.median[layer].append(size.median())
        self.peak[layer].append(peak)
        self.channel[layer].append(channel)

    def channels(self, _: int, part: Tensor) -> None:
        """part is (..., hidden): the stream, or what is added to it."""
        self.reach.append(part.float().abs().flatten(0, -2).amax(0))

    def weights(self, layer: int, weights: Tensor) -> None:
        """weights is (batch, heads, queries, keys)."""
        length = weights.shape[-1]
        self.first[layer].append(weights[:, :, 1:, 0].float().mean((0, 2)))
        # A key is seen by the queries after it; the query at its own place tells nothing.
        below = weights.float().tril(-1).mean(1).sum(1)
        later = torch.arange(length - 1, -1, -1, device=weights.device).clamp_min(1)
        self.received[layer].append(below / later)

    def inputs(self, name: str, inputs: Tensor) -> None:
        peak = inputs.float().abs().max()
        self.read[name] = torch.maximum(self.read.get(name, peak), peak)

    def activation(self, layer: int, activation: Tensor) -> None:
        self.fired[layer] = activation.float().abs()

    def down(self, layer: int, out: Tensor) -> None:
        self.down_peak[layer] = out.float().abs().amax(-1)

    def written(self, layer: int, out: Tensor) -> None:
        # Between the neurons and the stream there may be a norm or a multiplier: the same factor
        # for all neurons of a token, near enough to rank them.
        gain = out.float().abs().amax(-1) / self.down_peak.pop(layer).clamp_min(1e-12)
        added = (self.fired.pop(layer) * gain[..., None]).flatten(0, -2)
        self.neuron[layer].append(added.amax(0) * self.columns[layer])


@contextmanager
def _counting(model: PreTrainedModel, family: Family, tally: _Tally) -> Iterator[None]:
    layers = layers_of(model, family)
    down = [module_at(layer, family.down) for layer in layers]
    reads = [module_at(layer, name) for layer in layers for name in family.reads]
    writes = [[module_at(layer, name) for layer in layers] for name in family.writes]
    with ExitStack() as stack:
        stack.enter_context(eager(model))
        stack.enter_context(watching(layers, tally.stream))
        stack.enter_context(watching_neurons(down, tally.activation))
        stack.enter_context(watching(down, tally.down))
        stack.enter_context(watching(writes[-1], tally.written))
        # Inside a layer a channel may be larger than in what the layer hands on.
        last = model.get_submodule(family.final_norm)
        stack.enter_context(watching([*reads, last], tally.channels, inputs=True))
        stack.enter_context(watching(chain(*writes), tally.channels))
        stack.enter_context(watching_inputs(model, family, tally.inputs))
        stack.enter_context(_weights(each_layers(model, family, family.attention), tally))
        yield


@contextmanager
def _weights(modules: list[nn.Module], tally: _Tally) -> Iterator[None]:
    handles = [
        module.register_forward_hook(lambda _, args, out, layer=layer: tally.weights(layer, out[1]))
        for layer, module in enumerate(modules)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def measure(
    model: PreTrainedModel,
    family: Family,
    tokens: Tensor,
    lead: Tensor,
    read: Callable[[Tensor], object] | None = None,
) -> Measurement:
    """Measure a model on text `tokens` (rows, length), read after the tokens `lead` (n,).

    `read` lets the model read a batch, lead included; by default its head is left out.
    """
    read = read or partial(model.base_model, use_cache=False)
    tally = _Tally(model, family)
    rows = led(tokens, lead)
    with _counting(model, family, tally), hastened(model.device):
        for batch in tqdm(rows.split(_ROWS), desc="measuring the stream", unit="batch"):
            read(batch.to(model.device))
    return Measurement(
        tokens=rows.cpu(),
        channel_mean=_mean(tally.mean),
        channel_share=_mean(tally.share),
        channel_peak=torch.stack(tally.reach).amax(0).cpu(),
        median=_mean(tally.median),
        token_peak=_rows(tally.peak),
        token_channel=_rows(tally.channel),
        first_weight=_mean(tally.first),
        token_weight=_rows(tally.received),
        neuron_peak=torch.stack([torch.stack(layer).amax(0) for layer in tally.neuron]).cpu(),
        input_peak={name: peak.cpu() for name, peak in tally.read.items()},
    )


def _mean(batches: list[list[Tensor]]) -> Tensor:
    return torch.stack([torch.stack(layer).mean(0) for layer in batches]).cpu()


def _rows(batches: list[list[Tensor]]) -> Tensor:
    return torch.stack([torch.cat(layer) for layer in batches]).cpu()
