"""Kill conversions of a tiny model at random moments, and look at what each of them left.

    python -m scripts.soak.kill_conversions --kills 200
    python -m scripts.soak.kill_conversions --kills 50 --streamed

The output must be absent, or complete: all its files as its report lists them and as a conversion
writes that nobody killed, and a model that loads. Exit code 1 where it is neither, or where the
next conversion could not clear what was left.
Every second one is killed while files are written; every fourth one may resume the one before.
Linux only.
"""

import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory

import click
import torch

import absorb
from absorb.load import source
from absorb.load.source import load
from absorb.schema.codec import from_json
from absorb.schema.report import Report
from absorb.schema.settings import ModelRef
from absorb.ship.staging import digests
from tests.helpers.tiny import tiny
from tests.helpers.tiny_tokenizer import tiny_tokenizer

warm = get_context("forkserver")  # forked from a process that has imported, and done nothing else
warm.set_forkserver_preload(["absorb.api", "tests.helpers.tiny", "tests.helpers.tiny_tokenizer"])


@click.command()
@click.option("--kills", default=200, show_default=True)
@click.option("--seed", default=0, show_default=True, help="Of the moments.")
@click.option("--streamed", is_flag=True, help="As a model larger than the memory.")
def main(kills: int, seed: int, streamed: bool) -> None:
    torch.set_num_threads(1)
    draw, found = random.Random(seed), Counter[str]()
    with TemporaryDirectory() as home:
        model, out, text = Path(home, "model"), Path(home, "out"), Path(home, "text.txt")
        layers = 3 if streamed else 1
        tiny("llama", torch.float32, num_hidden_layers=layers).save_pretrained(model)
        tiny_tokenizer().save_pretrained(model)
        text.write_text("".join(chr(97 + n * n * 7 % 23 + n % 3) for n in range(13_000)))
        first = conversion(model, out, text, resume=False, streamed=streamed)
        whole, writing = measured(first, out)
        meant = digests(out)
        while found.total() - found["over before the kill, complete"] < kills:
            shutil.rmtree(out, ignore_errors=True)
            process = conversion(model, out, text, resume=draw.random() < 0.25, streamed=streamed)
            if draw.random() < 0.5:
                wait_for_writing(process, out)
                time.sleep(draw.uniform(0, 1.2 * writing))
            else:
                wait_for_work(process, draw.uniform(0, whole))
            process.kill()
            process.join()
            was = "killed, " if process.exitcode == -signal.SIGKILL else "over before the kill, "
            found[was + left(out, meant)] += 1
        finish(conversion(model, out, text, resume=True, streamed=streamed))
        found["the last one, not killed, " + left(out, meant)] += 1
        others = sorted(path.name for path in out.parent.glob("out?*"))
    for kind, count in sorted(found.items()):
        click.echo(f"{count:5} {kind}")
    click.echo(f"left beside it in the end: {', '.join(others) or 'nothing'}")
    sys.exit(bool(others) or any("PARTIAL" in kind for kind in found))


def conversion(model: Path, out: Path, text: Path, resume: bool, streamed: bool) -> BaseProcess:
    """Start a conversion in a process of its own, which has everything imported."""
    process = warm.Process(target=convert, args=(model, out, text, resume, streamed))
    process.start()
    return process


def convert(model: Path, out: Path, text: Path, resume: bool, streamed: bool) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    torch.set_num_threads(1)
    if streamed:
        source.free_memory = lambda device: 0
    absorb.convert(
        model, out, text=text, steps=2, train="all", force=True, resume=resume, device="cpu"
    )


def measured(process: BaseProcess, out: Path) -> tuple[float, float]:
    """Seconds of work that a conversion takes before it writes, and those on the clock after."""
    whole = wait_for_writing(process, out)
    started = time.monotonic()
    finish(process)
    return whole, time.monotonic() - started


def wait_for_writing(process: BaseProcess, out: Path) -> float:
    """Wait until the checkpoint is being filled, or the process is over; its work until then."""
    begun, worked = out.with_name("out.partial") / "config.json", 0.0
    while process.is_alive() and not begun.exists():
        worked = work(process)
        time.sleep(0.001)
    return worked


def wait_for_work(process: BaseProcess, seconds: float) -> None:
    """Wait until a process has worked so long: on a busy machine the clock says little."""
    while process.is_alive() and work(process) < seconds:
        time.sleep(0.001)


def work(process: BaseProcess) -> float:
    """Seconds that a process has had a core for."""
    try:
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


def finish(process: BaseProcess) -> None:
    process.join()
    assert process.exitcode == 0, process.exitcode


def left(out: Path, meant: dict[str, str]) -> str:
    """Whether the output is absent, complete or neither."""
    if not out.exists():
        return "absent"
    try:
        report = from_json(Report, (out / "absorb.json").read_text())
        assert {name: digests(out)[name] for name in report.files} == report.files
        load(ModelRef(name=str(out)), measured=True)
        assert digests(out) == meant, "other bytes"
    except Exception as error:
        return f"PARTIAL: {error}"
    return "complete"


if __name__ == "__main__":
    main()
