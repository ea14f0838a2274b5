"""The committed versions: constraints.txt (the lock) and constraints-oldest.txt (the declared lower bounds)."""

from __future__ import annotations

import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PYTHONS = ("3.11", "3.12", "3.13")
LINE = re.compile(r"(?P<name>[a-z0-9]+(-[a-z0-9]+)*)==(?P<version>[0-9][0-9a-z.]*)( ; (?P<marker>.+))?")


@pytest.fixture
def scripts(monkeypatch) -> tuple[ModuleType, ModuleType]:
    """The modules lock and oldest of this folder."""
    monkeypatch.syspath_prepend(Path(__file__).parent)
    import lock
    import oldest

    return lock, oldest


def pins(python: str, platform: str = "linux", path: Path = ROOT / "constraints.txt") -> dict[str, Version]:
    """{name: version} of the lines whose markers hold; AssertionError for a line that is no plain pin."""
    versions: dict[str, Version] = {}
    for line in path.read_text().splitlines():
        if line.startswith("#"):
            continue
        parts = LINE.fullmatch(line)
        assert parts, f"{path.name}: only name==version, with or without a marker: {line!r}"
        if parts["marker"] and not Marker(parts["marker"]).evaluate(
            {"python_version": python, "sys_platform": platform}
        ):
            continue
        assert parts["name"] not in versions, f"{path.name} pins {parts['name']} twice for Python {python}"
        versions[parts["name"]] = Version(parts["version"])
    return versions


def direct_requirements() -> list[Requirement]:
    """Of the core and of what the tests need."""
    extras = PROJECT["optional-dependencies"]
    texts = PROJECT["dependencies"] + extras["dev"]
    return [requirement for requirement in map(Requirement, texts) if requirement.name != "hsat"]


@pytest.mark.parametrize("platform", ["linux", "darwin"])
@pytest.mark.parametrize("python", PYTHONS)
def test_the_lock_pins_every_direct_dependency_inside_its_declared_range(python, platform):
    locked = pins(python, platform)
    for requirement in direct_requirements():
        assert locked[canonicalize_name(requirement.name)] in requirement.specifier, requirement
    assert {"pip", "setuptools", "torchattacks"} <= set(locked)  # the Makefile installs these three by name


def test_the_lock_serves_every_python_that_the_project_names():
    supported = SpecifierSet(PROJECT["requires-python"])
    assert all(python in supported for python in PYTHONS)
    named = [line.rpartition(" ")[2] for line in PROJECT["classifiers"] if "Python :: 3." in line]
    assert tuple(named) == PYTHONS


def test_gpu_libraries_are_pinned_for_linux_alone():
    linux, mac = pins("3.12"), pins("3.12", "darwin")
    assert {name for name in linux if name.startswith(("nvidia-", "cuda-"))} and "triton" in linux
    assert not {name for name in mac if name.startswith(("nvidia-", "cuda-", "triton"))}
    assert {name: linux[name] for name in mac} == mac


def locked_environment() -> dict[str, Version]:
    """The lock of this Python; skips where the installed direct dependencies are other ones."""
    locked = pins(f"{sys.version_info[0]}.{sys.version_info[1]}", sys.platform)
    for requirement in direct_requirements():
        try:
            installed = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            pytest.skip(f"not the locked environment: {requirement.name} is not installed")
        wanted = locked[canonicalize_name(requirement.name)]
        if Version(installed.partition("+")[0]) != wanted:
            pytest.skip(f"not the locked environment: {requirement.name} is {installed}, the lock has {wanted}")
    return locked


def test_the_lock_pins_what_dependencies_bring_along():
    locked = locked_environment()
    waiting, seen = [(requirement.name, ("",)) for requirement in direct_requirements()], set()
    while waiting:
        name, extras = waiting.pop()
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        installed = Version(importlib.metadata.version(name).partition("+")[0])
        assert locked.get(canonicalize_name(name)) == installed, f"{name} {installed} is not what the lock says"
        for requirement in map(Requirement, importlib.metadata.requires(name) or ()):
            marker = requirement.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in extras):
                waiting.append((requirement.name, ("", *sorted(requirement.extras))))
    assert len(seen) > len(direct_requirements())


def test_the_oldest_versions_are_the_declared_lower_bounds(scripts):
    _, oldest = scripts
    pyproject, path = (ROOT / "pyproject.toml").read_text(), ROOT / "constraints-oldest.txt"
    assert path.read_text() == oldest.constraints(pyproject), "run python tests/packaging/oldest.py"
    bounds = oldest.lower_bounds(pyproject)
    assert set(bounds) == {requirement.name for requirement in direct_requirements()}
    for requirement in direct_requirements():
        assert Version(bounds[requirement.name]) in requirement.specifier


@pytest.mark.parametrize(
    "requirement", ["torch", "torch==2.6", "torch>=2.6,<3", "torch @ https://example.org/torch.whl"]
)
def test_a_requirement_without_a_plain_lower_bound_is_named(scripts, requirement):
    _, oldest = scripts
    text = (
        f'[project]\nname = "hsat"\ndependencies = ["{requirement}"]\noptional-dependencies = {{report = [], dev = []}}'
    )
    with pytest.raises(ValueError, match=re.escape(repr(requirement))):
        oldest.lower_bounds(text)


def test_versions_that_differ_between_pythons_get_markers_that_leave_no_gap(scripts):
    lock, _ = scripts
    text = lock.lock(
        {
            "3.11": {"numpy": "2.4", "same": "1", "nvidia-x": "1", "three": "1", "early": "1"},
            "3.12": {"numpy": "2.5", "same": "1", "nvidia-x": "1", "three": "2"},
            "3.13": {"numpy": "2.5", "same": "1", "nvidia-x": "2", "three": "3"},
        }
    )
    assert [line for line in text.splitlines() if not line.startswith("#")] == [
        "early==1",
        'numpy==2.4 ; python_version < "3.12"',
        'numpy==2.5 ; python_version >= "3.12"',
        'nvidia-x==1 ; python_version < "3.13" and sys_platform == "linux"',
        'nvidia-x==2 ; python_version >= "3.13" and sys_platform == "linux"',
        "same==1",
        'three==1 ; python_version < "3.12"',
        'three==2 ; python_version >= "3.12" and python_version < "3.13"',
        'three==3 ; python_version >= "3.13"',
    ]
