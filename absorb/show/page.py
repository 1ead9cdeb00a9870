"""Sections → a page that opens from disk: one file that holds its pictures and loads nothing."""

from base64 import b64encode

from jinja2 import Environment, PackageLoader, StrictUndefined
from tqdm import tqdm

from absorb.schema.report import Inspection
from absorb.schema.scores import Comparison
from absorb.show.charts import Section
from absorb.show.draw import png
from absorb.show.rows import finding_rows
from absorb.show.sections import standings
from absorb.show.tables import Row

Drawn = tuple[Section, bytes]


def drawn(sections: list[Section]) -> list[Drawn]:
    """Every section with its chart as PNG."""
    return [(section, png(section.chart)) for section in tqdm(sections, desc="drawing")]


def inspection_page(made: Inspection, shown: list[Drawn]) -> str:
    """The HTML of an inspection."""
    return _page(
        title=f"Outliers of {made.model}",
        lead=(
            "What absorb finds in the model, and what becomes of it: before is the original, after "
            "is the model with its outliers absorbed, before any fine-tune."
        ),
        findings=finding_rows(made),
        shown=shown,
        unfolded=False,
        origin=_origin(made.text_origin, made.text_sha256, made.versions),
    )


def comparison_page(made: Comparison) -> str:
    """The HTML of a comparison."""
    return _page(
        title=" beside ".join(model.model for model in made.models),
        lead=f"On {made.rows} rows of {made.length} tokens, in {made.dtype} on {made.device}.",
        findings=[],
        shown=drawn([standings(made)]),
        unfolded=True,
        origin=_origin(made.text_origin, made.text_sha256, made.versions),
    )


def _page(
    *,
    title: str,
    lead: str,
    findings: list[Row],
    shown: list[Drawn],
    unfolded: bool,
    origin: str,
) -> str:
    # Names of models and tokens come from strangers.
    environment = Environment(
        autoescape=True,
        loader=PackageLoader("absorb", "show/templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html").render(
        title=title,
        lead=lead,
        findings=findings,
        shown=[(section, b64encode(picture).decode()) for section, picture in shown],
        unfolded=unfolded,
        origin=origin,
    )


def _origin(text: str, fingerprint: str, versions: dict[str, str]) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in versions.items())
    return f"Text: {text} (SHA-256 of its tokens: {fingerprint}). Made by {packages}."
