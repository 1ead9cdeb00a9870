"""What the command line says, and how it ends when something is refused or a signal comes."""

import os
import signal
import sys
from functools import cache
from typing import Any

import click

from absorb.errors import AbsorbError, MisuseError

# torchrun starts several processes, of which one speaks for all.
_NUMBER = os.environ.get("RANK", "0")
SPEAKS = _NUMBER == "0"
_LOST = f"absorb: another process than {_NUMBER} of torchrun has ended, so nothing was written"


class UserErrors:
    """Turns an AbsorbError into one sentence and exit code 1, and a signal into an exit."""

    def __init__(
        self,
        frugal: str = "pass --train sinks, which needs least, or --device cpu",
        interrupted: str = "nothing was written",
    ):
        self.frugal = frugal  # what to do where memory is short
        self.interrupted = interrupted

    def __enter__(self) -> None:
        # Unlike the default of a signal, an exception lets every `finally` clean up.
        signal.signal(signal.SIGTERM, _terminated)
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # which is what nohup does
            signal.signal(signal.SIGHUP, _terminated)  # a terminal is closed

    def __exit__(self, _: Any, error: BaseException | None, __: Any) -> None:
        if error is not None and "RANK" in os.environ:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun sends it on top
        if isinstance(error, KeyboardInterrupt | SystemExit):
            sys.unraisablehook = _unheard
        if isinstance(error, AbsorbError):
            say(f"absorb: {error}")
            sys.exit(2 if isinstance(error, MisuseError) else 1)
        if isinstance(error, BrokenPipeError):
            return  # click ends in silence, as the reader of stdout wants no more
        if isinstance(error, OSError):  # a name too long, a disk that fails, a file that vanished
            reason = f"{error.filename}: {error.strerror}" if error.filename else str(error)
            click.echo(f"absorb: {reason}, so nothing was written; check the name", err=True)
            sys.exit(1)
        if _is_out_of_memory(error):
            where = "" if SPEAKS else f" of process {_NUMBER}"
            click.echo(
                f"absorb: the memory{where} is full, so nothing was written; {self.frugal}",
                err=True,
            )
            sys.exit(1)
        if _is_of_others(error):
            _say_lost()
            sys.exit(1)
        if isinstance(error, KeyboardInterrupt):
            click.echo(f"absorb: interrupted; {self.interrupted}", err=True)
            sys.exit(130)


def _is_out_of_memory(error: BaseException | None) -> bool:
    """Whether Python, a GPU or, by its words alone, torch on a CPU has no more memory."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    words = ("allocate memory", "out of memory", "ALLOC_FAILED")  # of a CPU, page-locked, of cuBLAS
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def _is_of_others(error: BaseException | None) -> bool:
    """Whether another process could not be reached, as gloo and NCCL have it."""
    return "RANK" in os.environ and any(
        word in str(error) for word in ("by peer", "gloo", "NCCL", "ProcessGroup")
    )


def _terminated(number: int, _: Any) -> None:
    """End, unless that has begun: torchrun's signal would keep a folder from being removed."""
    ending = sys.exc_info()[1]
    if isinstance(ending, SystemExit) or _is_of_others(ending):
        return
    if "RANK" in os.environ:
        _say_lost()
    sys.exit(128 + number)


@cache
def _say_lost() -> None:
    """Once: on GPUs a signal and the end of a wait both tell of it."""
    click.echo(_LOST, err=True)


def _unheard(_: Any) -> None:
    """Objects that a signal left half-made complain as they are thrown away."""


def say(sentence: str) -> None:
    if SPEAKS:
        click.echo(sentence, err=True)


def print_result(result: str) -> None:
    """Results go to stdout. By now whatever was to be written is."""
    if not SPEAKS:
        return
    try:
        click.echo(result)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise AbsorbError(
            f"the result could not be printed ({error.strerror}); check where the output goes"
        ) from error
