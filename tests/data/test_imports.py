"""The files of hsat.data form layers, and reading a cohort loads nothing heavy."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import hsat.data

FOLDER = Path(hsat.data.__file__).parent


def imports_of(path: Path) -> set[str]:
    """The files of this folder that a file imports, inside functions and TYPE_CHECKING blocks too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name.split(".")[2] for name in names if name.startswith("hsat.data.")} & {
        p.stem for p in FOLDER.glob("*.py")
    }


def test_no_file_imports_one_that_imports_it():
    order = list(TopologicalSorter({path.stem: imports_of(path) for path in FOLDER.glob("*.py")}).static_order())
    assert order.index("paths") < order.index("cohort") < order.index("opensrh") < order.index("layouts")
    assert order[-1] == "__init__"


def test_a_cohort_knows_no_reader_of_layouts():
    assert imports_of(FOLDER / "cohort.py") == {"file_check", "paths", "records", "splits"}
    layouts = {"assembly", "cohort", "folders", "layouts", "opensrh", "tables"}
    assert not imports_of(FOLDER / "file_check.py") & layouts


def test_importing_the_room_loads_nothing_heavy():
    heavy = ("torchvision", "timm", "faiss", "PIL", "tifffile", "matplotlib", "scipy", "pandas")
    code = f"import sys, hsat.data; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "[]\n"
