"""How models stand side by side, as data and as a table."""

from collections.abc import Callable
from dataclasses import dataclass

from absorb.quantize import FORMATS
from absorb.report import Row
from absorb.settings import Dtype, FormatName
from absorb.tally import Figures
from absorb.timing import Speed

# For "float" and for each format, what each task says by its metrics.
Answers = dict[str, dict[str, dict[str, float]]]

# What is shown of a task that has several metrics. A stderr belongs to a metric of its own name.
_METRICS = ("acc_norm", "acc", "exact_match", "word_perplexity")


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing(Figures):
    """How one of several models does. Its `divergence` is from the reference."""

    model: str
    converted: bool
    interval: tuple[float, float]  # of the perplexity: 95 %, bootstrapped over rows
    agreement: float  # share of tokens for which its first choice is that of the reference
    token_ratio: float  # largest peak of a token over that of its row's median token, in any layer
    kurtosis: float  # of the stream of a row, mean over rows and layers
    input_kurtosis: dict[str, float]  # of what each matrix reads, mean over rows, by its name
    head_weights: tuple[tuple[float, ...], ...]  # mean weight on the first token: layers, heads
    speed: Speed
    formats: dict[FormatName, float | None]  # the perplexity in each; None where it is no number
    tasks: Answers  # without the formats in which the perplexity is no number


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Models in the order they were named in, and what they were measured on."""

    reference: str
    models: tuple[Standing, ...]
    text_origin: str
    calibration_origin: str  # of the rows that fixed ranges were taken from
    text_sha256: str
    rows: int
    length: int
    dtype: Dtype
    device: str
    versions: dict[str, str]


def comparison_rows(comparison: Comparison) -> list[Row]:
    """A table with a column for every model.

    perplexity, 95 % interval: of every token but the first of a row; bootstrapped over rows
    KL, the same first choice: how far the next-token distribution is from that of the reference,
        and how often the likeliest token is the same
    largest |x| in the stream: and its multiple of the layer's median entry
    largest token: the largest peak of a token over that of the median token, in any layer
    kurtosis of the stream: of all entries of a row in a layer, mean over both; 3 if normal
    massive-activation tokens: with an entry above the thresholds for value and ratio
    mean weight on the first token: what attention gives it, over layers and heads
    prefill, decode, weights, cache: tokens per second of one row, read at once and then one by
        one, all models in turns; memory, with the most that a prefill takes where the system tells
    perplexity in ...: with matrices of the decoder layers and what they read in that format
    """
    reference = comparison.reference.rpartition("/")[2]
    figures: list[tuple[str, Callable[[Standing], str]]] = [
        ("perplexity", lambda m: f"{m.perplexity:.3f}"),
        ("  95 % interval", lambda m: "{:.2f} to {:.2f}".format(*m.interval)),
        (f"KL from {reference}, nats", lambda m: f"{m.divergence:.4f}"),
        ("  the same first choice", lambda m: f"{m.agreement:.1%}"),
        ("largest |x| in the stream", lambda m: f"{m.stream_peak:,.0f}"),
        ("  as a multiple of the median", lambda m: f"{m.stream_ratio:,.0f} x"),
        ("largest token, of the median token", lambda m: f"{m.token_ratio:,.0f} x"),
        ("kurtosis of the stream", lambda m: f"{m.kurtosis:,.0f}"),
        ("  of what a matrix reads, mean", lambda m: f"{_mean(m.input_kurtosis):,.0f}"),
        ("massive-activation tokens", lambda m: f"{m.massive_tokens}"),
        ("mean weight on the first token", lambda m: f"{m.first_weight:.3f}"),
        ("  highest of a head", lambda m: f"{max(map(max, m.head_weights)):.3f}"),
        *_speed_rows(comparison),
    ]
    if len(comparison.models) == 1:
        del figures[2:4]
    rows = [(label, *map(show, comparison.models)) for label, show in figures]
    names = comparison.models[0].formats
    formats = [
        (f"perplexity in {FORMATS[n].label}", *(_shown(m.formats[n]) for m in comparison.models))
        for n in names
    ]
    head = ("", *(model.model for model in comparison.models))
    return [head, *rows, *formats, *_task_rows(comparison)]


def _task_rows(comparison: Comparison) -> list[Row]:
    """What each task says, in float and in each format."""
    first = comparison.models[0]
    labels = {"float": ""} | {str(name): f" in {FORMATS[name].label}" for name in first.formats}
    return [
        (f"{task}, {metric}{label}", *(_answers(m, place, task, metric) for m in comparison.models))
        for task, metrics in first.tasks.get("float", {}).items()
        for metric in [next((name for name in _METRICS if name in metrics), min(metrics))]
        for place, label in labels.items()
    ]


def _answers(model: Standing, place: str, task: str, metric: str) -> str:
    found = model.tasks.get(place)
    if found is None:
        return "overflows"
    value, error = found[task][metric], found[task].get(f"{metric}_stderr")
    return f"{value:.3f}" if error is None else f"{value:.3f} ± {error:.3f}"


def _speed_rows(comparison: Comparison) -> list[tuple[str, Callable[[Standing], str]]]:
    rows: list[tuple[str, Callable[[Standing], str]]] = [
        ("prefill, tokens per second", lambda m: f"{m.speed.prefill:,.0f}"),
        ("decode, tokens per second", lambda m: f"{m.speed.decode:,.1f}"),
        ("weights, MB", lambda m: f"{m.speed.weights / 1e6:,.1f}"),
        (f"cache of {comparison.length} tokens, MB", lambda m: f"{m.speed.cache / 1e6:,.1f}"),
    ]
    if comparison.models[0].speed.peak is not None:
        rows.append(("most memory in prefill, MB", lambda m: f"{(m.speed.peak or 0) / 1e6:,.0f}"))
    return rows


def _mean(values: dict[str, float]) -> float:
    return sum(values.values()) / len(values)


def _shown(perplexity: float | None) -> str:
    return "overflows" if perplexity is None else f"{perplexity:.3f}"
