"""The wheel, built from a copy of the sources and installed elsewhere: what it holds, and whether it runs there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import hsat

pytest.importorskip("setuptools", minversion="77.0.1", reason="the build needs setuptools >= 77.0.1")
ROOT = Path(__file__).parents[2]
BUILD_SDIST = "import sys; from setuptools import build_meta; print(build_meta.build_sdist(sys.argv[1]))"


def run(*command: object, cwd: Path, **variables: str) -> str:
    """What a command prints, on both channels; AssertionError with all of it if it fails."""
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"} | variables
    words = [str(word) for word in command]
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    done = subprocess.run(words, check=False, cwd=cwd, env=environment, **both)
    assert done.returncode == 0, done.stdout
    return done.stdout


def build_wheel(source: Path, out: Path) -> tuple[Path, str]:
    """The wheel of a source folder or file, and what pip printed."""
    words = ("--no-deps", "--no-build-isolation", "--no-index", "--verbose", "--wheel-dir", out)
    printed = run(sys.executable, "-m", "pip", "wheel", source, *words, cwd=out.parent)
    (wheel,) = out.glob("*.whl")
    return wheel, printed


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """A copy of what git tracks that matters to a build, with folders that do not belong into a wheel."""
    copy = tmp_path_factory.mktemp("sources") / "hsat"
    for name in ("hsat", "examples", "tests", "benchmarks"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "results", "golden"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    return copy


@pytest.fixture(scope="module")
def built(sources, tmp_path_factory) -> tuple[Path, str]:
    return build_wheel(sources, tmp_path_factory.mktemp("wheel") / "dist")


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory) -> Path:
    """A folder that holds the installed wheel and nothing else."""
    folder = tmp_path_factory.mktemp("installed")
    words = ("--no-deps", "--no-index", "--no-compile", "--quiet", "--target", folder)
    run(sys.executable, "-m", "pip", "install", built[0], *words, cwd=folder.parent)
    return folder


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_the_wheel_holds_the_package_with_its_data_and_nothing_else(built):
    packed = contents(built[0])
    information = f"hsat-{hsat.__version__}.dist-info"
    assert {name.partition("/")[0] for name in packed} == {"hsat", information}
    data = {"hsat/py.typed", "hsat/report/page/report.html", "hsat/report/page/report.css"}
    data |= {str(path.relative_to(ROOT)) for path in (ROOT / "hsat" / "recipes").glob("*.yaml")}
    assert len(data) > 15
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "hsat").rglob("*.py")}
    assert {name for name in packed if name.startswith("hsat/")} == modules | data
    for name in modules | data:
        assert packed[name] == (ROOT / name).read_bytes(), name
    assert packed[f"{information}/licenses/LICENSE"] == (ROOT / "LICENSE").read_bytes()
    assert "License-Expression: MIT\n" in packed[f"{information}/METADATA"].decode()
    assert "hsat = hsat.cli.main:main\n" in packed[f"{information}/entry_points.txt"].decode()


def test_the_build_warns_of_nothing(built, sources, tmp_path):
    editable = run(
        sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index", "--verbose",
        "--target", tmp_path, "--editable", sources, cwd=tmp_path,
    )  # fmt: skip
    for printed in (built[1], editable):
        words = printed.lower()
        assert "hsat" in words  # pip did print what the build said
        assert "deprecat" not in words and "backendwarning" not in words and "informationonly" not in words, printed


def test_the_installed_wheel_runs_in_another_folder(installed, tmp_path):
    program = (
        "import importlib.metadata, pathlib, hsat\n"
        "import hsat.eval, hsat.report, hsat.training, hsat.data, hsat.models, hsat.testing\n"
        "print(pathlib.Path(hsat.__file__).parent, hsat.__version__, importlib.metadata.version('hsat'))\n"
        "for name in hsat.__all__: getattr(hsat, name)"
    )
    printed = run(sys.executable, "-c", program, cwd=tmp_path, PYTHONPATH=str(installed))
    assert printed.split() == [str(installed / "hsat"), hsat.__version__, hsat.__version__]


def test_the_installed_wheel_writes_a_report_from_its_template(installed, made_run, tmp_path):
    folder = made_run(tmp_path / "run")
    program = (
        "import sys, hsat, pathlib; from hsat.report import write_report\n"
        f"assert pathlib.Path(hsat.__file__).is_relative_to({str(installed)!r})\n"
        f"write_report([{str(folder)!r}], 'report.html')"
    )
    run(sys.executable, "-c", program, cwd=tmp_path, PYTHONPATH=str(installed))
    assert "<html" in (tmp_path / "report.html").read_text()


def test_the_source_archive_builds_the_same_wheel(built, sources, tmp_path):
    name = run(sys.executable, "-c", BUILD_SDIST, tmp_path, cwd=sources).split()[-1]
    again, _ = build_wheel(tmp_path / name, tmp_path / "dist")
    assert again.name == built[0].name
    assert contents(again) == contents(built[0])
