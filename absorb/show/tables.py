"""Rows of cells as text, as a listing and as Markdown."""

import textwrap

Row = tuple[str, ...]
_WIDTH = 100


def table(rows: list[Row]) -> str:
    """Rows as aligned text: the first column to the left, all others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def listing(rows: list[Row]) -> str:
    """Rows of a label and a text as lines, the texts folded under themselves."""
    indent = max(len(label) for label, _ in rows) + 2
    return "\n".join(
        textwrap.fill(
            label.ljust(indent) + text,
            _WIDTH,
            subsequent_indent=" " * indent,
            break_long_words=False,
            break_on_hyphens=False,
        )
        for label, text in rows
    )


def markdown(rows: list[Row]) -> str:
    """Rows, the first of them the head, as a Markdown table."""
    head, *body = [tuple(cell.strip().replace("|", r"\|") for cell in row) for row in rows]
    rule = tuple("---" if column == 0 else "---:" for column in range(len(head)))
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *body))


def size_of(size: int) -> str:
    """Bytes for people."""
    for unit, much in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= much:
            return f"{size / much:.1f} {unit}"
    return f"{size} bytes"


def time_of(seconds: float) -> str:
    """Rounded as one says it: 40 seconds, 6 minutes, 3 hours."""
    if seconds < 90:
        return f"{max(10, round(seconds, -1)):.0f} seconds"
    if seconds < 5400:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds / 3600:.0f} hours"
