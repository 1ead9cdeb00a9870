"""Parquet files and datasets on the Hub → documents, by the optional package `datasets`."""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from absorb.errors import AbsorbError
from absorb.schema.places import Dataset
from absorb.text.records import FIELD, field


def refuse_missing_package(what: Path | Dataset) -> None:
    """Refuse what needs `datasets` where it is not installed. It brings pyarrow."""
    if find_spec("datasets") is None:
        kind = "a dataset on the Hub" if isinstance(what, Dataset) else "parquet"
        raise AbsorbError(
            f"{what} is {kind}, which needs the package datasets; pip install 'absorb-llm[data]', "
            "or name a file of plain text or JSON lines"
        )


def in_parquet(path: Path) -> Iterator[str]:
    """The column `text` of a parquet file, a few rows at a time."""
    refuse_missing_package(path)
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path)
        names = table.schema_arrow.names
        if FIELD in names:
            batches = (batch.to_pylist() for batch in table.iter_batches(columns=[FIELD]))
            yield from _fields((row for batch in batches for row in batch), f"{path}")
            return
    except AbsorbError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        raise AbsorbError(
            f"{path} cannot be read as parquet ({_first_line(error)}); fetch it again"
        ) from None
    raise AbsorbError(
        f"{path} has no column `{FIELD}` but {', '.join(names)!r:.80}; call the column with the "
        f"text `{FIELD}`"
    )


def on_the_hub(dataset: Dataset) -> Iterator[str]:
    """The field `text` of a split, read from the Hub as it is needed."""
    refuse_missing_package(dataset)
    from datasets import load_dataset

    try:
        rows = load_dataset(dataset.repository, split=dataset.part, streaming=True)
        yield from _fields(iter(rows), f"{dataset}")
    except AbsorbError:
        raise
    except Exception as error:  # its client, its readers and its builders raise what they like
        raise AbsorbError(
            f"there is no file {dataset}, and as a dataset on the Hub it cannot be read "
            f"({_first_line(error)}); check its name and split, or save its text as JSON lines"
        ) from None


def _fields(rows: Iterator[object], name: str) -> Iterator[str]:
    return (field(row, f"{name}, row {number}") for number, row in enumerate(rows, 1))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".:")
