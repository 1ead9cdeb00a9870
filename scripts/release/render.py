#!/usr/bin/env python
"""Write tables and pictures of README.md, and the model card, from the JSON files in model_cards/.

scripts/render_readme          rewrite them
scripts/render_readme --check  fail if that would change anything
"""

import json
import re
import sys
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from absorb.card import card, markdown
from absorb.charts import Section, digest
from absorb.draw import png
from absorb.exhibit import Exhibit
from absorb.families import FAMILIES
from absorb.report import Report, Row, from_json, score_rows
from absorb.views import sections
from scripts.benchmarks.int8.table import int8_rows
from scripts.benchmarks.rivals.table import rival_rows

ROOT = Path(__file__).resolve().parents[2]
FIGURES = ROOT / "model_cards" / "smollm2-135m-absorbed"


def read(name: str) -> dict[str, Any]:
    return json.loads((FIGURES / name).read_text())


def report() -> Report:
    """What `scripts/demo` found, did and measured."""
    return from_json(Report, (FIGURES / "absorb.json").read_text())


def demo() -> str:
    """The table that `scripts/demo` printed."""
    return markdown(score_rows(report().original, report().converted))


def wikitext() -> str:
    """WikiText-2 of the original, and of what `scripts/demo` and a GPU made of it."""
    demo, gpu = read("wikitext.json"), read("ablation.json")["100 steps of all"]
    rows: list[Row] = [
        ("", "perplexity", "W8A8 static", "clipped", "largest |x|", "massive tokens"),
        ("original", *figures(demo["original"])),
        ("converted on two CPU cores", *figures(demo["converted"])),
        ("converted on an H200", *figures(gpu["converted"])),
    ]
    return markdown(rows)


def figures(score: dict[str, Any]) -> Row:
    return (
        f"{score['perplexity']:.2f}",
        f"{score['quantised']['w8a8-static']:.2f}",
        f"{score['quantised']['w8a8-clipped']:.2f}",
        f"{score['stream_peak']:,.0f}",
        f"{score['massive_tokens']}",
    )


def attention(device: str) -> str:
    """Time of sink attention as a multiple of the best stock attention without sinks / of eager."""
    cases = read(f"attention-{device}.json")["cases"]
    lengths = sorted({case["length"] for case in cases})
    ratios: dict[str, dict[int, str]] = {}
    for case in cases:
        heads = f"{case['heads']}/{case['kv_heads']} heads of {case['head_dim']}"
        others = (case["ratios"].get(other) for other in ("best stock", "eager"))
        both = " / ".join("–" if ratio is None else f"{ratio:.2f}" for ratio in others)
        row = ratios.setdefault(f"{case['work']}, {case['dtype']}, {heads}", {})
        row[case["length"]] = both
    head = ("", *(f"{length}" for length in lengths))
    return markdown([head, *((row, *(by[n] for n in lengths)) for row, by in ratios.items())])


def sinks() -> str:
    """What each form of a sink makes of the model, untrained."""
    run = read("sinks.json")
    names = ("original", "mean logits", "first fit", "sequential fit", "auto", "key")
    rows = [
        (name, f"{run[name]['perplexity']:.3f}", f"{run[name]['divergence']:.4f}") for name in names
    ]
    return markdown([("", "perplexity", "KL from the teacher"), *rows])


RIVALS = """\
Perplexities of {windows} windows of WikiText-2, all with the same quantiser and with ranges from the
same 4,096 tokens of C4, from one run of `scripts/benchmark_rivals demo DIR --text wikitext2_test.txt --calibration
c4.jsonl` on {device}. The best of each column is bold:

{table}

*Fine-tuned* is plain training of all weights on the next token, in as many steps on the same text as
absorb. It is ahead wherever outliers are no trouble, as it learns the text; absorb keeps to its
teacher. SmoothQuant's α ({alpha}), and the share of the stream that is not clipped ({share:.3%}), are
those with the least loss in W8A8 on the calibration text. The prefix is the one that PrefixQuant's
criterion finds, its keys and values computed in float as there. The rotation is QuaRot's, before
every matrix, and has the norms' weights in the matrices so that it could be merged; the column *W4A4
rotated* rotates what the norms give, weights and all, which has fewer outliers. Every row is
rounded to the nearest: the figures that QuaRot's authors give also have GPTQ and clipped activations,
and those of PrefixQuant ranges that were trained. For models like this one the authors of SmoothQuant
set α to 0.8 or more, too.\
"""


