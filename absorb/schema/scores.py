"""How good, how quantisable and how fast models are, one by one and side by side: plain data."""

from dataclasses import dataclass

from absorb.schema.settings import Dtype, FormatName


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """What reading one text takes and what it leaves: memory in bytes."""

    prefill: float  # tokens per second, of a text that is read at once
    decode: float  # tokens per second, one after another behind that text
    weights: int
    cache: int  # keys and values of the text
    peak: int | None  # the most at once, weights included; None where the system does not tell


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

    quantized: dict[FormatName, float]  # the perplexity in each


# For "float" and for each format, what each task says by its metrics.
TaskResults = dict[str, dict[str, dict[str, float]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelScore(Figures):
    """How one of several models does. Its `divergence` is from the reference."""

    model: str
    converted: bool
    interval: tuple[float, float]  # of the perplexity: 95 %, bootstrapped over rows
    agreement: float  # share of tokens for which its first choice is that of the reference
    token_ratio: float  # largest peak of a token over that of its row's median token, in any layer
    kurtosis: float  # of the stream of a row, mean over rows and layers
    input_kurtosis: dict[str, float]  # of what each matrix reads, mean over rows, by its name
    head_weights: tuple[tuple[float, ...], ...]  # mean weight on the first token: layers, heads
    speed: Speed | None  # none of models larger than the memory
    formats: dict[FormatName, float | None]  # the perplexity in each; None where it is no number
    tasks: TaskResults  # without the formats in which the perplexity is no number
    # By how much it is above the reference, each question beside the same; none of the reference.
    task_differences: TaskResults


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Models in the order they were named in, and what they were measured on."""

    reference: str
    models: tuple[ModelScore, ...]
    text_origin: str
    calibration_origin: str  # of the rows that fixed ranges were taken from
    text_sha256: str
    rows: int
    length: int
    dtype: Dtype
    device: str
    versions: dict[str, str]
