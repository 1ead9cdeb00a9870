"""Reports → the rows that tables, the card and pages show."""

from collections.abc import Callable

from absorb.fold.gates import RANK
from absorb.quantize.formats import FORMATS
from absorb.schema.findings import Findings, OutlierChannel
from absorb.schema.report import WORSE, Inspection, loss_of
from absorb.schema.scores import Comparison, ModelScore, Score, Speed
from absorb.show.tables import Row


def score_rows(original: Score, converted: Score) -> list[Row]:
    """The before/after table."""
    loss = loss_of(original, converted)
    mark = f" ({loss:+.1%})" if loss > WORSE else ""
    figures = (
        ("perplexity", "perplexity", "{:.3f}"),
        ("KL from the teacher, nats", "divergence", "{:z.4f}"),
        ("largest |x| in the stream", "stream_peak", "{:,.0f}"),
        ("  as a multiple of the median", "stream_ratio", "{:,.0f} x"),
        ("massive-activation tokens", "massive_tokens", "{:d}"),
        ("mean weight on the first token", "first_weight", "{:.3f}"),
    )
    rows = [
        (label, form.format(getattr(original, name)), form.format(getattr(converted, name)))
        for label, name, form in figures
    ]
    quantized = [
        (
            f"perplexity in {FORMATS[name].label}",
            f"{before:.3f}",
            f"{converted.quantized[name]:.3f}",
        )
        for name, before in original.quantized.items()
    ]
    [(label, before, after), *others] = rows
    return [
        ("", "original", "converted"),
        (label, before, f"{after}{mark}"),
        *others,
        *quantized,
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
        *_orders(inspection),
        *_gates(inspection),
        ("KL after the graft, nats", _divergence(inspection)),
    ]


def _gates(inspection: Inspection) -> list[Row]:
    if inspection.job.gates == "none":
        return []
    return [("gates", f"of rank {RANK} on norms that read the stream (experimental)")]


def _divergence(inspection: Inspection) -> str:
    only = inspection.logit_divergence
    return f"{inspection.divergence:z.4f}" + (f"; {only:z.4f} with logits alone" if only else "")


def _origin(inspection: Inspection) -> list[Row]:
    plan, proof = inspection.job.plan, inspection.proof
    rows: list[Row] = []
    if proof is not None:
        rows.append(("architecture", f"derived and proved by {len(proof.checks)} tests"))
    if plan is not None:
        rows.append(("plan", f"read from {plan.name}, and the findings with it"))
    return rows


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
    keyed, states = inspection.keyed_layers, inspection.handing_on
    logits = f"{inspection.by_logits} layers by logits" if inspection.by_logits else ""
    keys = f"keys in layers {_ranges(keyed)}" if keyed else ""
    none = f"none in layers {_ranges(states)}, which hand on a state" if states else ""
    return ", ".join(part for part in (logits, keys, none) if part)


def _channels(findings: Findings, layers: int) -> str:
    shown = [
        f"{found.channel} (up to {found.ratio:.0f} x, {len(found.layers)} of {layers} layers, "
        + ", ".join(filter(None, (f"{found.share:.0%} of the norm", steadiness(found))))
        + ")"
        for found in findings.outlier_channels[:4]
    ]
    return _listed(shown, len(findings.outlier_channels))


# Of one channel mean² / std² of the energy is a constant, the rest tells tokens apart: at 2 it is
# four fifths.
_STEADY = 2.0


def steadiness(found: OutlierChannel) -> str:
    """Whether a channel is nearly a constant, or tells tokens apart; empty where nobody looked."""
    if found.steadiness is None:
        return ""
    kind = "constant" if found.steadiness > _STEADY else "informative"
    return f"{kind}, |mean| / std {found.steadiness:.1f}"


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


def _orders(inspection: Inspection) -> list[Row]:
    """What stands in another order, if anything does."""
    shown = [
        f"{order.channels} in {len(order.layers)} of {len(inspection.layers)} layers "
        f"(error {order.share:.2f} x)"
        for order in inspection.orders
    ]
    return [("orders of channels", "; ".join(shown))] if shown else []


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


