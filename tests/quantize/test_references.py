"""The grids are those of torchao and compressed-tensors, where these are installed.

    pip install --target DIR --no-deps torchao compressed-tensors && pip install --target DIR loguru
    PYTHONPATH=DIR scripts/test tests/quantize/test_references.py

Seen with torchao 0.18.0 and compressed-tensors 0.20.0.
"""

from dataclasses import replace
from typing import Any

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
    power_of_two,
    rounded,
)
from absorb.quantize.rotation import rotated

ROWS, CHANNELS = 64, 256
LEAST_NORMAL = 2.0**-6  # of E4M3


@pytest.fixture
def values() -> Tensor:
    """Normal numbers with outliers, in rows of very different sizes, and a row of zeros."""
    draw = torch.Generator().manual_seed(0)
    values = torch.randn(ROWS, CHANNELS, generator=draw)
    values[torch.rand(ROWS, CHANNELS, generator=draw) < 0.005] *= 50
    values *= 10 ** torch.linspace(-3, 3, ROWS)[:, None]
    values[5] = 0
    return values


@pytest.fixture
def torchao() -> Any:
    return pytest.importorskip("torchao.quantization.quant_primitives")


@pytest.fixture
def compressed() -> Any:
    return pytest.importorskip("compressed_tensors.quantization")


@pytest.mark.parametrize(
    ("grid", "block"),
    [
        (INT8_TENSOR, (ROWS, CHANNELS)),
        (INT8_ROW, (1, CHANNELS)),
        (INT4_ROW, (1, CHANNELS)),
        (INT4_GROUPS, (1, 128)),
    ],
    ids=["int8 tensor", "int8 row", "int4 row", "int4 groups"],
)
def test_integers_are_those_of_torchao_to_the_bit(
    grid: Grid, block: tuple[int, int], values: Tensor, torchao: Any
) -> None:
    """Given a symmetric range. torchao multiplies by 1 / scale: a tie may go the other way."""
    symmetric, top = torchao.MappingType.SYMMETRIC, int(grid.top)
    how = (torch.int8, -top, top)
    scale, zero = torchao.choose_qparams_affine(values, symmetric, block, *how)
    codes = torchao.quantize_affine(values, block, scale, zero, *how)
    assert torch.equal(
        rounded(values, grid), torchao.dequantize_affine(codes, block, scale, zero, *how)
    )


def test_eight_bit_floats_are_those_of_torchao_to_the_bit(values: Tensor, torchao: Any) -> None:
    values = values[values.abs().sum(-1) > 0]  # it divides zeros by zero
    scale = torchao._choose_scale_float8(values, [1, CHANNELS])
    codes = torchao._quantize_affine_float8(values, scale)
    assert torch.equal(rounded(values, E4M3_ROW), torchao._dequantize_affine_float8(codes, scale))


def test_nvfp4_is_that_of_torchao_to_the_bit(values: Tensor) -> None:
    """But for blocks 30,000 times below the largest: torchao keeps their scale at 2^-6.

    Ours may be as small as the least subnormal number of E4M3, 2^-9, or zero.
    """
    theirs = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")
    unit = theirs.per_tensor_amax_to_scale(values.abs().max())
    expected = theirs.NVFP4Tensor.to_nvfp4(values, per_tensor_scale=unit).dequantize()
    normal = normal_blocks(values, unit)
    assert 0 < normal.float().mean() < 1
    assert torch.equal(rounded(values, NVFP4)[normal], expected[normal])


def normal_blocks(values: Tensor, unit: Tensor) -> Tensor:
    """Where the scale of a block of 16 is a normal number of E4M3, in units of the tensor's."""
    peaks = values.view(ROWS, -1, 16).abs().amax(-1, True) / 6 / unit
    return (peaks >= LEAST_NORMAL).expand(-1, -1, 16).reshape(ROWS, CHANNELS)


def test_mxfp4_is_that_of_torchao_to_the_bit(values: Tensor) -> None:
    theirs = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    expected = theirs.MXTensor.to_mx(values, torch.float4_e2m1fn_x2, 32).dequantize()
    assert torch.equal(rounded(values, MXFP4), expected)


