"""Checkpoint → Verification: whether a folder or repository holds what absorb wrote, all of it.

Nothing of a checkpoint is run before its files and its code are known to be ours.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from absorb.errors import AbsorbError
from absorb.load import download, files
from absorb.runtime.precision import ADDED
from absorb.schema.codec import from_json, parse_json
from absorb.schema.exported import Exported, Rescaled
from absorb.schema.places import Endpoint, expanded
from absorb.schema.report import Inspection, Report
from absorb.schema.settings import ModelRef
from absorb.ship.export.mlx import MODEL_FILE, OURS
from absorb.ship.plan_file import PLAN, plan_in
from absorb.ship.served.compare import compared
from absorb.ship.staging import REPORT, digest, digests
from absorb.ship.stranger import said_in_isolation
from absorb.show.tables import Row, size_of

Say = Callable[[str], None]
Finding = tuple[str, list[str]]  # what is well, and what is not
CODE = "modeling_absorb.py"
# Files that some loader of Python objects opens, and that can run any code when it does.
_PICKLES = {".bin", ".ckpt", ".joblib", ".npy", ".pickle", ".pkl", ".pt", ".pth"}
# Of the largest logit. Other machines and versions sum in another order, which moves a float32
# logit by a hundred-thousandth; a wrong weight, sink or scale moves it by more than this.
TOLERANCE = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One thing that was looked at. It is well if nothing is wrong."""

    name: str
    found: str
    wrong: tuple[str, ...]  # a sentence each


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """All that was looked at, in this order, up to the first that is not well."""

    model: str
    commit: str | None
    checks: tuple[Check, ...]

    @property
    def wrong(self) -> list[str]:
        return [reason for check in self.checks for reason in check.wrong]


Written = Report | Exported | Rescaled
# What no other report has.
_KINDS = {"target": Exported, "reaches": Rescaled}


def verify(ref: ModelRef, say: Say, endpoint: Endpoint | None = None) -> Verification:
    """Look at a folder or repository; `say` is told what is being done.

    With `endpoint` what a server says is compared in place of what the checkpoint says by itself.
    An AbsorbError says why it cannot be looked at.
    """
    folder, commit = _located(ref)
    report = read_report(folder, ref.name)
    checks: list[Check] = []
    for name, look in _checks_of(report, endpoint).items():
        say(f"checking {name}")
        checks.append(_check(name, look, folder, report))
        if checks[-1].wrong:
            break
    return Verification(model=ref.name, commit=commit, checks=tuple(checks))


def _located(ref: ModelRef) -> tuple[Path, str | None]:
    path = expanded(ref.name)
    if not path.exists() and download.is_repository(ref.name):
        folder = download.everything(ref)
        return folder, folder.name
    if not path.is_dir():
        raise AbsorbError(f"{ref.name} is no folder; name one, or a Hub repository (owner/name)")
    if ref.revision is not None:
        raise AbsorbError(f"{ref.name} is a folder and has no revisions; drop --revision")
    return path, None


def read_report(folder: Path, name: str) -> Written:
    """The report in the folder of a checkpoint or an export, with its index of files."""
    file = folder / REPORT
    if not file.is_file():
        raise AbsorbError(f"{name} has no {REPORT}, so absorb did not write it; check the name")
    try:
        text = file.read_text(encoding="utf-8")
        told = parse_json(text)
        kind: Any = next((kind for key, kind in _KINDS.items() if key in told), Report)
        report: Written = from_json(kind, text)
    # Whatever a stranger put in place of it: what cannot be built is no report of ours.
    except (
        AssertionError,
        AttributeError,
        LookupError,
        RecursionError,
        TypeError,
        ValueError,
    ) as error:
        raise AbsorbError(
            f"the {REPORT} of {name} is damaged, or of another version of absorb; fetch it again "
            "or convert again"
        ) from error
    if not isinstance(report.files, dict) or not report.files:
        raise AbsorbError(f"the {REPORT} of {name} lists no files; convert again")
    return report


