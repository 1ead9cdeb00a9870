"""Export → the README.md that lies in it. Pure: all that it says is in the two absorb.json."""

from absorb.schema.exported import Exported
from absorb.schema.report import Report
from absorb.ship.export.targets import ROUTES
from absorb.show.card import metadata
from absorb.show.tables import Row

_CARD = """\
---
{metadata}
---

# {title}

{model}, converted by [absorb](https://pypi.org/project/absorb-llm/) {version} and exported as
`{architecture}`, a stock architecture of transformers: the attention sink is a logit for each head
(`sinks`), and the values it carried are biases. It needs no code of its own.

## Load it

Do not put a BOS or another prefix before a text: the sinks stand for {prefix}. The tokenizer adds
none.

{engines}

## What was lost

{lost}

On text {text} the exported model is {divergence:.2g} nats per token from the converted one (mean
KL), both in float32.

## How it was made

```sh
absorb export DIR --to {target} --out OUT
```

{versions}. `absorb.json` holds all figures and the SHA-256 of every file, and `absorb verify`
checks them.
"""
_TRANSFORMERS = """\
**transformers** {since} or newer, without `trust_remote_code`:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH_OR_REPO")
tokenizer = AutoTokenizer.from_pretrained("PATH_OR_REPO")
```

"""
_MLX = """\
**MLX** (mlx-lm 0.32 was tried) runs `granite_swa_mlx.py`, which lies here and is absorb's:

```python
from mlx_lm import generate, load

model, tokenizer = load("PATH_OR_REPO", trust_remote_code=True)
print(generate(model, tokenizer, prompt="The capital of France is"))
```

"""
_ENGINES = {
    "granite_swa": """\
**vLLM** (0.32 was tried):

```sh
vllm serve PATH_OR_REPO
```

**llama.cpp** reads the same model from a .gguf file, which `absorb export DIR --to gguf` writes.

**onnxruntime-genai** (0.18 was tried) has no builder of this architecture. That of Granite makes
the same graph where `attention_attrs["sinks"]` is set, without which it drops the sinks without a
word, and where a window that hides nothing is not told to it.

**SGLang** has the architecture, and up to 0.5.23 it drops all biases of attention without a word:
do not serve this model by such a version.""",
    "flint": """\
**vLLM**, **llama.cpp** and **SGLang**: the architecture is new, so ask each for `flint` by name
before you rely on it. An engine that does not know it says so.""",
}
_LLAMA_CPP = """\
**llama.cpp** b11739 or newer:

```sh
llama-server -m {file}
llama-quantize {file} Q4_K_M.gguf Q4_K_M
```

vLLM and SGLang want the model as a folder, which `absorb export DIR --to native` writes. Others may
read this file as another model, without the sinks."""


def card(exported: Exported, report: Report) -> str:
    """The README.md of an export."""
    model = exported.model
    return _CARD.format(
        metadata=metadata(exported, _title(exported), []),
        title=_title(exported),
        model=f"[{model}](https://huggingface.co/{model})" if "/" in model else model,
        version=exported.versions["absorb"],
        architecture=exported.architecture,
        prefix=f"`{report.inspection.prefix_text!r}`",
        engines=_engines(exported),
        lost="\n".join(f"- {one[0].upper()}{one[1:]}." for one in _lost(exported)),
        text=exported.text_origin,
        divergence=exported.divergence,
        target=exported.target,
        versions=", ".join(f"{name} {version}" for name, version in exported.versions.items()),
    )


def _engines(exported: Exported) -> str:
    if exported.target == "gguf":
        return _LLAMA_CPP.format(file=file_name(exported))
    since = ROUTES[exported.family].target.since
    mlx = _MLX if exported.mlx else ""
    return _TRANSFORMERS.format(since=since) + mlx + _ENGINES[exported.architecture]


def file_name(exported: Exported) -> str:
    """What a .gguf file of an export is called."""
    model = exported.model.rpartition("/")[2].removesuffix(".gguf")
    return f"{model}-absorbed-{exported.dtype.upper()}.gguf"


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


def _lost(exported: Exported) -> list[str]:
    lost = list(exported.lost)
    if exported.stream > 1:
        lost.append(
            "the residual stream is as large as the original's, up to "
            f"{exported.stream:g} times as large as in the converted model: no matrix sees a "
            "difference, and float16 overflows where it did in the original"
        )
    return lost or ["nothing"]
