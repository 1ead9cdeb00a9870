"""Report → model card. Pure: all that a card says is in absorb.json."""

import shlex

from huggingface_hub import EvalResult, ModelCardData

from absorb.models.families import family_of
from absorb.quantize.formats import FORMATS
from absorb.schema.declared import changed
from absorb.schema.exported import Exported, Rescaled
from absorb.schema.report import Inspection, Report, sentence, verdict
from absorb.schema.settings import Job
from absorb.show.rows import finding_rows, score_rows
from absorb.show.tables import markdown

_CARD = """\
---
{metadata}
---

# {title}

{model} with its outliers absorbed into parameters by
[absorb](https://pypi.org/project/absorb-llm/) {version}: {form}, and the outlier channels of the
residual stream have scales.

## Load it

```python
from transformers import {auto}, {reader}

name, safely = "PATH_OR_REPO", {{"revision": "COMMIT", "trust_remote_code": True}}
model = {auto}.from_pretrained(name, **safely)
{reads} = {reader}.from_pretrained(name, **safely)
```

It needs transformers 5.16 or newer. `trust_remote_code=True` runs `modeling_absorb.py` of this
repository, and `revision`, the id of a commit, makes sure that it is the code you read. `absorb
verify PATH_OR_REPO` checks that it is that of absorb, and the files those that were written.
{registered}

## Before and after

{scores}
{verdict}
Held-out text: {text}. The teacher is the original model with the prefix {prefix}. W8A8 is
symmetric INT8, per tensor with fixed ranges for activations and per channel for weights.

## What was found, and what was done

{findings}

Fine-tune: {recipe}; step {kept} was kept.

## Quantise it

All matrices are the stock Linears of transformers, so a tool that quantises {family} models
quantises this one too. Leave `sink`, `sink_key`, `sink_value`, `input_scale` and `output_scale` as
they are: a few numbers in float32 that everything else depends on. Calibrate on text without a BOS.
{purpose}

## Fine-tune it

peft and the trainers of transformers and TRL train it like any model. peft does not know this
architecture by its name: give a `LoraConfig` its `target_modules`, such as `"all-linear"`. Weight
decay would pull sinks and scales away from where they do their work, so leave them out of it:

```python
{trainer}```

The same method does it in a class made from TRL's `SFTTrainer`. An adapter of the original belongs
to the original: merge it there first, then convert. An average of two conversions is worse than
either; average the originals first.

## Limits

{limits}

## How it was made

```sh
{command}
```

{versions}. `absorb.json` holds all figures and arguments and the SHA-256 of every file, and
`plan/plan.safetensors` is enough to convert the same model again: `absorb convert --plan`.
"""
_FORMS = {
    "logit": "the attention sink is a logit for each head, and the values it carried are biases",
    "key": "the attention sink is a key and a value in every layer, which all queries see",
    "auto": "the attention sink is a logit for each head, and the values it carried are biases, "
    "save for the layers named below, which have a key and a value that all queries see",
}
# scripts/soak/trainers.py trains by it.
_TRAINER = """\
from transformers import Trainer


class TrainerForSinks(Trainer):
    def get_decay_parameter_names(self, model):
        ours = ({names})
        return [n for n in super().get_decay_parameter_names(model) if not n.endswith(ours)]
"""
_REGISTERED = "After `import absorb` neither is needed."
_PROVED = (
    "absorb has no entry for this architecture: one was derived and proved on tiny random models, "
    "and `absorb.json` holds it with the tests that it passed."
)
_PURPOSES = {
    "none": "Formats with one fixed range for each activation tensor gain most from it.",
    "int8": "It was trained for W8A8 with one fixed range for each activation tensor.",
    "w4a4": "It was trained for W4A4 behind a Hadamard rotation of what every matrix reads.",
    "nvfp4": "It was trained for NVFP4, weights and activations.",
    "mxfp4": "It was trained for MXFP4, weights and activations.",
}
# A model that reads text alone, and one that reads pictures too.
_TEXT = {"auto": "AutoModelForCausalLM", "reader": "AutoTokenizer", "reads": "tokenizer"}
_PICTURES = {
    "auto": "AutoModelForImageTextToText",
    "reader": "AutoProcessor",
    "reads": "processor",
}


def _registered(inspection: Inspection) -> str:
    """What `import absorb` spares: nothing where pictures are read or an entry was derived."""
    if inspection.proof is not None:
        return _PROVED
    return "" if inspection.whole else _REGISTERED


def card(report: Report) -> str:
    """The README.md of a checkpoint."""
    inspection = report.inspection
    model = inspection.model
    return _CARD.format(
        **(_PICTURES if inspection.whole else _TEXT),
        metadata=metadata(inspection, _title(inspection), _results(report)),
        title=_title(inspection),
        model=f"[{model}](https://huggingface.co/{model})" if _is_on_hub(inspection) else model,
        version=inspection.versions["absorb"],
        registered=_registered(inspection),
        form=_FORMS[inspection.job.sink],
        prefix=_prefix(inspection),
        scores=markdown(score_rows(report.original, report.converted)),
        verdict=_verdict(report),
        text=inspection.text_origin,
        findings=markdown([("", ""), *finding_rows(inspection)]),
        recipe=report.recipe,
        kept=report.losses.kept,
        family=inspection.family,
        purpose=_PURPOSES[report.recipe.purpose],
        trainer=_TRAINER.format(names=", ".join(f'"{name}"' for name in _ours(inspection))),
        limits="\n".join(f"- {limit}" for limit in _limits(report)),
        command=command(inspection.job),
        versions=", ".join(f"{name} {version}" for name, version in inspection.versions.items()),
    )


