"""The Python interface: what the commands do, with the same options, and plain data as a result.

What is being done goes to the logger `absorb`, as a warning where the result may disappoint;
what is refused raises an AbsorbError.
"""

import gc
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from inspect import Parameter, getdoc, signature
from os import PathLike
from pathlib import Path
from threading import RLock
from typing import Any, TypedDict, TypeVar, Unpack

import torch

from absorb.errors import MisuseError
from absorb.pipelines import convert as conversion
from absorb.pipelines import export as exporting
from absorb.pipelines import inspect as inspection
from absorb.pipelines.compare import compare
from absorb.pipelines.produce import Produced, produce
from absorb.runtime.precision import as_in_a_new_process
from absorb.schema.declared import Option, filled, options_of
from absorb.schema.exported import Exported
from absorb.schema.places import text_named
from absorb.schema.report import Inspection, Report
from absorb.schema.scores import Comparison
from absorb.schema.settings import (
    Architecture,
    Dtype,
    Evaluation,
    Export,
    FormatName,
    Gates,
    Job,
    Purpose,
    Sink,
    Survey,
    Target,
    Thresholds,
    Train,
    Weights,
)

Function = TypeVar("Function", bound=Callable[..., Any])
_say = logging.getLogger("absorb").info
_turn = RLock()
_RESUME = Option(help="", name="resume", kind=bool, default=False)  # of no settings


class InspectOptions(TypedDict, total=False):
    """For editors and type checkers, which run nothing: the names and types in Survey."""

    revision: str | None
    trust_remote_code: bool
    text_only: bool
    text: str | Path | None
    prefix: str | None
    seed: int
    sink: Sink
    residual_target: float
    thresholds: Thresholds
    device: str


class ConvertOptions(InspectOptions, total=False):
    """The same of Job."""

    gates: Gates
    steps: int | None
    minutes: float | None
    train: Train | None
    purpose: Purpose
    plan: str | Path | None
    to: Architecture
    window: int | None
    force: bool


class EvaluateOptions(TypedDict, total=False):
    """The same of Evaluation."""

    against: Sequence[str | Path]
    trust_remote_code: bool
    text: str | Path | None
    calibration: str | Path | None
    windows: int | None
    length: int | None
    formats: Sequence[FormatName]
    tasks: Sequence[str | Path]
    limit: int | None
    dtype: Dtype
    device: str


class ExportOptions(TypedDict, total=False):
    """The same of Export."""

    to: Target
    weights: Weights | None
    window: int | None
    mlx: bool
    tolerance: float
    text: str | Path | None
    device: str
    force: bool


def annotation(option: Option) -> Any:
    """What Python callers may give for an option."""
    kind = str | Path if option.kind is Path or option.is_there else option.kind
    if option.many:
        return Sequence[str | Path] if kind is str else Sequence[kind]  # type: ignore[valid-type]
    return kind | None if option.default is None else kind


def taking_options_of(kind: type) -> Callable[[Function], Function]:
    """Show the options that a settings class declares where a function takes **options."""

    def shown(function: Function) -> Function:
        plain = signature(function)
        own = [one for one in plain.parameters.values() if one.kind is not Parameter.VAR_KEYWORD]
        declared = options_of(kind)
        arguments = [
            Parameter(
                one.name, Parameter.KEYWORD_ONLY, default=one.default, annotation=annotation(one)
            )
            for one in declared
        ]
        whole = plain.replace(parameters=[*own, *arguments])
        function.__signature__ = whole  # type: ignore[attr-defined]
        told = "\n".join(f"{one.name}: {one.help}" for one in declared)
        function.__doc__ = f"{getdoc(function)}\n\n{told}"
        return function

    return shown


@contextmanager
def _undisturbed() -> Iterator[None]:
    """With torch as a new process has it, whatever its caller has set, and one call at a time.

    torch and transformers keep for the whole process much of what a call sets.
    """
    with _turn:  # what another call has set is not the caller's
        elsewhere = torch.get_default_device().type != "cpu"
        with (
            _gpus_left_alone(),
            torch.device("cpu") if elsewhere else nullcontext(),
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast("cpu", enabled=False),
            torch.autocast("cuda", enabled=False),
            as_in_a_new_process(),
        ):
            yield


