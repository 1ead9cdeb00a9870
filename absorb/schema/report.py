"""What was found, done and measured: plain data, the source of absorb.json, tables and the card."""

import platform
from dataclasses import dataclass
from importlib.metadata import version

from absorb.__version__ import __version__
from absorb.schema.findings import Findings, Removal, Trial
from absorb.schema.proof import Proof
from absorb.schema.scores import Score
from absorb.schema.settings import Job
from absorb.schema.training import Losses, Recipe

WORSE = 0.01  # what a conversion may cost in float, as a share of the perplexity


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerFigures:
    """One layer of the original, and how well a sink stands for its prefix."""

    median: float  # of the stream's magnitude
    peak: float
    first_weight: float
    fit_error: float
    # Where it does not, it hands on a state: it takes no sink, and stays as it is but for scales.
    attends: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """Channels that stand in another order, so that others share a block's scale in a format."""

    channels: str  # "stream", or what reads them: neurons by `down`, values by the output
    layers: tuple[int, ...]  # that have it
    share: float  # of the squared error of their outputs that is left, on other text; mean


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """Everything known before the fine-tune."""

    model: str
    commit: str | None
    license: str | None
    fingerprint: str  # of the weights
    family: str
    whole: str | None = None  # the kind of model that it is a part of, which is written with it
    dtype: str
    layers: tuple[LayerFigures, ...]
    text_origin: str
    text_sha256: str
    prefix: tuple[int, ...]
    prefix_text: str
    prefix_trials: tuple[Trial, ...]
    token_text: dict[int, str]
    findings: Findings
    removals: tuple[Removal, ...]
    keyed_layers: tuple[int, ...]  # whose sinks are the prefix's keys and values, not logits
    residual_scales: dict[int, float]
    divergence: float  # of the untrained student, in nats per token
    rope_changes_at: int | None = None  # the longest text, in tokens, if frequencies change beyond
    # Of one with logits in the keyed layers too, if any were fitted there.
    logit_divergence: float | None = None
    proof: Proof | None = None  # of a family that absorb has no entry for
    orders: tuple[Order, ...] = ()  # that a format with a scale for each block is served by
    versions: dict[str, str]
    job: Job  # what the user asked for, and what a plan that was read had decided

    @property
    def handing_on(self) -> tuple[int, ...]:
        """The layers that hand on a state instead of attending."""
        return tuple(i for i, layer in enumerate(self.layers) if not layer.attends)

    @property
    def by_logits(self) -> int:
        """The number of layers whose sinks are logits."""
        return len(self.layers) - len(self.handing_on) - len(self.keyed_layers)

    def __post_init__(self) -> None:
        """Raise a ValueError where parts contradict each other, as those of a damaged file may."""
        if not self.findings.tokens() <= self.token_text.keys():
            raise ValueError("a token that was found has no text")


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """What the model says after fixed tokens, in float32 on a CPU: ship/isolated.py."""

    tokens: tuple[int, ...]
    logits: tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lead:
    """What is put before a text although sinks stand for it, or nothing does."""

    by: str  # whom, as the subject of a sentence
    text: str
    cost: float  # of reading it, as a share of the perplexity of held-out text


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """A conversion, complete."""

    inspection: Inspection
    recipe: Recipe
    losses: Losses
    original: Score
    converted: Score
    files: dict[str, str]  # the SHA-256 of every other file of the checkpoint
    probe: Probe
    leads: tuple[Lead, ...] | None = None  # None where nobody looked

    def __post_init__(self) -> None:
        """Raise a ValueError where the scores cannot be set side by side."""
        if self.original.quantized.keys() != self.converted.quantized.keys():
            raise ValueError("the two scores are of different formats")
        if "absorb" not in self.inspection.versions:
            raise ValueError("the version of absorb is missing")


def versions() -> dict[str, str]:
    """Of everything that has a part in the figures."""
    packages = ("torch", "transformers", "safetensors", "tokenizers")
    return {
        "absorb": __version__,
        **{name: version(name) for name in packages},
        "python": platform.python_version(),
    }


def loss_of(original: Score, converted: Score) -> float:
    """What the conversion costs in float on held-out text, as a share of the perplexity."""
    return converted.perplexity / original.perplexity - 1


def verdict(report: Report) -> str | None:
    """Where the converted model is worse than the original in float: that, and what helps."""
    loss, job = loss_of(report.original, report.converted), report.inspection.job
    if loss <= WORSE:
        return None
    ways = {
        "--sink auto": job.sink == "logit",
        "--text FILE with text like what it will read": job.calibration.text is None,
        "a longer fine-tune (--steps)": job.distillation.purpose == "none",
        "a fine-tune without --for": job.distillation.purpose != "none",
    }
    helps = ", or ".join(way for way, possible in ways.items() if possible)
    return (
        f"in float the converted model is {loss:.1%} worse than the original on held-out text; "
        f"convert with {helps}"
    )


def sentence(lead: Lead) -> str:
    """What a lead is and costs."""
    change = f"{abs(lead.cost):.1%} {'lower' if lead.cost < 0 else 'higher'}"
    return (
        f"{lead.by} puts `{lead.text!r}` first all the same, and it is read as text: behind it the "
        f"perplexity of held-out text is {change}"
    )
