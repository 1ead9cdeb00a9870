"""Rescaled → the rows that are printed and the README.md of its folder."""

from absorb.fold.float16 import MOST
from absorb.schema.exported import Reach, Rescaled
from absorb.show.card import command, metadata
from absorb.show.tables import Row, markdown

_CARD = """\
---
{metadata}
---

# {title}

{model} in float16, rescaled by [absorb](https://pypi.org/project/absorb-llm/) {version} so that
nothing overflows: {done}. It is the same function of the same architecture, `{architecture}`,
with no new parameter and no code of its own, and whatever runs the original runs
it.

## Load it

```python
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH_OR_REPO", dtype=torch.float16)
tokenizer = AutoTokenizer.from_pretrained("PATH_OR_REPO")
```

## How far it reaches

float16 holds magnitudes up to {most:,.0f}. Headroom is that by the largest one on text {text}:
below 1 it overflows.

{reaches}

{squares}

## What it costs

Mean KL from the original, which is in float32, in nats per token: {rounding:.2g} for weights that
are rounded to float16, {divergence:.2g} where all is computed in float16.

## How it was made

```sh
{command}
```

{versions}. `absorb.json` holds all figures and the SHA-256 of every file, and `absorb verify`
checks them.
"""
_SQUARES = (
    "Norms sum squares in float32: transformers and every engine we know of do. The line says what "
    "one that summed in float16 would need."
)


def card(rescaled: Rescaled) -> str:
    """The README.md of a rescaled model."""
    model = rescaled.model
    title = f"{model.rpartition('/')[2]} for float16"
    return _CARD.format(
        metadata=metadata(rescaled, title, []),
        title=title,
        model=f"[{model}](https://huggingface.co/{model})" if "/" in model else model,
        version=rescaled.versions["absorb"],
        done=_done(rescaled),
        architecture=rescaled.architecture,
        most=MOST,
        text=rescaled.text_origin,
        reaches=markdown(reach_rows(rescaled)),
        squares=_SQUARES,
        rounding=rescaled.rounding,
        divergence=rescaled.divergence,
        command=command(rescaled.job),
        versions=", ".join(f"{name} {version}" for name, version in rescaled.versions.items()),
    )


def reach_rows(rescaled: Rescaled) -> list[Row]:
    """The largest magnitudes and the headroom that they leave, before and after."""
    head = ("largest magnitude", "before", "headroom", "after", "headroom")
    return [head, *(_row(reach) for reach in rescaled.reaches)]


def _row(reach: Reach) -> Row:
    label = reach.kind if reach.bound else f"{reach.kind} (float32)"
    before, after = (
        (_figure(peak), f"{_figure(MOST / max(peak, 1e-9))} x")
        for peak in (reach.before, reach.after)
    )
    return (label, *before, *after)


def _figure(value: float) -> str:
    """To about three digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def rescaled_rows(rescaled: Rescaled) -> list[Row]:
    """What was done and what it costs, a line each."""
    return [
        ("rescaled", _done(rescaled)),
        ("KL in float32", f"{rescaled.rounding:.2g} nats per token, by rounding the weights"),
        ("KL in float16", f"{rescaled.divergence:.2g} nats per token"),
        ("text", rescaled.text_origin),
    ]


def _done(rescaled: Rescaled) -> str:
    parts = [f"{count:,} channels of {name}" for name, count in rescaled.channels.items()]
    if rescaled.stream != 1:
        parts.insert(0, f"the residual stream over {rescaled.stream:g}")
    return ", ".join(parts) or "there was nothing to rescale"
