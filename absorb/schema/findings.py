"""The outliers of a model, and what of them goes: plain data.

sink token: one that heads give much of their attention, whatever they look for
massive activation: a stream entry far above the median, nearly always on a sink token
spike neuron: an MLP neuron that alone writes a massive activation
outlier channel, residual sink: a channel of the stream that is large on nearly every token
outlier token: one whose largest entry is far above that of the median token
stream: what a decoder layer hands on, the residual stream
prefix: the tokens that sinks stand for
sink: what a layer has in place of the prefix, a logit for each head or its keys and values
lead: the tokens that a model is to be given before a text
teacher, student: the original behind the prefix, and the converted model without one"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class SinkHead:
    """A head that gives the first token, on average, more weight than the threshold."""

    layer: int
    head: int
    weight: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SinkToken:
    """A token that a layer's heads give, on average, more weight than the threshold."""

    token: int
    position: int
    layers: tuple[int, ...]
    weight: float


@dataclass(frozen=True, slots=True, kw_only=True)
class MassiveActivation:
    """The largest massive activation of a token id at one channel of the stream."""

    token: int
    position: int
    channel: int
    layers: tuple[int, ...]
    value: float
    ratio: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SpikeNeuron:
    """An MLP neuron that alone adds a massive activation to the stream.

    Neurons of experts are counted one expert after the other.
    """

    layer: int
    neuron: int
    contribution: float


@dataclass(frozen=True, slots=True, kw_only=True)
class OutlierChannel:
    """A channel that is large on nearly every token: a residual sink.

    steadiness is abs(mean) / std of its value over ordinary tokens, in the layer where it is
    largest. Well above 1 it is nearly a constant, and below that it tells tokens apart. None in
    what an earlier version found.
    """

    channel: int
    layers: tuple[int, ...]
    ratio: float
    share: float
    steadiness: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """The outliers of a model, largest first."""

    sink_heads: tuple[SinkHead, ...]
    sink_tokens: tuple[SinkToken, ...]
    massive_activations: tuple[MassiveActivation, ...]
    spike_neurons: tuple[SpikeNeuron, ...]
    outlier_channels: tuple[OutlierChannel, ...]
    outlier_tokens: int

    def tokens(self) -> set[int]:
        """The ids of all tokens that are named."""
        named = {sink.token for sink in self.sink_tokens}
        named |= {activation.token for activation in self.massive_activations}
        return {token for token in named if token >= 0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """A prefix that was tried, and the mean loss of calibration text behind it in nats."""

    prefix: tuple[int, ...]
    loss: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Removal:
    """A spike neuron, and the KL in nats per token once it, and those gone with it, are gone."""

    spike: SpikeNeuron
    divergence: float
