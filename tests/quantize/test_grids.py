"""Every grid is what its specification says, computed here another way."""

from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from absorb.quantize.grids import (
    E4M3_ROW,
    INT4_GROUPS,
    INT4_ROW,
    INT8_ROW,
    INT8_TENSOR,
    MXFP4,
    NVFP4,
    Grid,
    e2m1,
    e4m3,
    power_of_two,
    rounded,
)

FP4 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
GRIDS = [INT8_TENSOR, INT8_ROW, INT4_ROW, INT4_GROUPS, E4M3_ROW, NVFP4, MXFP4]
every_grid = pytest.mark.parametrize(
    "grid",
    GRIDS,
    ids=["int8 tensor", "int8 row", "int4 row", "int4 groups", "e4m3 row", "nvfp4", "mxfp4"],
)


def drawn(*shape: int) -> Tensor:
    """Normal numbers with a few outliers, and rows of very different sizes."""
    draw = torch.Generator().manual_seed(0)
    values = torch.randn(shape, generator=draw)
    values[torch.rand(shape, generator=draw) < 0.01] *= 100
    return values * 10 ** torch.linspace(-3, 3, shape[-2])[:, None]


def test_four_bit_floats_round_to_the_nearest_and_ties_to_the_even() -> None:
    for (index, low), high in zip(enumerate(FP4), FP4[1:], strict=False):
        middle = (low + high) / 2
        even = low if index % 2 == 0 else high
        below, above = torch.tensor(middle).nextafter(torch.tensor([0.0, 9.0]))
        for sign in (1, -1):
            given = sign * torch.tensor([low, below, middle, above, high])
            assert e2m1(given).tolist() == [sign * v for v in (low, low, even, high, high)]


def test_eight_bit_floats_have_three_bits_of_mantissa_and_end_at_448() -> None:
    numbers = sorted(
        {
            float(Fraction(mantissa, 8) * Fraction(2) ** exponent)
            for exponent in range(-6, 9)
            for mantissa in range(8, 16)
        }
        | {mantissa * 2.0**-9 for mantissa in range(8)}
    )
    numbers = numbers[: numbers.index(448.0) + 1]  # 480 is the code of NaN
    assert torch.equal(e4m3(torch.tensor(numbers)), torch.tensor(numbers))
    for (index, low), high in zip(enumerate(numbers), numbers[1:], strict=False):
        middle = torch.tensor((low + high) / 2)
        assert float(e4m3(middle)) == (low if index % 2 == 0 else high)
    assert e4m3(torch.tensor([449.0, -1e9])).tolist() == [448, -448]


def test_integers_tie_to_the_even() -> None:
    values = torch.tensor([[0.5, 1.5, 2.5, -3.5, 7.0]])
    assert rounded(values, INT4_ROW).tolist() == [[0, 2, 2, -4, 7]]


def test_a_block_scale_of_mxfp4_is_a_quarter_of_the_power_of_two_below() -> None:
    for exponent in range(-124, 128):
        peaks = torch.tensor([1.0, 1.5, 1.999]) * 2.0**exponent
        assert power_of_two(peaks, 6).tolist() == [2.0 ** (exponent - 2)] * 3


def test_mxfp4_clips_what_lies_beyond_six() -> None:
    block = torch.zeros(1, 32)
    block[0, :3] = torch.tensor([7.9, -5.1, 0.24])
    assert rounded(block, MXFP4)[0, :3].tolist() == [6, -6, 0]


def test_nvfp4_has_a_scale_of_eight_bits_for_sixteen_and_one_for_the_tensor() -> None:
    values = torch.randn(6, 48, generator=torch.Generator().manual_seed(0))
    values *= 10 ** torch.linspace(-1, 1, 6)[:, None]
    unit = values.abs().max() / (6 * 448)
    for row, out in zip(values, rounded(values, NVFP4), strict=True):
        for block, given in zip(row.split(16), out.split(16), strict=True):
            scale = (block.abs().max() / 6 / unit).to(torch.float8_e4m3fn).float() * unit
            codes = given / scale
            nearest = torch.tensor(FP4)[(codes.abs()[:, None] - torch.tensor(FP4)).abs().argmin(1)]
            torch.testing.assert_close(codes.abs(), nearest, rtol=1e-6, atol=0)
            distances = ((block / scale).abs()[:, None] - torch.tensor(FP4)).abs().amin(1)
            inside = (block / scale).abs() <= 6
            error = (codes - block / scale).abs()
            assert (error - distances)[inside].abs().max() < 1e-5


def test_a_block_far_below_the_largest_one_is_zero_in_nvfp4() -> None:
    values = torch.cat([torch.full((1, 16), 6 * 448.0), torch.full((1, 16), 6 * 2.0**-11)], 1)
    assert rounded(values, NVFP4)[0, [0, 16]].tolist() == [6 * 448, 0]


@every_grid
def test_a_grid_holds_what_is_on_it(grid: Grid) -> None:
    once = rounded(drawn(6, 256), grid)
    torch.testing.assert_close(rounded(once, grid), once, rtol=1e-6, atol=0)


@every_grid
def test_rounding_takes_the_nearest_number_of_the_grid(grid: Grid) -> None:
    """Moving to any other number that the same span reached would be further."""
    values = drawn(6, 256)
    out = rounded(values, grid)
    width = grid.span if isinstance(grid.span, int) else {"row": 256, "tensor": 6 * 256}[grid.span]
    for given, got in zip(values.view(-1, width), out.view(-1, width), strict=True):
        reached = torch.cat([got, -got]).unique()
        best = (given[:, None] - reached).abs().amin(1)
        assert ((given - got).abs() <= best * (1 + 1e-4) + 1e-30).all()


@every_grid
def test_zeros_stay_zeros_and_dtypes_stay(grid: Grid) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        zeros = rounded(torch.zeros(2, 33, dtype=dtype), grid)
        assert zeros.dtype == dtype
        assert not zeros.any()
        assert rounded(torch.ones(2, 33, dtype=dtype), grid).isfinite().all()


@pytest.mark.parametrize(
    ("grid", "width"), [(INT8_ROW, 300), (INT4_GROUPS, 128), (NVFP4, 16), (MXFP4, 32)]
)
def test_who_does_not_share_a_scale_does_not_see_the_others(grid: Grid, width: int) -> None:
    values = torch.randn(2, 300, generator=torch.Generator().manual_seed(0))
    values[1, 299] = 10  # so that NVFP4's scale of the tensor stays
    louder = values.clone()
    louder[0, 3] *= 0.01
    differs = rounded(values, grid) != rounded(louder, grid)
    assert differs[0, :width].any()
    assert not differs[0, width:].any()
    assert not differs[1].any()


def test_the_end_of_a_row_may_be_shorter_than_a_span() -> None:
    values = drawn(2, 150)
    out = rounded(values, INT4_GROUPS)
    assert out.shape == values.shape
    torch.testing.assert_close(out[:, 128:], rounded(values[:, 128:], INT4_ROW))


def test_finer_grids_err_less() -> None:
    values = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    errors = [
        float((rounded(values, grid) - values).square().mean())
        for grid in (INT8_ROW, INT8_TENSOR, E4M3_ROW, NVFP4, MXFP4, INT4_ROW)
    ]
    assert all(fine < coarse for fine, coarse in pairwise(errors))
