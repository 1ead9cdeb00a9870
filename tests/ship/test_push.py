"""A checkpoint reaches the Hub whole or not at all, and every refusal there is one sentence."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from huggingface_hub import constants
from huggingface_hub.utils import _http

from absorb.cli.main import main
from absorb.errors import AbsorbError
from absorb.schema.places import Destination
from absorb.schema.settings import ModelRef
from absorb.ship.hub import checked_target, upload
from absorb.ship.staging import digests
from absorb.ship.verify import verify
from tests.helpers.fake_hub import TOKEN, USER, FakeHub, Trouble, serving
from tests.helpers.tiny_tokenizer import letters
from tests.pipelines.test_ranks import told

pytestmark = pytest.mark.usefixtures("little_text")


REPOSITORY = f"{USER}/model"
BATCH = f"POST /{REPOSITORY}.git/info/lfs/objects/batch"
COMMIT = f"POST /api/models/{REPOSITORY}/commit/main"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with serving(monkeypatch, tmp_path) as hub:
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long huggingface_hub would have waited before each new attempt."""
    waited: list[float] = []
    monkeypatch.setattr(_http.time, "sleep", waited.append)
    return waited


@pytest.fixture
def folder(converted: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(converted, tmp_path / "model"))


def push(*arguments: str | Path) -> Result:
    """`absorb push` with the verification, which takes seconds."""
    return CliRunner().invoke(main, ["push", *map(str, arguments)])


def upload_to(folder: Path, repository: str = REPOSITORY, **options: Any) -> None:
    """All of `absorb push` but the verification."""
    upload(folder, checked_target(Destination(repository=repository, **options)), lambda _: None)


def refused(act: Callable[[], object]) -> str:
    with pytest.raises(AbsorbError) as caught:
        act()
    assert "\n" not in str(caught.value)
    assert TOKEN not in str(caught.value)
    return str(caught.value)


def arrived(hub: FakeHub, folder: Path, repository: str = REPOSITORY) -> bool:
    """Whether the repository holds the files of the folder, byte for byte, and no others."""
    names = [*digests(folder), "absorb.json"]
    if set(hub.files(repository)) != {*names, ".gitattributes"}:
        return False
    there = hub.folders[repository]
    return all((there / name).read_bytes() == (folder / name).read_bytes() for name in names)


@pytest.mark.usefixtures("at_home")
def test_a_push_is_verified_complete_and_told(hub: FakeHub, folder: Path) -> None:
    result = push(folder, "model", "--private")
    assert result.exit_code == 0, result.output
    assert f"uploading {len(digests(folder)) + 1} files, " in result.stderr
    assert f"kB, to {hub.url}/{REPOSITORY}" in result.stderr
    assert f"uploaded to {hub.url}/{REPOSITORY}/commit/{hub.commit(REPOSITORY)}" in result.stdout
    assert arrived(hub, folder)
    assert REPOSITORY in hub.private
    assert TOKEN not in result.output
    there = hub.folders[REPOSITORY]
    assert not any(TOKEN.encode() in (there / name).read_bytes() for name in hub.files(REPOSITORY))
    assert verify(ModelRef(name=REPOSITORY), lambda _: None).wrong == []


def test_a_changed_folder_is_not_uploaded(hub: FakeHub, folder: Path) -> None:
    (folder / "config.json").write_text("{}")
    result = push(folder, "model")
    assert result.exit_code == 1
    assert "config.json is not as it was written" in result.stderr
    assert f"so {folder} was not uploaded" in result.stderr
    assert not hub.folders


@pytest.mark.usefixtures("at_home")
def test_a_conversion_is_pushed_when_it_is_written(
    hub: FakeHub, original: Path, text_file: Path, tmp_path: Path
) -> None:
    command = ["convert", str(original), "--out", str(tmp_path / "out"), "--steps", "0"]
    command += ["--text", str(text_file)]
    result = CliRunner().invoke(main, [*command, "--push-to-hub", REPOSITORY, "--json"])
    assert result.exit_code == 0, result.output
    assert "uploaded to" in result.stderr
    assert json.loads(result.stdout)["files"]
    assert arrived(hub, tmp_path / "out")


