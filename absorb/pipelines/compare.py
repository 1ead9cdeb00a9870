"""Evaluation → Comparison: models side by side on one text, as stored and in every format."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from absorb.errors import AbsorbError
from absorb.load.opening.tokenizer import lead_of
from absorb.load.source import Source, load
from absorb.measure.score import ROWS_AT_ONCE, in_formats, tallies
from absorb.measure.tally import Tally
from absorb.measure.tasks import Answers, Task, answered, refuse_unmarked, tasks_of
from absorb.measure.timing import DECODED, speeds
from absorb.prove.prove import proved
from absorb.quantize.formats import FORMATS
from absorb.quantize.simulate import in_format
from absorb.runtime.precision import as_stored, device_of
from absorb.runtime.reading import Subject
from absorb.schema.declared import typed
from absorb.schema.report import versions
from absorb.schema.scores import Comparison, ModelScore, Speed, TaskResults
from absorb.schema.settings import Evaluation, FormatName, ModelRef, Thresholds
from absorb.schema.training import LENGTH
from absorb.text.corpus import refuse_unreadable
from absorb.text.gather import WINDOW, Texts, gather_windows, refuse_short_model

_RESAMPLES = 2000
# What a comparison holds, in bytes a weight: every model in float32, and the weights of one of them
# as they were before they were rounded.
_HELD, _HELD_ONCE = 4, 4

Answered = dict[str, dict[str, Answers]]  # in float and in each format, by task


@torch.no_grad()
def compare(wish: Evaluation, say: Callable[[str], None]) -> Comparison:
    """Measure all models; `say` is told what is being done.

    The reference is the first of the others, or the model itself where there are none.
    """
    device, tasks = device_of(wish.device), tasks_of(wish.tasks)
    for text in (wish.text, wish.calibration):
        refuse_unreadable(text)
    names = (wish.model, *wish.against)
    sources = [
        _loaded(name, wish, device, _HELD * left + _HELD_ONCE, say)
        for name, left in zip(names, range(len(names), 0, -1), strict=True)
    ]
    streams = any(source.streaming for source in sources)
    if streams:
        _refuse_slow(tasks)
        say("the models are larger than the memory, so their layers come one by one; no timing")
    subjects = [_subject(source) for source in sources]
    _refuse_other_tokens(sources)
    if tasks:
        refuse_unmarked(sources[0].tokenizer, sources[0].name)
    for source, subject in zip(sources, subjects, strict=True):
        _refuse_few_positions(source, subject, wish)
        as_stored(source.decoder, getattr(torch, wish.dtype))
    texts = gather_windows(sources[0], wish)
    reference = min(1, len(wish.against))
    seen = tallies(subjects, subjects[reference], texts.held_out, inputs=True)
    took: Sequence[Speed | None] = [None] * len(sources)
    if not streams:
        took = speeds([source.model for source in sources], texts.held_out[:1].to(device))
    scores = [
        _standing(source, subject, tally, speed, texts, wish.formats)
        for source, subject, tally, speed in zip(sources, subjects, seen, took, strict=True)
    ]
    answers = [
        asked(subject, source.tokenizer, _finite(score), texts.calibration, tasks, wish.limit)
        for source, subject, score in zip(sources, subjects, scores, strict=True)
    ]
    return Comparison(
        reference=sources[reference].name,
        models=tuple(
            _with_answers(score, own, answers[reference])
            for score, own in zip(scores, answers, strict=True)
        ),
        text_origin=texts.origin,
        calibration_origin=typed(wish.calibration) if wish.calibration else texts.origin,
        text_sha256=texts.fingerprint,
        rows=len(texts.held_out),
        length=texts.held_out.shape[1],
        dtype=wish.dtype,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        versions=versions(),
    )


def _loaded(
    name: str, wish: Evaluation, device: torch.device, held: int, say: Callable[[str], None]
) -> Source:
    say(f"loading {name}")
    ref = ModelRef(name=name, trust_remote_code=wish.trust_remote_code)
    return load(ref, measured=True, device=device, held=held, prove=proved)


def _refuse_slow(tasks: list[Task]) -> None:
    """Refuse questions to a model all of whose weights would be read anew for each."""
    if tasks:
        raise AbsorbError(
            "the models are larger than the memory, and every question would read all their "
            "weights again; drop --tasks, or ask on a machine with more memory"
        )


def _subject(source: Source) -> Subject:
    """A converted model is given nothing before a text: its sinks stand for that."""
    if source.converted:
        return Subject(decoder=source.decoder)
    return Subject(decoder=source.decoder, lead=lead_of(source.tokenizer))


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


def _refuse_few_positions(source: Source, subject: Subject, wish: Evaluation) -> None:
    """Refuse learned positions that end before a window, with what is read beside it, does."""
    beside = max(len(subject.lead), DECODED)
    if wish.text is None:
        refuse_short_model(source, LENGTH + beside)
    else:
        remedy = "choose a model with more positions, or a smaller --length"
        refuse_short_model(source, (wish.length or WINDOW) + beside, remedy)


def _standing(
    source: Source,
    subject: Subject,
    tally: Tally,
    speed: Speed | None,
    texts: Texts,
    formats: tuple[FormatName, ...],
) -> ModelScore:
    measured = in_formats(subject, formats, texts.held_out, texts.calibration)
    return ModelScore(
        **asdict(tally.figures(Thresholds())),
        model=source.name,
        converted=source.converted,
        interval=interval(tally.row_losses),
        agreement=tally.agreement,
        token_ratio=tally.token_ratio,
        kurtosis=tally.kurtosis,
        input_kurtosis=tally.input_kurtosis,
        head_weights=tuple(map(tuple, tally.head_weights.tolist())),
        speed=speed,
        formats={n: value if math.isfinite(value) else None for n, value in measured.items()},
        tasks={},
        task_differences={},
    )


def _finite(score: ModelScore) -> list[FormatName]:
    """The formats in which the perplexity is a number."""
    return [name for name, perplexity in score.formats.items() if perplexity is not None]


@torch.no_grad()
def asked(
    subject: Subject,
    tokenizer: PreTrainedTokenizerBase,
    formats: Iterable[FormatName],
    calibration: Tensor,
    tasks: list[Task],
    limit: int | None,
) -> Answered:
    """The tasks in float, and in each of the formats; none where there is no task.

    Fixed ranges are those of `calibration`, (rows, length) of token ids.
    """
    if not tasks:
        return {}
    rows = ROWS_AT_ONCE[subject.decoder.device.type]
    ask = partial(answered, subject.decoder.model, tokenizer, tasks, limit)
    found: Answered = {"float": ask(rows)}
    for name in formats:
        form = FORMATS[name]
        with in_format(subject, form, calibration):
            found[name] = ask(1 if form.minds_padding else rows)
    return found


def metrics_of(answers: Answered) -> TaskResults:
    """What the harness says of each task, without the marks of single questions."""
    return {at: {task: one.metrics for task, one in found.items()} for at, found in answers.items()}


def _with_answers(score: ModelScore, own: Answered, reference: Answered) -> ModelScore:
    differences: TaskResults = {}
    if own is not reference:
        for at in (at for at in own if at in reference):
            pairs = ((task, found, reference[at][task]) for task, found in own[at].items())
            differences[at] = {task: found.minus(other) for task, found, other in pairs}
    return replace(score, tasks=metrics_of(own), task_differences=differences)


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
