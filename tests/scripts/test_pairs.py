"""Models that took turns are compared round by round."""

import pytest

from scripts.engines.pairs import add_ratios, cell


def test_a_ratio_is_that_of_rounds_and_not_of_medians() -> None:
    # In every round the machine is slower, and one model twice as fast as the other.
    stock, native = [90.0, 60.0, 50.0], [180.0, 120.0, 100.0]
    models = {
        "stock": {"tokens_per_second": {"decode": stock}},
        "native": {"tokens_per_second": {"decode": native}},
        "refused": {"refused": "it is too large"},
    }
    add_ratios(models)
    assert models["native"]["of_stock"] == {"decode": 2.0}
    assert models["native"]["spread"] == {"decode": (2.0, 2.0)}
    assert models["native"]["tokens_per_second"] == {"decode": 120.0}
    assert models["refused"]["of_stock"] == {}


def test_a_cell_shows_median_and_quartiles_beside_the_stock_model() -> None:
    rates = {"stock": [10.0] * 5, "native": [8.0, 9.0, 10.0, 11.0, 20.0]}
    models = {name: {"tokens_per_second": {"prefill": each}} for name, each in rates.items()}
    add_ratios(models)
    assert cell(models["native"], "prefill") == "10 (1.00 x, 0.90 to 1.10)"
    assert cell(models["native"], "decode") == ""


def test_models_that_met_in_unequal_rounds_are_not_compared() -> None:
    rates = {"stock": [1.0, 2.0], "native": [1.0]}
    models = {name: {"tokens_per_second": {"prefill": each}} for name, each in rates.items()}
    with pytest.raises(ValueError, match="longer"):
        add_ratios(models)
