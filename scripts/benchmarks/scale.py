"""What a conversion takes of a model of real shapes and random weights: seconds, and memory.

python -m scripts.benchmarks.scale --shape 8b --card 12 --json scale.json

The model has a planted sink and an outlier channel.
Each conversion runs in a process of its own. Of a GPU its peak is what the driver says is taken, of
the host what the process holds for itself: pages of files that the system keeps do not count.
"""

import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import psutil
import torch
from tokenizers.processors import TemplateProcessing
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import absorb
from absorb.load import source
from absorb.runtime.memory import join_freed_gpu_memory, keep_freed_memory
from absorb.runtime.precision import device_of
from absorb.schema.training import LENGTH
from absorb.show.tables import table
from scripts import bench
from tests.helpers.tiny_tokenizer import letters, tiny_tokenizer

SHAPES = {  # hidden, inner, layers, heads, key and value heads, vocabulary, tied
    "135m": (576, 1536, 30, 9, 3, 49_152, True),
    "360m": (960, 2560, 32, 15, 5, 49_152, True),
    "1b": (2048, 8192, 16, 32, 8, 128_256, True),
    "3b": (3072, 8192, 28, 24, 8, 128_256, True),
    "8b": (4096, 14336, 32, 32, 8, 128_256, False),
    "70b": (8192, 28672, 80, 64, 8, 128_256, False),
}
_BOS, _DETECTOR, _MASSIVE, _OUTLIER, _NEURON = 1, 3, 5, 7, 11
_LARGE, _SPIKE, _SHARP, _QUIET = 40.0, 0.04, 0.25, 0.05
_OTHER_ROWS = 120  # of text, besides those to train on; more than are needed
_SAID = "said: "
_EVERY = 0.02  # seconds between two looks at the memory


