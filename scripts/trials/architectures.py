"""Which causal language models of the installed transformers can be converted, class by class.

python -m scripts.trials.architectures --json architectures.json

A tiny random model stands for each class. An entry of FAMILIES is put to the same tests as one that
is derived. What passes is saved, and loaded by a process without absorb.
"""

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import torch
from safetensors.torch import save_file
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from absorb.models.families import FAMILIES, suited
from absorb.models.family import Family, UnsupportedFamilyError
from absorb.models.refused import REFUSED
from absorb.prove.prove import NO_MODEL, proved, shown
from absorb.prove.shrink import shrunk
from absorb.prove.students import mixed_student
from absorb.prove.subject import Subject
from absorb.runtime.quiet import quiet
from absorb.schema.proof import Proof
from absorb.schema.report import versions
from scripts.trials import stranger

# What the defaults of a class leave open.
_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
_OPEN: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE}},
    "dots1": {"n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "ministral": {"head_dim": 128, "sliding_window": 4096},
    "nemotron": {"num_key_value_heads": 8},
}
# Some begin with layers without experts, or have layers without attention, and can be made without.
ALIKE: dict[str, dict[str, Any]] = {
    "afmoe": {"num_dense_layers": 0},
    "ernie4_5_moe": {"moe_layer_start_index": 0},
    "exaone_moe": {"first_k_dense_replace": 0, "mlp_layer_types": ["sparse"] * 32},
    "glm4_moe": {"first_k_dense_replace": 0},
    "hy_v3": {"mlp_layer_types": ["sparse"] * 80},
    "lfm2": {"layer_types": ["full_attention"] * 32},
    "lfm2_moe": {"layer_types": ["full_attention"] * 32, "num_dense_layers": 0},
    "sarvam_moe": {"first_k_dense_replace": 0},
}
# A proof makes all layers alike, and such an entry names places that only some of them have.
_SEVERAL = "layers of several kinds: its tests are tests/models/test_families.py"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of one class."""

    model_type: str
    cls: str
    settings: dict[str, Any]  # that are not the defaults of the class
    outcome: str  # listed, derived, refused or unmade
    reason: str = ""  # of a refusal, or of what was not asked
    tests: int = 0  # that were passed
    key_form: float | None = None  # how far its logits are from those behind the prefix
    left_out: tuple[str, ...] = ()  # links that could not be proved
    stranger: str = "not asked"  # what a process without absorb found of a checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """A class and its configuration, as of a model that somebody might download."""

    model_type: str
    kind: Any
    config: Any
    settings: dict[str, Any]


def trial_of(model_type: str) -> Trial:
    """Raises whatever a configuration says of its own defaults."""
    settings = {**_OPEN.get(model_type, {}), **ALIKE.get(model_type, {})}
    config = CONFIG_MAPPING[model_type](**settings)
    kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if getattr(config, "is_decoder", True) is False:  # else a token sees those after it
        settings["is_decoder"] = config.is_decoder = True
    return Trial(model_type=model_type, kind=kind, config=config, settings=settings)


def judged(trial: Trial) -> tuple[Outcome, Family | None]:
    """What became of a class, and its family if it can be converted."""
    model_type = trial.model_type
    found = Outcome(
        model_type=model_type, cls=trial.kind.__name__, settings=trial.settings, outcome="refused"
    )
    if isinstance(trial.config.to_dict().get("text_config"), dict):
        return replace(found, reason="a language model is one part of it among others"), None
    if model_type in FAMILIES and FAMILIES[model_type].some:
        return replace(found, outcome="listed", reason=_SEVERAL), None
    try:
        if model_type in FAMILIES:
            family = suited(FAMILIES[model_type], trial.config.to_dict())
            proof = shown(trial.kind, trial.config, family)
        else:
            family, proof = proved(trial.kind, trial.config)
    except UnsupportedFamilyError as error:
        unmade = str(error).startswith(NO_MODEL)
        named = REFUSED if not unmade and model_type not in ALIKE else {}
        reason = named.get(model_type, str(error))
        return replace(found, reason=reason, outcome="unmade" if unmade else "refused"), None
    outcome = "listed" if model_type in FAMILIES else "derived"
    return replace(found, outcome=outcome, **_of(proof)), family


def _of(proof: Proof) -> dict[str, Any]:
    exact = {check.claim: check.moved for check in proof.checks}
    return {
        "tests": len(proof.checks),
        "key_form": exact["the form key is exact"],
        "left_out": proof.left_out,
    }


@torch.no_grad()
def saved(trial: Trial, family: Family, folder: Path) -> None:
    """Save a tiny absorbed model in float32, with some text and what it says after it."""
    subject = Subject(kind=trial.kind, config=shrunk(trial.config), family=family)
    with quiet():
        student = mixed_student(subject).model
        student.save_pretrained(folder)
    logits = student(subject.tokens, use_cache=False).logits
    save_file({"tokens": subject.tokens, "logits": logits}, folder / stranger.SAID)


def strangers_word(root: Path) -> dict[str, str]:
    """What a process without absorb found of every checkpoint in a folder: `fine`, or what not."""
    command = [sys.executable, "-I", str(stranger.__file__), str(root)]
    private = {**os.environ, "HF_HOME": str(root / "home"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=private, capture_output=True, text=True, check=True)
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found


def outcome_of(model_type: str, root: Path) -> Outcome:
    """What became of a class; what can be converted is saved under its name."""
    try:
        trial = trial_of(model_type)
    except Exception as error:  # configurations check themselves, each in its own way
        reason = f"its own defaults are no configuration ({' '.join(str(error).split())[:200]})"
        cls = str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])
        return Outcome(model_type=model_type, cls=cls, settings={}, outcome="unmade", reason=reason)
    outcome, family = judged(trial)
    if family is not None:
        saved(trial, family, root / model_type)
    return outcome


@click.command()
@click.option("--json", "out", type=click.Path(path_type=Path), required=True)
@click.argument("model_types", nargs=-1)
def main(out: Path, model_types: tuple[str, ...]) -> None:
    outcomes = []
    with TemporaryDirectory() as folder:
        for model_type in model_types or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            outcomes.append(outcome_of(model_type, Path(folder)))
            click.echo(f"{model_type}: {outcomes[-1].outcome} {outcomes[-1].reason}", err=True)
        said = strangers_word(Path(folder))
    outcomes = [replace(o, stranger=said.get(o.model_type, o.stranger)) for o in outcomes]
    found = {"versions": versions(), "classes": [asdict(outcome) for outcome in outcomes]}
    out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
