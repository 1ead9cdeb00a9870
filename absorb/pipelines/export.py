"""A converted checkpoint → the same model as a checkpoint that other engines know."""

import shutil
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PretrainedConfig

from absorb.errors import AbsorbError, Say
from absorb.load import checks, files
from absorb.load.source import Source, load
from absorb.models.families import family_of
from absorb.pipelines.convert import fill, warn_of_loss
from absorb.runtime.precision import device_of
from absorb.schema.codec import to_json
from absorb.schema.exported import Exported
from absorb.schema.places import expanded
from absorb.schema.report import Probe, Report, versions
from absorb.schema.settings import Export, Job, ModelRef
from absorb.schema.training import LENGTH
from absorb.ship.export import gguf, mlx, native
from absorb.ship.export.card import card, file_name
from absorb.ship.export.targets import Route, config_for, route_of
from absorb.ship.isolated import probe_tokens
from absorb.ship.plan_file import fits_in
from absorb.ship.resume import forget
from absorb.ship.staging import REPORT, digest, digests, staged
from absorb.ship.stranger import Said, said_in_isolation
from absorb.ship.verify import read_report
from absorb.text.samples import sampled
from absorb.text.windows import windows

CONVERSION = "conversion.json"  # the report of a conversion that was exported at once
_ROWS = 4  # of text, to compare on
# In nats per token. What is only told in other words differs by the rounding of float32.
_EXACT = 1e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class _Folder:
    """A converted checkpoint that can be exported."""

    path: Path
    report: Report
    config: PretrainedConfig  # of the stock model beneath
    route: Route
    target: PretrainedConfig
    weights: list[Path]


def export(wish: Export, say: Say) -> Exported:
    """Write the export, complete or not at all; `say` is told what is being done."""
    device_of(wish.device)  # refused before the long work
    folder = _read(expanded(wish.folder), wish.window)
    if wish.to == "gguf":
        gguf.refuse(folder.target)
    if wish.mlx:
        mlx.refuse(folder.target)
    if folder.path.resolve().is_relative_to(expanded(wish.out).resolve()):
        raise AbsorbError(
            f"{wish.out} is or holds the conversion {wish.folder} that is to be exported, and the "
            "export would take its place; choose another --out"
        )
    with staged(wish.out, wish.force) as place:
        return _fill(place, folder, wish, say)


def converted(job: Job, say: Say, resume: bool = False) -> Exported:
    """Convert a model and write the native export alone, complete or not at all.

    With the export lies what became of the conversion, as conversion.json.
    """
    job = replace(job, sink="logit")
    with staged(job.out, job.force) as place:
        apart = place / "converted"
        apart.mkdir()
        warn_of_loss(fill(apart, job, say, resume))
        text = job.calibration.text
        wish = Export(
            folder=apart,
            out=job.out,
            text=text if isinstance(text, Path) else None,
            device=job.device,
            window=job.window,
        )
        result = _fill(place, _read(apart, wish.window), wish, say)
    forget(job.out)
    return result


def _fill(place: Path, folder: _Folder, wish: Export, say: Say) -> Exported:
    """Write the export into a folder. Of a conversion that lies in it only the report is left."""
    say(f"writing {folder.target.model_type}")
    native_place = place if wish.to == "native" else place / "native"
    native_place.mkdir(exist_ok=True)
    made = _write(folder, native_place)
    if wish.mlx:
        mlx.add(place, folder.target)
        made = replace(made, mlx=True)
    if wish.to == "gguf":
        weights = wish.weights or "f16"
        made = replace(made, target="gguf", dtype=weights)
        say(f"writing {file_name(made)}")
        gguf.write(place / file_name(made), native_place, weights, made.model, made.license)
    result = _compared(folder, native_place, made, wish, say)
    if wish.to == "gguf":
        shutil.rmtree(native_place)
    if folder.path.is_relative_to(place):
        (folder.path / REPORT).rename(place / CONVERSION)
        shutil.rmtree(folder.path)
    (place / "README.md").write_text(card(result, folder.report), encoding="utf-8")
    result = replace(result, files=digests(place))
    (place / REPORT).write_text(to_json(result), encoding="utf-8")
    return result


def _compared(folder: _Folder, place: Path, made: Exported, wish: Export, say: Say) -> Exported:
    """The record with what the exported model says, or an AbsorbError where it says another."""
    say("comparing it with the converted model")
    device = device_of(wish.device)
    with TemporaryDirectory() as apart:
        reference = Path(apart, "reference.safetensors")
        origin = _ask(folder, wish, device, reference)
        probe = probe_tokens(folder.target.vocab_size)
        said = said_in_isolation(place, probe, reference)
    _refuse_far(said, made, wish.tolerance)
    return replace(
        made,
        divergence=said.divergence or 0.0,
        text_origin=origin,
        probe=Probe(tokens=probe, logits=tuple(map(tuple, said.logits))),
    )


