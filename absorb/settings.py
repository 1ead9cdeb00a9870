"""What a user may choose. Immutable, checked, and cheap to import: no torch here."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from absorb.errors import AbsorbError

Sink = Literal["logit", "key", "auto"]
Train = Literal["sinks", "scales", "all"]
Purpose = Literal["none", "int8", "w4a4", "nvfp4"]
Dtype = Literal["float32", "bfloat16", "float16"]
FormatName = Literal[
    "w8a8-static",
    "w8a8-clipped",
    "w8a8-tensor",
    "w8a8-token",
    "fp8",
    "w4a8",
    "w4a4",
    "w4a4-hadamard",
    "nvfp4",
    "mxfp4",
    "stream-fp16",
    "stream-int8",
    "cache-int8",
    "cache-int4",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """The numbers that are allowed, the ends among them unless the least is `excluded`."""

    least: float
    most: float | None = None
    excluded: bool = False
    whole: bool = False

    def __contains__(self, value: object) -> bool:
        if isinstance(value, bool) or not isinstance(value, int if self.whole else int | float):
            return False
        above = value > self.least if self.excluded else value >= self.least
        return above and (self.most is None or value <= self.most)

    def __str__(self) -> str:
        kind = "a whole number" if self.whole else "a number"
        least = f"{'above' if self.excluded else 'from'} {self.least:g}"
        return f"{kind} {least}" + ("" if self.most is None else f" to {self.most:g}")


RANGES = {
    "seed": Range(least=0, most=10**9, whole=True),
    "residual_target": Range(least=0.001, most=1e6),
    "steps": Range(least=0, whole=True),
    "minutes": Range(least=0, most=1e6, excluded=True),
    "limit": Range(least=1, whole=True),
    "windows": Range(least=1, most=10**6, whole=True),
    "length": Range(least=2, most=10**6, whole=True),
    "sink_weight": Range(least=0, most=1e9),
    "massive_value": Range(least=0, most=1e9),
    "massive_ratio": Range(least=0, most=1e9),
    "token_ratio": Range(least=0, most=1e9),
    "channel_ratio": Range(least=0, most=1e9),
    "divergence": Range(least=0, most=1e9),
}
CHOICES: dict[str, tuple[str, ...]] = {
    "sink": get_args(Sink),
    "train": get_args(Train),
    "purpose": get_args(Purpose),
    "dtype": get_args(Dtype),
    "formats": get_args(FormatName),
}


class _Checked:
    """Refuses, by an AbsorbError, what is out of its range or none of its choices."""

    __slots__ = ()

    def __post_init__(self) -> None:
        for one in fields(self):  # type: ignore[arg-type]  # all that inherit are dataclasses
            value = getattr(self, one.name)
            if value is None and one.default is None:
                continue
            for part in value if isinstance(value, tuple) else (value,):
                _refuse_strange(one.name, part)


def _refuse_strange(name: str, value: Any) -> None:
    if name in RANGES and value not in RANGES[name]:
        raise AbsorbError(f"{name} is {value!r} and must be {RANGES[name]}")
    if name in CHOICES and value not in CHOICES[name]:
        known = ", ".join(map(repr, CHOICES[name]))
        raise AbsorbError(f"{name} is {value!r} and must be one of {known}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRef:
    """Where the model to convert is: a Hub id, a folder, a .gguf file, or `demo`."""

    name: str
    revision: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if not self.name:  # as a path it would be the current folder
            raise AbsorbError(
                "the name of a model is empty; give a Hub id, a folder, a .gguf file, or demo"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration(_Checked):
    """The text that is measured. Without a file the model samples its own."""

    text: Path | None = None
    prefix: str | None = None
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Thresholds(_Checked):
    """When a figure counts as an outlier, each as its source defines it."""

    # Attention sink: mean weight that a token receives (arXiv 2410.10781).
    sink_weight: float = 0.3
    # Massive activation: magnitude, and multiple of the layer's median (arXiv 2402.17762).
    massive_value: float = 100.0
    massive_ratio: float = 1000.0
    # Outlier token: multiple of the median token's peak (PrefixQuant, arXiv 2410.05265).
    token_ratio: float = 64.0
    # Residual sink: mean magnitude of a channel over that of the median channel.
    channel_ratio: float = 10.0
    # How far, in nats per token, removing spike neurons may move the next-token distribution.
    divergence: float = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class Distillation(_Checked):
    """The brief fine-tune. None lets the machine decide, and the choice is printed.

    It takes a number of steps or of minutes, not both.
    """

    steps: int | None = None
    minutes: float | None = None
    train: Train | None = None
    purpose: Purpose = "none"  # what is to be done with the converted model
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation(_Checked):
    """Models to be compared on one text. Without a file the first of them samples it."""

    model: str
    against: tuple[str, ...] = ()
    trust_remote_code: bool = False  # of all models
    text: Path | None = None
    calibration: Path | None = None  # where fixed ranges come from; None for part of the text
    windows: int | None = None  # of the text that are measured: None for 32
    length: int | None = None  # tokens of each: None for 512
    formats: tuple[FormatName, ...] = ()
    tasks: tuple[str, ...] = ()
    limit: int | None = None  # questions of each task
    dtype: Dtype = "float32"
    device: str = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class Job(_Checked):
    """One conversion, complete."""

    model: ModelRef
    out: Path
    calibration: Calibration = field(default_factory=Calibration)
    thresholds: Thresholds = field(default_factory=Thresholds)
    sink: Sink = "logit"
    # What an outlier channel is brought down to, as a multiple of the median channel's mean.
    residual_target: float = 1.0
    plan: Path | None = None
    distillation: Distillation = field(default_factory=Distillation)
    device: str = "auto"
    force: bool = False
