"""The package reads from the top down: a module imports only what stands above it in this list."""

import ast
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "absorb"
ORDER = (
    "errors",
    "files",
    "memory",
    "threads",
    "plain",
    "declared",
    "settings",
    "families",
    "modeling_absorb",
    "registration",
    "stranger",
    "logits",
    "watch",
    "outline",
    "timing",
    "weights",
    "experts",
    "device",
    "download",
    "vetting",
    "gguf_file",
    "source",
    "windows",
    "samples",
    "text",
    "grids",
    "rotation",
    "storage",
    "quantize",
    "tally",
    "measure",
    "findings",
    "scene",
    "forms",
    "constants",
    "key_bias",
    "fit",
    "sinks",
    "prefix",
    "plan",
    "smoothing",
    "graft",
    "state",
    "divergence",
    "decide",
    "recipe",
    "distill",
    "rehearse",
    "score",
    "report",
    "plan_file",
    "progress",
    "card",
    "checkpoint",
    "verify",
    "hub",
    "write",
    "standing",
    "tasks",
    "compare",
    "charts",
    "exhibit",
    "views",
    "draw",
    "page",
    "pipeline",
    "interface",
    "options",
    "refusals",
    "cli",
    "__main__",
)


def imported(module: str) -> set[str]:
    """The modules of the package that a module imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "absorb":
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("absorb."):
            names.add(str(node.module).removeprefix("absorb."))
    return names & set(ORDER)


def test_every_module_has_its_place() -> None:
    assert {path.stem for path in PACKAGE.glob("*.py")} == {*ORDER, "__init__"}


def test_imports_only_point_down() -> None:
    for place, module in enumerate(ORDER):
        assert imported(module) <= set(ORDER[:place]), module


def test_the_shipped_code_stands_alone() -> None:
    assert not imported("modeling_absorb")
    code = (PACKAGE / "modeling_absorb.py").read_text()
    roots = {
        (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name).split(".")[0]
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    assert roots - {*sys.stdlib_module_names} == {"torch", "transformers", "triton"}
