"""The table of `scripts.benchmarks.rivals`, from the JSON that it wrote."""

from typing import Any

from absorb.show.tables import Row

COLUMNS = {
    "float": "perplexity",
    "w8a8-static": "W8A8 static",
    "w8a8-clipped": "W8A8 clipped",
    "w8a8-token": "W8A8 per token",
    "w4a4": "W4A4",
    "w4a4-hadamard": "W4A4 rotated",
    "nvfp4": "NVFP4",
}


def rival_rows(run: dict[str, Any]) -> list[Row]:
    """A row for every rival, with the best of each column in bold."""
    rivals = run["rivals"]
    best = {c: min(r["figures"][c]["perplexity"] for r in rivals.values()) for c in COLUMNS}

    def cell(rival: dict[str, Any], column: str) -> str:
        value = rival["figures"][column]["perplexity"]
        digits = f"{value:,.0f}" if value >= 1000 else f"{value:.2f}"
        return f"**{digits}**" if value == best[column] else digits

    def interval(rival: dict[str, Any]) -> str:
        return "{:.2f} to {:.2f}".format(*rival["figures"]["float"]["interval"])

    head = ("", "perplexity", "95 % interval", *list(COLUMNS.values())[1:])
    return [
        head,
        *(
            (name, cell(rival, "float"), interval(rival), *(cell(rival, c) for c in formats()))
            for name, rival in rivals.items()
        ),
    ]


def formats() -> list[str]:
    return [column for column in COLUMNS if column != "float"]
