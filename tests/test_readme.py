"""What the repository says is what its files say."""

import subprocess
import sys
from pathlib import Path

from absorb.card import card
from absorb.quantize import FORMATS
from absorb.report import Report, from_json, to_json

ROOT = Path(__file__).parent.parent
CARD = ROOT / "model_cards" / "smollm2-135m-absorbed"


def test_the_readme_shows_the_figures_of_its_files() -> None:
    script = ROOT / "scripts" / "render_readme"
    done = subprocess.run([sys.executable, script, "--check"], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_readme_knows_every_format() -> None:
    text = (ROOT / "README.md").read_text()
    assert [name for name in FORMATS if f"`{name}`" not in text] == []


def test_the_model_card_is_that_of_its_report() -> None:
    report = from_json(Report, (CARD / "absorb.json").read_text())
    assert card(report) == (CARD / "README.md").read_text()


def test_a_report_survives_being_written_and_read() -> None:
    text = (CARD / "absorb.json").read_text()
    assert to_json(from_json(Report, text)) == text