# What is shown of a task that has several metrics. A stderr belongs to a metric of its own name.
_METRICS = ("acc_norm", "acc", "exact_match", "word_perplexity")


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
    tasks: with standard errors; that above the reference is of pairs of answers to one question
    """
    reference = comparison.reference.rpartition("/")[2]
    figures: list[tuple[str, Callable[[ModelScore], str]]] = [
        ("perplexity", lambda m: f"{m.perplexity:.3f}"),
        ("  95 % interval", lambda m: "{:.2f} to {:.2f}".format(*m.interval)),
        (f"KL from {reference}, nats", lambda m: f"{m.divergence:z.4f}"),
        ("  the same first choice", lambda m: f"{m.agreement:.1%}"),
        ("largest |x| in the stream", lambda m: f"{m.stream_peak:,.0f}"),
        ("  as a multiple of the median", lambda m: f"{m.stream_ratio:,.0f} x"),
        ("largest token, of the median token", lambda m: f"{m.token_ratio:,.0f} x"),
        ("kurtosis of the stream", lambda m: f"{m.kurtosis:,.0f}"),
        ("  of what a matrix reads, mean", lambda m: f"{_mean(m.input_kurtosis):,.0f}"),
        ("massive-activation tokens", lambda m: f"{m.massive_tokens}"),
        ("mean weight on the first token", lambda m: f"{m.first_weight:.3f}"),
        ("  highest of a head", lambda m: f"{max(map(max, m.head_weights)):.3f}"),
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
    return [head, *rows, *_speed_rows(comparison), *formats, *_task_rows(comparison)]


def _task_rows(comparison: Comparison) -> list[Row]:
    """What each task says, in float and in each format."""
    models, first = comparison.models, comparison.models[0]
    labels = {"float": ""} | {str(name): f" in {FORMATS[name].label}" for name in first.formats}
    return [
        row
        for task, metrics in first.tasks.get("float", {}).items()
        for metric in [next((name for name in _METRICS if name in metrics), min(metrics))]
        for place, label in labels.items()
        for row in (
            (f"{task}, {metric}{label}", *(_answers(m, place, task, metric) for m in models)),
            ("  above the reference", *(_above(m, place, task, metric) for m in models)),
        )
        if any(row[1:])
    ]


def _answers(model: ModelScore, place: str, task: str, metric: str) -> str:
    found = model.tasks.get(place)
    return "overflows" if found is None else _with_error(found[task], metric, "")


def _above(model: ModelScore, place: str, task: str, metric: str) -> str:
    found = model.task_differences.get(place, {}).get(task, {})
    return _with_error(found, metric, "+") if metric in found else ""


def _with_error(found: dict[str, float], metric: str, sign: str) -> str:
    value, error = found[metric], found.get(f"{metric}_stderr")
    return f"{value:{sign}.3f}" if error is None else f"{value:{sign}.3f} ± {error:.3f}"


def _speed_rows(comparison: Comparison) -> list[Row]:
    speeds = [model.speed for model in comparison.models if model.speed is not None]
    if len(speeds) < len(comparison.models):  # of models larger than the memory there are none
        return []
    shown: dict[str, Callable[[Speed], str]] = {
        "prefill, tokens per second": lambda s: f"{s.prefill:,.0f}",
        "decode, tokens per second": lambda s: f"{s.decode:,.1f}",
        "weights, MB": lambda s: f"{s.weights / 1e6:,.1f}",
        f"cache of {comparison.length} tokens, MB": lambda s: f"{s.cache / 1e6:,.1f}",
    }
    if speeds[0].peak is not None:
        shown["most memory in prefill, MB"] = lambda s: f"{(s.peak or 0) / 1e6:,.0f}"
    return [(label, *map(show, speeds)) for label, show in shown.items()]


def _mean(values: dict[str, float]) -> float:
    return sum(values.values()) / len(values)


def _shown(perplexity: float | None) -> str:
    return "overflows" if perplexity is None else f"{perplexity:.3f}"
