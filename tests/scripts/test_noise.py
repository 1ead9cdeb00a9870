"""`scripts.trials.noise` adds as much noise as a grid leaves on numbers without outliers."""

import pytest
import torch

from absorb.quantize.formats import FORMATS
from absorb.quantize.grids import FLOAT32, MXFP4, NVFP4, Grid, rounded
from scripts.trials.noise import noise_of, noisy, part_of


@pytest.mark.parametrize("grid", [NVFP4, MXFP4])
def test_noise_is_of_the_size_of_rounding_and_grows_with_a_block(grid: Grid) -> None:
    assert isinstance(grid.span, int)
    numbers = torch.randn(2000, 2, grid.span, generator=torch.Generator().manual_seed(1))
    numbers[:, 1] *= 100
    left = rounded(numbers.flatten(1), noisy(grid)).view(numbers.shape) - numbers
    shares = left.square().sum((0, 2)).sqrt() / numbers.square().sum((0, 2)).sqrt()
    # Of 32,000 numbers a mean square is known to a hundredth.
    assert shares.tolist() == pytest.approx([noise_of(grid)] * 2, rel=0.02)


def test_a_part_of_a_format_leaves_the_other_in_float() -> None:
    form = part_of(FORMATS["nvfp4"], (True, False), lambda grid: grid)
    assert (form.weights, form.inputs) == (NVFP4, FLOAT32)
