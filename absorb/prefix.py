"""Which tokens the sinks will stand for."""

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from absorb.errors import AbsorbError
from absorb.findings import outlier_tokens
from absorb.settings import Thresholds
from absorb.source import Source
from absorb.watch import layers_of, led, watching

_ROWS = 8
_LENGTH = 64
_EXTENSIONS = 2
# What fewer outlier tokens may cost in loss, as a share.
_TOLERANCE = 0.001

# Tokens that models make sinks of when no BOS was trained (arXiv 2402.17762, 2410.05265).
_CANDIDATES = ("\n", ".", ",", " the", " and", " of", "The", "In", "I", "\n\n", " ")


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """A prefix that was tried: its loss in nats per token, and how many outlier tokens remain."""

    prefix: tuple[int, ...]
    loss: float
    outliers: int


@torch.no_grad()
def find_prefix(
    source: Source, text: str | None, tokens: Tensor, thresholds: Thresholds
) -> list[Trial]:
    """The prefixes that were tried on calibration text `tokens` (rows, length); the last one won.

    `text`, if given, is the prefix; otherwise it is BOS where the tokenizer adds one, else the
    candidate with the lowest loss, and after it the outlier tokens that it pays to add.
    """
    if text is not None:
        return [_try(source, _encoded(source.tokenizer, text), tokens, thresholds)]
    trials = [
        _try(source, (candidate,), tokens, thresholds)
        for candidate in tqdm(
            _candidates(source.tokenizer), desc="choosing the prefix", unit="token"
        )
    ]
    trials.sort(key=lambda trial: -trial.loss)
    for _ in range(_EXTENSIONS):
        best = trials[-1]
        token = _worst_outlier(source, best.prefix, tokens, thresholds)
        if token is None or token in best.prefix:
            break
        longer = _try(source, (*best.prefix, token), tokens, thresholds)
        if not _better(longer, best):
            trials.insert(0, longer)
            break
        trials.append(longer)
    return trials


def _better(longer: Trial, best: Trial) -> bool:
    cheap = longer.loss <= best.loss * (1 + _TOLERANCE)
    return longer.loss < best.loss or (cheap and longer.outliers < best.outliers)


def lead_of(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """What the tokenizer puts before every text: BOS, or nothing. (n,)"""
    ids = tokenizer("a")["input_ids"]
    return torch.tensor(ids[:1] if ids[0] == tokenizer.bos_token_id else [], dtype=torch.long)


def _encoded(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise AbsorbError(f"--prefix {text!r} holds no token; give text, or leave --prefix out")
    return tuple(ids)


def _candidates(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    lead = lead_of(tokenizer).tolist()
    if lead:
        return lead
    texts = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in _CANDIDATES)
    single = [ids[0] for ids in texts if len(ids) == 1]
    return list(dict.fromkeys([*tokenizer.all_special_ids, *single]))


def _try(source: Source, prefix: tuple[int, ...], tokens: Tensor, thresholds: Thresholds) -> Trial:
    text = tokens[:_ROWS, :_LENGTH].to(source.model.device)
    peaks, logits = _peaks(source, prefix, text)
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), text[:, 1:].flatten())
    outliers = int(outlier_tokens(peaks, thresholds)[:, :, len(prefix) :].any(0).sum())
    return Trial(prefix=prefix, loss=loss.item(), outliers=outliers)


def _peaks(source: Source, prefix: tuple[int, ...], text: Tensor) -> tuple[Tensor, Tensor]:
    """Peaks (layers, rows, prefix + length) of the stream, and the logits of the text."""
    peaks: list[Tensor] = []
    layers = layers_of(source.model, source.family)
    with watching(layers, lambda _, stream: peaks.append(stream.float().abs().amax(-1))):
        rows = led(text, torch.tensor(prefix))
        logits = source.model(rows, use_cache=False).logits[:, len(prefix) :]
    return torch.stack(peaks), logits


def _worst_outlier(
    source: Source, prefix: tuple[int, ...], tokens: Tensor, thresholds: Thresholds
) -> int | None:
    """The token that is most often an outlier behind the prefix."""
    text = tokens[:_ROWS].to(source.model.device)
    peaks, _ = _peaks(source, prefix, text)
    outliers = outlier_tokens(peaks, thresholds)[:, :, len(prefix) :].any(0)
    counts = Counter(text[outliers].tolist())
    return counts.most_common(1)[0][0] if counts else None