def rivals() -> str:
    """absorb beside what one would do instead."""
    run = read("rivals.json")
    device, found = run["device"].removeprefix("NVIDIA ").partition(" ")[0], run["rivals"]
    return RIVALS.format(
        windows=run["windows"],
        device=f"an {device}",
        table=markdown(rival_rows(run)),
        alpha=found["SmoothQuant"]["chosen"]["alpha"],
        share=found["stream clipped"]["chosen"]["share"],
    )


INT8 = """\
And in real INT8 arithmetic, by torchao on a CPU: {windows} windows, from `scripts/benchmark_int8 demo DIR
--text wikitext2_test.txt --calibration c4.jsonl --json FILE`, for a conversion on two CPU cores. What
is outside the decoder layers stays in float32.{reduced} Tokens are those of a text of 512 that is read
at once, seconds those that one thread had a core:

{table}\
"""
REDUCED = """ This CPU cannot add products of full INT8 numbers without
overflow, so torchao leaves one bit of every range unused. That costs more perplexity than in the
table above, and the integers bring little speed."""


def int8() -> str:
    """Original and converted model in the arithmetic that the other tables only imitate."""
    run = read("int8.json")
    return INT8.format(
        windows=run["windows"],
        reduced=REDUCED if run["reduced"] else "",
        table=markdown(int8_rows(run)),
    )


def ablation() -> str:
    """What each choice of a conversion costs and brings, as multiples of the original."""
    names = ("perplexity", "w8a8-static", "w8a8-clipped", "w8a8-token", "nvfp4", "w4a4-hadamard")
    rows = [
        (
            name,
            f"{run['seconds']:.0f}",
            f"{run['converted']['divergence']:.4f}",
            *(ratio(run["ratios"], column) for column in names),
            " ".join(map(str, run["prefix"])),
        )
        for name, run in read("ablation.json").items()
    ]
    head = ("", "seconds", "KL", "perplexity", "W8A8 static", "clipped", "per token")
    return markdown([(*head, "NVFP4", "W4A4 rotated", "prefix"), *rows])


def ratio(ratios: dict[str, float], name: str) -> str:
    return f"{ratios[name]:.4f}" if name in ratios else ""


SMALL = """\
**On models with few sinks.** `scripts/train_small qwen3 --out DIR` (or `gpt_neox`) trains a small one
from nothing on a GPU, on the Python that is installed there. In about four minutes it grows sinks in
a few of its heads. What logits cost where the first token is read for something else shows here: the
KL after the graft says so, and `--sink key` is exact. Converted by `scripts/ablate --model DIR --text
DIR/held_out.jsonl --calibration DIR/calibration.jsonl --row untrained --row "untrained, keys where they
are needed" --row "100 steps of all" --json FILE`, before exponents were searched; perplexities are
multiples of the original's in float, on 32 windows of text that the model was not trained on:

{table}\
"""


def small_models() -> str:
    """What conversions make of small models that were trained for this alone, if there are any."""
    head = ("", "perplexity", "after a BOS", "W8A8 static", "clipped", "per token")
    rows: list[Row] = [(*head, "largest |x| / median", "massive tokens", "weight on the first")]
    for path in sorted((ROOT / "model_cards" / "small-models").glob("*.json")):
        runs = json.loads(path.read_text())
        before = runs["untrained"]["original"]
        perplexities = {"perplexity": before["perplexity"], **before["quantised"]}
        ratios = {name: value / before["perplexity"] for name, value in perplexities.items()}
        rows.append((f"{path.stem}, original", *small_figures(ratios, before)))
        for name, run in runs.items():
            rows.append((f"{path.stem}, {name}", *small_figures(run["ratios"], run["converted"])))
    if len(rows) == 1:
        return ""
    return SMALL.format(table=markdown(rows))


