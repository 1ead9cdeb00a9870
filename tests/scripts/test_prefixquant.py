"""The rival finds the tokens that were made outliers, and as many as there are."""

import torch
from torch import Tensor

from absorb.load.source import Source
from scripts.benchmarks.rivals.prefixquant import prefix_tokens
from tests.fold.test_planted import BOS, planted
from tests.helpers.sources import source_of

OFTEN, SELDOM = 40, 50  # tokens that fire the planted neuron as BOS does


def source() -> Source:
    model = planted("llama")
    embedding = model.get_input_embeddings().weight
    with torch.no_grad():
        embedding[[OFTEN, SELDOM]] = embedding[BOS].clone()
    return source_of(model, "planted")


def text(places: dict[int, int], rows: int = 4) -> Tensor:
    """Rows of ordinary tokens with a token at each of the places."""
    draw = torch.Generator().manual_seed(2)
    found = torch.randint(3, 30, (rows, 24), generator=draw)
    for place, token in places.items():
        found[:, place] = token
    return found


def test_the_most_frequent_outliers_come_first_and_bos_last() -> None:
    rows = text({5: OFTEN, 9: OFTEN, 12: SELDOM})
    assert prefix_tokens(source(), rows) == (OFTEN, SELDOM, BOS)


def test_they_are_as_many_as_stand_in_a_row() -> None:
    rows = text({5: OFTEN})
    rows[0, 12] = SELDOM
    assert prefix_tokens(source(), rows) == (OFTEN, SELDOM, BOS)  # 1.25 in a row
    rows = text({5: OFTEN})
    rows[0, 5] = SELDOM
    assert prefix_tokens(source(), rows) == (OFTEN, BOS)


def test_a_token_at_the_beginning_counts_and_is_not_taken() -> None:
    assert prefix_tokens(source(), text({0: SELDOM, 5: OFTEN})) == (OFTEN, BOS)
    assert prefix_tokens(source(), text({0: SELDOM})) == (BOS,)


def test_one_rare_token_is_left_alone() -> None:
    rows = text({0: SELDOM}, rows=24)
    rows[3, 7] = OFTEN
    assert prefix_tokens(source(), rows) == (BOS,)
    rows[4:7, 7] = OFTEN
    assert prefix_tokens(source(), rows) == (OFTEN, BOS)
