"""Every figure of a model on text, defined once, and the tally that takes them as it reads.

Both what is found before a conversion and what is scored after it are made of these. A figure is
taken of each row of text by itself, and the mean, largest or number over rows is what is reported:
so it does not depend on how many rows are read at once.

A row is all that the model reads at once: the lead, if it is given one, and the text. The stream of
a layer is what that layer hands on, (rows, length, hidden).
"""

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from absorb.runtime import ranks
from absorb.runtime.losses import kl, parts
from absorb.schema.scores import Figures
from absorb.schema.settings import Thresholds


def perplexity_of(losses: Tensor) -> float:
    """exp of the mean of what rows of one length lose per token in nats: (rows,)."""
    return float(losses.mean().exp())


def row_medians(size: Tensor) -> Tensor:
    """The median magnitude (rows,) of all entries of each row of a stream, given as magnitudes.

    The median of a layer is the mean of these. It was one over the rows read at once where outliers
    are found, and this where they are scored; this depends on no batch.
    """
    return size.flatten(1).median(1).values


def is_massive(peaks: Tensor, medians: Tensor, thresholds: Thresholds) -> Tensor:
    """Which magnitudes (layers, ...) are massive activations, by the median of their layer.

    Large in itself, and as a multiple of the median: arXiv 2402.17762.
    """
    ratios = (peaks.flatten(1) / medians[:, None]).view_as(peaks)
    return (peaks > thresholds.massive_value) & (ratios > thresholds.massive_ratio)


def token_ratios(peaks: Tensor) -> Tensor:
    """The largest magnitude of each token (..., length) over that of the median token of its row.

    As in PrefixQuant (arXiv 2410.05265), whose outlier tokens are above Thresholds.token_ratio. The
    median was one over all rows where tokens are counted, and over the rows read at once where they
    are left out of the means of channels; a row's own depends on neither.
    """
    return peaks / peaks.median(-1, keepdim=True).values


def outlier_tokens(peaks: Tensor, thresholds: Thresholds) -> Tensor:
    """Which tokens (..., length) are far above the median token of their row, by their peaks."""
    return token_ratios(peaks) > thresholds.token_ratio


def kurtosis(values: Tensor) -> Tensor:
    """The fourth moment over the squared variance of all entries, a scalar: 3 if they are normal.

    The measure of outliers in arXiv 2306.12929.
    """
    squares = (values - values.mean()).square()
    return squares.square().mean() / squares.mean().square()


def row_kurtoses(values: Tensor) -> Tensor:
    """That of each row of values (rows, ...): (rows,)."""
    return torch.stack([kurtosis(row.float()) for row in values])


def first_token_attention(weights: Tensor) -> Tensor:
    """The mean weight (rows, heads) that queries after the first token give it.

    weights is (rows, heads, queries, keys). The first query has no other choice.
    """
    return weights[:, :, 1:, 0].float().mean(2)


def token_attention(weights: Tensor) -> Tensor:
    """The mean weight (rows, length) that heads and later queries give each token.

    weights is (rows, heads, queries, keys). The query at a token's own place tells nothing.
    """
    length = weights.shape[-1]
    below = weights.float().tril(-1).mean(1).sum(1)
    return below / torch.arange(length - 1, -1, -1, device=weights.device).clamp_min(1)


class ByLayer:
    """A figure of each row, which comes by layers and a few rows at once."""

    def __init__(self) -> None:
        self.parts: defaultdict[Any, list[Tensor]] = defaultdict(list)

    def add(self, layer: int, rows: Tensor) -> None:
        """rows is (rows, ...)."""
        self.parts[layer].append(rows)

    def join(self, rows: int) -> None:
        """Take in what other processes have seen of so many rows, each of its share."""
        for layer, own in self.parts.items():
            self.parts[layer] = [ranks.of_all(torch.cat(own), rows)]

    def all(self) -> Tensor:
        """(layers, rows, ...)"""
        return torch.stack([torch.cat(rows) for rows in self.parts.values()])

    def mean(self) -> Tensor:
        """Over rows: (layers, ...)."""
        return self.all().mean(1)