def _check(name: str, look: Callable[[Path, Any], Finding], folder: Path, report: Written) -> Check:
    try:
        found, wrong = look(folder, report)
    except AbsorbError as error:
        found, wrong = "", [str(error)]
    return Check(name=name, found=found, wrong=tuple(wrong))


def _files(folder: Path, report: Written) -> Finding:
    """Whether all files are there, as they were written, and no others."""
    here, listed = digests(folder), report.files
    wrong = [f"{name} is missing; fetch it again" for name in sorted(listed.keys() - here.keys())]
    for name in sorted(here):
        if Path(name).suffix in _PICKLES:
            wrong.append(f"{name} is a pickle, which can run any code when loaded; remove it")
        elif name not in listed:
            wrong.append(f"{name} is no file of this checkpoint; remove it")
        elif here[name] != listed[name]:
            wrong.append(f"{name} is not as it was written; fetch it again")
    size = sum((folder / name).stat().st_size for name in here)
    return f"{len(here)} files, {size_of(size)}, as they were written", wrong


def _code(folder: Path, report: Report) -> Finding:
    """Whether all code that a loader would run is that of a released version."""
    wrong = _other_code(folder, report, CODE)
    released = json.loads(Path(__file__).with_name("released.json").read_text())
    code = folder / CODE
    digest = hashlib.sha256(code.read_bytes()).hexdigest() if code.is_file() else None
    version = next((name for name, ours in released.items() if ours == digest), None)
    if version is None:
        wrong.append(f"{CODE} is not that of any released version; read it before you run it")
    return f"{CODE} of absorb {version}", wrong


def _no_code(folder: Path, report: Exported | Rescaled) -> Finding:
    """Whether a loader has no code to run: a stock architecture needs none."""
    ours = MODEL_FILE if isinstance(report, Exported) and report.mlx else ""
    wrong = _other_code(folder, report, ours)
    if not ours:
        return f"none: {report.architecture} is a stock architecture", wrong
    if not (folder / ours).is_file() or digest(folder / ours) != digest(OURS):
        wrong.append(f"{ours} is not that of this version of absorb; read it before you run it")
    return f"{ours} of this version of absorb, which MLX alone runs", wrong


def _other_code(folder: Path, report: Written, ours: str) -> list[str]:
    """What is wrong with code beside `ours`, and with configurations that name any."""
    wrong = [
        f"{name} is code that absorb does not write; remove it"
        for name in sorted(report.files)
        if name.endswith((".py", ".so", ".pyc")) and name != ours
    ]
    for file in folder.glob("*config.json"):
        wrong += [
            f"{file.name} names code outside of {ours or 'transformers'} ({reference}); do not "
            "load it"
            for reference in _references(file)
            if not (ours == CODE and reference.startswith(f"{Path(ours).stem}."))
        ]
    return wrong


