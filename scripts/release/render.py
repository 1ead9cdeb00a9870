"""Write README.md, EVIDENCE.md, the model card and their pictures from the JSON in model_cards/.

python -m scripts.release.render          rewrite them
python -m scripts.release.render --check  fail if that would change anything

What they say is in templates/, every figure in the JSON.
"""

import json
import re
from html import escape
from pathlib import Path
from typing import Any

import click
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from absorb.models.families import FAMILIES, INSIDE
from absorb.schema.codec import from_json
from absorb.schema.exported import Rescaled
from absorb.schema.report import Report
from absorb.ship.export.rescaled import reach_rows
from absorb.show.before_after import BeforeAfter
from absorb.show.card import card
from absorb.show.charts import Section, digest
from absorb.show.draw import png
from absorb.show.rows import score_rows
from absorb.show.sections import sections
from absorb.show.tables import markdown
from scripts.benchmarks.int8.table import int8_rows
from scripts.benchmarks.rivals.table import rival_rows
from scripts.engines.table import (
    chain_rows,
    engine_rows,
    four_bit_rows,
    stranger_rows,
    vllm_rows,
)
from scripts.release import accuracy, scale, tables
from scripts.trials import noise

ROOT = Path(__file__).resolve().parents[2]
FIGURES = ROOT / "model_cards" / "smollm2-135m-absorbed"
SMALL_MODELS = ROOT / "model_cards" / "small-models"
TEMPLATES = Path(__file__).parent / "templates"


def pages() -> dict[Path, str]:
    """Every page as it should be, by where it stands."""
    found = figures()
    report = from_json(Report, (FIGURES / "absorb.json").read_text())
    shown = {
        "tables": drawn(found, report),
        "families": list(FAMILIES),
        "inside": list(INSIDE),
        "count": tables.count_of(found["architectures"]),
        "added": scale.added,
        "of_one_card": scale.of_one_card,
        **found,
    }
    return {
        ROOT / "README.md": page("README.md", pictures=gallery(FIGURES.relative_to(ROOT)), **shown),
        FIGURES / "EVIDENCE.md": page("EVIDENCE.md", **shown),
        FIGURES / "README.md": page("card.md", card=card(report), pictures=gallery(Path())),
    }


def figures() -> dict[str, Any]:
    """What each JSON file holds, by its name as an identifier; that of all small models."""
    found = {path.stem.replace("-", "_"): _read(path) for path in FIGURES.glob("*.json")}
    small = {path.stem: _read(path) for path in sorted(SMALL_MODELS.glob("*.json"))}
    return {**found, "small_models": small}


def drawn(found: dict[str, Any], report: Report) -> dict[str, str]:
    """Every table in Markdown, by its name."""
    models = {"two CPU cores": found["model_cpu"], "H200": found["model_h200"]}
    gated: dict[str, float] = found["gated_attention"]["kl"]
    rows = {
        "demo": score_rows(report.original, report.converted),
        "wikitext": tables.wikitext(found["wikitext"], found["tasks"]),
        "rivals": rival_rows(found["rivals"]),
        "int8": int8_rows(found["int8"]),
        "engines": engine_rows(found["vllm"], found["stranger"]),
        "vllm": vllm_rows(found["vllm"]),
        "stranger": stranger_rows(found["stranger"]),
        "int8_chain": chain_rows(found["int8_chain"]),
        "four_bits": four_bit_rows(found["four_bits"]),
        "accuracies": accuracy.accuracies(found["tasks"]),
        "headline": accuracy.headline(found["tasks"]),
        "ablation": tables.ablation(found["ablation"]),
        "sinks": tables.sinks(found["sinks"]),
        "early_sink": tables.early_sink(found["early_sink"]),
        "small_models": tables.small_models(found["small_models"]),
        "attention_cpu": tables.attention(found["attention_cpu"]),
        "attention_h200": tables.attention(found["attention_h200"]),
        "model": tables.model(models),
        "scale": scale.rows_of(found["scale"]),
        "growth": scale.growth(found["growth"]),
        "gates": tables.ablation(found["gates"]),
        "gates_asked": accuracy.means(found["gates"]),
        "gated_attention": [("", "KL"), *((name, f"{kl:.4f}") for name, kl in gated.items())],
        "layers_first": tables.ablation(found["layers_first"]),
        "for_a_format": tables.ablation(found["for_a_format"]),
        "noise": noise.rows_of(found["noise"]),
        "architectures": tables.architectures(found["architectures"]),
        "float16": reach_rows(from_json(Rescaled, (FIGURES / "float16.json").read_text())),
        "windows": tables.windows(found["window"]),
        "far": tables.far(found["far"]),
        "other_engines": tables.engines(
            {
                "MLX": found["engine_mlx"],
                "onnxruntime-genai": found["engine_onnxruntime_genai"],
            }
        ),
        "onnx_float16": tables.onnx_float16(found["engine_onnx_float16"]),
    }
    return {name: markdown(table) for name, table in rows.items()}


def page(template: str, **shown: Any) -> str:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,  # a figure without a source is an error
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made = environment.get_template(template)
    return made.render(**shown, contents=contents(made.render(**shown, contents="")))


def contents(text: str) -> str:
    """Links to the sections of a page, but for this list of them."""
    titles = re.findall(r"^## (?!Contents$)(.+)$", text, re.MULTILINE)
    places = (re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles)
    return "\n".join(f"- [{one}](#{at})" for one, at in zip(titles, places, strict=True))


def pictures() -> list[Section]:
    """Those that are shown, of what `absorb inspect demo --png FOLDER` wrote."""
    exhibit = from_json(BeforeAfter, (FIGURES / "figures.json").read_text())
    return [section for section in sections(exhibit) if section.name in ("sinks", "channels")]


def gallery(folder: Path) -> str:
    """The pictures side by side, with their words for those who do not see them."""
    return "\n".join(
        f'<img src="{folder / section.name}.png" width="49%" alt="{escape(section.words)}">'
        for section in pictures()
    )


def stale(section: Section) -> bool:
    """Whether a picture is missing or shows other figures. Its bytes depend on the library."""
    path = _file(section)
    if not path.exists():
        return True
    with Image.open(path) as picture:
        return picture.text.get("Figures") != digest(section.chart)


def _file(section: Section) -> Path:
    return FIGURES / f"{section.name}.png"


def _read(path: Path) -> Any:
    return json.loads(path.read_text())


@click.command()
@click.option("--check", is_flag=True, help="Write nothing; fail if anything would change.")
def main(check: bool) -> None:
    """Write pages and pictures from the figures in model_cards/."""
    texts = {p: text for p, text in pages().items() if not p.exists() or p.read_text() != text}
    wrong = [section for section in pictures() if stale(section)]
    if check and (texts or wrong):
        names = ", ".join(str(path.relative_to(ROOT)) for path in [*texts, *map(_file, wrong)])
        raise click.ClickException(f"not what templates and figures say: {names}; drop --check")
    for path, text in texts.items():
        path.write_text(text)
    for section in wrong:
        _file(section).write_bytes(png(section.chart))


if __name__ == "__main__":
    main()
