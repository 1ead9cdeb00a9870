"""The command line. Results on stdout, progress on stderr; exit code 1 for a refusal, 2 for misuse.

torch takes seconds to import, so everything that needs it is imported inside the commands.
"""

import logging
import os
import re
import sys
from io import TextIOWrapper

import click

from absorb.__version__ import __version__
from absorb.cli.convert import convert
from absorb.cli.evaluate import evaluate
from absorb.cli.export import export
from absorb.cli.hub import push, verify
from absorb.cli.inspect import inspect
from absorb.runtime.memory import join_freed_gpu_memory, keep_freed_memory, share_cores

# transformers imports torchao if it is there, which then tells of kernels that this machine cannot
# use, and of what a later torch will say to it.
_NOISY = ("torchao", "torch.utils._pytree")


class _Absorb(click.Group):
    """Refuses arguments that are no text or empty, whichever option they are of."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        for argument in args:
            if "\0" in argument or argument != argument.encode(errors="ignore").decode():
                raise click.UsageError(f"{argument!r} is not text in UTF-8", ctx)
            # As a path it would be the current folder.
            if not argument or re.fullmatch(r"--[a-z-]+=", argument):
                raise click.UsageError("an argument is empty; name what is meant, or drop it", ctx)
        return super().parse_args(ctx, args)


@click.group(
    cls=_Absorb, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(__version__)
def main() -> None:
    """Move the outliers of a language model into explicit parameters.

    MODEL is a Hub id (owner/name), a folder, a .gguf file, or `demo` (SmolLM2-135M-Instruct).
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a locale may know no more than ASCII
            stream.reconfigure(errors="backslashreplace")
    keep_freed_memory()
    join_freed_gpu_memory()
    share_cores()
    if os.environ.get("RANK", "0") != "0":  # one process of torchrun speaks for all
        os.environ["TQDM_DISABLE"] = "1"
        logging.getLogger("absorb").setLevel(logging.CRITICAL)
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)


for _command in (convert, inspect, evaluate, export, verify, push):
    main.add_command(_command)
