"""Tiny cohorts on disk, one finished training, and ways to run the commands as a user would."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hsat.data import write_synthetic_cohort

# An epoch has two batches here, so the checkpoints after steps 3 and 6 lie within one and between two.
SMALL = "--data.image_size 32 --model.backbone test_byobnet --model.embedding_dim 16".split()
SHORT = "--train.steps 8 --train.batch_patients 2 --train.eval_every 4 --train.save_every 3 --attack.steps 2".split()


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Sums depend on how many threads share them; the subprocesses get one by OMP_NUM_THREADS."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An OpenSRH folder of two classes; a class has three patients to train on and one to validate on."""
    return write_synthetic_cohort(
        tmp_path_factory.mktemp("cohort") / "srh", classes=("hgg", "lgg"), patients_per_class=4, patches=3, size=32
    )


@pytest.fixture
def own_root(root: Path, tmp_path: Path) -> Path:
    """A copy of that cohort that a test may damage."""
    return Path(shutil.copytree(root, tmp_path / "own"))


@pytest.fixture(scope="session")
def colour_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """RGB PNGs as class/patient/slide/patch.png, and the same as manifest.csv; patches are not square."""
    root, rng = tmp_path_factory.mktemp("colour"), np.random.default_rng(0)
    lines = ["path,class,patient,slide"]
    for number in range(8):
        name = ("adenoma", "normal")[number % 2]
        for patch in range(2):
            path = root / name / f"p{number}" / "s1" / f"{patch}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 120, (40, 36, 3)) + 100 * (number % 2)
            Image.fromarray(pixels.astype(np.uint8)).save(path)
            lines.append(f"{path.relative_to(root)},{name},p{number},s1")
    (root / "manifest.csv").write_text("\n".join(lines) + "\n")
    return root


@pytest.fixture(scope="session")
def options(root: Path) -> list[str]:
    """The options of a training of a few seconds, without --out."""
    return ["--data.root", str(root), *SMALL, *SHORT, "--quiet"]


@pytest.fixture(scope="session")
def trained(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of that training, never interrupted.  Read only."""
    from hsat.cli.train import main

    out = tmp_path_factory.mktemp("trained") / "run"
    main([*options, "--out", str(out)])
    return out


@pytest.fixture
def stops() -> Callable[..., str]:
    """stops(main, argv): main ends the program; the message, which is one for people and not a traceback."""

    def call(main: Callable[[list[str]], object], argv: list[str]) -> str:
        with pytest.raises(SystemExit) as stop:
            main(argv)
        assert isinstance(stop.value.code, str), f"ended with {stop.value.code!r}"
        assert stop.value.code.startswith("error:")
        return stop.value.code

    return call


@pytest.fixture(scope="session")
def launch() -> Callable[..., subprocess.Popen[str]]:
    """launch(command, *argv, cwd=...): `hsat command` as a process of its own, in a process group of its own."""

    def start(command: str, *argv: str, cwd: Path) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "hsat", command, *argv],
            cwd=cwd,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    return start
