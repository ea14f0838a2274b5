from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hsat.models import load_checkpoint, wrap_encoder
from hsat.training import RandomStateMismatch, checkpoint, load_training_state, save_checkpoint


@dataclass
class Run:
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    generator: torch.Generator

    @classmethod
    def fresh(cls, seed: int) -> Run:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 2))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50)
        return cls(model, optimizer, scheduler, torch.Generator().manual_seed(seed))

    def parts(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "generators": {"noise": self.generator},
        }

    def train(self, steps: int) -> list[float]:
        losses = []
        for _ in range(steps):
            noise = torch.rand(6, 5, generator=self.generator)
            scale = random.random() + float(np.random.rand())
            loss = self.model(noise * scale + torch.randn(6, 5)).square().mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.scheduler.step()
            losses.append(loss.item())
        return losses


@pytest.fixture(autouse=True)
def global_random_states() -> Any:
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    yield
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])


def save(path: Path, run: Run, **options: Any) -> Path:
    return save_checkpoint(path, **run.parts(), **({"epoch": 1, "step": 7, "config": {}} | options))


def test_a_resumed_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    first = Run.fresh(0)
    first.train(7)
    save(tmp_path / "last.pt", first)
    wanted = first.train(9)
    second = Run.fresh(1)
    second.train(3)
    load_training_state(tmp_path / "last.pt", **second.parts())
    assert second.train(9) == wanted
    assert second.scheduler.get_last_lr() == first.scheduler.get_last_lr()
    for ours, theirs in zip(second.model.state_dict().values(), first.model.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


def test_plain_values_come_back_as_they_were(tmp_path: Path) -> None:
    config = {"eps": 8 / 255, "levels": ("patch", "slide"), "data": {"root": None, "views": 2, "balanced": True}}
    extra = {"best": np.float32(0.5), "history": np.arange(3), "folder": Path("runs/a"), "blob": b"x"}
    path = save(tmp_path / "new" / "last.pt", Run.fresh(0), config=config, extra=extra, epoch=3, step=40)
    state = load_training_state(path, **Run.fresh(1).parts())
    assert (state.epoch, state.step, state.config) == (3, 40, config)
    assert state.extra["best"] == 0.5 and state.extra["folder"] == os.path.join("runs", "a")
    assert state.extra["history"].tolist() == [0, 1, 2] and state.extra["blob"] == b"x"


def test_saving_changes_nothing(tmp_path: Path) -> None:
    plain, saving = Run.fresh(0), None
    random.seed(1), np.random.seed(1)
    wanted = plain.train(4)
    saving = Run.fresh(0)
    random.seed(1), np.random.seed(1)
    losses = []
    for _ in range(4):
        save(tmp_path / "last.pt", saving)
        losses += saving.train(1)
    assert losses == wanted


def test_random_states_can_be_left_alone(tmp_path: Path) -> None:
    save(tmp_path / "last.pt", Run.fresh(0))
    run = Run.fresh(1)
    before = torch.get_rng_state(), random.getstate(), run.generator.get_state()
    load_training_state(tmp_path / "last.pt", **run.parts(), restore_random=False)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert torch.equal(run.generator.get_state(), before[2])


def test_the_weights_alone_load_into_an_encoder(tmp_path: Path) -> None:
    encoder, other = (wrap_encoder(nn.Sequential(nn.Flatten(), nn.Linear(12, 4)), norm="none") for _ in range(2))
    path = save_checkpoint(tmp_path / "last.pt", model=encoder, epoch=0, step=0, config={})
    load_checkpoint(other, path)
    for ours, theirs in zip(other.state_dict().values(), encoder.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("moment", ["while writing", "before the rename"])
def test_a_failing_save_leaves_the_previous_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    run = Run.fresh(0)
    path = save(tmp_path / "last.pt", run, step=1)
    before = path.read_bytes()
    run.train(2)

    def half_written(values: Any, file: Any) -> None:
        file.write(b"PK\x03\x04 half")
        raise OSError("no space left on device")

    def fails(*_: Any) -> None:
        raise OSError("no space left on device")

    if moment == "while writing":
        monkeypatch.setattr(checkpoint.torch, "save", half_written)
    else:
        monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="no space left"):
        save(path, run, step=3)
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]
    assert load_training_state(path, **Run.fresh(1).parts()).step == 1


