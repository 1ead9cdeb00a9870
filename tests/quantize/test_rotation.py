"""The rotation is orthogonal, spreads what stands out, and is undone by a product."""

import pytest
import torch

from absorb.quantize.rotation import paley, rotated

# Of hidden layers and neurons of real models, and sizes without a Hadamard matrix.
SIZES = [1, 2, 3, 32, 33, 48, 576, 896, 960, 1152, 1536, 2048, 4864]


@pytest.mark.parametrize("size", SIZES)
def test_a_rotation_is_orthogonal(size: int) -> None:
    matrix = rotated(torch.eye(size))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size), rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [32, 48, 576, 896, 960, 1152, 1536, 2048, 4864])
def test_one_channel_becomes_all_channels(size: int) -> None:
    spike = torch.zeros(size)
    spike[5] = 1
    torch.testing.assert_close(rotated(spike).abs(), torch.full((size,), size**-0.5))


def test_blocks_are_rotated_where_no_matrix_has_the_size() -> None:
    assert rotated(torch.eye(33)).count_nonzero() == 33
    spike = torch.zeros(92)  # the order of the last small Hadamard matrix that was found, in 1961
    assert all(paley(order) is None for order in (23, 46, 92))
    spike[5] = 1
    assert rotated(spike).nonzero().flatten().tolist() == [4, 5, 6, 7]


@pytest.mark.parametrize("order", [4, 8, 12, 20, 24, 28, 36, 60, 76, 108])
def test_paley_gives_hadamard_matrices(order: int) -> None:
    matrix = paley(order)
    assert matrix is not None
    assert set(matrix.unique().tolist()) == {-1, 1}
    assert torch.equal(matrix @ matrix.T, order * torch.eye(order))


def test_the_signs_are_random_and_always_the_same() -> None:
    ones = torch.ones(512)
    assert torch.equal(rotated(ones), rotated(ones))
    assert rotated(ones).abs().max() < 5  # without signs it would be 512 ** 0.5


def test_a_product_of_rotated_factors_is_the_product() -> None:
    draw = torch.Generator().manual_seed(0)
    inputs, weight = torch.randn(3, 7, 96, generator=draw), torch.randn(5, 96, generator=draw)
    product = rotated(inputs) @ rotated(weight).T
    torch.testing.assert_close(product, inputs @ weight.T, rtol=1e-4, atol=1e-4)