@contextmanager
def _gpus_left_alone() -> Iterator[None]:
    """The current GPU stays so, and models that are gone give their memory back first and last.

    Weights that stream are in cycles, and so is what holds the models of a call that failed.
    """
    current = torch.cuda.current_device() if torch.cuda.is_initialized() else 0
    _collect()
    try:
        yield
    finally:
        if torch.cuda.is_initialized():
            torch.cuda.set_device(current)
        _collect()


def _collect() -> None:
    if torch.cuda.is_initialized():
        gc.collect()  # half a second; where nothing but a CPU is in use Python does it in time


@taking_options_of(Job)
@_undisturbed()
def convert(
    model: str | Path,
    out: str | Path,
    *,
    resume: bool = False,
    **options: Unpack[ConvertOptions],
) -> Produced:
    """Convert a model and write the checkpoint to `out`, complete or not at all.

    `model` is a Hub id, a folder, a .gguf file or "demo". With `resume` what is found is kept in
    OUT.progress, and gone on from. The result is what absorb.json holds: a Report, with `to` native
    an Exported, with `to` stock a Rescaled. Raises an AbsorbError for what cannot be converted, and
    warns where the result is worse in float.
    """
    _RESUME.refuse_strange(resume)
    given = asked(Job, options)
    job = filled(Job, {"name": _named(model, "model"), "out": Path(_named(out, "out")), **given})
    made = produce(job, _say, resume)
    if isinstance(made, Report):
        conversion.warn_of_loss(made)
    return made


@taking_options_of(Survey)
@_undisturbed()
def inspect(model: str | Path, **options: Unpack[InspectOptions]) -> Inspection:
    """Find the outliers of a model, and how they would be absorbed; writes nothing."""
    given = asked(Survey, options)
    job = filled(Job, {"name": _named(model, "model"), "out": Path(), **given})
    return inspection.inspect(job, _say)


@taking_options_of(Evaluation)
@_undisturbed()
def evaluate(model: str | Path, **options: Unpack[EvaluateOptions]) -> Comparison:
    """Measure models, originals and converted ones, side by side on one text."""
    given = asked(Evaluation, options)
    return compare(filled(Evaluation, {"model": _named(model, "model"), **given}), _say)


@taking_options_of(Export)
@_undisturbed()
def export(folder: str | Path, out: str | Path, **options: Unpack[ExportOptions]) -> Exported:
    """Write a converted checkpoint as one that other engines know, complete or not at all.

    Raises an AbsorbError for what no stock architecture can hold, and where the export is further
    from the converted model than is allowed.
    """
    given = asked(Export, options)
    places = {"folder": Path(_named(folder, "folder")), "out": Path(_named(out, "out"))}
    request = filled(Export, {**places, **given})
    return exporting.export(request, _say)


def asked(kind: type, options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the options that are not at their defaults, as the settings want them.

    Raises a TypeError, as Python does, for one that the settings do not declare.
    """
    known = {one.name: one for one in options_of(kind)}
    for name in options.keys() - known.keys():
        raise TypeError(f"there is no option {name!r}; known are {', '.join(known)}")
    values = {name: _settled(known[name], value) for name, value in options.items()}
    return {name: value for name, value in values.items() if value != known[name].default}


def _settled(option: Option, value: Any) -> Any:
    """What the settings want; they refuse what has a type that they do not know."""
    is_path = isinstance(value, str | PathLike)
    if option.many:
        if is_path or not isinstance(value, Iterable):
            return value
        return tuple(map(str, value) if option.kind is str else value)
    if option.is_there and is_path:
        return text_named(value, option.name)
    return Path(value) if option.kind is Path and is_path else value


def _named(value: str | Path, argument: str) -> str:
    """The name or path that a caller gives, who may have a model at hand and give that."""
    if not isinstance(value, str | PathLike):
        kind = type(value).__name__
        raise MisuseError("{0} is of type {kind} and must be a name or path", argument, kind=kind)
    return str(value)