def faked(compressed: Any, values: Tensor, unit: Tensor | None = None, **settings: Any) -> Tensor:
    """What compressed-tensors makes of values (rows, channels), with scales found at run time."""
    helpers = pytest.importorskip("compressed_tensors.quantization.utils.helpers")
    forward = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    args = compressed.QuantizationArgs(**{"dynamic": True, **settings})
    scale, zero = helpers.compute_dynamic_scales_and_zp(values[None], args, None, unit)
    out: Tensor = forward.fake_quantize(values[None], scale, zero, args, unit)
    return out[0]


def test_eight_bit_floats_are_those_of_compressed_tensors_to_the_bit(
    values: Tensor, compressed: Any
) -> None:
    expected = faked(compressed, values, num_bits=8, type="float", strategy="token")
    assert torch.equal(rounded(values, E4M3_ROW), expected)


def test_nvfp4_is_that_of_compressed_tensors_but_for_the_last_bit(
    values: Tensor, compressed: Any
) -> None:
    """It keeps the inverse of the tensor's scale, which rounds otherwise.

    Where that moves a value across the middle between two numbers, it takes the other one.
    """
    helpers = pytest.importorskip("compressed_tensors.quantization.utils.helpers")
    unit = helpers.generate_gparam(values.amin(), values.amax())
    settings = {"strategy": "tensor_group", "group_size": 16, "dynamic": "local"}
    expected = faked(
        compressed,
        values,
        unit,
        num_bits=4,
        type="float",
        scale_dtype=torch.float8_e4m3fn,
        **settings,
    )
    normal = normal_blocks(values, 1 / unit)
    ours = rounded(values, NVFP4)
    close = torch.isclose(ours, expected, rtol=3e-7, atol=0)
    assert (~close & normal).sum() <= 2


def test_mxfp4_is_that_of_compressed_tensors_but_where_a_peak_is_near_eight(
    values: Tensor, compressed: Any
) -> None:
    """Its scales are rounded: a block whose peak is 7 or more of its units gets twice the scale.

    The specification (OCP, 6.3) and torchao's default clip that peak to 6.
    """
    settings = {"strategy": "group", "group_size": 32, "scale_dtype": torch.uint8}
    expected = faked(compressed, values, num_bits=4, type="float", **settings)
    peaks = values.view(ROWS, -1, 32).abs().amax(-1, True)
    near = torch.frexp(peaks)[0] * 2 >= 1.75
    near = near.expand(-1, -1, 32).reshape(ROWS, CHANNELS)
    assert 0 < near.float().mean() < 0.5
    doubled = replace(MXFP4, scale=lambda peak, top: 2 * power_of_two(peak, top))
    ours = torch.where(near, rounded(values, doubled), rounded(values, MXFP4))
    assert torch.equal(ours, expected)


@pytest.mark.parametrize(("grid", "bits"), [(INT8_ROW, 8), (INT4_ROW, 4)], ids=["int8", "int4"])
def test_integers_are_those_of_compressed_tensors_with_the_same_scale(
    grid: Grid, bits: int, values: Tensor, compressed: Any
) -> None:
    """Its own scale is |x| / 127.5 or |x| / 7.5, so that the largest value is often clipped.

    Its grid has one more number at the negative end.
    """
    forward = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    args = compressed.QuantizationArgs(num_bits=bits, type="int", strategy="token", dynamic=True)
    scale = values.abs().amax(-1, True) / grid.top
    here = scale[:, 0] > 0
    zero = torch.zeros_like(scale[here])
    expected = forward.fake_quantize(values[here], scale[here], zero, args)
    assert torch.equal(rounded(values, grid)[here], expected)


@pytest.mark.parametrize("size", [512, 576, 1536])
def test_a_rotation_helps_as_much_as_that_of_compressed_tensors(size: int) -> None:
    """Which Hadamard matrix and which signs makes no difference to rounding."""
    theirs = pytest.importorskip("compressed_tensors.transform.utils.hadamard")
    draw = torch.Generator().manual_seed(0)
    values = torch.randn(2000, size, generator=draw)
    values[:, 7] *= 60
    matrix = theirs.random_hadamard_matrix(size, torch.float32, gen=draw) / size**0.5
    errors = [
        float((rounded(turned, INT4_ROW) - turned).square().mean())
        for turned in (rotated(values), values @ matrix, values)
    ]
    assert errors[0] == pytest.approx(errors[1], rel=0.03)
    assert errors[0] < errors[2] / 5
