"""What was found, done and measured: plain data, the source of absorb.json, tables and the card."""

import json
import platform
import textwrap
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from absorb import __version__
from absorb.distill import Losses
from absorb.findings import Findings
from absorb.measure import Measurement
from absorb.plain import built, parsed
from absorb.plan import Plan, Removal
from absorb.prefix import Trial
from absorb.quantize import FORMATS
from absorb.recipe import Recipe
from absorb.score import Score
from absorb.settings import Job

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Row = tuple[str, ...]
Kind = TypeVar("Kind", bound="DataclassInstance")
_WIDTH = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerFigures:
    """One layer of the original, and how well a sink stands for its prefix."""

    median: float  # of the stream's magnitude
    peak: float
    first_weight: float
    fit_error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """Everything known before the fine-tune."""

    model: str
    commit: str | None
    license: str | None
    fingerprint: str  # of the weights
    family: str
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
    # Of one with logits in the keyed layers too, if any were fitted there.
    logit_divergence: float | None = None
    versions: dict[str, str]
    job: Job  # what the user asked for, and what a plan that was read had decided

    def __post_init__(self) -> None:
        """Raise a ValueError where parts contradict each other, as those of a damaged file may."""
        if not self.findings.tokens() <= self.token_text.keys():
            raise ValueError("a token that was found has no text")


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """What the model says after fixed tokens, in float32 on a CPU: see `stranger.logits_after`."""

    tokens: tuple[int, ...]
    logits: tuple[tuple[float, ...], ...]


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

    def __post_init__(self) -> None:
        """Raise a ValueError where the scores cannot be set side by side."""
        if self.original.quantised.keys() != self.converted.quantised.keys():
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


def layer_figures(measurement: Measurement, plan: Plan) -> tuple[LayerFigures, ...]:
    """One line for every layer."""
    columns = zip(
        measurement.median.tolist(),
        measurement.token_peak.flatten(1).amax(1).tolist(),
        measurement.first_weight.mean(1).tolist(),
        plan.fit_error.tolist(),
        strict=True,
    )
    return tuple(
        LayerFigures(median=median, peak=peak, first_weight=weight, fit_error=error)
        for median, peak, weight, error in columns
    )


def to_json(data: "DataclassInstance") -> str:
    """Readable JSON of a report."""
    return json.dumps(asdict(data), indent=1, ensure_ascii=False, default=_plain) + "\n"


def _plain(value: object) -> str:
    assert isinstance(value, Path)
    return value.name  # where it lay on somebody's disk is nobody's business


def from_json(kind: type[Kind], text: str) -> Kind:
    """The inspection or report that `to_json` wrote; a ValueError says why it is none."""
    data: Kind = built(kind, parsed(text))
    return data


