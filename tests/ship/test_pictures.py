"""A model that reads pictures, converted whole and pushed, says something of one to a stranger."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from absorb.cli.main import main
from absorb.schema.places import Destination
from absorb.ship.hub import checked_target, upload
from scripts.soak.journey import HERE_PICTURE, STRANGER_PICTURE
from tests.helpers import warm
from tests.helpers.fake_hub import TOKEN, USER, serving
from tests.helpers.wrappers import saved_with_processor

pytestmark = pytest.mark.usefixtures("little_text")


REPOSITORY = f"{USER}/pictures"


def last(done: subprocess.CompletedProcess[str]) -> str:
    """The last line that a process printed."""
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


@pytest.mark.slow
def test_a_stranger_loads_it_as_its_card_says_and_it_sees_the_picture(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out = saved_with_processor(tmp_path / "whole"), tmp_path / "out"
    command = ["convert", folder, "--out", out, "--steps", "0", "--text", text_file]
    result = CliRunner().invoke(main, [str(word) for word in command])
    assert result.exit_code == 0, result.output
    kept = {"processor_config.json", "tokenizer.json", "chat_template.jinja"}
    assert kept <= {file.name for file in out.iterdir()}
    with serving(monkeypatch, tmp_path) as hub:
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        upload(out, checked_target(Destination(repository=REPOSITORY)), lambda _: None)
        stranger = {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_XET": "1",
        }
        command = [sys.executable, "-c", STRANGER_PICTURE, REPOSITORY, hub.commit(REPOSITORY)]
        # Where the Hub is, is read once, as huggingface_hub is imported.
        env = {**os.environ, **stranger}
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        digest, text = json.loads(last(done))
    assert digest == last(warm.run([sys.executable, "-c", HERE_PICTURE, out]))
    assert "<patch>" in text
