"""A call from Python does the same whatever its caller has set of torch, and puts it back."""

import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

import absorb
from absorb import AbsorbError
from absorb.cli import main as cli
from absorb.load import source
from absorb.runtime import precision
from absorb.schema.codec import from_json
from absorb.schema.report import Report

pytestmark = pytest.mark.usefixtures("little_text")


def test_what_the_caller_has_set_of_torch_changes_nothing(
    original: Path, text_file: Path, tmp_path: Path
) -> None:
    def divergence(name: str) -> float:
        options: Any = {"text": text_file, "steps": 1, "train": "all"}
        return absorb.convert(original, tmp_path / name, **options).converted.divergence

    usual = divergence("usual")
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
        assert divergence("inside") == usual
        assert torch.is_inference_mode_enabled()
        assert torch.is_autocast_enabled("cpu")
    torch.set_default_dtype(torch.float64)
    try:
        assert divergence("float64") == usual
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


class Products(logging.Handler):
    """How exact a product is, and how free torch is in its algorithms, whenever absorb speaks."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.seen: set[tuple[bool, bool]] = set()

    def emit(self, _: logging.LogRecord) -> None:
        numbers = torch.linspace(1, 2, 64 * 64).view(64, 64)
        exact = numbers.double() @ numbers.double()
        is_exact = torch.allclose((numbers @ numbers).double(), exact, rtol=1e-5)
        self.seen.add((is_exact, torch.are_deterministic_algorithms_enabled()))


@pytest.mark.parametrize("kind", [None, torch.backends.mkldnn.matmul], ids=["named", "by kind"])
def test_products_are_as_exact_as_in_a_new_process(kind: Any, original: Path) -> None:
    """A trainer may have hastened them, in the old way or in the new one."""
    logger, products = logging.getLogger("absorb"), Products()
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(products)
    if kind is None:
        torch.set_float32_matmul_precision("medium")
    else:
        kind.fp32_precision = "bf16"
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with pytest.raises(AbsorbError):
            absorb.inspect(original, text=__file__, revision="main")
        assert products.seen == {(True, False)}
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
        assert kind is not None or torch.get_float32_matmul_precision() == "medium"
        assert torch.is_deterministic_algorithms_warn_only_enabled()
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
        if kind is not None:
            kind.fp32_precision = "none"
        torch.set_float32_matmul_precision("highest")
        logger.removeHandler(products)
        logger.setLevel(level)


def test_processes_that_a_caller_has_joined_are_left_alone(
    original: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of those that trained may convert what they have: the others may wait for it."""

    def converted(name: str) -> Report:
        made = absorb.convert(original, tmp_path / name, text=text_file, steps=1, train="sinks")
        assert isinstance(made, Report)
        return made

    usual = converted("usual")
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "0"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        assert converted("beside").losses == usual.losses
        assert absorb.evaluate(original, text=text_file, windows=2, length=32).rows == 2
        assert dist.get_world_size() == 2
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("streams", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_call_learns_as_the_command_does(
    original: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streams: bool
) -> None:
    monkeypatch.setattr(precision, "_bfloat16_is_fast", lambda device: True)
    if streams:
        monkeypatch.setattr(source, "free_memory", lambda device: 0)
    options: Any = {"text": text_file, "steps": 4, "train": "all"}
    called = absorb.convert(original, tmp_path / "called", **options)
    said = [str(original), "--text", str(text_file), "--steps", "4", "--train", "all"]
    done = CliRunner().invoke(cli.convert, [*said, "--out", str(tmp_path / "said")])
    assert done.exit_code == 0, done.output
    report = from_json(Report, (tmp_path / "said" / "absorb.json").read_text())
    assert called.losses == report.losses
    assert len(called.losses.layers) == 3 * streams


def test_calls_from_several_threads_take_turns(
    original: Path, text_file: Path, tmp_path: Path
) -> None:
    def converted(name: str) -> Any:
        return absorb.convert(original, tmp_path / name, text=text_file, steps=0)

    torch.set_default_dtype(torch.float64)
    try:
        with ThreadPoolExecutor() as pool:
            one, other = pool.map(converted, ("one", "other"))
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert one.converted == other.converted