def table(rows: list[Row]) -> str:
    """Rows as aligned text: the first column to the left, all others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def listing(rows: list[Row]) -> str:
    """Rows of a label and a text as lines, the texts folded under themselves."""
    indent = max(len(label) for label, _ in rows) + 2
    return "\n".join(
        textwrap.fill(
            label.ljust(indent) + text,
            _WIDTH,
            subsequent_indent=" " * indent,
            break_long_words=False,
            break_on_hyphens=False,
        )
        for label, text in rows
    )


_WORSE = 0.01  # what a conversion may cost in float, as a share of the perplexity


def loss_of(original: Score, converted: Score) -> float:
    """What the conversion costs in float on held-out text, as a share of the perplexity."""
    return converted.perplexity / original.perplexity - 1


def verdict(report: Report) -> str | None:
    """Where the converted model is worse than the original in float: that, and what helps."""
    loss, job = loss_of(report.original, report.converted), report.inspection.job
    if loss <= _WORSE:
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


def score_rows(original: Score, converted: Score) -> list[Row]:
    """The before/after table."""
    loss = loss_of(original, converted)
    mark = f" ({loss:+.1%})" if loss > _WORSE else ""
    figures = (
        ("perplexity", "perplexity", "{:.3f}"),
        ("KL from the teacher, nats", "divergence", "{:.4f}"),
        ("largest |x| in the stream", "stream_peak", "{:,.0f}"),
        ("  as a multiple of the median", "stream_ratio", "{:,.0f} x"),
        ("massive-activation tokens", "massive_tokens", "{:d}"),
        ("mean weight on the first token", "first_weight", "{:.3f}"),
    )
    rows = [
        (label, form.format(getattr(original, name)), form.format(getattr(converted, name)))
        for label, name, form in figures
    ]
    quantised = [
        (
            f"perplexity in {FORMATS[name].label}",
            f"{before:.3f}",
            f"{converted.quantised[name]:.3f}",
        )
        for name, before in original.quantised.items()
    ]
    [(label, before, after), *others] = rows
    return [
        ("", "original", "converted"),
        (label, before, f"{after}{mark}"),
        *others,
        *quantised,
    ]


def finding_rows(inspection: Inspection) -> list[Row]:
    """The findings and the plan, a line each."""
    findings, layers = inspection.findings, len(inspection.layers)
    return [
        *_origin(inspection),
        ("attention sinks", _sinks(inspection)),
        ("massive activations", _massive(inspection)),
        ("spike neurons", _neurons(inspection)),
        ("outlier channels", _channels(findings, layers)),
        ("outlier tokens", f"{findings.outlier_tokens}"),
        ("prefix", f"{inspection.prefix_text!r}"),
        ("sinks", _forms(inspection)),
        ("residual scales", _scales(inspection)),
        ("KL after the graft, nats", _divergence(inspection)),
    ]


def _divergence(inspection: Inspection) -> str:
    only = inspection.logit_divergence
    return f"{inspection.divergence:.4f}" + (f"; {only:.4f} with logits alone" if only else "")


def _origin(inspection: Inspection) -> list[Row]:
    plan = inspection.job.plan
    if plan is None:
        return []
    return [("plan", f"read from {plan.name}, and the findings with it")]


def _name(inspection: Inspection, token: int) -> str:
    return "first token" if token < 0 else repr(inspection.token_text[token])


def _sinks(inspection: Inspection) -> str:
    found = inspection.findings
    if not found.sink_heads:
        return "none"
    layers = sorted({head.layer for head in found.sink_heads})
    tokens = ", ".join(_name(inspection, sink.token) for sink in found.sink_tokens[:3])
    heads = f"{len(found.sink_heads)} heads in layers {_ranges(layers)}"
    return f"{heads} (up to {found.sink_heads[0].weight:.2f})" + (
        f", on {tokens}" if tokens else ""
    )


def _massive(inspection: Inspection) -> str:
    shown = [
        f"{_name(inspection, found.token)} channel {found.channel}: {found.value:,.0f} "
        f"({found.ratio:,.0f} x the median, layers {_ranges(found.layers)})"
        for found in inspection.findings.massive_activations[:3]
    ]
    return _listed(shown, len(inspection.findings.massive_activations))


def _neurons(inspection: Inspection) -> str:
    removed = {(r.spike.layer, r.spike.neuron) for r in inspection.removals}
    shown = [
        f"({found.layer}, {found.neuron}) adds {found.contribution:,.0f}"
        + (", removed" if (found.layer, found.neuron) in removed else ", kept")
        for found in inspection.findings.spike_neurons[:6]
    ]
    known = {(found.layer, found.neuron) for found in inspection.findings.spike_neurons}
    later = [f"({layer}, {neuron})" for layer, neuron in sorted(removed - known)]
    also = f"; {', '.join(later)} removed after the graft" if later else ""
    return _listed(shown, len(inspection.findings.spike_neurons)) + also


def _forms(inspection: Inspection) -> str:
    keyed, layers = inspection.keyed_layers, len(inspection.layers)
    logits = f"{layers - len(keyed)} layers by logits" if len(keyed) < layers else ""
    keys = f"keys in layers {_ranges(keyed)}" if keyed else ""
    return ", ".join(part for part in (logits, keys) if part)


def _channels(findings: Findings, layers: int) -> str:
    shown = [
        f"{found.channel} (up to {found.ratio:.0f} x, {len(found.layers)} of {layers} layers, "
        f"{found.share:.0%} of the norm)"
        for found in findings.outlier_channels[:4]
    ]
    return _listed(shown, len(findings.outlier_channels))


def _scales(inspection: Inspection) -> str:
    """The scales of outlier channels one by one, those of all others as a range."""
    outliers = {found.channel for found in inspection.findings.outlier_channels}
    scales = inspection.residual_scales
    shown = [f"{channel}: {scale:g}" for channel, scale in scales.items() if channel in outliers]
    others = [scale for channel, scale in scales.items() if channel not in outliers]
    text = _listed(shown[:8], len(shown))
    if not others:
        return text
    span = " to ".join(f"{scale:g}" for scale in sorted({min(others), max(others)}))
    fitted = f"{span} on {len(others)} channels to fit float16"
    return f"{text}; {fitted}" if shown else fitted


def _listed(shown: list[str], total: int) -> str:
    more = f"; and {total - len(shown)} more" if total > len(shown) else ""
    return "; ".join(shown) + more if shown else "none"


def _ranges(numbers: list[int] | tuple[int, ...]) -> str:
    """Sorted numbers with runs folded: 3-9, 12."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
