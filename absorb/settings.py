"""What a user may choose. Immutable, and cheap to import: no torch here."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

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
class ModelRef:
    """Where the model to convert is: a Hub id, a folder, a .gguf file, or `demo`."""

    name: str
    revision: str | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """The text that is measured. Without a file the model samples its own."""

    text: Path | None = None
    prefix: str | None = None
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Thresholds:
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
class Distillation:
    """The brief fine-tune. None lets the machine decide, and the choice is printed.

    It takes a number of steps or of minutes, not both.
    """

    steps: int | None = None
    minutes: float | None = None
    train: Train | None = None
    purpose: Purpose = "none"  # what is to be done with the converted model
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Models to be compared on one text. Without a file the first of them samples it."""

    model: str
    against: tuple[str, ...] = ()
    text: Path | None = None
    formats: tuple[FormatName, ...] = ()
    tasks: tuple[str, ...] = ()
    limit: int | None = None  # questions of each task
    dtype: Dtype = "float32"
    device: str = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
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