@dataclass(slots=True)
class Tally:
    """What one model has shown so far on held-out text."""

    losses: list[Tensor] = field(default_factory=list)  # nats per token of rows read at once
    divergence: float = 0.0  # the sum over tokens, in nats
    agreed: int = 0  # tokens for which the teacher's first choice is the model's
    tokens: int = 0  # that were predicted
    peaks: ByLayer = field(default_factory=ByLayer)  # of each token: (rows, length)
    medians: ByLayer = field(default_factory=ByLayer)  # (rows,)
    kurtoses: ByLayer = field(default_factory=ByLayer)  # (rows,)
    first: ByLayer = field(default_factory=ByLayer)  # attention on the first token: (rows, heads)
    inputs: dict[str, list[Tensor]] = field(default_factory=dict)  # kurtoses of what matrices read

    def see_stream(self, layer: int, stream: Tensor) -> None:
        """stream is (rows, length, hidden)."""
        size = stream.float().abs()
        self.peaks.add(layer, size.amax(-1))
        self.medians.add(layer, row_medians(size))
        self.kurtoses.add(layer, row_kurtoses(stream))

    def see_attention(self, layer: int, weights: Tensor) -> None:
        """weights is (rows, heads, queries, keys)."""
        self.first.add(layer, first_token_attention(weights))

    def see_input(self, length: int, name: str, values: Tensor) -> None:
        """values (tokens, ..., channels), of rows of a length, is what the matrix `name` reads."""
        kurtoses = row_kurtoses(values.unflatten(0, (-1, length)))
        self.inputs.setdefault(name, []).append(kurtoses)

    def see_logits(self, logits: Tensor, teacher: Tensor, tokens: Tensor) -> None:
        """logits and the teacher's are (rows, length, vocabulary)."""
        losses = torch.zeros(len(tokens), dtype=torch.float64, device=tokens.device)
        for part, following in parts(tokens):
            target, own = (each[:, part].float().log_softmax(-1) for each in (teacher, logits))
            losses -= own.gather(-1, following[..., None]).sum((1, 2), dtype=torch.float64)
            self.divergence += float(kl(target, own).sum(dtype=torch.float64))
            self.agreed += int((own.argmax(-1) == target.argmax(-1)).sum())
        predicted = tokens[:, 1:]
        self.losses.append(losses.cpu() / predicted.shape[1])
        self.tokens += predicted.numel()

    def join(self, rows: int) -> None:
        """Take in what other processes have seen of so many rows, each of its share."""
        if ranks.count() == 1:
            return
        for figure in (self.peaks, self.medians, self.kurtoses, self.first):
            figure.join(rows)
        self.inputs = {n: [ranks.of_all(torch.cat(own), rows)] for n, own in self.inputs.items()}
        self.losses = [ranks.of_all(torch.cat(self.losses), rows)]
        sums = torch.tensor([self.divergence, self.agreed, self.tokens], dtype=torch.float64)
        divergence, agreed, tokens = ranks.summed(sums).tolist()
        self.divergence, self.agreed, self.tokens = divergence, int(agreed), int(tokens)

    @property
    def row_losses(self) -> Tensor:
        """The mean loss of each row in nats: (rows,), float64."""
        return torch.cat(self.losses)

    @property
    def agreement(self) -> float:
        """The share of tokens for which the model's first choice is the teacher's."""
        return self.agreed / self.tokens

    @property
    def token_ratio(self) -> float:
        """The largest multiple that a token's peak is, in any layer, of its row's median token."""
        return float(token_ratios(self.peaks.all()).max())

    @property
    def kurtosis(self) -> float:
        """Of the stream of a row, the mean over rows and layers."""
        return float(self.kurtoses.mean().mean())

    @property
    def input_kurtosis(self) -> dict[str, float]:
        """Of what each matrix reads of a row, the mean over rows, by its name."""
        return {name: float(torch.cat(rows).mean()) for name, rows in self.inputs.items()}

    @property
    def head_weights(self) -> Tensor:
        """The mean attention weight on the first token: (layers, heads)."""
        return self.first.mean()

    def figures(self, thresholds: Thresholds) -> Figures:
        """What every score has; `thresholds` say which activations are massive."""
        peaks, medians = self.peaks.all(), self.medians.mean()
        highest = peaks.flatten(1).amax(1)
        layer = int(highest.argmax())
        return Figures(
            perplexity=perplexity_of(self.row_losses),
            divergence=self.divergence / self.tokens,
            stream_peak=float(highest[layer]),
            stream_ratio=float(highest[layer] / medians[layer]),
            massive_tokens=int(is_massive(peaks, medians, thresholds).any(0).sum()),
            first_weight=float(self.head_weights.mean()),
        )