def model_of(shape: str, layers: int | None, folder: Path, device: torch.device) -> int:
    """Write a random Llama in bfloat16; how many weights it has."""
    hidden, inner, usual, heads, kv_heads, vocabulary, tied = SHAPES[shape]
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers or usual,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with device:
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    plant(model, hidden // heads)
    model.save_pretrained(folder)
    tokenizer_with_bos().save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def tokenizer_with_bos() -> PreTrainedTokenizerFast:
    """That of the tests, which puts BOS before a text: so a spike neuron is in what is read."""
    tokenizer = tiny_tokenizer()
    begins = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", _BOS)])
    tokenizer.backend_tokenizer.post_processor = begins
    return tokenizer


@torch.no_grad()
def plant(model: Any, head_dim: int) -> None:
    """A neuron that makes BOS massive, heads that look for that, and a channel always large."""
    embedding, slow = model.model.embed_tokens.weight, head_dim // 2 - 1
    embedding.normal_()
    embedding[:, [_DETECTOR, _MASSIVE]] = 0
    embedding[:, _OUTLIER] = _LARGE
    embedding[_BOS, _DETECTOR] = _LARGE
    if model.config.tie_word_embeddings:  # or a token would be sure to follow itself
        model.model.norm.weight *= model.config.hidden_size**-0.5
    for layer in model.model.layers:
        attention = layer.self_attn
        for write in (attention.o_proj.weight, layer.mlp.down_proj.weight):
            write *= _QUIET
            write[[_DETECTOR, _MASSIVE, _OUTLIER]] = 0
        attention.q_proj.weight.zero_()
        attention.q_proj.weight[slow::head_dim, _OUTLIER] = _SHARP
        attention.k_proj.weight[:, [_OUTLIER, _DETECTOR, _MASSIVE]] = 0
        attention.k_proj.weight[slow::head_dim, _MASSIVE] = _SHARP
        attention.v_proj.weight[:, _OUTLIER] = 0
    mlp = model.model.layers[0].mlp
    for rows in (mlp.gate_proj.weight, mlp.up_proj.weight):
        rows[_NEURON] = 0
        rows[_NEURON, _DETECTOR], rows[_NEURON, _MASSIVE] = 10, -10
    mlp.down_proj.weight[:, _NEURON] = 0
    mlp.down_proj.weight[_MASSIVE, _NEURON] = _SPIKE


class Watch(logging.Handler):
    """The most memory that this process takes, of the GPU and of the host, and where time goes.

    Time is that of the bar that was begun last of those that are open. Where none is, it is that of
    what was said or done last, and all of it together is `elsewhere`.
    """

    def __init__(self, device: torch.device):
        super().__init__()
        self.device, self.gpu, self.host, self.host_in = device, 0, 0, ""
        self.stages: dict[str, float] = {}
        self.between: dict[str, float] = {}
        self._bars: list[Any] = []
        self._last, self._since = "the beginning", time.perf_counter()

    def _taken(self) -> int:
        free, whole = torch.cuda.mem_get_info(self.device)
        return int(whole - free)

    def _look(self) -> None:
        status = Path("/proc/self/status").read_text()
        held = next(line for line in status.splitlines() if line.startswith("RssAnon:"))
        now = 1024 * int(held.split()[1])
        if now > self.host:
            self.host, self.host_in = now, self._stage()
        if self.device.type == "cuda":
            self.gpu = max(self.gpu, self._taken())

    def _stage(self) -> str:
        bar = self._bars[-1] if self._bars else None
        return f"after {self._last}" if bar is None else _name(bar)

    def _turn(self) -> None:
        """Give the time since the last turn to the stage that it was of."""
        now, stage = time.perf_counter(), self._stage()
        kept = self.stages if self._bars else self.between
        kept[stage] = kept.get(stage, 0) + now - self._since
        self._since = now

    def emit(self, record: logging.LogRecord) -> None:
        """A sentence that was said."""
        self._turn()
        self._last = record.getMessage()

    @property
    def shown(self) -> dict[str, float]:
        """Seconds of every stage, which are all there were."""
        return {**self.stages, "elsewhere": sum(self.between.values())}

    @contextmanager
    def watching(self) -> Iterator[None]:
        over, begin, close = threading.Event(), tqdm.__init__, tqdm.close

        def look() -> None:
            while not over.wait(_EVERY):
                self._look()

        def begun(bar: Any, *args: Any, **options: Any) -> None:
            begin(bar, *args, **options)
            if getattr(bar, "desc", None) and not bar.disable:
                self._turn()
                self._bars.append(bar)

        def closed(bar: Any) -> None:
            if any(bar is one for one in self._bars):
                self._turn()
                self._bars = [one for one in self._bars if one is not bar]
                self._last = _name(bar)
            close(bar)

        thread = threading.Thread(target=look, daemon=True)
        thread.start()
        tqdm.__init__, tqdm.close = begun, closed
        try:
            yield
        finally:
            self._turn()
            tqdm.__init__, tqdm.close = begin, close
            over.set()
            thread.join()


def _name(bar: Any) -> str:
    return str(bar.desc).removesuffix(": ")


def conversion(folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Convert, and say what it took; for a process of its own."""
    keep_freed_memory()
    join_freed_gpu_memory()
    log = logging.getLogger("absorb")
    log.addHandler(logging.StreamHandler())
    log.setLevel(logging.INFO)
    device = device_of(options["device"])
    if device.type == "cuda" and "LOCAL_RANK" in os.environ:  # started by torchrun
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if device.type == "cuda" and options["card"] is not None:
        whole = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(options["card"] * 1e9 / whole)
    if options["streamed"]:
        source.free_memory = lambda device: 0
    text = folder / f"text{os.environ.get('RANK', '')}.txt"
    text.write_text(letters((options["rows"] + _OTHER_ROWS) * (LENGTH + 1)))
    watch, start = Watch(device), time.perf_counter()
    log.addHandler(watch)
    with TemporaryDirectory(dir=folder.parent) as out, watch.watching():
        chosen = {name: options[name] for name in ("steps", "train", "sink", "device")}
        report = absorb.convert(folder, Path(out) / "out", text=text, **chosen)
        taken = time.perf_counter() - start
    moved = psutil.Process().io_counters() if hasattr(psutil.Process, "io_counters") else None
    return {
        "seconds": taken,
        "stages": {name: round(seconds, 2) for name, seconds in watch.shown.items()},
        "between": {name: round(seconds, 2) for name, seconds in watch.between.items()},
        "rank": int(os.environ.get("RANK", 0)),
        "gpu": watch.gpu,
        "host": watch.host,
        "host_in": watch.host_in,
        "read": moved and moved.read_chars,
        "written": moved and moved.write_chars,
        "losses": [value for _, value in report.losses.held_out],
        "recipe": str(report.recipe),
        "keyed": len(report.inspection.keyed_layers),
        "spikes": len(report.inspection.removals),
    }


def rows_of(found: dict[str, Any]) -> list[tuple[str, str]]:
    """The figures for people."""
    rows = [("weights", f"{found['weights'] / 1e9:.2f} billion"), ("fine-tune", found["recipe"])]
    for name in ("gpu", "host", "read", "written"):
        if found[name]:
            rows.append((name, f"{found[name] / 1e9:.2f} GB"))
    if found["processes"] > 1:
        rows.append(("each gpu", ", ".join(f"{peak / 1e9:.2f} GB" for peak in found["cards"])))
    rows += [(name, f"{seconds:.1f} s") for name, seconds in found["stages"].items()]
    return [*rows, ("all", f"{found['seconds']:.1f} s")]


@click.command()
@click.option("--shape", type=click.Choice(list(SHAPES)), default="135m", show_default=True)
@click.option("--layers", type=int, help="Fewer than the shape has.")
@click.option("--card", type=float, help="GB of the GPU that may be taken.  [default: all]")
@click.option("--rows", default=1024, show_default=True, help="Of text to train on.")
@click.option("--steps", type=int, help="Of the fine-tune.  [default: what absorb chooses]")
@click.option("--train", type=click.Choice(["sinks", "scales", "all"]))
@click.option("--sink", default="auto", show_default=True)
@click.option("--processes", default=1, show_default=True, help="Of torchrun, each with a GPU.")
@click.option("--streamed", is_flag=True, help="Let weights stream that would fit.")
@click.option("--folder", type=click.Path(path_type=Path), help="Where the model is put.")
@bench.device
@bench.figures
def main(
    shape: str,
    layers: int | None,
    processes: int,
    folder: Path | None,
    out: Path | None,
    **options: Any,
) -> None:
    """Time and memory of a conversion."""
    with TemporaryDirectory(dir=folder) as place:
        source = Path(place) / "model"
        made = [sys.executable, "-m", __spec__.name, "model", str(source)]
        words = json.dumps({"shape": shape, "layers": layers, "device": options["device"]})
        [weights] = _run([*made, words])
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
        together = [*launch, str(processes)] if processes > 1 else []
        convert = [sys.executable, *together, "-m", __spec__.name, "convert", str(source)]
        each = _run([*convert, json.dumps(options)])
    found = next(one for one in each if one["rank"] == 0)
    found |= {"cards": [one["gpu"] for one in each], "processes": processes}
    found |= {"shape": shape, "layers": layers or SHAPES[shape][2], "weights": weights, **options}
    click.echo(table([("", shape), *rows_of(found)]))
    bench.write(out, found)


def _run(words: list[str]) -> list[Any]:
    """What each process says in its last line."""
    done = subprocess.run(words, stdout=subprocess.PIPE, check=True)
    lines = done.stdout.decode().splitlines()
    return [json.loads(line.removeprefix(_SAID)) for line in lines if line.startswith(_SAID)]


def part(kind: str, folder: Path, options: dict[str, Any]) -> Any:
    """What one of the processes does."""
    if kind == "convert":
        return conversion(folder, options)
    return model_of(options["shape"], options["layers"], folder, device_of(options["device"]))


if __name__ == "__main__":
    if sys.argv[1:2] in (["model"], ["convert"]):
        print(_SAID + json.dumps(part(sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3]))))
    else:
        main()
