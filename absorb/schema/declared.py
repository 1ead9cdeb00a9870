"""How an option is declared: once, in the field of a settings class, with all that is said of it.

From there come the options of the commands, the arguments in Python, the command in a model card,
and the refusal of what is out of range. Neither torch nor click is needed.
"""

from collections.abc import Iterator, Mapping
from dataclasses import Field, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

from absorb.errors import MisuseError

Settings = TypeVar("Settings")
_TYPES = {bool: "True or False", str: "text", Path: "a path"}  # for people


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """The numbers that are allowed, the ends among them unless the least is `excluded`."""

    least: float
    most: float | None = None
    excluded: bool = False
    whole: bool = False

    def __contains__(self, value: object) -> bool:
        if isinstance(value, bool) or not isinstance(value, int if self.whole else int | float):
            return False
        above = value > self.least if self.excluded else value >= self.least
        return above and (self.most is None or value <= self.most)

    def __str__(self) -> str:
        kind = "a whole number" if self.whole else "a number"
        least = f"{'above' if self.excluded else 'from'} {self.least:g}"
        return f"{kind} {least}" + ("" if self.most is None else f" to {self.most:g}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """What is declared of an option, and what its field says of itself."""

    help: str
    range: Range | None = None
    flag: str = ""  # of the command line, where the name does not make it
    metavar: str | None = None
    is_there: bool = False  # it names text that is to be read: a file, or a dataset on the Hub
    repeated: bool = False  # the flag, once for each part; else the parts have commas between them
    decides: tuple[str, ...] = ()  # the options that have no say beside it
    # Known from the field.
    name: str = ""
    kind: Any = None  # of the value or, if there are `many`, of its parts; None is no kind
    many: bool = False
    default: Any = None

    @property
    def choices(self) -> tuple[str, ...]:
        """The words that are allowed, if it takes words."""
        return get_args(self.kind) if get_origin(self.kind) is Literal else ()

    def refuse_strange(self, value: Any) -> None:
        """Raise a MisuseError for what is out of range, none of the choices or of another type."""
        if value is None and self.default is None:
            return
        if self.many and not isinstance(value, tuple):
            raise _strange(self.name, value, "a list")
        for part in value if self.many else (value,):
            if self.range is not None and part not in self.range:
                raise _strange(self.name, part, f"{self.range}")
            if self.choices and part not in self.choices:
                raise _strange(self.name, part, f"one of {', '.join(map(repr, self.choices))}")
            if not (self.choices or self.range or isinstance(part, self._types)):
                raise _strange(self.name, part, self._told_type)

    @property
    def _types(self) -> Any:
        return Path | str if self.is_there else self.kind

    @property
    def _told_type(self) -> str:
        return "a path" if self.is_there else _TYPES.get(self.kind) or f"{self.kind.__name__}"

    def words(self, value: Any) -> list[str]:
        """What to type to get this value, which is not the default."""
        if value is True:
            return [self.flag]
        if is_dataclass(value):
            parts = [f"{inner.name}={typed(one)}" for inner, one in changed(value)]
        else:
            parts = [typed(part) for part in value] if self.repeated else [typed(value)]
        return [word for part in parts for word in (self.flag, part)]


def option(default: Any, help: str, **more: Any) -> Any:  # noqa: A002 - click and argparse say so
    """A field that is an option; `more` are fields of Option."""
    return field(default=default, metadata={"option": Option(help=help, **more)})


class Checked:
    """Settings that refuse, by a MisuseError, what no option may be and what contradicts itself."""

    __slots__ = ()

    def __post_init__(self) -> None:
        for one in fields(self):  # type: ignore[arg-type]  # all that inherit are dataclasses
            declared = _option_of(one)
            if declared is not None:
                declared.refuse_strange(getattr(self, one.name))
        self.refuse_contradictions()

    def refuse_contradictions(self) -> None:
        """Raise a MisuseError where one option leaves no sense to another."""


def options_of(kind: Any) -> tuple[Option, ...]:
    """The options that a settings class declares, those of the settings inside it among them."""
    found: list[Option] = []
    for one in fields(kind):
        declared = _option_of(one)
        if declared is not None:
            found.append(declared)
        elif is_dataclass(one.type):
            found += options_of(one.type)
    return tuple(found)


def filled(kind: type[Settings], given: Mapping[str, Any]) -> Settings:
    """Settings of what was `given`, by names of options and fields, and of defaults for the rest.

    Raises a MisuseError for an option that another one has decided.
    """
    for one in options_of(kind):
        for other in one.decides if one.name in given else ():
            if other in given:
                raise MisuseError(
                    "{0} has decided what {1} would; drop one of them", one.name, other
                )
    settings: Settings = _filled(kind, given)
    return settings


def changed(settings: Any) -> Iterator[tuple[Option, Any]]:
    """The options that have another value than their default, with it."""
    for one in fields(settings):
        declared, value = _option_of(one), getattr(settings, one.name)
        if declared is None:
            yield from changed(value) if is_dataclass(value) else ()
        elif value != declared.default:
            yield declared, value


def typed(value: Any) -> str:
    """A value as one types it on the command line."""
    if isinstance(value, Path):
        return value.name  # where it lay on somebody's disk is nobody's business
    if isinstance(value, tuple):
        return ",".join(value)
    return f"{value}".removesuffix(".0") if isinstance(value, float) else f"{value}"


def _option_of(one: "Field[Any]") -> Option | None:
    declared: Option | None = one.metadata.get("option")
    if declared is None:
        return None
    kind, many = one.type, get_origin(one.type) is tuple
    inner = get_args(kind)
    if many or type(None) in inner:
        kind = next(part for part in inner if part is not type(None))
    flag = declared.flag or f"--{one.name.replace('_', '-')}"
    return replace(declared, name=one.name, flag=flag, kind=kind, many=many, default=one.default)


def _filled(kind: Any, given: Mapping[str, Any]) -> Any:
    values = {one.name: given[one.name] for one in fields(kind) if one.name in given}
    for one in fields(kind):
        if _option_of(one) is None and is_dataclass(one.type):
            values[one.name] = _filled(one.type, given)
    return kind(**values)


def _strange(name: str, value: object, allowed: str) -> MisuseError:
    return MisuseError("{0} is {value!r} and must be {allowed}", name, value=value, allowed=allowed)
