"""The house reads from the ground up: a folder imports only what stands before it in the list."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "absorb"
ORDER = (
    "__version__",
    "errors",
    "schema",
    "models",
    "runtime",
    "quantize",
    "load",
    "text",
    "measure",
    "fold",
    "prove",
    "tune",
    "show",
    "ship",
    "pipelines",
    "api",
    "cli",
    "__main__",
)
MOST_FILES = 10
FOLDERS = [PACKAGE / name for name in ORDER if (PACKAGE / name).is_dir()]
WITHOUT_TORCH = ("schema", "cli")


def imported(file: Path) -> set[str]:
    """The modules that a file imports, wherever in it, as dotted names; a package with a name."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def rooms(file: Path) -> set[str]:
    """The folders and modules of the package that a file imports from."""
    parts = [name.split(".") for name in imported(file)]
    return {part[1] for part in parts if part[0] == "absorb" and len(part) > 1} & set(ORDER)


def files(place: Path) -> list[Path]:
    return sorted(place.rglob("*.py")) if place.is_dir() else [place.with_suffix(".py")]


def test_every_room_has_its_place() -> None:
    rooms = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or is_package(path)}
    assert rooms == {*ORDER, "__init__"}


def is_package(path: Path) -> bool:
    return (path / "__init__.py").is_file()


@pytest.mark.parametrize("name", ORDER)
def test_imports_only_point_down(name: str) -> None:
    allowed = {*ORDER[: ORDER.index(name)], name}
    for file in files(PACKAGE / name):
        assert rooms(file) <= allowed, file


def test_no_module_imports_itself_around_a_corner() -> None:
    known = {dotted(file): file for file in PACKAGE.rglob("*.py")}
    needs = {name: modules(file, known) - {name} for name, file in known.items()}
    while needs:
        free = {name for name, others in needs.items() if not others & needs.keys()}
        assert free, sorted(needs)
        needs = {name: others for name, others in needs.items() if name not in free}


def dotted(file: Path) -> str:
    return ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts)


def modules(file: Path, known: dict[str, Path]) -> set[str]:
    """Those of the known modules that a file imports, or imports something of."""
    names = imported(file)
    return {
        name for name in known if name in names or name in {n.rpartition(".")[0] for n in names}
    }


@pytest.mark.parametrize("folder", [f for top in FOLDERS for f in (top, *top.rglob("*/"))])
def test_a_folder_is_seen_at_a_glance(folder: Path) -> None:
    assert len([file for file in folder.glob("*.py") if file.stem != "__init__"]) <= MOST_FILES


@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_what_needs_no_torch_imports_none(name: str) -> None:
    found = [dotted(file) for file in files(PACKAGE / name) if file.stem != "__init__"]
    code = f"import sys, {', '.join(found)}; print({{'torch', 'transformers'}} & {{*sys.modules}})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"


def test_the_shipped_code_stands_alone() -> None:
    shipped = PACKAGE / "models" / "modeling_absorb.py"
    assert not rooms(shipped)
    roots = {name.split(".")[0] for name in imported(shipped)}
    assert roots - {*sys.stdlib_module_names} == {"torch", "transformers", "triton"}
