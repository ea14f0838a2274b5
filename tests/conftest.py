"""Material of several test folders: tables, a run folder, cohorts on disk, one training, commands as processes."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from hsat.data import write_synthetic_cohort
from hsat.eval import Provenance, Record, write_records
from hsat.eval.artifact_files import ArtifactSource, write_artifacts
from hsat.types import EmbeddingTable, HierarchicalBatch

ROOT = Path(__file__).parents[1]
CACHES = {"__pycache__", ".pytest_cache", ".hypothesis", ".ruff_cache", ".mypy_cache"}
BEFORE, WRITTEN = pytest.StashKey[set[Path]](), pytest.StashKey[list[str]]()
CLASSES = ("hgg", "lgg", "normal")
CONDITIONS = {  # name: (repr of the attack, eps in grey levels, what is left of the clean value)
    "clean": ("", 0, 1.0),
    "noise-8": ("RandomNoise(Linf(eps=8/255))", 8, 0.95),
    "PGD-4": ("PGD(Linf(eps=4/255), steps=10)", 4, 0.75),
    "PGD-8": ("PGD(Linf(eps=8/255), steps=10)", 8, 0.5),
    "BIM-8": ("BIM(Linf(eps=8/255), steps=10)", 8, 0.55),
}


@pytest.fixture(scope="session")
def golden() -> dict[str, np.ndarray]:
    """Reference numbers of kNN, pooling and metrics from the published code."""
    with np.load(Path(__file__).parent / "golden" / "knn.npz") as arrays:
        return {name: arrays[name] for name in arrays.files}


def _table(z, label=None, *, slide=None, patient=None, classes=None, class_names=None, **text) -> EmbeddingTable:
    n = len(z)
    label = np.zeros(n, dtype=np.int64) if label is None else np.asarray(label)
    count = int(label.max(initial=0)) + 1 if classes is None else classes
    index = np.arange(n)
    return EmbeddingTable(
        z=np.asarray(z),
        label=label,
        patch=index,
        slide=index if slide is None else np.asarray(slide),
        patient=index if patient is None else np.asarray(patient),
        class_names=tuple("abcdefghij"[:count]) if class_names is None else class_names,
        **text,
    )


@pytest.fixture(scope="session")
def table() -> Callable[..., EmbeddingTable]:
    """Make a table from embeddings; ids default to one slide and one patient per row."""
    return _table


def _record(**changes: Any) -> Record:
    values: dict[str, Any] = dict(
        model="hsat",
        attack="PGD(...)",
        attack_name="PGD-8",
        eps="8/255",
        eps_value=8 / 255,
        target="features",
        level="patch",
        metric="accuracy",
        value=0.5,
        low=0.25,
        high=0.75,
        n=100,
        k=200,
        temperature=0.07,
        seed=0,
        versions={"torch": "2"},
        flags=("doubtful",),
        settings={"random_start": True, "note": "noted"},
    )
    return Record(**(values | changes))


@pytest.fixture(scope="session")
def made_record() -> Callable[..., Record]:
    """made_record(**changes): one record of an attack, with an interval, a flag and a note."""
    return _record


def _records(model: str = "HSAT", value: float = 0.8, **changes: Any) -> list[Record]:
    first = Record(
        model=model,
        attack="",
        attack_name="clean",
        eps="0",
        eps_value=0.0,
        target="features",
        level="patch",
        metric="accuracy",
        value=value,
        n=36,
        k=20,
        temperature=0.07,
        seed=0,
        versions={"hsat": "0.1.0", "torch": "2.0"},
        cohort="c0ffee" * 10,
        split="val",
        checkpoint=f"digest of {model}",
        settings={"layer": "features", "how": "mean", "bank_rows": 90, "bank_cohort": "c0ffee" * 10},
    )
    found = []
    for name, (attack, eps, share) in CONDITIONS.items():
        for level, n in (("patch", 36), ("slide", 12), ("patient", 6)):
            for metric, less, chance in (("accuracy", 0.0, 0.4), ("mca", 0.02, 1 / 3), ("map", 0.01, 1 / 3)):
                kept = round(share * value - less, 6)
                about = {"zero_gradient_share": 0.0, "never_moved_share": 0.0} if attack else {}
                record = replace(
                    first,
                    attack=attack,
                    attack_name=name,
                    eps=f"{eps}/255",
                    eps_value=eps / 255,
                    level=level,
                    metric=metric,
                    value=kept,
                    low=max(0.0, kept - 0.1),
                    high=min(1.0, kept + 0.1),
                    chance=chance,
                    n=n,
                    settings=first.settings | about,
                )
                found.append(replace(record, **changes))
    return found


def _files_of_the_project() -> set[Path]:
    """What lies in the project's folder and in the folders there, but for caches and hidden folders."""
    top = [path for path in ROOT.iterdir() if path.name not in CACHES]
    inside = [path.iterdir() for path in top if path.is_dir() and not path.name.startswith(".")]
    return {*top, *(path for paths in inside for path in paths if path.name not in CACHES)}


