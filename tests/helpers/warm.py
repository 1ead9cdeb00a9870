"""New processes, forked from one that has imported torch and transformers and done nothing else.

A new Python imports these for ten seconds. Where not that is tested, but what a process does that
shares no state with the tests, one of these is as good: it never saw absorb, nor the tests' models.
What is read once, as Python starts or a library is imported, is not new in it: the locale, the
settings of threads, and those HF_ variables that `_settle` does not name: it has them as they were
when the first of these processes was asked for.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

DEVNULL = subprocess.DEVNULL
warm = multiprocessing.get_context("forkserver")
warm.set_forkserver_preload(["tests.helpers.imported"])


def run(
    command: Sequence[object],
    env: Mapping[str, str] | None = None,
    cwd: Path | str | None = None,
    **_: object,
) -> subprocess.CompletedProcess[str]:
    """As `subprocess.run` of a Python with `-c CODE`, `-I FILE` or `-m MODULE`, all captured."""
    kind, what, *words = [str(word) for word in command[1:]]
    return call(_python, kind, what, words, env=env, cwd=cwd)


def call(
    target: Callable[..., None],
    *arguments: Any,
    env: Mapping[str, str] | None = None,
    cwd: Path | str | None = None,
) -> subprocess.CompletedProcess[str]:
    """What a function says and ends with in a process of its own."""
    known = dict(os.environ if env is None else env)
    with TemporaryDirectory() as folder:
        said = [Path(folder, name) for name in ("stdout", "stderr")]
        inside = (said, known, str(cwd or Path.cwd()), target, arguments)
        process = warm.Process(target=_inside, args=inside)
        process.start()
        process.join()
        out, err = (path.read_text() for path in said)
    assert process.exitcode is not None
    return subprocess.CompletedProcess([target.__name__], process.exitcode, out, err)


def _inside(
    said: Sequence[Path],
    known: dict[str, str],
    folder: str,
    target: Callable[..., None],
    arguments: Sequence[Any],
) -> None:
    for number, path in enumerate(said, 1):
        os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY), number)
    os.environ.clear()
    os.environ.update(known)
    os.chdir(folder)
    _settle(known)
    target(*arguments)


def _settle(known: Mapping[str, str]) -> None:
    """What huggingface_hub and transformers read of the environment when they are imported."""
    from huggingface_hub import constants
    from transformers import dynamic_module_utils
    from transformers.utils import hub

    constants.HF_HUB_OFFLINE = known.get("HF_HUB_OFFLINE") == "1"
    if "HF_HOME" in known:
        modules = str(Path(known["HF_HOME"], "modules"))
        constants.HF_HUB_CACHE = str(Path(known["HF_HOME"], "hub"))
        dynamic_module_utils.HF_MODULES_CACHE = hub.HF_MODULES_CACHE = modules


def _python(kind: str, what: str, words: list[str]) -> None:
    sys.argv = ["-c" if kind == "-c" else what, *words]
    if kind == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    elif kind == "-I":
        runpy.run_path(what, run_name="__main__")
    else:
        exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})
