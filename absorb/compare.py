"""Evaluation → Comparison: models side by side on one text, as stored and in every format."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from absorb.device import device_of
from absorb.errors import AbsorbError
from absorb.prefix import lead_of
from absorb.quantize import FORMATS, watching_inputs
from absorb.report import versions
from absorb.score import (
    ROWS_AT_ONCE,
    Subject,
    Tally,
    in_format,
    kurtosis,
    quantised_perplexity,
    watched_logits,
)
from absorb.settings import Calibration, Evaluation, FormatName, ModelRef, Thresholds
from absorb.source import Source, load
from absorb.standing import Answers, Comparison, Standing
from absorb.tasks import Task, answered, tasks_of
from absorb.text import Texts, gather, read_ids, refuse_short_model
from absorb.timing import Speed, speeds
from absorb.write import as_stored

LENGTH = 512
# Of a file: so many windows are measured at most, and one for every four of them is what fixed
# ranges are taken from.
_WINDOWS = 32
_SHARE = 5
_RESAMPLES = 2000


@torch.no_grad()
def compare(wish: Evaluation, say: Callable[[str], None]) -> Comparison:
    """Measure all models; `say` is told what is being done.

    The reference is the first of the others, or the model itself where there are none.
    """
    device, tasks = device_of(wish.device), tasks_of(wish.tasks)
    sources = [_loaded(name, wish, say) for name in (wish.model, *wish.against)]
    subjects = [_subject(source) for source in sources]
    _refuse_other_tokens(sources)
    for source, subject in zip(sources, subjects, strict=True):
        refuse_short_model(source, len(subject.lead) + LENGTH)
        as_stored(source.model, getattr(torch, wish.dtype))
        nn.Module.to(source.model, device)
    texts = _texts(sources[0], wish.text)
    reference = min(1, len(wish.against))
    tallies = _tallies(sources, subjects, reference, texts.held_out)
    asked = partial(_asked, tasks=tasks, limit=wish.limit)
    took = speeds([source.model for source in sources], texts.held_out[:1].to(device))
    return Comparison(
        reference=sources[reference].name,
        models=tuple(
            _standing(source, subject, tally, speed, texts, wish.formats, asked)
            for source, subject, tally, speed in zip(sources, subjects, tallies, took, strict=True)
        ),
        text_origin=texts.origin,
        text_sha256=texts.fingerprint,
        rows=len(texts.held_out),
        length=texts.held_out.shape[1],
        dtype=wish.dtype,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        versions=versions(),
    )


def _loaded(name: str, wish: Evaluation, say: Callable[[str], None]) -> Source:
    say(f"loading {name}")
    return load(ModelRef(name=name, trust_remote_code=wish.trust_remote_code), measured=True)


def _subject(source: Source) -> Subject:
    """A converted model is given nothing before a text: its sinks stand for that."""
    if source.converted:
        return Subject(model=source.model)
    return Subject(model=source.model, lead=lead_of(source.tokenizer))


def _refuse_other_tokens(sources: list[Source]) -> None:
    """Refuse models that do not mean the same by the same token id."""
    first, *others = sources
    for other in others:
        sizes = [source.model.config.vocab_size for source in (first, other)]
        if first.tokenizer.get_vocab() != other.tokenizer.get_vocab() or len(set(sizes)) > 1:
            raise AbsorbError(
                f"{first.name} and {other.name} have different tokenizers, so their perplexities "
                "cannot be compared; name models that share one"
            )


def _texts(source: Source, path: Path | None) -> Texts:
    """Windows of the file, or rows that the model samples: held out, and to take ranges from."""
    if path is None:
        return gather(source, Calibration(), training_rows=0)
    rows = _windows(path, source)
    seen = -(-len(rows) // _SHARE)
    return Texts(
        calibration=rows[-seen:],
        validation=rows[:0],
        held_out=rows[:-seen],
        training=rows[:0],
        origin=path.name,
    )


def _windows(path: Path, source: Source) -> Tensor:
    """The first windows of a file: (rows, LENGTH)."""
    most = _WINDOWS * _SHARE // (_SHARE - 1)
    ids = read_ids(path, source, most * LENGTH)
    rows = min(len(ids) // LENGTH, most)
    if rows < 2:
        raise AbsorbError(
            f"{path} holds {len(ids)} tokens and {2 * LENGTH} are needed, a window to measure and "
            "one to take ranges from; give a longer text, or no --text and the model samples one"
        )
    return torch.tensor(ids[: rows * LENGTH]).view(rows, LENGTH)


@dataclass(slots=True)
class _Tally(Tally):
    """With what each matrix reads."""

    inputs: dict[str, list[Tensor]] = field(default_factory=dict)  # kurtosis of each row

    def see_input(self, name: str, values: Tensor) -> None:
        """values is (tokens, ..., channels)."""
        self.inputs.setdefault(name, []).append(kurtosis(values.float()))


def _watched(source: Source, subject: Subject, tokens: Tensor, tally: _Tally) -> Tensor:
    with watching_inputs(source.model, source.family, tally.see_input):
        return watched_logits(subject, source.family, tokens, tally)


def _tallies(
    sources: list[Source], subjects: list[Subject], reference: int, held_out: Tensor
) -> list[_Tally]:
    """What every model shows on text (rows, length), compared with the one at `reference`."""
    tallies = [_Tally() for _ in sources]
    for batch in tqdm(held_out.split(1), desc="evaluating", unit="row"):
        tokens = batch.to(sources[0].model.device)
        logits = [
            _watched(source, subject, tokens, tally)
            for source, subject, tally in zip(sources, subjects, tallies, strict=True)
        ]
        for tally, part in zip(tallies, logits, strict=True):
            tally.see_logits(part, logits[reference], tokens)
    return tallies


def _standing(
    source: Source,
    subject: Subject,
    tally: _Tally,
    speed: Speed,
    texts: Texts,
    formats: tuple[FormatName, ...],
    asked: Callable[..., Answers],
) -> Standing:
    peaks, layers = tally.peaks(), len(tally.stream)
    heads = torch.stack(tally.first).unflatten(0, (-1, layers)).mean(0)
    measured = {name: _finite(_perplexity(source, subject, name, texts)) for name in formats}
    usable = [name for name, value in measured.items() if value is not None]
    return Standing(
        **asdict(tally.figures(Thresholds())),
        model=source.name,
        converted=source.converted,
        interval=interval(torch.tensor(tally.losses) / (texts.held_out.shape[1] - 1)),
        agreement=tally.agreed / tally.tokens,
        token_ratio=float((peaks.amax(1) / peaks.median(1).values).max()),
        kurtosis=float(torch.stack(tally.kurtoses).mean()),
        input_kurtosis={n: float(torch.stack(k).mean()) for n, k in tally.inputs.items()},
        head_weights=tuple(map(tuple, heads.tolist())),
        speed=speed,
        formats=measured,
        tasks=asked(source, subject, usable, texts.calibration),
    )


def _perplexity(source: Source, subject: Subject, name: FormatName, texts: Texts) -> float:
    form, family = FORMATS[name], source.family
    return quantised_perplexity(subject, family, form, texts.held_out, texts.calibration)


def _asked(
    source: Source,
    subject: Subject,
    formats: list[FormatName],
    calibration: Tensor,
    tasks: list[Task],
    limit: int | None,
) -> Answers:
    """The tasks in float, and in each format."""
    if not tasks:
        return {}
    rows = ROWS_AT_ONCE[source.model.device.type]
    ask = partial(answered, source.model, source.tokenizer, tasks, limit)
    found = {"float": ask(rows)}
    for name in formats:
        form = FORMATS[name]
        with in_format(subject, source.family, form, calibration):
            found[name] = ask(1 if form.mixes_rows else rows)
    return found


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def interval(losses: Tensor) -> tuple[float, float]:
    """Between what the perplexity of rows with these mean losses (rows,) lies in 95 of 100 cases.

    The percentile bootstrap (Efron and Tibshirani 1993, section 13.3): rows are drawn with
    replacement.
    """
    draw = torch.Generator().manual_seed(0)
    chosen = torch.randint(len(losses), (_RESAMPLES, len(losses)), generator=draw)
    ends = losses.new_tensor([0.025, 0.975])
    low, high = losses[chosen].mean(1).exp().quantile(ends).tolist()
    return low, high
