"""Write constraints-oldest.txt anew: every lower bound of pyproject.toml as a pin.

A test compares the file with pyproject.toml, so the two cannot drift.

    python tests/packaging/oldest.py
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
EXTRAS = ("dev",)  # what `make test` installs
HEADER = """\
# The oldest releases that pyproject.toml declares, on Python 3.11; `tests/matrix.sh oldest` runs the tests on them.
# Written by tests/packaging/oldest.py; not meant to be edited.
"""


def lower_bounds(pyproject: str) -> dict[str, str]:
    """{name: lowest version} of the core and of what `make test` installs.

    Raises:
        ValueError: a requirement without a lower bound, or one package with two different ones.
    """
    project = tomllib.loads(pyproject)["project"]
    requirements = list(project["dependencies"])
    for extra in EXTRAS:
        requirements += project["optional-dependencies"][extra]
    bounds: dict[str, str] = {}
    for requirement in requirements:
        if requirement.startswith(f"{project['name']}["):
            continue
        parts = re.fullmatch(r"([\w.-]+)>=([\w.]+)", requirement)
        if parts is None:
            raise ValueError(f"pyproject.toml: write {requirement!r} as name>=version; the bound is tested")
        name, version = parts.groups()
        if bounds.setdefault(name, version) != version:
            raise ValueError(f"pyproject.toml: {name} has two lower bounds, {bounds[name]} and {version}")
    return bounds


def constraints(pyproject: str) -> str:
    """The text of constraints-oldest.txt."""
    bounds = lower_bounds(pyproject)
    return HEADER + "".join(f"{name}=={bounds[name]}\n" for name in sorted(bounds, key=str.lower))


if __name__ == "__main__":
    (ROOT / "constraints-oldest.txt").write_text(constraints((ROOT / "pyproject.toml").read_text()))
