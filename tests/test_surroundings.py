"""Whatever the locale, the time zone and the clock are, absorb writes the same files."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from absorb.ship.staging import digests
from tests.helpers.tiny import tiny
from tests.helpers.tiny_tokenizer import letters, tiny_tokenizer

ROOT = Path(__file__).parent.parent

# Every command in one process, as the imports take longest.
ALL = """
import sys
import pytest
import torch
from absorb.cli.main import main
from tests.conftest import shorten_texts

torch.set_num_threads(1)
model, text, out = sys.argv[1:]
for words in (
    ["inspect", model, "--text", text],
    ["convert", model, "--text", text, "--steps", "2", "--out", out],
    ["eval", out, "--against", model, "--text", text, "--formats", "fp8", "--windows", "2"],
    ["verify", out],
):
    try:
        main(words)
    except SystemExit as ended:
        assert not ended.code, (words, ended.code)
    shorten_texts(pytest.MonkeyPatch())  # behind the first command: it imports without a word
"""

# Python runs a module of this name as it starts. The clock stands at YEARS and runs backwards.
CLOCK = """
import os, time
shift = (float(os.environ["YEARS"]) - 1970) * 31_557_600
time.time = lambda: shift - 100 * time.monotonic()
time.time_ns = lambda: int(time.time() * 1e9)
"""

SURROUNDINGS = {
    "ASCII in 1970": {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "TZ": "<-99>99", "YEARS": "1970"},
    "Turkish in 2099": {"LC_ALL": "tr_TR.UTF-8", "TZ": "Pacific/Kiritimati", "YEARS": "2099"},
}
LOCALE = ("PYTHONUTF8", "PYTHONIOENCODING", "LANG", "LANGUAGE", "LC_ALL", "LC_CTYPE", "TZ")


def test_the_package_is_the_command_too() -> None:
    command = [sys.executable, "-m", "absorb", "convert", "model"]
    done = subprocess.run(command, capture_output=True, check=False, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("Usage: python -m absorb convert")


@pytest.mark.slow
def test_surroundings_change_nothing(tmp_path: Path) -> None:
    model, text = tmp_path / "modèle-İ", tmp_path / "text.txt"
    tiny("llama", torch.float32, num_hidden_layers=1).save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    text.write_text("é İ ı" + letters(13_000), encoding="utf-8")
    (tmp_path / "clock").mkdir()
    (tmp_path / "clock" / "sitecustomize.py").write_text(CLOCK)
    written = []
    for name, settings in SURROUNDINGS.items():
        out = tmp_path / name / "modèle"
        known = {key: value for key, value in os.environ.items() if key not in LOCALE}
        known |= {"PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path / "clock")]), **settings}
        command = [sys.executable, "-c", ALL, str(model), str(text), str(out)]
        done = subprocess.run(command, env=known, capture_output=True, check=False)
        assert done.returncode == 0, (name, done.stderr.decode(errors="replace"))
        for noise in (b"Traceback", b"torchao", b"_pytree"):
            assert noise not in done.stderr, name
        assert b"without absorb" in done.stdout
        report = (out / "absorb.json").read_bytes()
        written.append((digests(out), report))
        assert b"mod\\u00e8le" in report or "modèle".encode() in report
    assert all(one == written[0] for one in written)
