"""Figures → sections of words, a chart and a table. Pure."""

from absorb.schema.scores import Comparison, ModelScore
from absorb.show.before_after import BeforeAfter, Snapshot
from absorb.show.charts import Layers, Maps, Pairs, Panel, Ranks, Section, number
from absorb.show.rows import comparison_rows, steadiness


def sections(exhibit: BeforeAfter) -> list[Section]:
    """All that the pictures of an inspection show."""
    return [
        _sinks(exhibit),
        _channels(exhibit),
        _tokens(exhibit),
        _neurons(exhibit),
        _inputs(exhibit),
    ]


def standings(comparison: Comparison) -> Section:
    """Models side by side, and what a format makes of their perplexity."""
    models = comparison.models
    bars: list[tuple[str, float | None, str]] = [
        (f"{comparison.dtype}: {_last(model.model)}", model.perplexity, "") for model in models
    ]
    for name in models[0].formats:
        for model in models:
            value = model.formats[name]
            note = "overflows" if value is None else ""
            bars.append((f"{name}: {_last(model.model)}", value, note))
    return Section(
        name="perplexity",
        title="Perplexity by format",
        words=" ".join(_range_sentence(model, comparison.dtype) for model in models),
        chart=Ranks(unit="perplexity", rows=tuple(bars), group=len(models)),
        table=comparison_rows(comparison),
    )


def _range_sentence(model: ModelScore, dtype: str) -> str:
    words = f"{model.model} has a perplexity of {model.perplexity:.2f} in {dtype}"
    finite = {name: value for name, value in model.formats.items() if value is not None}
    if not finite:
        return f"{words}."
    best, worst = min(finite, key=finite.__getitem__), max(finite, key=finite.__getitem__)
    return (
        f"{words}, and in lower precision from {number(finite[best])} ({best}) to "
        f"{number(finite[worst])} ({worst})."
    )


def _last(name: str) -> str:
    """A Hub id without its owner."""
    return name.rpartition("/")[2]


def _sinks(exhibit: BeforeAfter) -> Section:
    before, after = exhibit.before.first_weight, exhibit.after.first_weight
    threshold = exhibit.inspection.job.thresholds.sink_weight
    heads = [weight for row in before for weight in row]
    above = sum(weight > threshold for weight in heads)
    most, layer, head = _most(before)
    words = (
        f"In the original a head gives the first token {_mean(before):.3f} of its attention on "
        f"average; {above} of {len(heads)} heads give it more than {threshold:g} (dotted). The "
        f"most is {most:.2f}, by head {head} of layer {layer}. After the graft the average is "
        f"{_mean(after):.3f} and the most {_most(after)[0]:.2f}: the sinks are parameters."
    )
    rows = [
        (f"{i}", *_mean_and_most(one), *_mean_and_most(other))
        for i, (one, other) in enumerate(zip(before, after, strict=True))
    ]
    labels = tuple((j, f"{j}") for j in range(len(before[0])))
    return Section(
        name="sinks",
        title="Attention on the first token",
        words=words,
        chart=Maps(
            lines="head",
            unit="mean weight on the first token",
            logarithmic=False,
            panels=_both(before, after, labels, labels),
            dotted=threshold,
        ),
        table=[("layer", "mean before", "highest", "mean after", "highest"), *rows],
    )


def _mean_and_most(weights: tuple[float, ...]) -> tuple[str, str]:
    most = max(weights)
    return f"{sum(weights) / len(weights):.3f}", f"{most:.3f} (head {weights.index(most)})"


