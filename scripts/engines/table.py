"""Tables of what engines said, from the JSON that the scripts of this folder wrote."""

from typing import Any

from absorb.show.tables import Row


def vllm_rows(done: dict[str, Any]) -> list[Row]:
    """A row for every model: how far vLLM is from transformers, and how fast."""
    head = ("", "largest difference of a log-probability", "prefill", "decode")
    rows = [
        (f"{family}, {kind}", *_row(one))
        for family, kinds in done.get("families", {}).items()
        for kind, one in kinds.items()
    ]
    rows += [(f"the demo, {kind}", *_row(one)) for kind, one in done.get("model", {}).items()]
    return [head, *rows]


def _row(one: dict[str, Any]) -> Row:
    speeds, ratios = one["tokens_per_second"], one.get("of_stock", {})
    told = [
        f"{speeds[work]:,.0f} ({ratios[work]:.2f} x)" if work in ratios else ""
        for work in ("prefill", "decode")
    ]
    return (f"{one['largest_difference']:.1e}", *told)