def _learns_positions(inspection: Inspection) -> bool:
    if inspection.proof is not None:
        return inspection.proof.learned_positions
    return family_of(inspection.family).positions is not None


def _is_on_hub(of: Inspection | Exported | Rescaled) -> bool:
    """Some old repositories have no owner, as gpt2."""
    return of.commit is not None or "/" in of.model


def _verdict(report: Report) -> str:
    worse = verdict(report)
    return "" if worse is None else f"\n{worse[0].upper()}{worse[1:]}.\n"


def _title(inspection: Inspection) -> str:
    return f"{inspection.model.rpartition('/')[2]}, absorbed"


def _prefix(inspection: Inspection) -> str:
    return f"`{inspection.prefix_text!r}`"


def metadata(of: Inspection | Exported | Rescaled, title: str, results: list[EvalResult]) -> str:
    """The front matter of a card, as YAML."""
    hub_id = of.model if _is_on_hub(of) else None  # else the name of a file
    data = ModelCardData(
        base_model=hub_id,
        # Of the four kinds that the Hub knows this is the one: whole weights in the precision of
        # the original, so neither quantized nor an adapter, and of one model, so no merge.
        base_model_relation="finetune" if hub_id else None,
        library_name="transformers",
        license=of.license,
        pipeline_tag=_task(of),
        tags=["absorb", "float16" if isinstance(of, Rescaled) else "attention-sink"],
        model_name=title,
        eval_results=results or None,
    )
    return data.to_yaml()


def _task(of: Inspection | Exported | Rescaled) -> str:
    pictures = isinstance(of, Inspection) and of.whole is not None
    return "image-text-to-text" if pictures else "text-generation"


def _results(report: Report) -> list[EvalResult]:
    score = report.converted
    figures = {"perplexity": score.perplexity}
    figures |= {
        f"perplexity in {FORMATS[name].label}": value for name, value in score.quantized.items()
    }
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type="text",
            dataset_name=report.inspection.text_origin,
            metric_type="perplexity",
            metric_name=name,
            metric_value=round(value, 3),
        )
        for name, value in figures.items()
    ]


def _limits(report: Report) -> list[str]:
    inspection = report.inspection
    limits = [
        f"Do not put a BOS or another prefix before the text: the sinks stand for "
        f"{_prefix(inspection)}. {_leads(report)}",
        "Attention runs as `sdpa` (the default), `eager` or `flex_attention`. What would drop the "
        "sinks is refused.",
    ]
    if inspection.by_logits:
        limits.append(
            "A sink logit does not depend on the query, as the prefix's did: right after the graft "
            f"that cost {inspection.divergence:z.4f} nats per token."
        )
    if inspection.handing_on:
        limits.append(
            f"{len(inspection.handing_on)} of {len(inspection.layers)} layers hand on a state "
            "instead of attending: they are as they were, but for residual and smoothing scales, "
            "and what the prefix left in their state is gone. Right after the graft all of it cost "
            f"{inspection.divergence:z.4f} nats per token."
        )
    if inspection.whole is not None:
        limits.append(
            f"Of this {inspection.whole} model the language model was converted; what reads "
            "pictures is bit for bit that of the original. All was fitted and measured on text: "
            f"{_pictures(inspection)} The largest values that patches of pictures bring into a "
            "matrix are in none of the figures above, so calibrate INT8 on pictures too."
        )
    if _learns_positions(inspection):
        limits.append(
            f"Positions are learned, and the prefix took its own with it: the model reads "
            f"{len(inspection.prefix)} tokens fewer than the original."
        )
    if inspection.keyed_layers and inspection.rope_changes_at is not None:
        limits.append(
            f"Beyond {inspection.rope_changes_at:,} tokens RoPE has other frequencies, and the "
            "sinks' keys were rotated by those of shorter text: there they no longer stand for the "
            "prefix."
        )
    return [*limits, "Figures in low precision are computed by fake quantisation."]


def _ours(inspection: Inspection) -> tuple[str, ...]:
    """How the names of the parameters end that no stock model has."""
    keyed = len(inspection.keyed_layers)
    sinks = {"sink": keyed < len(inspection.layers), "sink_key": keyed, "sink_value": keyed}
    gates = () if inspection.job.gates == "none" else ("gate_in", "gate_out")
    return (*(n for n, there in sinks.items() if there), "input_scale", "output_scale", *gates)


def _pictures(inspection: Inspection) -> str:
    """What was fitted on text means for the tokens of pictures."""
    if not inspection.by_logits:
        return "patches of pictures meet the prefix's keys as words do, which is exact."
    return (
        "a logit was fitted to the queries of words, and patches of pictures ask with others; "
        "with `--sink key` they meet the prefix itself, as words do."
    )


def _leads(report: Report) -> str:
    if report.leads is None:
        return "The tokenizer adds none."
    left = " ".join(f"{sentence(lead)}." for lead in report.leads)
    return left or "Neither the tokenizer nor a chat template adds one."


def command(job: Job) -> str:
    """The `absorb convert` that does this job again, in a new folder DIR."""
    asked = [(option, value) for option, value in changed(job) if option.name != "force"]
    decided = {name for option, _ in asked for name in option.decides}
    kept = [(option, value) for option, value in asked if option.name not in decided]
    words = [word for option, value in kept for word in option.words(value)]
    return shlex.join(["absorb", "convert", job.model.name, "--out", "DIR", *words])