def _channels(exhibit: BeforeAfter) -> Section:
    before, after = exhibit.before, exhibit.after
    ratios = before.channel_ratios
    threshold = exhibit.inspection.job.thresholds.channel_ratio
    worst = max(ratios, key=lambda channel: ratios[channel])
    scales = exhibit.inspection.residual_scales
    steady = {c.channel: steadiness(c) for c in exhibit.inspection.findings.outlier_channels}
    words = (
        f"Mean |x| of the stream's {exhibit.hidden} channels on ordinary tokens, as a multiple of "
        "the median channel's"
        + (f"; of {exhibit.band} neighbours the largest is shown" if exhibit.band > 1 else "")
        + f". Above {threshold:g} x it is an outlier (dotted). In the original "
        f"channel {worst} is up to {ratios[worst]:,.0f} x, and after the graft up to "
        f"{after.channel_ratios[worst]:,.1f} x."
    )
    rows = [
        (
            f"{c}",
            f"{ratios[c]:,.1f} x",
            f"{after.channel_ratios[c]:,.1f} x",
            f"{scales.get(c, 1):g}",
            steady.get(c, ""),
        )
        for c in ratios
    ]
    labels = tuple((channel // exhibit.band, f"{channel}") for channel in ratios)
    return Section(
        name="channels",
        title="Channels of the residual stream",
        words=words,
        chart=Maps(
            lines="channel",
            unit="multiple of the median channel",
            logarithmic=True,
            panels=_both(before.channels, after.channels, labels, labels),
            dotted=threshold,
            floor=1,
        ),
        table=[("channel", "before", "after", "residual scale", "|mean| / std"), *rows],
    )


def _tokens(exhibit: BeforeAfter) -> Section:
    snapshots = (exhibit.before, exhibit.after)
    (most, token), (left, _) = (_peak(snapshot) for snapshot in snapshots)
    words = (
        f"Largest |x| of each of the first tokens of a text. In the original it reaches "
        f"{most:,.0f}, on {token}; after the graft {left:,.0f}."
    )
    labels = [
        tuple((i, f"{i} {text!r}") for i, text in enumerate(snapshot.token_text))
        for snapshot in snapshots
    ]
    lead = len(snapshots[0].token_text) - len(snapshots[1].token_text)  # read by the original alone
    rows = []
    for index, text in enumerate(snapshots[0].token_text):
        before = _summit(snapshots[0], index)
        after = ("–", "–") if index < lead else _summit(snapshots[1], index - lead)
        rows.append((f"{text!r}", *before, *after))
    return Section(
        name="tokens",
        title="Tokens in the residual stream",
        words=words,
        chart=Maps(
            lines="token",
            unit="largest |x|",
            logarithmic=True,
            panels=_both(snapshots[0].tokens, snapshots[1].tokens, *labels),
            dotted=None,
        ),
        table=[("token", "largest |x| before", "in layer", "after", "in layer"), *rows],
    )


def _neurons(exhibit: BeforeAfter) -> Section:
    neurons = exhibit.neurons
    spikes = [neuron for neuron in neurons if neuron.status != "no spike"]
    gone = sum(neuron.status == "removed" for neuron in spikes)
    first = neurons[0]
    words = (
        f"MLP neurons by the most that one of them adds to an entry of the stream. Neuron "
        f"{first.neuron} of layer {first.layer} adds {first.contribution:,.0f}. "
        + (
            f"{len(spikes)} write a massive activation alone (spike neurons); removed: {gone}."
            if spikes
            else "None of them writes a massive activation alone."
        )
    )
    bars = [(f"layer {n.layer}, neuron {n.neuron}", n.contribution, n.status) for n in neurons]
    rows = [(f"{n.layer}", f"{n.neuron}", f"{number(n.contribution)}", n.status) for n in neurons]
    return Section(
        name="neurons",
        title="Spike neurons",
        words=words,
        chart=Ranks(
            unit="most added to an entry of the stream",
            rows=tuple(bars),
        ),
        table=[("layer", "neuron", "adds", "status"), *rows],
    )


def _inputs(exhibit: BeforeAfter) -> Section:
    panels = _together(exhibit.before.inputs, exhibit.after.inputs)
    name, before, after = max(panels, key=lambda panel: max(panel[1]))
    layer = before.index(max(before))
    words = (
        "Largest |x| that a matrix of each layer reads, which a fixed INT8 range must hold. "
        f"The widest in the original is that of {name} in layer {layer}: {number(before[layer])}, "
        f"and {number(after[layer])} after graft and smoothing."
    )
    layers = range(len(before))
    rows = [(f"{i}", *(f"{number(b[i])} → {number(a[i])}" for _, b, a in panels)) for i in layers]
    return Section(
        name="inputs",
        title="What the matrices read",
        words=words,
        chart=Pairs(unit="largest |x|", panels=panels),
        table=[("layer", *(name for name, _, _ in panels)), *rows],
    )


def _both(
    before: Layers,
    after: Layers,
    first: tuple[tuple[int, str], ...],
    second: tuple[tuple[int, str], ...],
) -> tuple[Panel, Panel]:
    return (
        Panel(title="before", values=before, labels=first),
        Panel(title="after the graft, untrained", values=after, labels=second),
    )


def _together(
    before: dict[str, tuple[float, ...]], after: dict[str, tuple[float, ...]]
) -> tuple[tuple[str, tuple[float, ...], tuple[float, ...]], ...]:
    """One panel for the matrices that read the same."""
    ends = [site.rpartition(".")[2] for site in before]
    shared: dict[tuple[tuple[float, ...], tuple[float, ...]], list[str]] = {}
    for site, end in zip(before, ends, strict=True):
        name = end if ends.count(end) == 1 else site
        shared.setdefault((before[site], after[site]), []).append(name)
    return tuple((", ".join(names), *values) for values, names in shared.items())


def _mean(layers: Layers) -> float:
    return sum(map(sum, layers)) / sum(map(len, layers))


def _most(layers: Layers) -> tuple[float, int, int]:
    """The largest number, its layer and its place in it."""
    return max((value, i, j) for i, row in enumerate(layers) for j, value in enumerate(row))


def _peak(snapshot: Snapshot) -> tuple[float, str]:
    value, layer, token = _most(snapshot.tokens)
    return value, f"{snapshot.token_text[token]!r} in layer {layer}"


def _summit(snapshot: Snapshot, token: int) -> tuple[str, str]:
    """The largest |x| of a token, and the layer of it."""
    values = [row[token] for row in snapshot.tokens]
    return f"{number(max(values))}", f"{values.index(max(values))}"
