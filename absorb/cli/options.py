"""Settings as options of a command: what their fields declare, in the words of click."""

from collections.abc import Callable
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import click

from absorb.errors import MisuseError
from absorb.schema.declared import Option, Settings, filled, options_of, typed
from absorb.schema.places import Dataset, is_dataset

Decorator = Callable[[Callable[..., None]], Callable[..., None]]


def options_from(kind: type, *only: str) -> Decorator:
    """The options that a settings class declares, or `only` some of them.

    What is not given comes as None, False or (): `settled` knows the defaults.
    """

    def decorated(command: Callable[..., None]) -> Callable[..., None]:
        for one in reversed(options_of(kind)):
            if not only or one.name in only:
                command = _option(one)(command)
        return command

    return decorated


def settled(kind: type[Settings], values: dict[str, Any]) -> Settings:
    """Settings of the values of a command's options, or a UsageError that calls them by flags."""
    given = {n: v for n, v in values.items() if not (v is None or v is False or v == ())}
    flags = {one.name: one.flag for one in options_of(kind)}
    try:
        return filled(kind, given)
    except MisuseError as error:
        raise click.UsageError(error.calling(lambda name: flags[name])) from error


def _option(declared: Option) -> Decorator:
    told: dict[str, Any] = {"help": _help(declared), "metavar": declared.metavar}
    if declared.kind is bool:
        told |= {"is_flag": True}
    elif is_dataclass(declared.kind):
        told |= {"multiple": True, "metavar": "NAME=VALUE", "callback": _assigned(declared.kind)}
    elif declared.repeated:
        told |= {"multiple": True}
    elif declared.many:
        told |= {"metavar": "A,B,C", "callback": _separated}
    else:
        told |= {"type": _type(declared)}
    return click.option(declared.flag, declared.name, **told)


def _type(declared: Option) -> Any:
    """How a word becomes a value. Whether a number is in its range, the settings know."""
    if declared.choices:
        return click.Choice(declared.choices)
    if declared.is_there:
        return _Text(exists=True, dir_okay=False, path_type=Path)
    if declared.kind is Path:
        return click.Path(path_type=Path)
    return declared.kind


class _Text(click.Path):
    """A file that is there, or a dataset on the Hub."""

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        if isinstance(value, str) and is_dataset(value):
            return Dataset(value)
        return super().convert(value, param, ctx)


def _help(declared: Option) -> str:
    """What it is, and its default where that is a value."""
    if is_dataclass(declared.kind):
        each = [f"{one.name}={typed(one.default)}: {one.help}" for one in options_of(declared.kind)]
        return "\n".join(("\b", declared.help, *each))
    default = declared.default
    if default is None or default is False or default == ():
        return declared.help
    return f"{declared.help}  [default: {typed(default)}]"


def _separated(ctx: Any, param: Any, value: str | None) -> tuple[str, ...] | None:
    """Words with commas between them, without repeats."""
    if value is None:
        return None
    found = tuple(dict.fromkeys(value.split(",")))
    if "" in found:
        raise click.BadParameter("a name between two commas is missing", ctx, param)
    return found


def _assigned(kind: Any) -> Callable[[Any, Any, tuple[str, ...]], Any]:
    """A callback that makes settings of NAME=VALUE, all of them numbers; None of none."""
    known = [one.name for one in options_of(kind)]

    def assigned(ctx: Any, param: Any, words: tuple[str, ...]) -> Any:
        values: dict[str, float] = {}
        for word in words:
            name, _, value = word.partition("=")
            if name not in known:
                reason = f"{word!r} is no NAME=VALUE where NAME is one of {', '.join(known)}"
                raise click.BadParameter(reason, ctx, param)
            values[name] = click.FLOAT(value, param, ctx)
        try:
            return filled(kind, values) if words else None
        except MisuseError as error:
            raise click.BadParameter(f"{error}", ctx, param) from error

    return assigned


json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
