"""Report → model card. Pure."""

from absorb.report import Report, Row, finding_rows, score_rows

_CARD = """\
---
{metadata}
---

# {title}

{model} with its outliers absorbed into parameters by
[absorb](https://pypi.org/project/absorb-llm/) {version}: {form}, and the outlier channels of the
residual stream have scales.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH_OR_REPO", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("PATH_OR_REPO")
```

`trust_remote_code=True` runs `modeling_absorb.py` of this folder. Do not put a BOS or another
prefix before the text: the sinks stand for {prefix}.

## Before and after

{scores}

Held-out text: {text}. The teacher is the original model with the prefix {prefix}. W8A8 is
symmetric INT8, per tensor with fixed ranges for activations and per channel for weights.

## What was found, and what was done

{findings}

Fine-tune: {recipe}; step {kept} was kept.

All figures, arguments and versions are in `absorb.json`.
"""

_FORMS = {
    "logit": "the attention sink is a logit for each head, and the values it carried are biases",
    "key": "the attention sink is a key and a value in every layer, which all queries see",
    "auto": "the attention sink is a logit for each head, and the values it carried are biases, "
    "save for the layers named below, which have a key and a value that all queries see",
}


def card(report: Report) -> str:
    """The README.md of a checkpoint."""
    inspection = report.inspection
    model = inspection.model
    return _CARD.format(
        metadata=_metadata(report),
        title=f"{inspection.model.rpartition('/')[2]}, absorbed",
        model=f"[{model}](https://huggingface.co/{model})" if "/" in model else model,
        version=inspection.versions["absorb"],
        form=_FORMS[inspection.arguments["sink"]],
        prefix=f"`{inspection.prefix_text!r}`",
        scores=markdown(score_rows(report.original, report.converted)),
        text=inspection.text_origin,
        findings=markdown([("", ""), *finding_rows(inspection)]),
        recipe=report.recipe,
        kept=report.losses.kept,
    )


def _metadata(report: Report) -> str:
    lines = ["library_name: transformers"]
    if "/" in report.inspection.model:  # a Hub id, not the name of a file
        lines.append(f"base_model: {report.inspection.model}")
    if report.inspection.license is not None:
        lines.append(f"license: {report.inspection.license}")
    return "\n".join([*lines, "pipeline_tag: text-generation", "tags:", "- absorb"])


def markdown(rows: list[Row]) -> str:
    """Rows, the first of them the head, as a Markdown table."""
    head, *body = [tuple(cell.strip().replace("|", r"\|") for cell in row) for row in rows]
    rule = tuple("---" if column == 0 else "---:" for column in range(len(head)))
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *body))