def _references(config: Path) -> list[str]:
    """The classes of its own that a configuration file tells transformers to load."""
    with files.reading(config.name):
        found = json.loads(config.read_text(encoding="utf-8")).get("auto_map") or {}
        return [str(one) for value in found.values() for one in _listed(value) if one is not None]


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _figures(folder: Path, report: Report) -> Finding:
    """Whether the report is about these weights, as far as that is seen without its text."""
    inspection, wrong = report.inspection, []
    tensors, elements = _small_tensors(folder)
    with files.reading(PLAN), safe_open(plan_in(folder), "pt") as plan:
        scale = plan.get_tensor("residual")
        planned = from_json(Inspection, plan.metadata()["absorb_inspection"])
    if planned != inspection:
        wrong.append(f"{REPORT} and {PLAN} are about different conversions; convert again")
    scales = {channel: factor for channel, factor in enumerate(scale.tolist()) if factor != 1}
    if scales != inspection.residual_scales:
        wrong.append(f"{REPORT} has other residual scales than {PLAN}; convert again")
    untouched = report.recipe.train == "sinks" or report.losses.kept == 0
    read = [tensor for name, tensor in tensors.items() if name.endswith(".input_scale")]
    if untouched and not all(tensor.equal(scale) for tensor in read):
        wrong.append(f"{REPORT} has other residual scales than the weights; convert again")
    if _layers(tensors, "sink_key") != set(inspection.keyed_layers):
        wrong.append(f"{REPORT} names other layers with sink keys than the weights; convert again")
    attending = {index for index, layer in enumerate(inspection.layers) if layer.attends}
    if _layers(tensors, "sink") | _layers(tensors, "sink_key") != attending:
        wrong.append("some layers of the weights have no sinks; convert again")
    if not elements:
        raise AbsorbError(f"{folder.name} holds no weights; fetch it again")
    kind = elements.most_common(1)[0][0]
    stored = str(files.STORED.get(kind, kind)).removeprefix("torch.")
    if stored != inspection.dtype:
        wrong.append(
            f"{REPORT} says {inspection.dtype} and the weights are {stored}; convert again"
        )
    return f"about these weights: {len(inspection.layers)} layers, {stored}", wrong


def _small_tensors(folder: Path) -> tuple[dict[str, Tensor], Counter[str]]:
    """Sinks and scales by name, and how many elements of which type there are in all others."""
    ours = (".sink", ".sink_key", ".input_scale")
    tensors: dict[str, Tensor] = {}
    elements: Counter[str] = Counter()
    for file in files.weight_files(folder, folder.name):
        with files.reading(file.name), safe_open(file, "pt") as content:
            names = [name for name in content.keys() if name.endswith(ours)]  # noqa: SIM118
            tensors |= {name: content.get_tensor(name) for name in names}
        for name, one in files.headers([file]).items():
            if name.rpartition(".")[2] not in ADDED:
                elements[one.kind] += one.elements
    return tensors, elements


def _layers(tensors: dict[str, Tensor], kind: str) -> set[int]:
    """The layers that have a parameter: the first number in a name is that of the layer."""
    names = [name.split(".") for name in tensors if name.endswith(f".{kind}")]
    return {next(int(part) for part in name if part.isdigit()) for name in names}


def _logits(folder: Path, report: Written) -> Finding:
    """Whether the model loads for a stranger, and says what it said when it was written."""
    expected = Tensor([*report.probe.logits])
    given = Tensor(said_in_isolation(folder, report.probe.tokens).logits)
    if given.shape != expected.shape:
        return "", ["the model gives another number of logits than when it was written"]
    apart = float((given - expected).abs().max() / expected.abs().max())
    if not apart <= TOLERANCE:  # so that NaN is refused as well
        return "", [
            f"the logits are {apart:.1%} of the largest away from those in {REPORT}, and "
            f"{TOLERANCE:.1%} is allowed; update torch and transformers, or convert again"
        ]
    return f"reproduced to {apart:.1e} of the largest, without absorb", []


_CHECKS: dict[str, Callable[[Path, Any], Finding]] = {
    "files": _files,
    "code": _code,
    "report": _figures,
    "logits": _logits,
}


def _checks_of(
    report: Written, endpoint: Endpoint | None
) -> Mapping[str, Callable[[Path, Any], Finding]]:
    """What is looked at. Of a .gguf file transformers reads another model: it skips the sinks."""
    looks = dict(_CHECKS)
    if not isinstance(report, Report):
        looks = {"files": _files, "code": _no_code, "logits": _logits}
    if endpoint is not None:
        del looks["logits"]
        looks["endpoint"] = lambda folder, report: compared(folder, report, endpoint)
    elif isinstance(report, Exported) and report.target == "gguf":
        del looks["logits"]
    return looks


def check_rows(verification: Verification) -> list[Row]:
    """What was found, a line for each check."""
    return [
        (check.name, "; ".join(check.wrong) if check.wrong else check.found)
        for check in verification.checks
    ]