def test_what_a_killed_save_left_is_removed_by_the_next_one(tmp_path: Path) -> None:
    for name in (".last.pt-a1b2.partial", ".best.pt-a1b2.partial"):
        (tmp_path / name).write_bytes(b"PK half of it")
    save(tmp_path / "last.pt", Run.fresh(0))
    assert sorted(file.name for file in tmp_path.iterdir()) == [".best.pt-a1b2.partial", "last.pt"]


def test_the_file_is_on_the_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (order.append("fsync"), fsync(handle)))
    monkeypatch.setattr(Path, "replace", lambda a, b: (order.append((a.parent, b.parent)), replace(a, b)))
    save(tmp_path / "last.pt", Run.fresh(0))
    assert order == ["fsync", (tmp_path, tmp_path), "fsync"]


def test_what_is_no_plain_value_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(
        TypeError, match=r"config\.data\.transforms\[1\] is a Linear; a checkpoint holds tensors and plain"
    ):
        save(tmp_path / "last.pt", Run.fresh(0), config={"data": {"transforms": [1, nn.Linear(1, 1)]}})
    with pytest.raises(TypeError, match=r"extra has the key \(1, 2\)"):
        save(tmp_path / "last.pt", Run.fresh(0), extra={(1, 2): 3})
    assert not list(tmp_path.iterdir())


BAD_FILES = [
    (b"", "is empty"),
    (b"\n<!DOCTYPE html><html>Sign in", "is an HTML page"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "is a Git LFS pointer"),
    (b"some other bytes", "damaged"),
]


@pytest.mark.parametrize(("content", "message"), BAD_FILES)
def test_files_that_are_no_checkpoint(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "last.pt").write_bytes(content)
    with pytest.raises(ValueError, match=f"last.pt.*{message}"):
        load_training_state(tmp_path / "last.pt", **Run.fresh(0).parts())


@pytest.mark.parametrize("share", [0.02, 0.3, 0.7, 0.99])
def test_truncated_file(tmp_path: Path, share: float) -> None:
    path = save(tmp_path / "last.pt", Run.fresh(0))
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match=r"last.pt \(\d+ bytes\) is truncated, damaged or no checkpoint"):
        load_training_state(path, **Run.fresh(1).parts())


