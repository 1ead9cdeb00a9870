"""What the repository says is what its files say."""

import subprocess
import sys
from pathlib import Path

from absorb.quantize import FORMATS
from absorb.report import Report, from_json, to_json

ROOT = Path(__file__).parent.parent
CARD = ROOT / "model_cards" / "smollm2-135m-absorbed"


def test_readme_and_card_and_pictures_show_the_figures_of_their_files() -> None:
    script = ROOT / "scripts" / "render_readme"
    done = subprocess.run([sys.executable, script, "--check"], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_readme_knows_every_format() -> None:
    text = (ROOT / "README.md").read_text()
    assert [name for name in FORMATS if f"`{name}`" not in text] == []


def test_a_report_survives_being_written_and_read() -> None:
    text = (CARD / "absorb.json").read_text()
    assert to_json(from_json(Report, text)) == text