def pytest_sessionstart(session: pytest.Session) -> None:
    """Under xdist the controller looks, for all workers; without it, the one process."""
    if not hasattr(session.config, "workerinput"):
        session.config.stash[BEFORE] = _files_of_the_project()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A suite that wrote into the project's folder fails."""
    before = session.config.stash.get(BEFORE, None)
    if before is not None and (new := _files_of_the_project() - before):
        session.config.stash[WRITTEN] = sorted(str(path.relative_to(ROOT)) for path in new)
        if session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Name what was written."""
    if names := terminalreporter.config.stash.get(WRITTEN, None):
        terminalreporter.write_line(
            f"FAILED: while the tests ran, this appeared in {ROOT}: {', '.join(names)}; tests write to tmp_path",
            red=True,
        )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped, with the reason, where torch sees no GPU."""
    if torch.cuda.is_available():
        return
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    skip = pytest.mark.skip(reason=f"needs a CUDA device; torch {torch.__version__}, built for {built}, sees none")
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def made_records() -> Callable[..., list[Record]]:
    """made_records(model, value, **changes): one evaluation's records, clean, noise and three attacks."""
    return _records


def _artifacts(folder: Path, model: str, *, size: int = 12, **changes: Any) -> Path:
    rng = np.random.default_rng(len(model))
    n = 36
    label = np.arange(n) % 3
    centre = np.eye(8)[label]
    images = torch.from_numpy(rng.random((3, 3, size, size), dtype=np.float32))
    tables, scores, examples = {}, {}, {}
    for name, (_, eps, share) in CONDITIONS.items():
        z = centre * share + 0.1 * rng.standard_normal((n, 8))
        ids = {"patch": np.arange(n), "slide": np.arange(n) % 12, "patient": np.arange(n) % 6}
        tables[name] = EmbeddingTable(z=z, label=label, class_names=CLASSES, **ids)
        wrong = rng.random(n) > share
        found = np.full((n, 3), 0.1)
        found[np.arange(n), np.where(wrong, (label + 1) % 3, label)] = 0.8
        scores[name] = {20: found}
        sign = torch.from_numpy(rng.choice([-1.0, 1.0], images.shape).astype(np.float32))
        examples[name] = (images + eps / 255 * sign).clamp(0, 1)
    options: dict[str, Any] = {"target": "features", "checkpoint": f"digest of {model}"} | changes
    provenance = Provenance(model=model, checkpoint=options.pop("checkpoint"))
    source = ArtifactSource(tables=tables, scores=scores, class_names=CLASSES, examples=examples)
    return write_artifacts(folder, source, provenance=provenance, **options)


@pytest.fixture(scope="session")
def made_artifacts() -> Callable[..., Path]:
    """made_artifacts(folder, model): artifacts of random embeddings and images that fits `made_records`."""
    return _artifacts


def _run(folder: Path, *, models: tuple[str, ...] = ("HiDisc", "HSAT")) -> Path:
    values = [0.8 - 0.1 * index for index in range(len(models))]
    write_records(
        folder / "records.jsonl",
        [record for model, value in zip(models, values, strict=True) for record in _records(model, value)],
    )
    for model in models:
        _artifacts(folder / "evidence", model)
    about = {
        "settings": {"seed": 3, "data": {"image_size": 48}, "k": [20]},
        "cohort": "c0ffee" * 10,
        "versions": {"hsat": "0.1.0", "torch": "2.0"},
        "command": ["examples/evaluate_whitebox.py", "--k", "20"],
    }
    (folder / "run.json").write_text(json.dumps(about))
    steps = [
        f"{step},{12 / (1 + step / 50):.4f},{4 / (1 + step / 50):.4f},{0.3 if step % 100 == 0 else ''}"
        for step in range(500)
    ]
    (folder / "train.csv").write_text("\n".join(["step,loss,adversarial_patch,tune_robust_accuracy", *steps]) + "\n")
    return folder


@pytest.fixture(scope="session")
def made_run() -> Callable[..., Path]:
    """made_run(folder, models=...): a run folder with records, artifacts, run.json and train.csv."""
    return _run


