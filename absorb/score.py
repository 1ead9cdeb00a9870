"""Models and held-out text → Scores, side by side in one pass over the same tokens."""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from absorb.families import Family
from absorb.logits import kl, parts, row_losses
from absorb.memory import release_freed_memory
from absorb.quantize import FORMATS, Format, quantised
from absorb.settings import FormatName, Thresholds
from absorb.watch import each_layers, eager, layers_of, led, watching

# Tokens that are read at once: fewer take longer each, and the logits of these are a tenth of a
# gigabyte, or a few.
_TOKENS = 512
# Where nothing is kept of a row but its loss. A GPU reads eight in little more time than one.
ROWS_AT_ONCE = {"cpu": 1, "cuda": 8}


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A model, and the tokens (n,) that it is to be given before every row of text, if any."""

    model: PreTrainedModel
    lead: Tensor = field(default_factory=lambda: torch.tensor([], dtype=torch.long))

    def reads_as(self, other: "Subject") -> bool:
        """Whether both are one model that is given the same lead."""
        return self.model is other.model and torch.equal(self.lead, other.lead)


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """How a model does on held-out text, and what its outliers are there."""

    perplexity: float
    divergence: float  # KL(teacher | model), nats per token
    stream_peak: float  # largest magnitude in the residual stream
    stream_ratio: float  # and its multiple of the median of its layer
    massive_tokens: int  # tokens with a massive activation in any layer
    first_weight: float  # mean attention weight on the first token, over layers and heads


@dataclass(frozen=True, slots=True, kw_only=True)
class Score(Figures):
    """The same with what becomes of it in low precision."""

    quantised: dict[FormatName, float]  # the perplexity in each


@dataclass(slots=True)
class Tally:
    """What one subject has shown so far."""

    losses: list[float] = field(default_factory=list)  # of each row, in nats
    divergence: float = 0.0
    agreed: int = 0  # tokens for which the teacher's first choice is the subject's
    tokens: int = 0
    stream: dict[int, list[Tensor]] = field(default_factory=dict)
    medians: dict[int, list[Tensor]] = field(default_factory=dict)  # of each row
    kurtoses: list[Tensor] = field(default_factory=list)  # of each row in each layer
    first: list[Tensor] = field(default_factory=list)  # of rows read at once, in a layer: (heads,)

    def see_stream(self, layer: int, stream: Tensor) -> None:
        """stream is (rows, length, hidden)."""
        size = stream.float().abs()
        self.stream.setdefault(layer, []).append(size.amax(-1))
        self.medians.setdefault(layer, []).append(size.flatten(1).median(1).values)
        self.kurtoses += [kurtosis(row) for row in stream.float()]

    def see_logits(self, logits: Tensor, teacher: Tensor, tokens: Tensor) -> None:
        """logits and the teacher's are (rows, length, vocabulary)."""
        losses = torch.zeros(len(tokens), dtype=torch.float64, device=tokens.device)
        for part, following in parts(tokens):
            target, own = (each[:, part].float().log_softmax(-1) for each in (teacher, logits))
            losses -= own.gather(-1, following[..., None]).sum((1, 2), dtype=torch.float64)
            self.divergence += float(kl(target, own).sum(dtype=torch.float64))
            self.agreed += int((own.argmax(-1) == target.argmax(-1)).sum())
        self.losses += losses.tolist()
        self.tokens += tokens[:, 1:].numel()

    def peaks(self) -> Tensor:
        """The largest magnitude in the stream of each token: (layers, tokens)."""
        return torch.stack([torch.cat(rows).flatten() for rows in self.stream.values()])

    def figures(self, thresholds: Thresholds) -> Figures:
        peaks = self.peaks()
        ratios = peaks / torch.stack([torch.cat(m).mean() for m in self.medians.values()])[:, None]
        massive = (peaks > thresholds.massive_value) & (ratios > thresholds.massive_ratio)
        return Figures(
            perplexity=math.exp(sum(self.losses) / self.tokens),
            divergence=self.divergence / self.tokens,
            stream_peak=float(peaks.max()),
            stream_ratio=float(ratios.flatten()[peaks.argmax()]),
            massive_tokens=int(massive.any(0).sum()),
            first_weight=float(torch.stack(self.first).mean()),
        )


def kurtosis(values: Tensor) -> Tensor:
    """The fourth moment over the squared variance of all entries, a scalar: 3 if they are normal.

    The measure of outliers in arXiv 2306.12929.
    """
    squares = (values - values.mean()).square()
    return squares.square().mean() / squares.mean().square()