def small_figures(ratios: dict[str, float], score: dict[str, Any]) -> Row:
    names = ("perplexity", "perplexity after a BOS", "w8a8-static", "w8a8-clipped", "w8a8-token")
    return (
        *(ratio(ratios, name) for name in names),
        f"{score['stream_ratio']:,.0f} x",
        f"{score['massive_tokens']}",
        f"{score['first_weight']:.3f}",
    )


def early_sink() -> str:
    """What became of the early sink, and what that cost."""
    rows = [
        (name, f"{run['ratio']:.3f}", f"{run['kl']:.3f}", f"{run['token_ratio']:.1f}")
        for name, run in read("early-sink.json").items()
        if name != "original"
    ]
    return markdown([("", "perplexity", "KL", "largest token / median"), *rows])


def model() -> str:
    """Time of a converted model as a multiple of the original's."""
    runs = {"two CPU cores": read("model-cpu.json"), "H200": read("model-h200.json")}
    shapes = [
        f"{device}, {run['dtype']}, {run['batch']} x {run['length']}"
        for device, run in runs.items()
    ]
    rows = [
        (work, *(f"{run[work]['ratios']['seconds']:.2f}" for run in runs.values()))
        for work in ("prefill", "decode", "training step")
    ]
    return markdown([("", *shapes), *rows])


def render(text: str) -> str:
    """The README with what stands between its marks made anew."""
    parts = {
        "demo": demo(),
        "pictures": gallery(f"{FIGURES.relative_to(ROOT)}/"),
        "attention-cpu": attention("cpu"),
        "attention-h200": attention("h200"),
        "model": model(),
        "sinks": sinks(),
        "wikitext": wikitext(),
        "rivals": rivals(),
        "int8": int8(),
        "ablation": ablation(),
        "early-sink": early_sink(),
        "small-models": small_models(),
        "families": ", ".join(f"`{name}`" for name in FAMILIES),
    }
    for name, part in parts.items():
        marks = re.compile(f"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        text, found = marks.subn(lambda match, part=part: match[1] + part + "\n" + match[2], text)
        assert found == 1, name
    return text


def shown() -> list[Section]:
    """The pictures to show, of what `absorb inspect demo --png FOLDER` wrote."""
    exhibit = from_json(Exhibit, (FIGURES / "figures.json").read_text())
    return [section for section in sections(exhibit) if section.name in ("sinks", "channels")]


def stale(section: Section) -> bool:
    """Whether a picture is missing or shows other figures. Its bytes depend on the library."""
    path = FIGURES / f"{section.name}.png"
    if not path.exists():
        return True
    with Image.open(path) as picture:
        return picture.text.get("Figures") != digest(section.chart)


def gallery(folder: str) -> str:
    """The pictures side by side, with their words for those who do not see them."""
    return "\n".join(
        f'<img src="{folder}{section.name}.png" width="49%" alt="{escape(section.words)}">'
        for section in shown()
    )


def cards() -> dict[Path, str]:
    """Everything written, by where it stands."""
    readme = ROOT / "README.md"
    pictures = f"{card(report())}\n## Before any fine-tune\n\n{gallery('')}\n"
    return {readme: render(readme.read_text()), FIGURES / "README.md": pictures}


if __name__ == "__main__":
    texts = {path: text for path, text in cards().items() if text != path.read_text()}
    pictures = [section for section in shown() if stale(section)]
    if "--check" in sys.argv:
        wrong = [*(path.name for path in texts), *(f"{section.name}.png" for section in pictures)]
        if wrong:
            sys.exit(f"not what the figures say: {', '.join(wrong)}; run scripts/render_readme")
        sys.exit()
    for path, text in texts.items():
        path.write_text(text)
    for section in pictures:
        (FIGURES / f"{section.name}.png").write_bytes(png(section.chart))