class ToyEncoder(nn.Module):
    """Features: two colour contrasts of the whole image beside a constant; embedding: a fixed mixture of them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.head = nn.Linear(3, 4, bias=False)
        with torch.no_grad():
            self.head.weight.copy_(torch.tensor([[2.0, 0.5, 0.3], [0.0, 2.0, 0.3], [-1.0, 1.0, 0.2], [0.0, 0.0, 1.0]]))
        self.forwards = 0

    def features(self, images: Tensor) -> Tensor:
        self.forwards += 1
        mean = self.norm(images).mean((2, 3)) - 0.5
        contrast = torch.stack((mean[:, 0] - mean[:, 1], mean[:, 1] - mean[:, 2]), 1)
        return torch.cat((40 * contrast, torch.ones_like(contrast[:, :1])), 1)

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.normalize(self.head(self.features(images)), dim=1)


class ToyLoader(list):
    """Batches of grey images with a faint tint per class, and the dataset that describes them."""

    class dataset:
        class_names = ("cyan", "green", "red")
        split = "val"

        class cohort:
            @staticmethod
            def fingerprint() -> str:
                return "toy"


def _toy_batches(*, seed: int, sizes: tuple[int, ...], patients: int = 9, first_id: int = 0) -> ToyLoader:
    generator = torch.Generator().manual_seed(seed)
    tint = torch.tensor([[-4.0, 2.0, 2.0], [-2.0, 4.0, -2.0], [4.0, -2.0, -2.0]]) / 255
    loader, patch = ToyLoader(), first_id
    for size in sizes:
        index = torch.arange(patch, patch + size)
        slide = index % (2 * patients)
        label = (slide % patients) % 3
        noise = torch.randn(size, 3, 6, 6, generator=generator) * 4 / 255
        images = (0.5 + tint[label][:, :, None, None] + noise).clamp(0, 1)
        loader.append(HierarchicalBatch(images, index, slide + 1000 * first_id, slide % patients + first_id, label))
        patch += size
    return loader


@pytest.fixture(scope="session")
def toy_batches() -> Callable[..., ToyLoader]:
    return _toy_batches


@pytest.fixture
def toy_encoder() -> ToyEncoder:
    return ToyEncoder()


# An epoch has two batches here, so the checkpoints after steps 3 and 6 lie within one and between two.
SMALL = "--data.image_size 32 --model.backbone test_byobnet --model.embedding_dim 16".split()
SHORT = "--train.steps 8 --train.batch_patients 2 --train.eval_every 4 --train.save_every 3 --attack.steps 2".split()


@pytest.fixture(scope="session")
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
def trained(options: list[str], one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
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


def _start(words: list[str], cwd: Path, **environment: str) -> subprocess.Popen[str]:
    """A process in a process group of its own, whose errors are in its output."""
    return subprocess.Popen(
        [sys.executable, *words],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.fixture(scope="session")
def hear_ctrl_c() -> Iterator[None]:
    """Where pytest runs in the background it ignores Ctrl-C, and so would the processes that it starts."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def launch(hear_ctrl_c: None) -> Callable[..., subprocess.Popen[str]]:
    """launch(command, *argv, cwd=..., **environment): `hsat command` as a process of its own; or a script.py."""

    def start(command: object, *argv: object, cwd: Path, **environment: str) -> subprocess.Popen[str]:
        first = [str(command)] if str(command).endswith(".py") else ["-m", "hsat", str(command)]
        return _start([*first, *map(str, argv)], cwd, **environment)

    return start


@pytest.fixture(scope="session")
def torchrun(hear_ctrl_c: None) -> Callable[..., subprocess.Popen[str]]:
    """torchrun(command, *argv, cwd=..., ranks=2, restarts=0): the same by torchrun, over gloo on this machine."""

    def start(
        command: object, *argv: object, cwd: Path, ranks: int = 2, restarts: int = 0, meeting: str = "--standalone"
    ) -> subprocess.Popen[str]:
        first = [str(command)] if str(command).endswith(".py") else ["-m", "hsat", str(command)]
        options = [f"--nproc_per_node={ranks}", f"--max_restarts={restarts}", meeting]
        return _start(["-m", "torch.distributed.run", *options, *first, *map(str, argv)], cwd)

    return start


@pytest.fixture(scope="session")
def finish() -> Callable[..., str]:
    """finish(process): what it wrote, once it has ended; nothing of it is left."""

    def wait(process: subprocess.Popen[str], *, timeout: float = 300) -> str:
        try:
            return process.communicate(timeout=timeout)[0]
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)

    return wait


@pytest.fixture(scope="session")
def kill() -> Callable[..., str]:
    """kill(process): kill -9 for it and the processes that it started; what it wrote."""

    def end(process: subprocess.Popen[str]) -> str:
        os.killpg(process.pid, signal.SIGKILL)
        return process.communicate()[0]

    return end


@pytest.fixture(scope="session")
def train() -> Callable[[list[object]], None]:
    """train(argv): `hsat train` in this process."""
    from hsat.cli.train import main

    return lambda argv: main([*map(str, argv)])


@pytest.fixture(scope="session")
def rows_of() -> Callable[[Path], list[dict[str, str]]]:
    """rows_of(folder): the rows of its train.csv, as texts."""

    def read(folder: Path) -> list[dict[str, str]]:
        with (folder / "train.csv").open(newline="") as file:
            return list(csv.DictReader(file))

    return read