def _read(path: Path, window: int | None) -> _Folder:
    """Look at a folder, and refuse what cannot be exported before anything is written."""
    if not path.is_dir():
        raise AbsorbError(f"{path} is no folder; name one that `absorb convert` wrote")
    report = read_report(path, path.name)
    if not isinstance(report, Report):
        raise AbsorbError(
            f"{path} is an export already; export the converted checkpoint that it was made from"
        )
    if report.inspection.whole is not None:
        raise AbsorbError(
            f"{path} reads pictures too, and no stock architecture that has sinks does; convert "
            "with --text-only, then export that"
        )
    weights = files.weight_files(path, path.name)
    _refuse_damage(path, report)
    settings = files.read_json(path / "config.json", path.name)
    stock = checks.stock_type(settings)
    if stock is None:
        raise AbsorbError(f"{path} holds no converted model; convert one, then export that")
    if "gate_in" in settings.get("absorb", {}):
        raise AbsorbError(
            f"the norms of {path} have gates, and no stock architecture has any; convert without "
            "--gates, then export that"
        )
    route = route_of(stock)
    checks.family_in(path, path.name, measured=True)
    for ours in ("absorb", "auto_map", "architectures", "model_type"):
        settings.pop(ours, None)
    with files.reading(path.name):
        config = CONFIG_MAPPING[stock](**settings)
    return _Folder(
        path=path,
        report=report,
        config=config,
        route=route,
        target=config_for(route, config, window),
        weights=weights,
    )


def _refuse_damage(path: Path, report: Report) -> None:
    """Refuse files that are not as they were written, where an export depends on them."""
    for name in sorted(report.files):
        if name == "README.md" or name.endswith(".py"):
            continue
        if not (path / name).is_file():
            raise AbsorbError(f"{path} lacks {name}; fetch it again, or convert again")
        if digest(path / name) != report.files[name]:
            raise AbsorbError(f"{name} of {path} is not as it was written; convert again")


def _write(folder: _Folder, place: Path) -> Exported:
    """Weights, configuration and tokenizer; what was found out on the way."""
    inspection = folder.report.inspection
    family, keyed = family_of(inspection.family), inspection.keyed_layers
    fits = fits_in(folder.path) if keyed else {}
    if keyed and not fits.keys() >= {*keyed}:
        raise AbsorbError(
            f"{folder.path} holds the keys of its prefix and no logits for them, and "
            f"{folder.target.model_type} has no place for keys; convert with --sink auto or "
            "--sink logit, then export that"
        )
    with files.unchanged(folder.weights), ExitStack() as stack:
        tensors = native.Tensors(folder.weights, stack)
        stream = torch.ones(folder.config.hidden_size, dtype=torch.float64)
        for channel, scale in inspection.residual_scales.items():
            stream[channel] = scale
        conversion = native.Conversion(
            config=folder.config, family=family, route=folder.route, stream=stream, fits=fits
        )
        native.write(place, folder.target, native.exported(tensors, conversion))
        apart = native.furthest_apart(tensors, stream)
    for name in folder.report.files:
        if _is_kept(name):
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder.path / name, place / name)
    return Exported(
        target="native",
        architecture=folder.target.model_type,
        family=inspection.family,
        model=inspection.model,
        commit=inspection.commit,
        license=inspection.license,
        dtype=inspection.dtype,
        fingerprint=digest(folder.path / REPORT),
        fitted_layers=keyed,
        apart=apart,
        stream=stream.max().item(),
        divergence=0.0,
        text_origin="",
        versions=versions(),
        files={},
        probe=Probe(tokens=(), logits=()),
    )


def _is_kept(name: str) -> bool:
    """Whether a file of the conversion is one of the export: those of the tokenizer are."""
    ours = {"config.json", "README.md", files.INDEX}
    return name not in ours and not name.endswith((".safetensors", ".py"))


@torch.no_grad()
def _ask(folder: _Folder, wish: Export, device: torch.device, file: Path) -> str:
    """Write what the converted model says of a text into a file; the origin of the text."""
    source = load(ModelRef(name=str(folder.path)), measured=True)
    nn.Module.to(source.model, device)
    tokens, origin = _text(source, wish)
    # Of a window only what it leaves out is another model.
    tokens = tokens[:, : wish.window].contiguous()
    logits = [
        source.model(row[None].to(device), use_cache=False).logits.float().cpu() for row in tokens
    ]
    save_file({"tokens": tokens, "logits": torch.cat(logits)}, file)
    return origin


def _text(source: Source, wish: Export) -> tuple[Tensor, str]:
    if wish.text is None:
        return sampled(source, _ROWS, LENGTH, 0).rows, "sampled from the converted model"
    return windows(source, wish.text, _ROWS, LENGTH).contiguous(), wish.text.name


def _refuse_far(said: Said, made: Exported, tolerance: float) -> None:
    """Refuse an export that is not what the conversion was, or not near enough."""
    found: Any = said.divergence
    lost = made.lost
    allowed = tolerance if lost else _EXACT
    if found <= allowed:  # NaN is not
        return
    told = f"the export is {found:.2g} nats per token from the converted model"
    if not lost:
        raise AbsorbError(f"{told}, which should be none; please report this model to absorb")
    ways = ["--sink logit"] * bool(made.fitted_layers) + ["--train sinks"] * (made.apart != 1)
    raise AbsorbError(
        f"{told} and {allowed:g} is allowed, because {'; '.join(lost)}; convert with "
        f"{' and '.join(ways)}, or allow more by --tolerance"
    )
