"""What happens inside the experts of a layer, where no hook reaches.

transformers keeps the experts of a layer in one module, with the parameters gate_up_proj
(experts, 2 * neurons, hidden) and down_proj (experts, hidden, neurons). It is called with the
stream (tokens, hidden), the experts that each token is sent to, and their shares in the sum: both
(tokens, chosen).
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from absorb.models.decoder import Decoder
from absorb.runtime.hooks import See


def neurons_of(experts: Any, stream: Tensor, chosen: Tensor) -> Tensor:
    """What down_proj reads: (tokens, experts, neurons), zero where a token was not sent."""
    count, _, width = experts.down_proj.shape
    neurons = stream.new_zeros(len(stream), count, width)
    for expert, weight in enumerate(experts.gate_up_proj):
        sent = (chosen == expert).any(-1)
        gate, up = (stream[sent] @ weight.mT).chunk(2, -1)
        neurons[sent, expert] = (experts.act_fn(gate) * up).to(neurons)
    return neurons


def mixed(experts: Any, neurons: Tensor, chosen: Tensor, share: Tensor) -> Tensor:
    """What the experts give, (tokens, hidden), for neurons (tokens, experts, neurons)."""
    shared = _shared(neurons, chosen, share)
    out = shared.new_zeros(len(shared), experts.down_proj.shape[1])
    for expert, weight in enumerate(experts.down_proj):
        sent = (chosen == expert).any(-1)
        out[sent] += (shared[sent, expert] @ weight.mT).to(out)
    return out


def _shared(neurons: Tensor, chosen: Tensor, share: Tensor) -> Tensor:
    """The neurons (tokens, experts, neurons) of every expert times its share."""
    shares = neurons.new_zeros(neurons.shape[:2]).scatter_(1, chosen, share.to(neurons))
    return neurons * shares[..., None]


@contextmanager
def watching_experts(decoder: Decoder, see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call see(name, inputs) with what `up` and `down` of all experts are given.

    Inputs are (tokens, hidden) and (tokens, experts, neurons).
    """

    def before(up: str, down: str) -> Callable[..., None]:
        def look(experts: Any, args: tuple[Tensor, ...]) -> None:
            stream, chosen, _ = args
            see(up, stream.detach())
            see(down, neurons_of(experts, stream, chosen).detach())

        return look

    with hooking_experts(decoder, before):
        yield


@contextmanager
def hooking_experts(decoder: Decoder, before: Callable[[str, str], Any]) -> Iterator[None]:
    """Hook what `before` gives for the names of `up` and `down` in front of all experts."""
    handles = [
        experts.register_forward_pre_hook(before(*names))
        for names, experts in decoder.experts.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def watching_neurons(modules: Iterable[nn.Module], see: See) -> Iterator[None]:
    """Call see(index, activations (..., neurons)) with what the columns of `down` are added up by.

    A module is a Linear, or holds experts: their neurons stand one expert after the other.
    """

    def before(index: int) -> Callable[..., None]:
        def look(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            see(index, _activations(module, *args).detach())

        return look

    handles = [m.register_forward_pre_hook(before(index)) for index, m in enumerate(modules)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _activations(module: nn.Module, inputs: Tensor, *routing: Tensor) -> Tensor:
    if not routing:
        return inputs
    chosen, share = routing
    return _shared(neurons_of(module, inputs, chosen), chosen, share).flatten(1)
