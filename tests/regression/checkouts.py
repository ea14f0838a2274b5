"""A checkout and its environment, and the results of commands run there, kept by what they depend on."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from commands import LAYOUT, Command
from editions import Edition, edition_of

HERE = Path(__file__).parent
SOURCES = (
    "hsat",
    "examples",
    "tests/regression/small_runs.py",
)  # what the commands run; a change elsewhere makes no result stale
LIBRARIES = ("torch", "torchvision", "timm", "numpy", "faiss-cpu", "scipy", "scikit-learn", "pillow", "tifffile")
PROBE = f"""
import json, platform, hsat
from importlib import metadata
versions = dict(hsat=hsat.__file__, python=platform.python_version())
for name in {LIBRARIES}:
    try:
        versions[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
        pass
print(json.dumps(versions))
"""


class CommandFailedError(Exception):
    """A command ended with an error; its log is named."""


@dataclass(frozen=True, eq=False)
class Checkout:
    """One side of the comparison.

    side: "old" or "new".  versions: of Python and of the libraries that decide numbers.  sources: digest of the
    committed sources, None where they are changed or not under git, so that no result is reused.
    """

    side: str
    folder: Path
    python: Path
    edition: Edition
    versions: Mapping[str, str]
    sources: str | None

    @classmethod
    def open(cls, side: str, folder: Path, python: Path | None, table: Mapping[str, Any]) -> Checkout:
        """Look at a folder and its Python.  ValueError where they do not belong together."""
        folder = folder.resolve()
        if not (folder / "hsat").is_dir():
            raise ValueError(f"{folder} holds no folder hsat; give the root of a checkout")
        python = python or folder / ".venv" / "bin" / "python"
        if not python.exists():
            raise ValueError(f"there is no {python}; run `make install` in {folder}, or give --python-{side} PYTHON")
        probe = subprocess.run(
            [python, "-c", PROBE], env=environment(folder), cwd="/", capture_output=True, text=True, check=False
        )
        if probe.returncode:
            raise ValueError(f"{python} cannot import hsat of {folder}:\n{probe.stderr.strip()}")
        versions = json.loads(probe.stdout)
        if not Path(versions.pop("hsat")).resolve().is_relative_to(folder):
            raise ValueError(f"{python} imports another hsat than that of {folder}")
        return cls(side, folder, python, edition_of(folder, table), versions, sources_of(folder))

    def describe(self) -> str:
        """One line for people."""
        versions = ", ".join(f"{name} {self.versions.get(name)}" for name in ("python", "torch", "numpy"))
        state = f"sources {self.sources[:12]}" if self.sources else "changed sources, nothing is reused"
        return f"{self.side}: {self.folder} ({state}; {versions})"


def environment(folder: Path) -> dict[str, str]:
    """Of every command: hsat of this folder, one thread, no GPU, no network, no ranks of a surrounding torchrun."""
    kept = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("TORCHELASTIC", "PYTHON")) and key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    }
    fixed = {"PYTHONPATH": str(folder), "PYTHONHASHSEED": "0", "CUDA_VISIBLE_DEVICES": "", "MPLBACKEND": "Agg"}
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    return kept | fixed | threads | {"HF_HUB_OFFLINE": "1", "GLOO_SOCKET_IFNAME": kept.get("GLOO_SOCKET_IFNAME", "lo")}


def sources_of(folder: Path) -> str | None:
    """A digest of the committed sources; None where there are changes or no git."""
    changed = _git(folder, "status", "--porcelain", "--", *SOURCES)
    if changed is None or changed:
        return None
    trees = _git(folder, "ls-tree", "HEAD", *SOURCES)
    return hashlib.sha256(trees.encode()).hexdigest() if trees else None


def _git(folder: Path, *words: str) -> str | None:
    done = subprocess.run(["git", "-C", folder, *words], capture_output=True, text=True, check=False)
    return done.stdout if done.returncode == 0 else None


@dataclass(frozen=True)
class Workshop:
    """The folder where commands run and their results stay.  fresh: run again what is there already."""

    folder: Path
    fresh: bool = False

    def run(self, command: Command, checkout: Checkout, inputs: Mapping[str, Path]) -> Path:
        """The folder of a command's results, from an earlier comparison where nothing has changed.

        inputs: folders of results, by command.  Raises CommandFailedError with the end of its log.
        """
        words = self._words(command, checkout, inputs)
        place = self._place(command, checkout, inputs)
        reused = place.exists() and checkout.sources is not None and not self.fresh
        if not reused:
            self._run(command, checkout, words, place)
        return place / "out"

    def seconds(self, results: Path) -> float:
        """How long the command took that wrote these results."""
        return float(json.loads((results.parent / "run.json").read_text())["seconds"])

    def _words(self, command: Command, checkout: Checkout, inputs: Mapping[str, Path]) -> list[str]:
        edition = checkout.edition
        words = edition.words(command, {"checkout": str(checkout.folder), "here": str(HERE)})
        if command.ranks:
            launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={command.ranks}"]
            words = [*launcher, *words]
        options = dict(command.options)
        if command.cohort:
            options |= {"data.root": str(inputs["cohort"] / command.cohort)} | LAYOUT[command.cohort]
            options |= {"out": "out"}
        if command.encoders:
            files = [f"{name}={inputs[trained] / 'final.safetensors'}" for name, trained in command.encoders]
            options["checkpoint"] = ",".join(files)
        return [str(checkout.python), *words, *edition.spelled(options)]

    def _place(self, command: Command, checkout: Checkout, inputs: Mapping[str, Path]) -> Path:
        """A folder named by all that the results depend on."""
        if checkout.sources is None:
            return self.folder / "results" / f"{command.name}-{checkout.side}-changed"
        digests = {name: digest_of(path) for name, path in inputs.items()}
        paths = {name: Path(name) for name in inputs}  # the same words wherever the folders are
        words = self._words(command, checkout, paths)[1:]
        decisive = [checkout.side, str(checkout.folder), checkout.sources, checkout.versions, words, digests]
        decisive += [Path(word).read_text() for word in words if word.startswith(str(HERE))]
        key = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:16]
        return self.folder / "results" / f"{command.name}-{checkout.side}-{key}"

    def _run(self, command: Command, checkout: Checkout, words: list[str], place: Path) -> None:
        working = place.with_name(f"{place.name}.partial-{os.getpid()}")
        shutil.rmtree(working, ignore_errors=True)
        working.mkdir(parents=True)
        began = time.monotonic()
        with (working / "log.txt").open("w") as log:
            done = subprocess.run(
                words, cwd=working, env=environment(checkout.folder), stdout=log, stderr=subprocess.STDOUT, check=False
            )
        if done.returncode or not (working / "out").is_dir():
            failed = place.with_name(f"{place.name}.failed")
            shutil.rmtree(failed, ignore_errors=True)
            working.rename(failed)
            end = "\n".join((failed / "log.txt").read_text().splitlines()[-5:])
            raise CommandFailedError(f"ended with status {done.returncode}, see {failed / 'log.txt'}:\n{end}")
        about = {"words": words, "seconds": round(time.monotonic() - began, 1), "checkout": checkout.describe()}
        (working / "run.json").write_text(json.dumps(about, indent=1) + "\n")
        shutil.rmtree(place, ignore_errors=True)
        working.rename(place)


def digest_of(folder: Path) -> str:
    """SHA-256 over the names and bytes of the files that other commands read: cohorts and final encoders."""
    digest = hashlib.sha256()
    final = folder / "final.safetensors"
    files: Iterable[Path] = [final] if final.exists() else sorted(p for p in folder.rglob("*") if p.is_file())
    for path in files:
        digest.update(f"{path.relative_to(folder).as_posix()}\0".encode() + path.read_bytes())
    return digest.hexdigest()
