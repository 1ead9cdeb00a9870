"""The prefix that PrefixQuant (arXiv 2410.05265) puts into the cache of a model."""

import math
from collections import Counter

import torch
from torch import Tensor
from tqdm import tqdm

from absorb.load.source import Source
from absorb.runtime.hooks import watching

_RATIO = 64  # to the median token's largest input of down_proj, in the same row of text
_RARE = 0.1  # of the rows: a single token that is an outlier in fewer of them is left alone


@torch.no_grad()
def prefix_tokens(source: Source, rows: Tensor) -> tuple[int, ...]:
    """The tokens that are outliers most often in text (rows, length), and BOS.

    They are as many as outliers stand in a row, in the layer that has most: the mean, rounded up.
    An outlier at the beginning of a row, whatever token that is, counts among these alone. A
    tokenizer without BOS gives its end-of-text token.
    """
    found: Counter[int] = Counter()
    numbers = []
    downs = source.decoder.each(source.family.down)
    for row in tqdm(rows, desc="looking for outlier tokens", unit="row"):
        places: list[list[int]] = []
        with watching(downs, lambda _, x, p=places: p.append(outliers(x)), inputs=True):
            source.model.base_model(row[None].to(source.model.device), use_cache=False)
        numbers.append([len(layer) for layer in places])
        found.update(int(row[place]) for layer in places for place in layer if place)
    most = math.ceil(torch.tensor(numbers).double().mean(0).max())
    if len(found) == 1 and found.total() < _RARE * len(rows):
        found.clear()
    tokenizer = source.tokenizer
    begins = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    return (*(token for token, _ in found.most_common(most)), begins)


def outliers(inputs: Tensor) -> list[int]:
    """Which tokens of inputs (1, length, channels) have a largest value far beyond the median's."""
    peaks = inputs[0].abs().amax(-1)
    return (peaks > _RATIO * peaks.median()).nonzero().flatten().tolist()
