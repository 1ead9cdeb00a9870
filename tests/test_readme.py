"""What the repository says is what its files say."""

import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from jinja2 import UndefinedError

from absorb.cli.main import main
from absorb.quantize import formats
from absorb.quantize.formats import FORMATS
from absorb.schema.codec import from_json, to_json
from absorb.schema.report import Report
from scripts.release import render

ROOT = Path(__file__).parent.parent
CARD = ROOT / "model_cards" / "smollm2-135m-absorbed"
PAGES = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "SECURITY.md")),
    *sorted((ROOT / "model_cards").rglob("*.md")),
]
# What templates may say themselves: settings, versions, a model's name, what papers say.
NOT_MEASURED = {"5.16", "1,024", "1,600", "0.6", "0.8", "0.1.2", "2.0", "2601.22966", "3.11"}


def check() -> tuple[int, str]:
    result = CliRunner().invoke(render.main, ["--check"])
    return result.exit_code, result.output


def test_pages_and_pictures_show_the_figures_of_their_files() -> None:
    assert check() == (0, "")


def test_a_page_that_shows_other_figures_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    found = render.figures()
    found["tasks"]["models"][0]["perplexity"] += 1
    monkeypatch.setattr(render, "figures", lambda: found)
    code, said = check()
    assert code == 1
    assert "README.md, model_cards/smollm2-135m-absorbed/EVIDENCE.md;" in said


@pytest.mark.parametrize("template", ["README.md", "EVIDENCE.md"])
def test_a_figure_without_a_file_is_an_error(template: str) -> None:
    with pytest.raises(UndefinedError):
        render.page(template)


@pytest.mark.parametrize("template", ["README.md", "EVIDENCE.md"])
def test_no_figure_is_written_by_hand(template: str) -> None:
    text = (render.TEMPLATES / template).read_text()
    own = re.sub(r"{{.*?}}|{%.*?%}", "", text, flags=re.DOTALL)
    assert set(re.findall(r"\d+(?:[.,]\d+)+", own)) <= NOT_MEASURED


def test_the_readme_is_no_longer_than_two_hundred_lines() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for target in re.findall(r'\]\(([^)]+)\)|src="([^"]+)"', page.read_text()):
        place, _, section = "".join(target).partition("#")
        if place.startswith("https:"):
            continue
        file = page.parent / place if place else page
        if not file.exists() or (section and section not in sections(file)):
            broken.append("".join(target))
    assert broken == []


def sections(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


def test_every_format_is_explained() -> None:
    assert [name for name in FORMATS if f"`{name}`" not in str(formats.__doc__)] == []


def commands() -> list[str]:
    """Every absorb command in the code blocks of README.md, without redirection and comment."""
    text = (ROOT / "README.md").read_text()
    fenced = "".join(re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    shown = re.findall(r"^    (absorb .+)", text, re.MULTILINE)
    shown += re.findall(r"^(absorb .+)", fenced, re.MULTILINE)
    return [line.partition(">")[0].partition("#")[0] for line in shown]


def test_the_readme_shows_commands() -> None:
    assert len(commands()) > 8


@pytest.mark.parametrize("line", commands())
def test_a_command_of_the_readme_is_one(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus.txt").touch()
    _, name, *arguments = shlex.split(line)
    command = main.commands[name]
    with click.Context(main) as outer:
        command.make_context(name, arguments, parent=outer)  # raises where an option is unknown


def test_scripts_that_pages_name_are_there() -> None:
    text = "".join(page.read_text() for page in PAGES)
    modules = set(re.findall(r"python -m (scripts[.\w]+)", text))
    assert len(modules) > 5
    assert [name for name in modules if find_spec(name) is None] == []
    names = set(re.findall(r"`(scripts/[\w/]+)", text))
    assert [name for name in names if not (ROOT / name).exists()] == []


def test_the_shell_completes_commands() -> None:
    environment = {
        "_ABSORB_COMPLETE": "bash_complete",
        "COMP_WORDS": "absorb in",
        "COMP_CWORD": "1",
    }
    script = "from absorb.cli.main import main; main(prog_name='absorb')"
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, check=True, text=True
    )
    assert done.stdout.split() == ["plain,inspect"]


def test_a_report_survives_being_written_and_read() -> None:
    text = (CARD / "absorb.json").read_text()
    assert to_json(from_json(Report, text)) == text
