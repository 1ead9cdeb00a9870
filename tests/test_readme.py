"""What the repository says is what its files say."""

import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest

from absorb.cli import main
from absorb.quantize import FORMATS
from absorb.report import Report, from_json, to_json

ROOT = Path(__file__).parent.parent
CARD = ROOT / "model_cards" / "smollm2-135m-absorbed"


def test_readme_and_card_and_pictures_show_the_figures_of_their_files(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "argv", ["render_readme", "--check"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "scripts" / "release" / "render.py"), run_name="__main__")
    assert ended.value.code is None


def test_the_readme_knows_every_format() -> None:
    text = (ROOT / "README.md").read_text()
    assert [name for name in FORMATS if f"`{name}`" not in text] == []


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


def test_every_sentence_in_the_readme_is_one_of_absorb() -> None:
    sources = [path.read_text() for path in (ROOT / "absorb").glob("*.py")]
    said = re.sub(r'"\s+f?"', "", "".join(sources))
    section = (ROOT / "README.md").read_text().partition("## When it refuses")[2]
    table = section.partition("\n## ")[0]
    sentences = re.findall(r"^\| `(.+?)` \|", table, re.MULTILINE)
    assert len(sentences) > 10
    pieces = [piece for sentence in sentences for piece in sentence.split("…")]
    assert [piece for piece in pieces if piece not in said] == []


def test_the_shell_completes_commands() -> None:
    environment = {
        "_ABSORB_COMPLETE": "bash_complete",
        "COMP_WORDS": "absorb in",
        "COMP_CWORD": "1",
    }
    script = "from absorb.cli import main; main(prog_name='absorb')"
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, check=True, text=True
    )
    assert done.stdout.split() == ["plain,inspect"]


def test_a_report_survives_being_written_and_read() -> None:
    text = (CARD / "absorb.json").read_text()
    assert to_json(from_json(Report, text)) == text
