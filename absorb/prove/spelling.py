"""An entry as Python, ready to be pasted into absorb/models/families.py."""

from dataclasses import fields

from absorb.models.family import Family


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
    whole = f"({', '.join(map(_value, value))},)" if isinstance(value, tuple) and value else ""
    whole = whole.replace(",)", ")") if whole.count(",") > 1 else whole
    plain = f'"{value}"' if isinstance(value, str) else whole or repr(value)
    if len(plain) < 90 - indent or not isinstance(value, tuple):
        return plain
    inner = " " * (indent + 4)
    parts = "".join(f"{inner}{_value(part, indent + 4)},\n" for part in value)
    return f"(\n{parts}{' ' * indent})"