def test_a_flipped_bit_in_a_weight_is_found(tmp_path: Path) -> None:
    """torch.load does not compare the checksums: the run would go on with another weight."""
    run = Run.fresh(0)
    path = save(tmp_path / "last.pt", run)
    whole = bytearray(path.read_bytes())
    weight = next(run.model.parameters()).detach().numpy().tobytes()
    place = whole.index(weight) + 1
    whole[place] ^= 1
    path.write_bytes(whole)
    torch.load(path, weights_only=True)
    with pytest.raises(ValueError, match=r"last.pt .* damaged .*checksum of .*data/\d+"):
        load_training_state(path, **Run.fresh(1).parts())


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model": [1]}, "model cannot be used"),
        ({"model": {1: torch.zeros(1)}}, "model cannot be used"),
        ({"step": "3", "epoch": -1}, "step, epoch cannot be used"),
        ({"random": ["x"]}, "random cannot be used"),
        ({"random": [{}], "config": 3}, "config, random cannot be used"),
        ({"optimizer": "x"}, "the optimizer of"),
        ({"scheduler": 3}, "the scheduler of"),
    ],
)
def test_entries_of_another_kind_are_named(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    path = save(tmp_path / "last.pt", Run.fresh(0))
    torch.save(torch.load(path, weights_only=True) | change, path)
    with pytest.raises(ValueError, match=named):
        load_training_state(path, **Run.fresh(1).parts())


def test_a_file_that_would_run_code(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return (os.mkdir, (str(tmp_path / "ran"),))

    torch.save({"format": "hsat training 1", "model": Bomb()}, tmp_path / "last.pt")
    with pytest.raises(ValueError, match="holds more than tensors and plain values"):
        load_training_state(tmp_path / "last.pt", **Run.fresh(0).parts())
    assert not (tmp_path / "ran").exists()


def test_missing_file_folder_and_foreign_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no checkpoint at"):
        load_training_state(tmp_path / "none.pt", model=nn.Linear(1, 1))
    with pytest.raises(ValueError, match="is a folder"):
        load_training_state(tmp_path, model=nn.Linear(1, 1))
    torch.save({"state_dict": {}, "arch": "resnet50"}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"no training checkpoint of this version.*it holds arch, state_dict"):
        load_training_state(tmp_path / "other.pt", model=nn.Linear(1, 1))
    torch.save([1], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="holds a list, and a checkpoint is a dict"):
        load_training_state(tmp_path / "list.pt", model=nn.Linear(1, 1))


def unchanged(run: Run) -> Any:
    copies = {name: value.clone() for name, value in run.model.state_dict().items()}
    return lambda: all(torch.equal(value, run.model.state_dict()[name]) for name, value in copies.items())


def test_model_that_does_not_fit(tmp_path: Path) -> None:
    path, run = save(tmp_path / "last.pt", Run.fresh(0)), Run.fresh(1)
    run.model = nn.Sequential(nn.Linear(5, 9), nn.LayerNorm(9), nn.Dropout(), nn.Linear(9, 2, bias=False))
    same = unchanged(run)
    wanted = (
        r"does not fit the one given; 4 entries have no place: 1\.running_mean, 1\.running_var,"
        r" 1\.num_batches_tracked, 3\.bias;"
        r" 5 shapes or dtypes differ: 0\.weight float32 \(8, 5\) for float32 \(9, 5\)"
    )
    with pytest.raises(ValueError, match=wanted):
        load_training_state(path, **run.parts())
    assert same()
    run.model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    with pytest.raises(ValueError, match=r"5 entries are missing: 2\.weight, 2\.bias"):
        load_training_state(path, **run.parts())
    run.model = Run.fresh(0).model.double()
    with pytest.raises(ValueError, match=r"0\.weight float32 \(8, 5\) for float64 \(8, 5\)"):
        load_training_state(path, **run.parts())


def test_parts_that_differ_are_listed_and_nothing_is_changed(tmp_path: Path) -> None:
    path, run = save(tmp_path / "last.pt", Run.fresh(0)), Run.fresh(1)
    same = unchanged(run)
    with pytest.raises(ValueError, match="holds the states optimizer, scheduler, but none were given"):
        load_training_state(path, model=run.model)
    parts = run.parts() | {"generators": {"views": run.generator}}
    with pytest.raises(ValueError, match="holds the generators noise, but views were given"):
        load_training_state(path, **parts)
    other = torch.optim.SGD([run.model[0].weight], lr=0.1)
    with pytest.raises(ValueError, match=r"the optimizer of .*last.pt does not fit the one given"):
        load_training_state(path, **(run.parts() | {"optimizer": other}))
    assert same()


def test_another_number_of_ranks(tmp_path: Path) -> None:
    path = save(tmp_path / "last.pt", Run.fresh(0))
    content = torch.load(path)
    torch.save(content | {"random": content["random"] * 2}, path)
    with pytest.raises(RandomStateMismatch, match="states of 2 ranks, and this run has 1; resume with 2, or give"):
        load_training_state(path, **Run.fresh(1).parts())
    assert load_training_state(path, **Run.fresh(1).parts(), restore_random=False).step == 7


RUNS = """
import os, random, sys
from functools import partial
from pathlib import Path
import numpy as np, torch
from torch import nn
from hsat.attacks import PGD, Linf
from hsat.losses import HiDiscLoss
from hsat.training import adversarial_step, cosine_with_warmup, load_training_state, save_checkpoint
from hsat.types import HierarchicalBatch

def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())

def train(folder, steps):
    torch.manual_seed(0); random.seed(0); np.random.seed(0)
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Dropout(0.1), nn.Flatten(), nn.Linear(64, 8)
    model = nn.Sequential(*layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(cosine_with_warmup, steps=steps, warmup=4))
    generator = torch.Generator().manual_seed(5)
    parts = dict(model=model, optimizer=optimizer, scheduler=scheduler, generators={"noise": generator})
    step = load_training_state(folder / "last.pt", **parts).step if (folder / "last.pt").exists() else 0
    attack = PGD(Linf(8 / 255), step_size=4 / 255, steps=2)
    say("start", step)
    while step < steps:
        images = torch.rand(2, 2, 2, 2, 3, 6, 6) * (0.5 + random.random() / 2) * float(0.5 + np.random.rand() / 2)
        batch = HierarchicalBatch.from_grid(images)
        result = adversarial_step(model, HiDiscLoss(), attack, batch, generator=generator)
        optimizer.zero_grad(); result.loss.backward(); optimizer.step(); scheduler.step()
        step += 1
        say("step", step)
        if step % 3 == 0:
            save_checkpoint(folder / "last.pt", **parts, epoch=0, step=step, config={"steps": steps})
            say("saved", step)
    torch.save(model.state_dict(), folder / "final.pt")

torch.set_num_threads(1)
torch.optim.AdamW([torch.zeros(1, requires_grad=True)])  # the first optimiser imports half of torch
for line in sys.stdin:  # every run is a process of its own; forking spares it the imports
    folder, steps = line.split()
    process = os.fork()
    if process == 0:
        Path(folder).mkdir(exist_ok=True)
        train(Path(folder), int(steps))
        os._exit(0)
    say("process", process)
    say("ended", os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]))
"""


class Runs:
    """Starts training runs, one at a time, each in its own process, and kills them on demand."""

    def __init__(self, folder: Path) -> None:
        (folder / "runs.py").write_text(RUNS)
        self.folder = folder
        self.starter = subprocess.Popen(
            [sys.executable, str(folder / "runs.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )

    def run(self, name: str, steps: int, *, kill_after: int | None = None, delay: float = 0.0) -> tuple[int, int, int]:
        """(step at which it began, step of the last save that it reported, exit code)."""
        self.starter.stdin.write(f"{self.folder / name} {steps}\n")
        process = begun = done = saved = 0
        for line in self.starter.stdout:
            word, number = line.split()[0], int(line.split()[1])
            if word == "ended":
                return begun, saved, number
            if word == "process":
                process = number
            elif word == "start":
                begun = saved = number
            elif word == "saved":
                saved = number
            done += word == "step"
            if process and done == kill_after:
                time.sleep(delay)
                os.kill(process, signal.SIGKILL)
                kill_after = None
        raise AssertionError("the starter of the runs died")

    def close(self) -> None:
        self.starter.stdin.close()
        self.starter.stdout.close()
        self.starter.wait(60)


def check_killed_runs(folder: Path, *, kills: int, steps: int, seed: int) -> None:
    runs, draw = Runs(folder), random.Random(seed)
    try:
        assert runs.run("whole", steps)[2] == 0
        last_saved = 0
        for _ in range(kills):
            delay = draw.uniform(0.0, 0.01)
            begun, saved, code = runs.run("killed", steps, kill_after=draw.randint(1, 8), delay=delay)
            assert code == -signal.SIGKILL
            assert begun >= last_saved, "what had been saved was lost"
            last_saved = saved
        begun, _, code = runs.run("killed", steps)
        assert code == 0 and last_saved <= begun > 0
    finally:
        runs.close()
    wanted, got = (torch.load(folder / name / "final.pt") for name in ("whole", "killed"))
    assert wanted.keys() == got.keys()
    for name, value in wanted.items():
        assert torch.equal(got[name], value), name


def test_killed_and_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    check_killed_runs(tmp_path, kills=5, steps=150, seed=0)


@pytest.mark.slow
def test_killed_many_times(tmp_path: Path) -> None:
    check_killed_runs(tmp_path, kills=60, steps=1500, seed=random.SystemRandom().randrange(2**32))


def test_a_checkpoint_with_lost_parts_and_arrays_of_text_are_named(tmp_path):
    torch.save({"format": "hsat training 1", "epoch": 1}, tmp_path / "part.pt")
    with pytest.raises(ValueError, match="damaged training checkpoint: it lacks config, extra, model, random, step"):
        load_training_state(tmp_path / "part.pt", model=nn.Linear(1, 1))
    with pytest.raises(TypeError, match=r"extra\.names is a ndarray"):
        save_checkpoint(
            tmp_path / "c.pt", model=nn.Linear(1, 1), epoch=0, step=0, config={}, extra={"names": np.array(["a"])}
        )
