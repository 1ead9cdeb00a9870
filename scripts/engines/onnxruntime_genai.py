"""Native exports in onnxruntime-genai, beside the original there, and beside transformers.

    absorb export DIR --to native --out NATIVE
    python -m scripts.engines.onnxruntime_genai NATIVE demo

makes an environment with it the first time. How the model is built, and the two traps on the way,
are in inside/genai_says.py.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import click

from scripts.engines import beside
from scripts.engines.environments import Environment

GENAI = Environment(
    ("onnxruntime-genai==0.18.0", "onnx-ir", "onnx", "torch==2.13.0", "transformers==5.24.0")
)
COUNT, LENGTH = 2, 128


@click.command()
@click.argument("native", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("stock")
@click.option(
    "--json",
    "out",
    type=click.Path(dir_okay=False, path_type=Path),
    default=beside.EVIDENCE / "engine-onnxruntime-genai.json",
    show_default=True,
)
def main(native: Path, stock: str, out: Path) -> None:
    """Compare the export NATIVE and the original STOCK there with transformers."""
    with TemporaryDirectory() as place:
        models = {"stock": beside.saved(stock, Path(place, "stock")), "native": native}
        rows = dict.fromkeys(models, beside.rows_for(native, COUNT, LENGTH))
        found = beside.compared(GENAI, "genai_says.py", models, rows, timed=[*models])
    beside.report(found, out)


if __name__ == "__main__":
    main()
