"""A configuration → a family that is proved for it, or the name of the test that it fails.

The entry is derived from a tiny random model of the same class and settings. Links that cannot be
proved are left out of it; all the rest must hold.
"""

import io
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from absorb.models.family import Family, UnsupportedFamilyError
from absorb.prove import places, students
from absorb.prove.derived.entry import derived
from absorb.prove.derived.layer import UnderivedError, layers_of
from absorb.prove.shrink import shrunk, some_tokens, tiny_model
from absorb.prove.spelling import spelled
from absorb.prove.subject import Subject
from absorb.runtime.quiet import quiet
from absorb.schema.proof import Check, Proof

Checks = Callable[[Subject], Iterable[Check]]
# What an entry must pass, the cheapest first.
REQUIRED: tuple[Checks, ...] = (
    places.stream,
    places.values,
    students.keys,
    students.neutral,
    students.logits,
    students.text,
    students.reload,
)
NO_MODEL = "no small model of it can be made"


class UnprovedError(UnsupportedFamilyError):
    """Why there is no entry that holds for a model: the end of a sentence."""


def proved(kind: Any, config: Any) -> tuple[Family, Proof]:
    """The entry for models of a class with this configuration, and what it passed."""
    asked = kind, config.to_json_string(use_diff=False)
    if asked not in _KNOWN:  # before weights are fetched; it is asked again when they are read
        _KNOWN[asked] = _proved(kind, config)
    return _KNOWN[asked]


_KNOWN: dict[tuple[Any, str], tuple[Family, Proof]] = {}


def _proved(kind: Any, config: Any) -> tuple[Family, Proof]:
    with _silent(), torch.random.fork_rng(devices=[]):
        subject, checks, left_out = with_proved_links(claimed(kind, config))
        for claims in REQUIRED:
            checks += _passed(claims, subject)
    return subject.family, _proof(subject.family, checks, left_out)


def shown(kind: Any, config: Any, family: Family) -> Proof:
    """What an entry of FAMILIES passes for a configuration: all, or an UnprovedError says what."""
    subject = Subject(kind=kind, config=shrunk(config), family=family)
    checks: list[Check] = []
    with _silent(), torch.random.fork_rng(devices=[]):
        for link in _links(family):
            checks += _passed(link.checks, replace(subject, family=link.alone))
        for claims in REQUIRED:
            checks += _passed(claims, subject)
    return _proof(family, checks, [])


def _proof(family: Family, checks: list[Check], left_out: list[str]) -> Proof:
    return Proof(
        entry=spelled(family),
        learned_positions=family.positions is not None,
        checks=tuple(checks),
        left_out=tuple(left_out),
    )


def claimed(kind: Any, config: Any) -> Subject:
    """What is read off a tiny model, before anything of it is proved."""
    try:
        small = shrunk(config)
        tiny = tiny_model(kind, small)
        tiny(some_tokens(), use_cache=False)
    except Exception as error:  # whatever a class says of sizes that it was not made for
        raise UnprovedError(f"{NO_MODEL} ({_said(error)})") from error
    try:
        _refuse_other_kinds(kind, config, tiny)
        return Subject(kind=kind, config=small, family=derived(tiny, some_tokens()))
    except UnsupportedFamilyError as error:
        raise UnprovedError(str(error)) from error
    except Exception as error:
        raise UnprovedError(f"what it does cannot be followed ({_said(error)})") from error


def _refuse_other_kinds(kind: Any, config: Any, tiny: nn.Module) -> None:
    """Refuse layers that are not all made alike, and those that the tiny model has none of."""
    with torch.device("meta"):
        whole = kind(config)
    theirs, ours = (
        {_form(layer) for layer in model.get_submodule(layers_of(model)).children()}
        for model in (whole, tiny)
    )
    if len(theirs | ours) > 1:
        raise UnderivedError("its layers are not all made alike")


def _form(layer: nn.Module) -> frozenset[tuple[str, str]]:
    """The modules and parameters of a layer, by name and class."""
    modules = {(name, type(module).__name__) for name, module in layer.named_modules()}
    return frozenset(modules | {(name, "") for name, _ in layer.named_parameters()})


@dataclass(frozen=True, slots=True)
class Link:
    """A part of an entry that it may do without."""

    name: str
    alone: Family  # the entry with no other link of the kind
    checks: Checks
    without: Callable[[Family], Family]


def with_proved_links(subject: Subject) -> tuple[Subject, list[Check], list[str]]:
    """The subject with only those links that can be proved, the checks, and what was left out."""
    checks, left_out, family = [], [], subject.family
    for link in _links(family):
        try:
            checks += _passed(link.checks, replace(subject, family=link.alone))
        except UnprovedError as error:
            left_out.append(f"{link.name}: {error}")
            family = link.without(family)
    return replace(subject, family=family), checks, left_out


def _links(family: Family) -> Iterator[Link]:
    for feed in family.feeds:
        alone = replace(family, feeds=(feed,))
        yield Link(feed[0], alone, places.feeds, partial(_without_feed, feed))
    if family.up is not None:
        alone = replace(family, shared=None)
        yield Link(family.up, alone, places.neurons, partial(replace, up=None))
    if family.shared is not None:
        alone = replace(family, up=None)
        yield Link(family.shared[0], alone, places.neurons, partial(replace, shared=None))
    if family.key is not None:
        name = f"keys of {family.key}"
        yield Link(name, family, students.logits, partial(replace, key=None))


def _without_feed(feed: tuple[str, tuple[str, ...]], family: Family) -> Family:
    return replace(family, feeds=tuple(other for other in family.feeds if other != feed))


def _passed(claims: Checks, subject: Subject) -> list[Check]:
    """The checks of a kind, which all hold."""
    found = []
    try:
        for check in claims(subject):
            found.append(check)
            if not check.holds:
                raise UnprovedError(f"it fails the test that {check}")
    except UnprovedError:
        raise
    except Exception as error:  # a stock class may do anything where it is not as it was taken for
        last = found[-1].claim if found else str(claims.__doc__).partition("\n")[0]
        raise UnprovedError(f"it cannot be tested after: {last} ({_said(error)})") from error
    return found


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


@contextmanager
def _silent() -> Iterator[None]:
    with quiet(), redirect_stderr(io.StringIO()):
        yield