@torch.no_grad()
def evaluate(
    subjects: Sequence[Subject],
    teacher: Subject,
    family: Family,
    held_out: Tensor,
    calibration: Tensor,
    thresholds: Thresholds,
    formats: Sequence[FormatName],
) -> list[Score]:
    """Score every subject on `held_out` (rows, length).

    Perplexity counts each row's tokens but the first, whatever lead a model is given. Fixed ranges
    of formats come from `calibration` (rows, length); `thresholds` say which activations are
    massive.
    """
    tallies = [Tally() for _ in subjects]
    known = next((i for i, subject in enumerate(subjects) if subject.reads_as(teacher)), None)
    for batch in tqdm(held_out.split(_rows(held_out)), desc="evaluating", unit="batch"):
        tokens = batch.to(teacher.model.device)
        given = [
            watched_logits(s, family, tokens, t) for s, t in zip(subjects, tallies, strict=True)
        ]
        target = _logits(teacher, tokens) if known is None else given[known]
        for logits, tally in zip(given, tallies, strict=True):
            tally.see_logits(logits, target, tokens)
    return [
        Score(
            **asdict(tally.figures(thresholds)),
            quantised={
                name: quantised_perplexity(subject, family, FORMATS[name], held_out, calibration)
                for name in formats
            },
        )
        for subject, tally in zip(subjects, tallies, strict=True)
    ]


def _logits(subject: Subject, tokens: Tensor) -> Tensor:
    """Logits (rows, length, vocabulary) of the text, those of the lead left out."""
    rows = led(tokens, subject.lead)
    logits: Tensor = subject.model(rows, use_cache=False).logits
    return logits[:, len(subject.lead) :]


def watched_logits(subject: Subject, family: Family, tokens: Tensor, tally: Tally) -> Tensor:
    """Logits (rows, length, vocabulary) of the text; the tally sees streams and attention."""
    model = subject.model
    release_freed_memory()  # what a tally keeps lies among what was freed

    def see_weights(_: object, __: object, out: tuple[Tensor, Tensor]) -> None:
        tally.first.append(out[1][:, :, 1:, 0].float().mean((0, 2)))

    with ExitStack() as stack:
        stack.enter_context(eager(model))
        stack.enter_context(watching(layers_of(model, family), tally.see_stream))
        for module in each_layers(model, family, family.attention):
            stack.callback(module.register_forward_hook(see_weights).remove)
        return _logits(subject, tokens)


def quantised_perplexity(
    subject: Subject, family: Family, form: Format, held_out: Tensor, calibration: Tensor
) -> float:
    """Perplexity in a format, which takes fixed ranges, if it has any, from `calibration`."""
    return _perplexity_of(quantised_losses(subject, family, form, held_out, calibration))


@torch.no_grad()
def quantised_losses(
    subject: Subject, family: Family, form: Format, held_out: Tensor, calibration: Tensor
) -> Tensor:
    """What `losses` gives in a format, which takes fixed ranges, if any, from `calibration`."""
    with in_format(subject, family, form, calibration):
        return losses(subject, held_out, form.label, alone=form.mixes_rows)


@contextmanager
def in_format(
    subject: Subject, family: Family, form: Format, calibration: Tensor
) -> Iterator[None]:
    """The subject in a format for a while, with fixed ranges, if any, from `calibration`."""
    release_freed_memory()  # each format has tensors of other sizes
    find = form.ranges
    ranges = {} if find is None else find(subject.model, family, calibration, subject.lead)
    with quantised(subject.model, family, form, ranges):
        yield


def perplexity(subject: Subject, rows: Tensor, label: str) -> float:
    """exp of the mean loss of every token but the first of each row (rows, length)."""
    return _perplexity_of(losses(subject, rows, label))


def _perplexity_of(losses: Tensor) -> float:
    return float(losses.mean().exp())


@torch.no_grad()
def losses(subject: Subject, rows: Tensor, label: str, *, alone: bool = False) -> Tensor:
    """The mean loss in nats of every row's tokens but its first: (rows,), float64.

    Rows are read `alone` where what a model makes of one would depend on those read with it.
    """
    device, found = subject.model.device, []
    at_once = 1 if alone else max(_rows(rows), ROWS_AT_ONCE[device.type])
    for batch in tqdm(rows.split(at_once), desc=label, unit="batch" if at_once > 1 else "row"):
        tokens = batch.to(device)
        found.append(row_losses(_logits(subject, tokens), tokens).cpu())
    return torch.cat(found)


def _rows(text: Tensor) -> int:
    """How many rows of text (rows, length) are read at once."""
    return max(1, _TOKENS // text.shape[1])
