"""The house stays in order: imports point one way, files stay short, importing stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "wscl_fast"

# What each part may import of the package, beside itself.
ALLOWED = {
    "pairs": set(),
    "affinity": set(),
    "arrays": set(),
    "files": set(),
    "reference": {"pairs"},
    "scatter": set(),
    "slices": set(),
    "values": set(),
    "matching": {"pairs", "scatter", "slices", "values"},
    "chunked": {"pairs", "affinity", "reference", "scatter", "slices", "values"},
    "_ops": {"pairs", "values"},
    "_build": {"_ops"},
    "memory": {"_ops"},
    "functional": {
        "_ops",
        "chunked",
        "reference",
        "pairs",
        "matching",
        "affinity",
        "arrays",
        "scatter",
        "slices",
        "values",
    },
    "losses": {"functional", "distributed"},
    "queue": {"functional", "distributed"},
    "distributed": {"functional", "_ops", "pairs", "matching", "values"},
    "clustering": {"functional", "distributed", "arrays", "files", "scatter"},
    "data": {"files"},
    "train": {"files", "losses", "queue", "distributed", "clustering", "data", "functional", "_build"},
    "__init__": {"_build", "memory", "functional", "losses", "queue", "distributed", "clustering"},
    "__main__": {"train"},
}


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_parts(path: Path) -> set[str]:
    """The parts of the package that a file imports, wherever in the file."""
    parts = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            pieces = name.split(".")
            # Names that the package itself exports (the public interface) may be used from anywhere above.
            if pieces[0] == "wscl_fast" and len(pieces) > 1 and pieces[1] in ALLOWED:
                parts.add(pieces[1])
    return parts


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    part = part_of(path)
    assert part in ALLOWED, f"{part} is not in the plan of the house"
    assert imported_parts(path) - {part} <= ALLOWED[part]


def test_only_ops_touches_the_operators() -> None:
    users = [part_of(p) for p in PACKAGE.rglob("*.py") if "torch.ops.wscl_fast" in p.read_text()]
    assert set(users) == {"_ops"}


def test_the_core_knows_neither_torch_nor_python() -> None:
    for path in (ROOT / "csrc" / "core").iterdir():
        includes = [line for line in path.read_text().splitlines() if line.startswith("#include")]
        assert not [line for line in includes if "torch" in line or "Python" in line or "pybind" in line]


def test_files_stay_short() -> None:
    sources = [*PACKAGE.rglob("*.py"), *(ROOT / "csrc").rglob("*.*"), *(ROOT / "benchmarks").rglob("*.py")]
    long = {str(p.relative_to(ROOT)): n for p in sources if (n := len(p.read_text().splitlines())) >= 400}
    assert not long


def test_importing_the_package_is_light() -> None:
    """No package of an extra is imported, and no compiler is looked for."""
    script = """
import sys, subprocess
def refuse(*args, **kwargs): raise AssertionError(f"a process was started: {args}")
subprocess.Popen.__init__ = refuse
import torch
before = set(sys.modules)
import wscl_fast
print(" ".join(sorted({name.split(".")[0] for name in set(sys.modules) - before})))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    extras = {"matplotlib", "polars", "PIL", "sklearn", "scipy", "yaml", "tqdm", "safetensors", "resvg_py"}
    assert not extras & set(done.stdout.split())
