"""The house: rooms import only rooms below them, and each foreign library has its rooms."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import dfx

ROOT = Path(dfx.__file__).parent
ROOMS = [  # from the ground up; those of one line may not import each other
    ["errors", "html"],
    ["remote"],
    ["resolution", "tiff_rules"],
    ["masks", "coords"],
    ["grid"],
    ["slides"],
    ["reader"],
    ["pictures"],
    ["encoders"],
    ["plan"],
    ["memory"],
    ["kernel"],
    ["pin"],
    ["cluster"],
    ["store"],
    ["arrays", "loose"],
    ["run"],
    ["table", "progress", "counters", "export", "report"],
    ["call"],
    ["extractor"],
    ["demo"],
    ["cli"],
    ["__main__"],
]
FLOOR = {room: floor for floor, rooms in enumerate(ROOMS) for room in rooms}
ALLOWED = {
    "tifffile": {"slides", "masks"},
    "openslide": {"slides"},
    "torch": {"encoders"},
    "timm": {"encoders"},
    "fsspec": {"remote"},
    "distributed": {"run", "cluster", "memory"},
}


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Every module that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


FILES = sorted(p for p in ROOT.rglob("*.py") if p != ROOT / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_room_imports_only_rooms_below_it(path: Path) -> None:
    here = room_of(path)
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "dfx":
            other = parts[1]
            assert other in FLOOR, f"{path} imports {name}, which is no room"
            assert other == here or FLOOR[other] < FLOOR[here], f"{here} imports {other}, which is not below it"


def test_the_readme_has_a_word_on_every_room() -> None:
    text = (Path(__file__).parents[1] / "README.md").read_text()
    assert [room for room in FLOOR if f"**{room}**" not in text] == ["__main__"]


@pytest.mark.parametrize("library", sorted(ALLOWED))
def test_a_library_that_may_be_replaced_is_imported_in_its_rooms_only(library: str) -> None:
    rooms = {room_of(path) for path in FILES if any(name.split(".")[0] == library for name in imports(path))}
    assert rooms <= ALLOWED[library]


def test_the_kernel_runs_without_dask() -> None:
    for room in ("kernel", "reader", "plan"):
        names = {name.split(".")[0] for name in imports(ROOT / f"{room}.py")}
        assert not names & {"dask", "distributed"}, room


def test_importing_dfx_imports_neither_torch_nor_openslide() -> None:
    code = "import sys, dfx; assert not {'torch', 'openslide'} & set(sys.modules)"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_a_given_module_is_run_without_timm() -> None:
    """It takes a worker seconds to import and 200 MB to hold, with all that it imports."""
    code = """import sys, numpy, torch, dfx
from dfx import encoders
encoder = dfx.load_encoder(torch.nn.Flatten())
assert encoders.output(encoder, (4, 4))[0] == 48
assert encoders.encode(encoder, numpy.zeros((2, 4, 4, 3), "u1")).shape == (2, 48)
assert "timm" not in sys.modules"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
