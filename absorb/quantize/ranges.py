"""Where a fixed INT8 range had best end."""

from collections import defaultdict
from itertools import groupby

import torch
from torch import Tensor
from tqdm import tqdm

from absorb.models.decoder import Decoder
from absorb.quantize.grids import INT8_TENSOR, rounded
from absorb.runtime.inputs import ROWS, watching_inputs
from absorb.runtime.precision import with_fewer_rows
from absorb.runtime.reading import led
from absorb.runtime.walk import read

# Where a range may end, as fractions of the largest magnitude seen, and on how many tokens it is
# tried.
_FRACTIONS = [0.8**step for step in range(25)]
_TRIED = 512


@torch.no_grad()
def clipped_ranges(
    decoder: Decoder, tokens: Tensor, lead: Tensor | None = None
) -> dict[str, Tensor]:
    """Where a static INT8 grid had best end: a scalar under each name that `input_peaks` gives.

    That is where the output has the least squared error, if errors of different inputs do not add
    up: `sum_i |W_i|^2 (rounded(x_i) - x_i)^2`. What lies beyond is clipped. tokens is (rows,
    length), each row read after the tokens `lead` (n,). Errors are those of some _TRIED tokens.
    """
    rows = tokens if lead is None else led(tokens, lead)
    step = max(1, rows.numel() // _TRIED)

    def seen(at_once: int) -> tuple[dict[str, list[Tensor]], dict[str, list[Tensor]]]:
        tried: dict[str, list[Tensor]] = defaultdict(list)
        peaks: dict[str, list[Tensor]] = defaultdict(list)
        counted: dict[str, int] = defaultdict(int)

        def see(name: str, value: Tensor) -> None:
            tried[name].append(value[-counted[name] % step :: step].clone())
            peaks[name].append(value.abs().max())
            counted[name] += len(value)

        with watching_inputs(decoder, see):
            read(decoder, rows.split(at_once), "measuring inputs of Linears")
        return tried, peaks

    tried, peaks = with_fewer_rows(seen, ROWS)
    found = {}
    with tqdm(total=len(tried), desc="choosing INT8 ranges", unit="matrix") as bar:
        for layer, names in groupby(sorted(tried, key=decoder.layer_of), decoder.layer_of):
            with decoder.fetched(layer):
                for name in names:
                    peak, weight = torch.stack(peaks[name]).max(), decoder.named(name).weight
                    found[name] = _best_range(torch.cat(tried[name]).float(), peak, weight)
                    bar.update()
    return found


def _best_range(inputs: Tensor, peak: Tensor, weight: Tensor) -> Tensor:
    """For inputs (tokens, ..., channels) of a weight (..., outputs, channels)."""
    importance = weight.float().square().sum(-2)
    if importance.ndim == inputs.ndim:  # experts that read the same stream
        importance = importance.sum(0)
    errors = [
        ((rounded(inputs, INT8_TENSOR, peak * fraction) - inputs).square() * importance).sum()
        for fraction in _FRACTIONS
    ]
    return peak.float() * _FRACTIONS[int(torch.stack(errors).argmin())]
