"""Which tokens the sinks will stand for."""

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from absorb.errors import AbsorbError
from absorb.source import Source
from absorb.watch import layers_of, led, watching

# Candidates are told apart on the beginnings of a few rows; an extension must prove itself on more.
_ROWS = 8
_BEGINNING = 64
_EXTENSIONS = 2
# An extension that does not lower the loss must halve the largest outlier, and cost next to nothing.
_TOLERANCE = 0.001

# Tokens that models make sinks of when no BOS was trained (arXiv 2402.17762, 2410.05265).
_CANDIDATES = ("\n", ".", ",", " the", " and", " of", "The", "In", "I")


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """A prefix that was tried.

    loss is in nats per token; outlier is the largest peak of a token's stream behind the prefix, as
    a multiple of the median token's in that layer.
    """

    prefix: tuple[int, ...]
    loss: float
    outlier: float


@torch.no_grad()
def find_prefix(source: Source, text: str | None, tokens: Tensor) -> list[Trial]:
    """The prefixes that were tried on calibration text `tokens` (rows, length); the last one won.

    `text`, if given, is the prefix; otherwise it is BOS where the tokenizer adds one, else the
    candidate with the lowest loss, and after it the outlier tokens that it pays to add.
    """
    tokens = tokens[:_ROWS].to(source.model.device)
    if text is not None:
        return [_try(source, _encoded(source.tokenizer, text), tokens)[0]]
    candidates = tqdm(_candidates(source.tokenizer), desc="choosing the prefix", unit="token")
    trials = [_try(source, (token,), tokens[:, :_BEGINNING])[0] for token in candidates]
    trials.sort(key=lambda trial: -trial.loss)
    best, outlier = _try(source, trials[-1].prefix, tokens)
    for _ in range(_EXTENSIONS):
        longer, next_outlier = _try(source, (*best.prefix, outlier), tokens)
        trials.append(longer)
        if not _better(longer, best):
            break
        best, outlier = longer, next_outlier
    return [*(trial for trial in trials if trial.prefix != best.prefix), best]


def _better(longer: Trial, best: Trial) -> bool:
    halves = longer.outlier < 0.5 * best.outlier and longer.loss < best.loss * (1 + _TOLERANCE)
    return longer.loss < best.loss or halves


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


def _try(source: Source, prefix: tuple[int, ...], text: Tensor) -> tuple[Trial, int]:
    """How text (rows, length) does behind a prefix, and the token that is most often its outlier."""
    peaks: list[Tensor] = []
    layers = layers_of(source.model, source.family)
    with watching(layers, lambda _, stream: peaks.append(stream.float().abs().amax(-1))):
        rows = led(text, torch.tensor(prefix))
        logits = source.model(rows, use_cache=False).logits[:, len(prefix) :]
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), text[:, 1:].flatten())
    peak = torch.stack(peaks)[:, :, len(prefix) :]
    ratio = (peak / peak.flatten(1).median(1).values[:, None, None]).amax(0)
    worst = text.gather(1, ratio.argmax(1, keepdim=True))[:, 0].tolist()
    trial = Trial(prefix=prefix, loss=loss.item(), outlier=ratio.max().item())
    return trial, Counter(worst).most_common(1)[0][0]
