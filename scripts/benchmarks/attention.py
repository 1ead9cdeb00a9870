"""Sink attention against stock attention without sinks, eager, and a virtual token: one run, JSON.

python -m scripts.benchmarks.attention --json attention.json
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from absorb.measure.timing import interleaved
from absorb.models.modeling_absorb import How, eager, fast
from absorb.show.tables import table
from scripts import bench

Attention = Callable[..., tuple[Tensor, Any]]

BACKENDS = {
    "cuda": {
        "stock flash": SDPBackend.FLASH_ATTENTION,
        "stock cudnn": SDPBackend.CUDNN_ATTENTION,
        "stock efficient": SDPBackend.EFFICIENT_ATTENTION,
    },
    "cpu": {},
}
NAMES = ("best stock", "stock", *BACKENDS["cuda"], "virtual token", "eager")
LENGTHS = {"cpu": (512, 1024, 2048, 4096), "cuda": (2048, 4096, 8192, 16384)}
DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.bfloat16,)}
TOKENS = {"cpu": 1, "cuda": 16384}  # in a batch, where one text has fewer
WIDTH = {"cpu": 512, "cuda": 2048}  # of all heads together
EAGER_LIMIT = 4096  # its scores do not fit beyond


@dataclass(frozen=True)
class Case:
    """One comparison. With work "decode", a single query meets `length` keys."""

    work: str
    length: int
    head_dim: int
    kv_heads: int
    heads: int
    dtype: str
    batch: int

    def tensors(self, device: str) -> list[Tensor]:
        """Query, key and value as models give them: heads beside head_dim in memory."""
        queries = 1 if self.work == "decode" else self.length
        shapes = [(queries, self.heads), *[(self.length, self.kv_heads)] * 2]
        return [
            torch.randn(
                self.batch,
                length,
                heads,
                self.head_dim,
                device=device,
                dtype=getattr(torch, self.dtype),
            )
            .transpose(1, 2)
            .requires_grad_(self.work == "training")
            for length, heads in shapes
        ]


def cases(device: str, lengths: tuple[int, ...], head_dims: tuple[int, ...]) -> Iterator[Case]:
    for dtype in DTYPES[device]:
        for head_dim in head_dims:
            heads = WIDTH[device] // head_dim
            for length in lengths:
                for work, kv_heads in (
                    ("prefill", heads),
                    ("prefill", heads // 4),
                    ("training", heads),
                    ("training", heads // 4),
                    ("decode", heads // 4),
                ):
                    batch = max(1, TOKENS[device] // length)
                    name = str(dtype).removeprefix("torch.")
                    yield Case(work, length, head_dim, kv_heads, heads, name, batch)


def virtual_token(attend: Attention, module: Any, query: Tensor, key: Tensor, value: Tensor) -> Any:
    """Stock attention over one more key and value, which every query sees."""
    key, value = (
        torch.cat([extra.expand(len(key), -1, -1, -1), tensor], 2)
        for extra, tensor in ((module.extra_key, key), (module.extra_value, value))
    )
    length = query.shape[2]
    if length == 1:
        return attend(module, query, key, value, None)
    return attend(module, query, key, value, module.extra_mask)


def contenders(case: Case, device: str) -> dict[str, Callable[[], Tensor]]:
    query, key, value = case.tensors(device)
    mask = torch.ones(query.shape[2], case.length, dtype=torch.bool, device=device).tril()
    module = SimpleNamespace(
        extra_key=key[:1, :, :1].detach().clone(),
        extra_value=value[:1, :, :1].detach().clone(),
        extra_mask=torch.nn.functional.pad(mask, (1, 0), value=True)[None, None],
        num_key_value_groups=case.heads // case.kv_heads,
        is_causal=True,
        training=case.work == "training",
    )
    scaling = case.head_dim**-0.5
    stock = partial(sdpa_attention_forward, scaling=scaling)
    sink = torch.randn(case.heads, device=device, requires_grad=case.work == "training")

    def on(backend: SDPBackend) -> Tensor:
        with sdpa_kernel(backend):
            return stock(module, query, key, value, None)[0]

    runs: dict[str, Callable[[], Tensor]] = {
        "absorb": lambda: fast(query, key, value, None, (sink,), How(scaling))[0],
        "stock": lambda: stock(module, query, key, value, None)[0],
        **{name: partial(on, backend) for name, backend in BACKENDS[device].items()},
        "virtual token": lambda: virtual_token(stock, module, query, key, value)[0],
    }
    if case.length <= EAGER_LIMIT:
        runs["eager"] = lambda: eager(query, key, value, None, (sink,), How(scaling))[0]
    return {name: run for name, run in runs.items() if works(run)}


def works(run: Callable[[], Tensor]) -> bool:
    """Not every stock backend takes every case."""
    try:
        run()
    except RuntimeError as error:
        if "No available kernel" in str(error):
            return False
        raise
    return True


def timed(case: Case, device: str, repeats: int) -> dict[str, float]:
    """Median seconds of every contender."""
    runs = contenders(case, device)
    if case.work != "training":
        with torch.no_grad():
            return interleaved(runs, device, repeats)
    weight = torch.randn_like(runs["absorb"]())

    def step(run: Callable[[], Tensor]) -> None:
        run().backward(weight)

    return interleaved({name: partial(step, run) for name, run in runs.items()}, device, repeats)


@click.command()
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
@click.option("--length", "lengths", type=int, multiple=True, help="Instead of the usual ones.")
@click.option("--head-dim", "head_dims", type=int, multiple=True, default=(64, 128))
@click.option("--repeats", default=7, show_default=True)
@bench.figures
def main(
    device: str,
    lengths: tuple[int, ...],
    head_dims: tuple[int, ...],
    repeats: int,
    out: Path | None,
) -> None:
    """The time of sink attention as a multiple of every other's, below 1 where it is faster."""
    torch.manual_seed(0)
    figures, rows = [], []
    for case in cases(device, lengths or LENGTHS[device], head_dims):
        times = timed(case, device, repeats)
        best = min(value for name, value in times.items() if name.startswith("stock"))
        ratios = {"best stock": times["absorb"] / best}
        ratios |= {name: times["absorb"] / value for name, value in times.items()}
        figures.append({**asdict(case), "seconds": times, "ratios": ratios})
        shape = f"{case.work} {case.dtype} {case.length} × {case.head_dim}"
        heads = f"{case.heads}/{case.kv_heads} heads"
        rows.append(
            (f"{shape}, {heads}", *(f"{ratios[n]:.3f}" if n in ratios else "" for n in NAMES))
        )
        click.echo(" ".join(rows[-1]), err=True)
    print(table([("time of absorb as a multiple of", *NAMES), *rows]))
    gpu = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    report = {"device": gpu, "torch": torch.__version__, "threads": torch.get_num_threads()}
    bench.write(out, {**report, "cases": figures})


if __name__ == "__main__":
    main()
