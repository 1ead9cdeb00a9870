"""What a user may choose. Immutable, checked, and cheap to import: no torch here."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from absorb.errors import AbsorbError, MisuseError
from absorb.schema.declared import Checked, Range, changed, option
from absorb.schema.places import Dataset

Sink = Literal["logit", "key", "auto"]
Gates = Literal["none", "norm"]
Train = Literal["sinks", "scales", "all"]
Purpose = Literal["none", "int8", "w4a4", "nvfp4", "mxfp4"]
Dtype = Literal["float32", "bfloat16", "float16"]
Architecture = Literal["absorbed", "native", "stock"]
Target = Literal["native", "gguf"]
Weights = Literal["f32", "f16", "bf16"]
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
_TRUSTED = "Run tokenizer code that a model brings."
_DEVICES = "cpu, cuda, cuda:1, ..."
_FIGURE = Range(least=0, most=1e9)
# Not below what a checkpoint is probed with: there a window hides nothing.
_WIDTH = Range(least=64, most=2**20, whole=True)
_WINDOW = "Tokens that every layer sees, beside sinks."
# The options that have a say where a model is only rescaled.
_OF_STOCK = {"revision", "trust_remote_code", "text_only", "text", "seed", "device", "to", "force"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRef:
    """Where the model to convert is: a Hub id, a folder, a .gguf file, or `demo`."""

    name: str
    revision: str | None = option(None, "Branch, tag or commit of a Hub repository.")
    trust_remote_code: bool = option(False, _TRUSTED)
    text_only: bool = option(False, "Take the language model out of a vision model.")

    def __post_init__(self) -> None:
        if not self.name:  # as a path it would be the current folder
            raise AbsorbError(
                "the name of a model is empty; give a Hub id, a folder, a .gguf file, or demo"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration(Checked):
    """The text that is measured. Without a file the model samples its own."""

    text: Dataset | Path | None = option(
        None,
        "To fit and train on, or OWNER/DATASET[:split].  [default: the model samples it]",
        is_there=True,
    )
    prefix: str | None = option(None, "What sinks stand for.  [default: searched for]")
    seed: int = option(0, "Of all randomness.", range=Range(least=0, most=10**9, whole=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class Thresholds(Checked):
    """When a figure counts as an outlier, each as its source defines it."""

    # arXiv 2410.10781
    sink_weight: float = option(0.3, "mean attention a sink gets", range=_FIGURE)
    # arXiv 2402.17762
    massive_value: float = option(100.0, "of a massive activation", range=_FIGURE)
    massive_ratio: float = option(1000.0, "and that by the median", range=_FIGURE)
    # PrefixQuant, arXiv 2410.05265
    token_ratio: float = option(64.0, "a token's peak by the median", range=_FIGURE)
    channel_ratio: float = option(10.0, "channel mean by the median", range=_FIGURE)
    divergence: float = option(0.01, "nats removing neurons costs", range=_FIGURE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Distillation(Checked):
    """The brief fine-tune. None lets the machine decide, and the choice is printed."""

    steps: int | None = option(
        None,
        "Of the fine-tune; 0 for none.  [default: 100 on a GPU, 12 on a CPU]",
        range=Range(least=0, whole=True),
    )
    # For those who rent a GPU by the hour.
    minutes: float | None = option(
        None,
        "By the clock instead, loading not counted.",
        range=Range(least=0, most=1e6, excluded=True),
    )
    train: Train | None = option(
        None,
        "Sinks, residual scales too, or all weights.  [default: all on a GPU, sinks on a CPU]",
    )
    purpose: Purpose = option(
        "none",
        "int8, w4a4, nvfp4 or mxfp4.",
        flag="--for",
        metavar="FORMAT",
    )

    def refuse_contradictions(self) -> None:
        if self.steps is not None and self.minutes is not None:
            raise MisuseError(
                "{0} and {1} both set the length; drop one of them", "steps", "minutes"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey(Checked):
    """What to find in a model, and how to absorb it."""

    model: ModelRef
    calibration: Calibration = field(default_factory=Calibration)
    sink: Sink = option(
        "auto",
        "Logits; keys of the prefix, exact; auto: keys where no logit fits.",
    )
    residual_target: float = option(
        1.0,
        "Of outliers, in median channels.",
        range=Range(least=0.001, most=1e6),
    )
    thresholds: Thresholds = option(
        Thresholds(), "An outlier is above these; may be repeated.", flag="--threshold"
    )
    device: str = option("auto", _DEVICES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job(Survey):
    """One conversion, complete."""

    out: Path
    gates: Gates = option("none", "GatedNorm: experimental.")
    distillation: Distillation = field(default_factory=Distillation)
    plan: Path | None = option(
        None,
        "As this checkpoint or plan.safetensors has it.",
        decides=("prefix", "sink", "residual_target", "thresholds", "gates"),
    )
    to: Architecture = option(
        "absorbed",
        "Or a stock model with sinks, or the same model rescaled for float16.",
    )
    window: int | None = option(None, _WINDOW, range=_WIDTH)
    force: bool = option(False, "Replace the checkpoint that is there.")

    def refuse_contradictions(self) -> None:
        if self.to == "native" and self.sink == "key":
            raise MisuseError(
                "{1} native has no place for keys; pass {0} logit, or drop it", "sink", "to"
            )
        if self.to == "native" and self.gates != "none":
            raise MisuseError("{1} native has no place for gates; drop {0}", "gates", "to")
        if self.gates != "none" and self.distillation.steps == 0:
            raise MisuseError(
                "{0} norm without a fine-tune does nothing, and {1} 0 is none; drop one of them",
                "gates",
                "steps",
            )
        beside = {one.name for one, _ in changed(self)} - _OF_STOCK
        if self.to == "stock" and beside:
            raise MisuseError(
                "{0} is of sinks and of training, and {1} stock has neither; drop one of them",
                min(beside),
                "to",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation(Checked):
    """Models to be compared on one text. Without a file the first of them samples it."""

    model: str
    against: tuple[str, ...] = option(
        (),
        "Measure this model as well; may be repeated. The first of them is the reference.",
        metavar="MODEL",
        repeated=True,
    )
    trust_remote_code: bool = option(False, _TRUSTED)
    text: Dataset | Path | None = option(
        None,
        "To measure on: plain text, or JSON, CSV or parquet with a field `text`; or a dataset on "
        "the Hub, OWNER/DATASET[:split].  [default: MODEL samples it]",
        is_there=True,
    )
    calibration: Dataset | Path | None = option(
        None,
        "Text that fixed ranges of formats are taken from, its first 8 windows.  [default: other "
        "rows of the same text]",
        is_there=True,
    )
    windows: int | None = option(
        None,
        "Of --text that are measured on.  [default: 32]",
        range=Range(least=1, most=10**6, whole=True),
    )
    length: int | None = option(
        None, "Tokens of a window.  [default: 512]", range=Range(least=2, most=10**6, whole=True)
    )
    formats: tuple[FormatName, ...] = option(
        get_args(FormatName), "Low-precision formats to measure the perplexity in."
    )
    tasks: tuple[str, ...] = option(
        (),
        "Tasks of lm-evaluation-harness, in float and in each format: its names, or .jsonl files "
        "with question, choices and label on every line.",
    )
    limit: int | None = option(
        None, "Questions of each task.  [default: all]", range=Range(least=1, whole=True)
    )
    dtype: Dtype = option("float32", "What models are held and computed in.")
    device: str = option("auto", _DEVICES)

    def refuse_contradictions(self) -> None:
        for name in ("windows", "length"):
            if self.text is None and getattr(self, name) is not None:
                raise MisuseError("{0} is of {1}; add it, or drop {0}", name, "text")
        if self.limit is not None and not self.tasks:
            raise MisuseError(
                "{0} is of the questions of {1}; add some, or drop {0}", "limit", "tasks"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Export(Checked):
    """A converted checkpoint that is to become one that other engines know."""

    folder: Path
    out: Path
    to: Target = option(
        "native", "A stock architecture of transformers that has sinks, or a file for llama.cpp."
    )
    weights: Weights | None = option(
        None, "Of matrices in a .gguf file.  [default: f16]", flag="--type"
    )
    window: int | None = option(None, _WINDOW, range=_WIDTH)
    mlx: bool = option(False, "Put the code beside it that MLX runs it by.")
    tolerance: float = option(
        0.05,
        "What fitted logits and moved scales may cost: the KL from the converted model, in nats "
        "per token.",
        range=_FIGURE,
    )
    text: Path | None = option(
        None,
        "To measure that on: plain, or .jsonl with `text`.  [default: the model samples it]",
        is_there=True,
    )
    device: str = option("auto", "To sample and to read that text on: " + _DEVICES)
    force: bool = option(False, "Replace the checkpoint that is there.")

    def refuse_contradictions(self) -> None:
        if self.weights is not None and self.to != "gguf":
            raise MisuseError("{0} is of a .gguf file; pass {1} gguf, or drop it", "weights", "to")
        if self.mlx and self.to != "native":
            raise MisuseError("{0} is of a folder; pass {1} native, or drop it", "mlx", "to")
