"""Write constraints.txt anew: what pip would install today on each Python that hsat supports.

pip only resolves; nothing but metadata is downloaded, and a temporary environment per Python is removed afterwards.
Versions that differ between the Pythons get a marker.

    python tests/packaging/lock.py --pythons python3.11 python3.12 python3.13
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
INSTALLERS = ("pip", "setuptools")  # they make the environment, so they are pinned with it
WITHOUT_DEPENDENCIES = ("torchattacks",)  # its own pins are old; only tests import it
LINUX_ONLY = ("cuda-", "nvidia-", "triton")  # what torch asks for on Linux; its wheels elsewhere bring no GPU library
HEADER = """\
# What `make demo` and `make test` install, on Python {pythons}.  Written by `make lock`; not meant to be edited.
# Linux libraries of torch's GPU builds are marked; where other wheels of torch are installed, their lines do nothing.
"""


def canonical(name: str) -> str:
    """The name as PyPI compares it: lower case, runs of - _ . are one hyphen."""
    return re.sub(r"[-_.]+", "-", name).lower()


def resolve(python: Path, *requirements: str) -> dict[str, str]:
    """{name: version} that `pip install requirements` would install into an empty environment of this Python."""
    command = [python, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--report", "-"]
    answer = subprocess.run([*command, *requirements], check=True, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    packages = [entry["metadata"] for entry in json.loads(answer.stdout)["install"]]
    # a local label ("+cpu") names one build of a release; the lock is for all builds
    return {canonical(package["name"]): package["version"].partition("+")[0] for package in packages}


def version_of(python: str) -> str:
    """ "3.12" for an interpreter; SystemExit if it does not run."""
    ask = "import sys; print('%d.%d' % sys.version_info[:2])"
    try:
        answer = subprocess.run([python, "-c", ask], check=True, stdout=subprocess.PIPE, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(f"{python} does not run ({error}); name the interpreters: make lock PYTHONS='...'") from None
    return answer.stdout.strip()


def resolve_all(python: str) -> dict[str, str]:
    """{name: version} for one interpreter: hsat's dev extra and the installers, as the newest pip resolves them."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([python, "-m", "venv", folder], check=True)
        own = Path(folder) / "bin" / "python"
        subprocess.run([own, "-m", "pip", "install", "--quiet", "--upgrade", "pip"], check=True)
        packages = resolve(own, *INSTALLERS, "torch", "torchvision", ".[dev]")
        packages |= resolve(own, "--no-deps", *WITHOUT_DEPENDENCIES)
    return {name: version for name, version in packages.items() if name != "hsat"}


def pins(name: str, versions: dict[str, str]) -> list[str]:
    """The lines of one package.  versions: {"3.11": version, ...}, Pythons in order, possibly not all of them."""
    groups: list[tuple[str, str]] = []  # (first Python, version)
    for python, version in versions.items():
        if not groups or groups[-1][1] != version:
            groups.append((python, version))
    lines = []
    for index, (first, version) in enumerate(groups):
        markers = [f'python_version >= "{first}"'] if index else []
        if index + 1 < len(groups):
            markers.append(f'python_version < "{groups[index + 1][0]}"')
        if name.startswith(LINUX_ONLY):
            markers.append('sys_platform == "linux"')
        lines.append(f"{name}=={version}" + (" ; " + " and ".join(markers) if markers else ""))
    return lines


def lock(resolved: dict[str, dict[str, str]]) -> str:
    """The text of the constraints file.  resolved: {"3.11": {name: version}, ...}, Pythons in order."""
    lines = []
    for name in sorted(set().union(*resolved.values())):
        lines += pins(name, {python: packages[name] for python, packages in resolved.items() if name in packages})
    return HEADER.format(pythons=", ".join(resolved)) + "\n".join(lines) + "\n"


def main() -> None:
    """Resolve and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pythons", nargs="+", default=["python3.11", "python3.12", "python3.13"])
    parser.add_argument("--out", type=Path, default=ROOT / "constraints.txt")
    options = parser.parse_args()
    pythons = {version_of(python): python for python in options.pythons}
    in_order = sorted(pythons, key=lambda version: [int(part) for part in version.split(".")])
    options.out.write_text(lock({version: resolve_all(pythons[version]) for version in in_order}))


if __name__ == "__main__":
    main()
