"""Tables of what engines said, from the JSON that the scripts of this folder wrote."""

from typing import Any

from absorb.show.tables import Row


def vllm_rows(done: dict[str, Any]) -> list[Row]:
    """A row for every model: how far vLLM is from transformers, and how fast."""
    head = ("", "largest difference of a log-probability", "prefill", "decode")
    rows = [(name, *_row(one)) for name, one in done.get("families", {}).items()]
    rows += [(f"the demo, {kind}", *_row(one)) for kind, one in done.get("model", {}).items()]
    return [head, *rows]


def _row(one: dict[str, Any]) -> Row:
    if "refused" in one:
        return (one["refused"], "", "")
    speeds, ratios = one["tokens_per_second"], one.get("of_stock", {})
    told = [
        f"{speeds[work]:,.0f} ({ratios[work]:.2f} x)" if work in ratios else ""
        for work in ("prefill", "decode")
    ]
    return (f"{one['largest_difference']:.1e}", *told)


def chain_rows(done: dict[str, Any]) -> list[Row]:
    """A row for every model by every recipe, as vLLM runs it."""
    head = ("", "perplexity", "MB", "prefill", "decode", "seconds of `oneshot`")
    return [head, *(_chain_row(name, run) for name, run in done["rows"].items())]


def _chain_row(name: str, run: dict[str, Any]) -> Row:
    seconds = run.get("oneshot_seconds")
    return (
        name,
        f"{run['perplexity']:.2f}",
        f"{run['bytes'] / 1e6:,.0f}",
        f"{run['prefill']:,.0f}",
        f"{run['decode']:,.0f}",
        "" if seconds is None else f"{seconds:.0f}",
    )
