"""Which tokens the sinks will stand for."""

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from absorb.load.opening.tokenizer import lead_of
from absorb.load.source import Source
from absorb.measure.findings import find, token_weights
from absorb.measure.outliers import ROWS, Measurement, OutlierTally, measurement_of, tally_by
from absorb.runtime import ranks
from absorb.runtime.losses import row_losses
from absorb.runtime.precision import with_fewer_rows
from absorb.runtime.reading import Subject, led
from absorb.runtime.walk import logits
from absorb.schema.findings import Trial
from absorb.schema.settings import Thresholds

# Candidates are told apart on the beginnings of a few rows; an extension is looked for, and must
# prove itself, on all: a token is a sink in some rows only.
_ROWS = 6
_BEGINNING = 64
_EXTENSIONS = 2
# The share of rows that must have made a sink of a token before it stands for all of them: whether
# one row does is an accident of the text.
_COMMON = 0.25
# What absorbing one more sink token may cost in loss, as a share. Left in the text, a second sink
# makes the fit depend on where it happens to stand.
_TOLERANCE = 0.01
# By how much, as a share, the loss behind another token must be lower than behind a BOS that the
# tokenizer does not add. BOS was trained to begin texts; where another token won by less, sinks
# that were fitted to it did worse on other text.
_MARGIN = 0.03
# Tokens that models make sinks of when no BOS was trained (arXiv 2402.17762, 2410.05265).
_CANDIDATES = ("\n", ".", ",", " the", " and", " of", "The", "In", "I")


@torch.no_grad()
def find_prefix(
    source: Source, wish: tuple[int, ...] | None, tokens: Tensor, thresholds: Thresholds
) -> list[Trial]:
    """The prefixes that were tried on calibration text `tokens` (rows, length); the last one won.

    `wish`, if given, is the prefix; otherwise it begins with what the tokenizer puts first, else
    with the candidate of the lowest loss (BOS by preference), and goes on with the tokens that are
    attention sinks even behind it.
    """
    whole, tokens = tokens, tokens[:_ROWS]
    if wish is not None:
        return _tried(source, [wish], tokens)
    known = source.model.config.vocab_size  # a tokenizer may have more: padding that was added
    candidates = [one for one in _candidates(source.tokenizer) if max(one) < known]
    trials: list[Trial] = []
    if len(candidates) > 1:
        trials = _tried(source, candidates, tokens[:, :_BEGINNING])
        bos = source.tokenizer.bos_token_id
        trials.sort(key=lambda trial: -trial.loss * (1 - _MARGIN * (trial.prefix == (bos,))))
    first = trials.pop().prefix if trials else candidates[0]
    best, seen = _measured(source, first, whole)
    for _ in range(_EXTENSIONS):
        token = strongest_sink(seen, best.prefix, thresholds)
        if token is None:
            break
        longer, seen = _measured(source, (*best.prefix, token), whole)
        if longer.loss > best.loss * (1 + _TOLERANCE):
            trials.append(longer)
            break
        trials.append(best)
        best = longer
    return [*trials, best]


@torch.inference_mode()
def _measured(source: Source, prefix: tuple[int, ...], tokens: Tensor) -> tuple[Trial, Measurement]:
    """A trial, and a measurement of the text behind the prefix, in one pass."""
    rows = led(tokens, torch.tensor(prefix))

    def seen(at_once: int) -> tuple[OutlierTally, list[Tensor]]:
        losses: list[Tensor] = []

        def see(part: Tensor, logits: Tensor) -> None:
            losses.append(row_losses(logits[:, len(prefix) :], part[:, len(prefix) :]))

        return tally_by(source.decoder, rows, at_once, see), losses

    tally, own = with_fewer_rows(seen, ROWS)
    losses = ranks.of_all(torch.cat(own), len(rows))
    measurement = measurement_of(rows, source.decoder, tally)
    return Trial(prefix=prefix, loss=losses.mean().item()), measurement


def strongest_sink(
    measurement: Measurement, prefix: tuple[int, ...], thresholds: Thresholds
) -> int | None:
    """The sink token not in `prefix`, behind which text was measured, that takes most attention.

    Its weight is summed over layers and places: the highest may be that of one place, in one text.
    A token that is a sink in few rows does not count.
    """
    sinks = find(measurement, thresholds).sink_tokens
    left = [sink.token for sink in sinks if sink.token >= 0 and sink.token not in prefix]
    weight = token_weights(measurement)
    taken = torch.where(weight > thresholds.sink_weight, weight, 0).sum(0)
    tokens = measurement.tokens[:, : taken.shape[1]]
    by_row = {token: torch.where(tokens == token, taken, 0).sum(1) for token in left}
    common = {t: float(rows.sum()) for t, rows in by_row.items() if _is_common(rows)}
    return max(common, key=lambda token: common[token], default=None)


def _is_common(by_row: Tensor) -> bool:
    return bool((by_row > 0).float().mean() >= _COMMON)


def _candidates(tokenizer: PreTrainedTokenizerBase) -> list[tuple[int, ...]]:
    """What the tokenizer puts first, whole; where that is nothing, single tokens."""
    lead = lead_of(tokenizer).tolist()
    if lead:
        return [tuple(lead)]
    texts = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in _CANDIDATES)
    single = [ids[0] for ids in texts if len(ids) == 1]
    return [(token,) for token in dict.fromkeys([*tokenizer.all_special_ids, *single])]


def _tried(source: Source, prefixes: list[tuple[int, ...]], tokens: Tensor) -> list[Trial]:
    """Prefixes of one length, by the loss of the text (rows, length) but its first tokens."""

    def found(places: Tensor) -> Tensor:
        led_by = [led(tokens, torch.tensor(prefixes[place])) for place in places.tolist()]
        subject, rows = Subject(decoder=source.decoder), torch.cat(led_by)
        given = logits(subject, rows, len(tokens), "choosing the prefix")
        losses = [row_losses(own[:, -tokens.shape[1] :], tokens.to(own.device)) for own in given]
        return torch.stack([loss.mean() for loss in losses])

    losses = ranks.by_row(torch.arange(len(prefixes)), found).tolist()
    return [Trial(prefix=p, loss=loss) for p, loss in zip(prefixes, losses, strict=True)]
