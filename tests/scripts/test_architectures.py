"""The table of architectures says what became of each class, and what a stranger found."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from absorb.models.families import FAMILIES
from scripts.release.render import FIGURES
from scripts.release.tables import architectures, count_of
from scripts.trials.architectures import main
from tests.helpers import warm

KEPT = json.loads((FIGURES / "architectures.json").read_text())["classes"]


@pytest.mark.slow
def test_each_class_is_listed_derived_or_refused_with_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scripts.trials.architectures.subprocess", warm)
    out = tmp_path / "architectures.json"
    done = CliRunner().invoke(main, ["--json", str(out), "llama", "helium", "bloom", "gemma3"])
    assert done.exit_code == 0, done.output
    found = json.loads(out.read_text())
    classes = {one["model_type"]: one for one in found["classes"]}
    assert [one["outcome"] for one in classes.values()] == [
        "listed", "derived", "refused", "refused",
    ]  # fmt: skip
    assert [one["stranger"] for one in classes.values()] == ["fine", "fine", *["not asked"] * 2]
    assert "takes no function from outside" in classes["bloom"]["reason"]
    assert "one part of it among others" in classes["gemma3"]["reason"]
    assert count_of(found)["converted"] == 2
    assert len(architectures(found)) == 1 + len(classes)


def _has_several(model_type: str) -> bool:
    """Whether an entry names places that only some layers have, which no proof is made for."""
    return model_type in FAMILIES and bool(FAMILIES[model_type].some)


def test_what_is_kept_names_every_entry_and_whatever_passed_a_proof_passed_all_else() -> None:
    found = {one["model_type"]: one for one in KEPT}
    converted = [one for one in KEPT if one["outcome"] in ("listed", "derived")]
    assert found.keys() >= FAMILIES.keys()
    assert {found[name]["outcome"] for name in FAMILIES} <= {"listed", "derived"}
    proved = [one for one in converted if not _has_several(one["model_type"])]
    assert all(one["stranger"] == "fine" for one in proved)
    assert all(one["key_form"] < 1e-5 for one in proved)
    assert all(one["reason"] for one in KEPT if one not in proved)
    assert len(proved) >= 60


def test_what_is_kept_is_of_the_classes_of_transformers() -> None:
    assert len(KEPT) > 100
    assert {one["model_type"] for one in KEPT} & MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys()
