"""What the repository says is what its files say."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_readme_shows_the_figures_of_its_files() -> None:
    script = ROOT / "scripts" / "render_readme"
    done = subprocess.run([sys.executable, script, "--check"], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_model_card_is_that_of_its_report() -> None:
    folder = ROOT / "model_cards" / "smollm2-135m-absorbed"
    converted = json.loads((folder / "absorb.json").read_text())["converted"]
    assert f"{converted['perplexity']:.3f}" in (folder / "README.md").read_text()
