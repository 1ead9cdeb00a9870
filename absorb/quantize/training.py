"""Fine-tuning for what comes after it: the model computes as if quantised and learns to bear it."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from absorb.models.decoder import Decoder
from absorb.quantize.formats import Format
from absorb.quantize.grids import rounded
from absorb.quantize.simulate import multiplied, quantized_inputs
from absorb.schema.settings import FormatName, Purpose

FORMAT_FOR: dict[Purpose, FormatName] = {
    "int8": "w8a8-clipped",
    "w4a4": "w4a4-hadamard",
    "nvfp4": "nvfp4",
    "mxfp4": "mxfp4",
}


@contextmanager
def fake_quantized(decoder: Decoder, form: Format, text: Tensor) -> Iterator[None]:
    """Within it all that decoder layers multiply is rounded, and its gradient is as if it were not.

    What is stored, and trained, stays as fine as it was (straight through, arXiv 1308.3432). Fixed
    ranges, where the format has them, are found on text (rows, length) and stay.
    """
    ranges = {} if form.ranges is None else form.ranges(decoder, text)
    with ExitStack() as stack:
        for layer in range(len(decoder.layers)):
            stack.enter_context(weights_on_grid(decoder, form, layer))
        stack.enter_context(quantized_inputs(decoder, form, ranges))
        yield


@contextmanager
def weights_on_grid(decoder: Decoder, form: Format, layer: int) -> Iterator[None]:
    """The weights of one layer likewise."""
    weights = [_owner(decoder, name) for name in multiplied(decoder, layer)]
    for module, name in weights:
        rounding = _OnGrid(form, transposed=isinstance(module, Conv1D))
        parametrize.register_parametrization(module, name, rounding, unsafe=True)
    try:
        yield
    finally:
        for module, name in weights:
            parametrize.remove_parametrizations(module, name, leave_parametrized=False)


def _owner(decoder: Decoder, name: str) -> tuple[nn.Module, str]:
    """The module of a matrix, and the name of the parameter in it."""
    site = decoder.named(name)
    return site.module, site.parameter


class _OnGrid(nn.Module):
    """What a format leaves of a weight (..., outputs, inputs), or of one stored transposed."""

    def __init__(self, form: Format, transposed: bool) -> None:
        super().__init__()
        self.form, self.transposed = form, transposed

    def forward(self, weight: Tensor) -> Tensor:
        whole = on_grid(self.form, weight.mT if self.transposed else weight).to(weight)
        return whole.mT if self.transposed else whole


def on_grid(form: Format, weight: Tensor) -> Tensor:
    """What a format leaves of a weight (..., outputs, inputs): each matrix by itself."""
    matrices = weight.reshape(-1, *weight.shape[-2:])
    rows = torch.stack([rounded(form.rotate(matrix), form.weights) for matrix in matrices])
    return rows.view(weight.shape)
