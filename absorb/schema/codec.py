"""JSON, whoever wrote it → plain data, and plain data → the dataclasses that it fills."""

import json
import sys
from contextlib import suppress
from dataclasses import MISSING, asdict, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Kind = TypeVar("Kind", bound="DataclassInstance")


def parse_json(text: str | bytes) -> Any:
    """What a text of JSON means. A ValueError, and nothing else, says that it is none."""
    try:
        data = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    # A lone surrogate is a fine string to JSON and to Python, but nothing can write it down.
    json.dumps(data, ensure_ascii=False).encode()
    return data


def decode(kind: Any, data: Any) -> Any:
    """Plain data as what the annotations say it is: dataclasses, tuples and dictionaries.

    A ValueError says what does not fit. Whole numbers will do for floats.
    """
    inner = get_args(kind)
    origin = get_origin(kind)
    if is_dataclass(kind) and isinstance(kind, type):
        return _dataclass(kind, _expected(dict, data))
    if origin is dict:
        return _dictionary(inner, _expected(dict, data))
    if origin is tuple:
        each = inner[:1] * len(_expected(list, data)) if inner[-1] is Ellipsis else inner
        return tuple(decode(one, value) for one, value in zip(each, data, strict=True))
    if origin is Literal:
        return _chosen(inner, data)
    if kind is Path:
        return Path(_expected(str, data))
    if inner and data is None and type(None) in inner:
        return None
    if inner:
        return _first_that_fits([one for one in inner if one is not type(None)], data)
    if isinstance(kind, type) and issubclass(kind, str):
        return kind(_expected(str, data))
    return data if kind is Any else _expected(kind, data)


def _first_that_fits(kinds: list[Any], data: Any) -> Any:
    for kind in kinds[:-1]:
        with suppress(ValueError):
            return decode(kind, data)
    return decode(kinds[-1], data)


def _dataclass(kind: Any, data: dict[str, Any]) -> Any:
    kinds = get_type_hints(kind)
    needed = {f.name for f in fields(kind) if f.default is MISSING is f.default_factory}
    strange = (needed - data.keys()) | (data.keys() - kinds.keys())
    if strange:
        raise ValueError(f"{min(strange)!r} is missing or unknown")
    return kind(**{name: decode(kinds[name], value) for name, value in data.items()})


def _dictionary(inner: tuple[Any, ...], data: dict[str, Any]) -> dict[Any, Any]:
    key, value = inner
    whole = key is int  # JSON has no other keys than strings
    return {int(k) if whole else decode(key, k): decode(value, v) for k, v in data.items()}


def _chosen(choices: tuple[Any, ...], data: Any) -> Any:
    if not isinstance(data, str) or data not in choices:
        raise ValueError(f"{data!r:.40} is none of {', '.join(choices)}")
    return data


def _expected(kind: type, data: Any) -> Any:
    """The data, which is of a kind. To Python, true is a number, too."""
    if kind is float and type(data) is int and abs(data) <= sys.float_info.max:
        return float(data)
    if type(data) is not kind:
        raise ValueError(f"{data!r:.40} is no {kind.__name__}")
    return data


def to_json(data: "DataclassInstance") -> str:
    """Readable JSON of a report."""
    return json.dumps(asdict(data), indent=1, ensure_ascii=False, default=_plain) + "\n"


def _plain(value: object) -> str:
    assert isinstance(value, Path)
    return value.name  # where it lay on somebody's disk is nobody's business


def from_json(kind: type[Kind], text: str) -> Kind:
    """The inspection or report that `to_json` wrote; a ValueError says why it is none."""
    data: Kind = decode(kind, parse_json(text))
    return data
