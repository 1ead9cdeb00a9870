"""Export → the README.md that lies in it. Pure: all that it says is in the two absorb.json."""

from huggingface_hub import ModelCardData

from absorb.schema.exported import Exported
from absorb.schema.report import Report
from absorb.ship.export.targets import ROUTES
from absorb.show.tables import Row

_CARD = """\
---
{metadata}
---

# {title}

{model}, converted by [absorb](https://pypi.org/project/absorb-llm/) {version} and exported as
`{architecture}`, a stock architecture of transformers: the attention sink is a logit for each head
(`sinks`), and the values it carried are biases. It needs no code of its own and no
`trust_remote_code`.

## Load it

Do not put a BOS or another prefix before a text: the sinks stand for {prefix}. The tokenizer adds
none.

**transformers** {since} or newer:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH_OR_REPO")
tokenizer = AutoTokenizer.from_pretrained("PATH_OR_REPO")
```

{engines}

## What was lost

{lost}

On text {text} the exported model is {divergence:.2g} nats per token from the converted one (mean
KL), both in float32.

## How it was made

```sh
absorb export DIR --to {target} --out OUT
```

{versions}. `absorb.json` holds all figures and the SHA-256 of every file; `absorb verify` checks
them, and that the model says what it said when it was written.
"""
_ENGINES = {
    "granite_swa": """\
**vLLM** (0.32 was tried):

```sh
vllm serve PATH_OR_REPO
```

**llama.cpp** has the architecture too, under the name `granite_swa`; its converter must be told of
the biases of attention.

**SGLang** has the architecture, and up to 0.5.23 it drops all biases of attention without a word:
do not serve this model by such a version.""",
    "flint": """\
**vLLM**, **llama.cpp** and **SGLang**: the architecture is new, so ask each for `flint` by name
before you rely on it. An engine that does not know it says so.""",
}


def card(exported: Exported, report: Report) -> str:
    """The README.md of an export."""
    model = exported.model
    return _CARD.format(
        metadata=_metadata(exported),
        title=_title(exported),
        model=f"[{model}](https://huggingface.co/{model})" if "/" in model else model,
        version=exported.versions["absorb"],
        architecture=exported.architecture,
        prefix=f"`{report.inspection.prefix_text!r}`",
        since=ROUTES[exported.family].target.since,
        engines=_ENGINES[exported.architecture],
        lost="\n".join(f"- {one[0].upper()}{one[1:]}." for one in _lost(exported)),
        text=exported.text_origin,
        divergence=exported.divergence,
        target=exported.target,
        versions=", ".join(f"{name} {version}" for name, version in exported.versions.items()),
    )


def export_rows(exported: Exported) -> list[Row]:
    """What became of an export, a line for each figure."""
    return [
        ("architecture", exported.architecture),
        ("KL from the converted model", f"{exported.divergence:.2g} nats per token"),
        ("text", exported.text_origin),
        ("lost", "; ".join(_lost(exported))),
    ]


def _title(exported: Exported) -> str:
    return f"{exported.model.rpartition('/')[2]}, absorbed, as {exported.architecture}"


def _metadata(exported: Exported) -> str:
    hub_id = exported.model if "/" in exported.model else None  # else the name of a file
    data = ModelCardData(
        base_model=hub_id,
        base_model_relation="finetune" if hub_id else None,
        library_name="transformers",
        license=exported.license,
        pipeline_tag="text-generation",
        tags=["absorb", "attention-sink"],
        model_name=_title(exported),
    )
    return data.to_yaml()


def _lost(exported: Exported) -> list[str]:
    lost = list(exported.lost)
    if exported.stream > 1:
        lost.append(
            "the residual stream is as large as the original's: its outlier channels had been "
            f"written smaller by up to {exported.stream:g}, which no matrix reads, and "
            "float16 may overflow as it did"
        )
    return lost or ["nothing"]
