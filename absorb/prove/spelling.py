"""An entry as Python, ready to be pasted into absorb/models/families.py."""

from dataclasses import fields

from absorb.models.family import Family

_WIDTH = 85  # of a value: its name stands before it


def spelled(family: Family) -> str:
    """The call that makes an entry: what it does not say is as in Llama."""
    plain = Family(model_type=family.model_type)
    said = {"model_type": family.model_type}
    for field in fields(family):
        value = getattr(family, field.name)
        if value != getattr(plain, field.name):
            said[field.name] = value
    lines = "".join(f"    {name}={_value(value)},\n" for name, value in said.items())
    return f"Family(\n{lines})"


def _value(value: object, indent: int = 4) -> str:
    """A value on one line, or where that is too long with one line for each part."""
    if isinstance(value, str):
        return f'"{value}"'
    if not isinstance(value, tuple):
        return repr(value)
    parts = [_value(part, indent + 4) for part in value]
    whole = f"({', '.join(parts)}{',' if len(parts) == 1 else ''})"
    if len(whole) < _WIDTH - indent and "\n" not in whole:
        return whole
    inner = " " * (indent + 4)
    return "(\n" + "".join(f"{inner}{part},\n" for part in parts) + f"{' ' * indent})"
