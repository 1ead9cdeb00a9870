"""Weights that were nudged are hardly others in float, and rounded plainly they err less."""

import pytest
import torch
from torch import Tensor

from absorb.fold.graft import twin
from absorb.models.decoder import Decoder
from absorb.models.families import FAMILIES
from absorb.quantize.formats import FORMATS
from absorb.quantize.grids import MXFP4, NVFP4, Grid, e2m1_step, peaks_of, rounded
from absorb.runtime.inputs import watching_inputs
from absorb.tune.nudge import _REACH, nudge, nudged, nudges
from tests.helpers.tiny import VOCABULARY, tiny

GRIDS = pytest.mark.parametrize("grid", [NVFP4, MXFP4], ids=["nvfp4", "mxfp4"])


@pytest.fixture
def draw() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def of_few_directions(draw: torch.Generator, tokens: int = 512, channels: int = 64) -> Tensor:
    """Inputs most of which lies in a few directions, so that columns can stand in for others."""
    mixing = torch.randn(8, channels, generator=draw)
    noise = torch.randn(tokens, channels, generator=draw)
    return torch.randn(tokens, 8, generator=draw) @ mixing + 0.3 * noise


@GRIDS
def test_plain_rounding_errs_less_afterwards_and_float_hardly_at_all(
    grid: Grid, draw: torch.Generator
) -> None:
    text, other = of_few_directions(draw, 1024).chunk(2)
    weight = torch.randn(48, 64, generator=draw)
    moved = nudged(weight, text.T @ text, grid)

    def error(matrix: Tensor) -> float:
        return float(((matrix - weight) @ other.T).square().sum())

    plain = error(rounded(weight, grid))
    assert error(rounded(moved, grid)) < 0.8 * plain
    assert error(moved) < 0.05 * plain


@GRIDS
def test_no_weight_moves_further_than_it_may_and_no_scale_changes(
    grid: Grid, draw: torch.Generator
) -> None:
    text, weight = of_few_directions(draw), torch.randn(48, 64, generator=draw)
    moved = nudged(weight, text.T @ text, grid)
    peaks = peaks_of(weight, grid)
    scale = grid.scales(peaks)
    assert torch.equal(grid.scales(peaks_of(moved, grid)), scale)
    assert torch.equal(moved[weight.abs() == peaks], weight[weight.abs() == peaks])
    steps = (moved - weight).abs() / (e2m1_step(weight / scale) * scale)
    assert 0.05 < float((steps > 0).float().mean()) < 0.5
    assert steps.max() < _REACH + 0.05


@GRIDS
def test_storage_in_bfloat16_keeps_what_was_gained(grid: Grid, draw: torch.Generator) -> None:
    text = of_few_directions(draw)
    weight = torch.randn(48, 64, generator=draw).bfloat16().float()
    moved = nudged(weight, text.T @ text, grid)
    assert torch.equal(rounded(moved.bfloat16().float(), grid), rounded(moved, grid))


@torch.no_grad()
def test_a_matrix_that_text_says_nothing_of_is_rounded_as_ever(draw: torch.Generator) -> None:
    weight = torch.randn(48, 64, generator=draw)
    assert torch.equal(nudged(weight, torch.zeros(64, 64), MXFP4), weight)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "qwen2_moe"])
@torch.no_grad()
def test_every_linear_errs_less_on_text_that_it_was_not_nudged_on(
    model_type: str, draw: torch.Generator, tmp_path
) -> None:
    family, form = FAMILIES[model_type], FORMATS["mxfp4"]
    text, other = (torch.randint(3, VOCABULARY, (rows, 32), generator=draw) for rows in (24, 8))
    model = tiny(model_type, torch.float32)
    before, student = twin(Decoder(model, family)), twin(Decoder(model, family))
    left = nudge(student, text, form, tmp_path)
    assert all(0 < share < 1 for share in left)
    read: dict[str, Tensor] = {}
    with watching_inputs(before, read.__setitem__):
        before.model.base_model(other)
    errors = torch.zeros(2)
    for name in before.linears:
        exact = read[name] @ before.named(name).weight.T
        given = rounded(read[name], form.inputs)
        for place, decoder in enumerate((before, student)):
            matrix = rounded(decoder.named(name).weight, form.weights)
            errors[place] += (given @ matrix.T - exact).square().sum() / exact.square().sum()
    assert errors[1] < 0.97 * errors[0]


def test_what_is_rotated_or_has_other_grids_is_not_nudged() -> None:
    assert {name for name, form in FORMATS.items() if nudges(form)} == {"nvfp4", "mxfp4"}


def test_what_does_not_fit_beside_a_layer_is_found_on_the_cpu(
    draw: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.randn(8, 64, generator=draw)
    inputs = torch.randn(100, 64, generator=draw)
    squares = inputs.T @ inputs
    usual, cholesky, asked = nudged(weight, squares, NVFP4), torch.linalg.cholesky, list[Tensor]()

    def full(matrix: Tensor, **options: bool) -> Tensor:
        asked.append(matrix)
        if len(asked) == 1:
            raise torch.OutOfMemoryError
        return cholesky(matrix, **options)

    monkeypatch.setattr(torch.linalg, "cholesky", full)
    assert torch.equal(nudged(weight, squares, NVFP4), usual)
    assert len(asked) == 3
