"""A disk that fills up while absorb writes costs one sentence and leaves nothing half-written.

The disk is a tmpfs, small in bytes or in files, mounted in a namespace that goes with its process:
no rights are needed where users may make one.
"""

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.helpers import warm
from tests.helpers.tiny import tiny
from tests.helpers.tiny_tokenizer import letters, tiny_tokenizer

ALONE = ["unshare", "--map-root-user", "--mount"]

INSIDE = """
import json, subprocess, sys
from pathlib import Path
import pytest
import torch
from click.testing import CliRunner
from absorb.cli.main import main
from tests.conftest import shorten_texts

torch.set_num_threads(1)
shorten_texts(pytest.MonkeyPatch())
disk = Path(sys.argv[1])
for size, words in json.loads(sys.argv[2]):
    subprocess.run(["mount", "-t", "tmpfs", "-o", size, "none", disk], check=True)
    result = CliRunner().invoke(main, words)
    left = sorted(str(path.relative_to(disk)) for path in disk.rglob("*"))
    crash = None if isinstance(result.exception, SystemExit | None) else repr(result.exception)
    print(json.dumps([size, words, result.exit_code, crash, result.stderr, left]))
    subprocess.run(["umount", disk], check=True)
"""

CONVERT = ["convert", "MODEL", "--text", "TEXT", "--steps", "1", "--out", "DISK/out"]
EVALUATE = ["eval", "MODEL", "--text", "TEXT", "--formats", "fp8", "--html", "DISK/page.html"]
INSPECT = ["inspect", "MODEL", "--text", "TEXT", "--png", "DISK/pictures"]
CASES = [
    *(("convert", f"size={size}k", CONVERT) for size in (4, 16, 64, 112)),
    *(("convert", f"size=1m,nr_inodes={files}", CONVERT) for files in (1, 3, 9)),
    ("text", "size=32k", [*CONVERT, "--resume"]),
    ("state", "size=72k", [*CONVERT, "--train", "all", "--resume"]),
    ("eval", "size=12k", EVALUATE),
    ("inspect", "size=64k", INSPECT),
]


@dataclass(frozen=True, slots=True)
class Ending:
    size: str
    words: list[str]
    code: int
    crash: str | None
    said: str
    left: list[str]


@pytest.fixture(scope="module")
def endings(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, Ending]]:
    """How the commands ended, on a disk of its own each: all in one process, to import once."""
    if shutil.which("unshare") is None or subprocess.run([*ALONE, "true"], check=False).returncode:
        pytest.skip("no namespace to mount a small disk in: it takes Linux, and users who may")
    folder = tmp_path_factory.mktemp("full")
    tiny("llama", torch.float32, num_hidden_layers=1).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    (folder / "text.txt").write_text(letters(13_000))
    (folder / "disk").mkdir()
    places = {"MODEL": "model", "TEXT": "text.txt", "DISK": "disk"}
    cases = json.dumps([[size, words] for _, size, words in CASES])
    for name, place in places.items():
        cases = cases.replace(name, str(folder / place))
    command = [*ALONE, sys.executable, "-c", INSIDE, str(folder / "disk"), cases]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = [Ending(*json.loads(line)) for line in done.stdout.splitlines()]
    return [(kind, ending) for (kind, _, _), ending in zip(CASES, found, strict=True)]


@pytest.mark.slow
def test_a_full_disk_is_one_sentence(endings: list[tuple[str, Ending]]) -> None:
    for _, ending in endings:
        assert (ending.code, ending.crash) == (1, None), ending
        sentences = [line for line in ending.said.splitlines() if line.startswith("absorb: ")]
        assert len(sentences) == 1, ending
        causes = ("is full, so", "No space left on device", "make room, or name another place")
        assert any(cause in sentences[0] for cause in causes), ending


@pytest.mark.slow
def test_a_full_disk_is_left_as_it_was(endings: list[tuple[str, Ending]]) -> None:
    for kind, ending in endings:
        if kind != "state":
            assert ending.left == [], ending


@pytest.mark.slow
def test_what_a_conversion_goes_on_from_is_kept_where_a_later_file_is_too_large(
    endings: list[tuple[str, Ending]],
) -> None:
    (ending,) = (ending for kind, ending in endings if kind == "state")
    whole = ["out.progress", "out.progress/plan.safetensors", "out.progress/texts.safetensors"]
    assert ending.left == whole


PRINT = """
import os
from absorb.cli.main import main
os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
main()
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_output_that_cannot_be_printed_is_one_sentence(converted: Path) -> None:
    done = warm.run([sys.executable, "-c", PRINT, "verify", converted])
    assert done.returncode == 1, done.stderr
    assert done.stderr.splitlines()[-1] == (
        "absorb: the result could not be printed (No space left on device); "
        "check where the output goes"
    )