@pytest.mark.slow
def test_one_of_several_processes_pushes_what_they_have_written(
    hub: FakeHub, original: Path, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text(letters(40 * 257))
    command = [sys.executable, "-m", "absorb", "convert", original, "--out", tmp_path / "out"]
    command += ["--text", tmp_path / "text.txt", "--steps", "0", "--push-to-hub", REPOSITORY]
    at_home = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
    at_home["HF_HUB_DISABLE_XET"] = "1"
    with ThreadPoolExecutor() as pool:
        envs = [at_home | place for place in told(2)]
        said = {"capture_output": True, "text": True}
        done = [*pool.map(lambda env: subprocess.run(command, env=env, **said), envs)]
    assert [one.returncode for one in done] == [0, 0], [one.stderr for one in done]
    assert arrived(hub, tmp_path / "out")
    assert hub.requests.count(COMMIT) == 1
    assert [one.stdout.count("uploaded to") for one in done] == [1, 0]


@pytest.mark.parametrize(
    ("repository", "sentence"),
    [
        ("a b", "'a b' is no name for a repository"),
        ("a/b/c", "'a/b/c' is no name for a repository"),
        ("../b", "'../b' is no name for a repository"),
        ("their-lab/model", "you are someone on the Hub and cannot write to their-lab"),
    ],
)
def test_a_conversion_that_cannot_be_pushed_is_not_begun(
    hub: FakeHub, tmp_path: Path, repository: str, sentence: str
) -> None:
    command = ["convert", "nothing", "--out", str(tmp_path / "out"), "--push-to-hub", repository]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 1
    assert sentence in result.stderr
    assert not hub.folders


def test_a_commit_is_not_made_of_half_a_folder(
    hub: FakeHub, folder: Path, waits: list[float]
) -> None:
    hub.troubles = [Trouble("PUT /large/.*", times=100)]
    assert "the connection to the Hub was lost" in refused(lambda: upload_to(folder))
    assert hub.files(REPOSITORY) == [".gitattributes"]
    assert waits  # it was tried more than once


def test_what_has_arrived_is_not_uploaded_again(
    hub: FakeHub, folder: Path, waits: list[float]
) -> None:
    plan, weights = (
        sha256((folder / name).read_bytes()).hexdigest()
        for name in ("plan/plan.safetensors", "model.safetensors")
    )
    hub.troubles = [Trouble(f"PUT /large/{weights}", times=100)]
    refused(lambda: upload_to(folder))
    assert hub.uploaded == [plan]
    hub.troubles = []
    upload_to(folder)
    assert hub.uploaded == [plan, weights]
    assert arrived(hub, folder)
    upload_to(folder)
    assert hub.uploaded == [plan, weights]


def test_a_dropped_connection_is_tried_again(
    hub: FakeHub, folder: Path, waits: list[float]
) -> None:
    hub.troubles = [Trouble("PUT /large/.*", times=2), Trouble(BATCH, times=1)]
    upload_to(folder)
    assert arrived(hub, folder)
    assert len(waits) == 3


def test_a_hub_without_xet_is_served_without_it(
    hub: FakeHub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("hf_xet")
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_DISABLE_XET", False)
        said = refused(lambda: upload_to(folder))
    assert "with HF_HUB_DISABLE_XET=1 where the Hub has no xet" in said
    assert hub.files(REPOSITORY) == [".gitattributes"]
    upload_to(folder)
    assert len(hub.uploaded) == 2
    assert arrived(hub, folder)


def test_a_slow_hub_is_waited_for(hub: FakeHub, folder: Path) -> None:
    hub.troubles = [Trouble(".*", times=6, seconds=0.3)]
    upload_to(folder)
    assert arrived(hub, folder)


def test_the_hub_is_given_the_time_that_it_asks_for(
    hub: FakeHub, folder: Path, waits: list[float]
) -> None:
    hub.troubles = [Trouble(BATCH, 429, headers={"Retry-After": "7"})]
    upload_to(folder)
    assert waits == [8]  # one more, lest it be rounded down
    assert arrived(hub, folder)


@pytest.mark.parametrize(
    ("trouble", "sentence"),
    [
        (Trouble("GET /api/whoami-v2", 401), "the Hub does not accept your token; run `hf auth"),
        (Trouble("GET /api/whoami-v2", 503), r"the Hub has a fault (HTTP status 503); run the"),
        (Trouble("GET /api/whoami-v2"), "the connection to the Hub was lost"),
        (Trouble("GET /api/models/.*", 500), "the Hub has a fault (HTTP status 500)"),
        (Trouble("POST /api/repos/create", 403), "your token may not write to someone/model"),
        (Trouble("POST .*/preupload/main", 404), "there is no repository someone/model, or it is"),
        (Trouble(BATCH, 403), "your token may not write to someone/model"),
        (
            Trouble(BATCH, 429, times=9, headers={"Retry-After": "60"}),
            "in 60 seconds, run the same",
        ),
        (Trouble(BATCH, 502, times=9), "the Hub has a fault (HTTP status 502); run the same"),
        (Trouble("PUT /large/.*", 500, times=99), "the Hub has a fault (HTTP status 500)"),
        (Trouble(COMMIT, 409), "somebody else is changing someone/model; run the same command"),
        (Trouble(COMMIT, 412), "somebody else is changing someone/model; run the same command"),
        (Trouble(COMMIT, 413), "the Hub refused what was sent to someone/model (HTTP status 413"),
        (Trouble(COMMIT, 429), "the Hub has had too many requests from you; later, run the same"),
        (Trouble(COMMIT), "the connection to the Hub was lost"),
    ],
)
def test_a_trouble_is_explained_and_can_be_repeated(
    hub: FakeHub, folder: Path, waits: list[float], trouble: Trouble, sentence: str
) -> None:
    hub.troubles = [trouble]
    assert sentence in refused(lambda: upload_to(folder))
    assert REPOSITORY not in hub.folders or hub.files(REPOSITORY) == [".gitattributes"]
    hub.troubles = []
    upload_to(folder)
    assert arrived(hub, folder)


def test_nobody_pushes_without_a_token(
    hub: FakeHub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    assert refused(lambda: upload_to(folder)) == (
        "you are not logged in to the Hub; run `hf auth login` or set HF_TOKEN"
    )
    assert not hub.requests


def test_a_token_that_may_only_read_is_refused_at_once(hub: FakeHub, folder: Path) -> None:
    hub.role = "read"
    assert "your token for the Hub may only read" in refused(lambda: upload_to(folder))
    assert hub.requests == ["GET /api/whoami-v2"]


def test_an_organisation_is_an_owner_too(hub: FakeHub, folder: Path) -> None:
    hub.orgs = ["our-lab"]
    upload_to(folder, "our-lab/model")
    assert arrived(hub, folder, "our-lab/model")


def test_a_repository_of_other_things_is_not_touched(hub: FakeHub, folder: Path) -> None:
    (hub.create(REPOSITORY) / "thesis.pdf").write_text("years of work")
    assert "holds other files and no absorb.json" in refused(lambda: upload_to(folder))
    assert hub.files(REPOSITORY) == [".gitattributes", "thesis.pdf"]


def test_a_checkpoint_takes_the_place_of_an_earlier_one(hub: FakeHub, folder: Path) -> None:
    earlier = hub.create(REPOSITORY)
    (earlier / "absorb.json").write_text("{}")
    (earlier / "model-00001-of-00002.safetensors").write_text("old")
    upload_to(folder)
    assert arrived(hub, folder)


def test_nothing_private_becomes_public(hub: FakeHub, folder: Path) -> None:
    hub.create(REPOSITORY)
    assert "is there already and public" in refused(lambda: upload_to(folder, private=True))


def test_a_branch_is_made_and_filled(hub: FakeHub, folder: Path) -> None:
    upload_to(folder, revision="w4a4")
    assert (REPOSITORY, "w4a4") in hub.branches
    upload_to(folder, revision="w4a4")


def test_a_pull_request_changes_nothing(hub: FakeHub, folder: Path) -> None:
    missing = refused(lambda: upload_to(folder, "their-lab/model", create_pr=True))
    assert "there is no repository their-lab/model to open a pull request for" in missing
    hub.create("their-lab/model")
    hub.orgs = ["their-lab"]  # so that large files may be sent
    destination = checked_target(Destination(repository="their-lab/model", create_pr=True))
    pushed = upload(folder, destination, lambda _: None)
    assert pushed.url == f"{hub.url}/their-lab/model/discussions/1"
    assert hub.files("their-lab/model") == [".gitattributes"]
    assert push(folder, "model", "--create-pr", "--revision", "other").exit_code == 2
