"""A run folder: what was run on what, the training log, and optional loggers."""

from __future__ import annotations

import csv
import json
import os
import platform
import sys
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from settings import LoggerSettings

PACKAGES = ("hsat", "torch", "torchvision", "timm", "numpy", "faiss-cpu", "pydantic", "tifffile")
MAY_DIFFER = {
    "resume",
    "data.workers",
    "train.save_every",
    "train.max_memory",
    "device",
    "rank_timeout",
    "quiet",
    "change",
    "log.tensorboard",
    "log.wandb",
    "out",
    "data.root",
}
CHANGEABLE = {"train.lr", "train.precision"}  # with --change: what may keep numbers finite
MAY_DIFFER_BY_RANK = {  # paths, behind which what is read is compared; and what changes no number
    "data.root",
    "data.packed",
    "model.weights",
    "out",
    "device",  # its kind is compared when the ranks meet
    "rank_timeout",
    "data.workers",
    "log.tensorboard",
    "log.wandb",
    "quiet",
}


def versions() -> dict[str, str]:
    """Versions of Python, of the packages that decide numbers, and of the machine."""
    found = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": str(torch.get_num_threads()),
    }
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def device_named(name: str) -> torch.device:
    """The device that --device names; auto is a GPU where there is one.  ValueError for one that cannot be used."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from None
    return torch.device(name)


def write_json(path: Path, content: Any) -> None:
    """Write whole or not at all."""
    working = path.with_name(f".{path.name}.partial")
    working.write_text(json.dumps(content, indent=1, sort_keys=True, default=str) + "\n")
    os.replace(working, path)


def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings with dotted names."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def same_on_all_ranks(settings: dict[str, Any]) -> dict[str, Any]:
    """Those of the settings, with dotted names, that have to be the same on all ranks of a run."""
    return {key: value for key, value in flat(settings).items() if key not in MAY_DIFFER_BY_RANK}


class Run:
    """The folder `out` of one training: run.json, train.csv, last.pt, best and final encoder.

    defaults: values of options that the run began without, because it began with an earlier version.  writes=False:
    a rank that only reads last.pt; another one checks, logs and writes.
    """

    def __init__(
        self,
        out: Path,
        settings: dict[str, Any],
        *,
        cohort: str,
        resume: bool,
        log: LoggerSettings,
        defaults: dict[str, Any] | None = None,
        writes: bool = True,
    ) -> None:
        self.out, self.settings, self.cohort = out, settings, cohort
        self.last, self.writes = out / "last.pt", writes
        self._changeable, self.began = set(settings.get("change", ())), settings
        self._defaults = flat(json.loads(json.dumps(defaults or {}, default=str)))
        if not writes:
            return
        found = out / "run.json"
        if found.exists():
            if not resume:
                raise SystemExit(
                    f"error: {out} holds a run already; add --resume to go on with it, or choose another --out"
                )
            self._check_same(found)
        out.mkdir(parents=True, exist_ok=True)
        self._loggers = _loggers(out, settings, log)  # first: one that is not installed leaves no run behind
        if not found.exists():
            about = {"settings": settings, "cohort": cohort, "versions": versions(), "command": sys.argv}
            write_json(found, about)
        self._columns: list[str] = []

    def _check_same(self, path: Path) -> None:
        try:
            earlier = json.loads(path.read_text())
            before, cohort = earlier["settings"], str(earlier["cohort"])
            self.check_settings(before, "the run began with")
            self.began = before
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise SystemExit(
                f"error: {path} is damaged ({type(error).__name__}: {error}); --resume needs it, or take another --out"
            ) from None
        if cohort != self.cohort:
            raise SystemExit(
                f"error: {self.out} was trained on another cohort (fingerprint {cohort[:12]},"
                f" now {self.cohort[:12]}); resuming would mix the two"
            )

    def check_settings(self, earlier: dict[str, Any], whose: str) -> None:
        """End the program where these differ from the settings of now, but for those that may."""
        refused = {key: pair for key, pair in self._differing(earlier).items() if key not in self._changeable}
        if refused:
            listed = "; ".join(f"{key} was {before}, now {now}" for key, (before, now) in refused.items())
            hint = f"; or add --change {','.join(refused)}" if refused.keys() <= CHANGEABLE else ""
            raise SystemExit(f"error: --resume needs the settings {whose}: {listed}{hint}")

    def _differing(self, earlier: dict[str, Any]) -> dict[str, list[Any]]:
        """Settings that are others now, as [then, now], but for those that change no number."""
        before = self._defaults | flat(json.loads(json.dumps(earlier, default=str)))
        now = flat(json.loads(json.dumps(self.settings, default=str)))
        return {
            key: [before.get(key), now.get(key)]
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key) and key not in MAY_DIFFER
        }

    def note_changes(self, earlier: dict[str, Any], step: int) -> None:
        """Say, and write into run.json, which settings are others from this step on (--change)."""
        changes = self._differing(earlier)
        if not (self.writes and changes):
            return
        for key, (before, now) in changes.items():
            print(f"note: from step {step} on {key} is {now}; it was {before}", file=sys.stderr)
        path = self.out / "run.json"
        about, entry = json.loads(path.read_text()), {"step": step, "settings": changes}
        if entry not in (noted := about.setdefault("changes", [])):
            noted.append(entry)
            write_json(path, about)

    def keep_rows_before(self, step: int) -> None:
        """After a resume: drop what was logged behind the checkpoint, it will be logged again."""
        if self.writes:
            self._rewrite([row for row in self._rows() if int(row["step"]) < step], [])

    def log(self, row: dict[str, Any]) -> None:
        """Append one row to train.csv and to the loggers; `step` is required."""
        if not self.writes:
            return
        if not row.keys() <= set(self._columns):
            self._rewrite(self._rows(), list(row))
        with (self.out / "train.csv").open("a", newline="") as file:
            csv.DictWriter(file, self._columns, restval="").writerow(row)
        numbers = {key: value for key, value in row.items() if isinstance(value, int | float) and key != "step"}
        for logger in self._loggers:
            logger(numbers, int(row["step"]))

    def _rows(self) -> list[dict[str, str]]:
        """The whole rows of train.csv; a row that a killed process left half written is none."""
        path = self.out / "train.csv"
        if not path.exists():
            return []
        try:
            with path.open(newline="") as file:
                rows = [row for row in csv.DictReader(file) if None not in row.values()]
            return [row for row in rows if int(row["step"]) >= 0]
        except (ValueError, KeyError, csv.Error) as error:
            raise SystemExit(
                f"error: {path} is damaged ({type(error).__name__}: {error}); move it away, --resume starts a new one"
            ) from None

    def _rewrite(self, rows: list[dict[str, str]], columns: list[str]) -> None:
        self._columns = list(dict.fromkeys([*(rows[0] if rows else []), *columns]))
        working = self.out / ".train.csv.partial"
        with working.open("w", newline="") as file:
            writer = csv.DictWriter(file, self._columns, restval="")
            writer.writeheader()
            writer.writerows(rows)
        os.replace(working, self.out / "train.csv")


def _loggers(out: Path, settings: dict[str, Any], log: LoggerSettings) -> list[Any]:
    found: list[Any] = []
    if log.tensorboard:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise SystemExit('error: --log.tensorboard needs an extra: pip install "hsat[train]"') from None
        writer = SummaryWriter(str(out))

        def to_tensorboard(numbers: dict[str, float], step: int) -> None:
            for key, value in numbers.items():
                writer.add_scalar(key, value, step)
            writer.flush()

        found.append(to_tensorboard)
    if log.wandb:
        try:
            import wandb
        except ImportError:
            raise SystemExit('error: --log.wandb needs an extra: pip install "hsat[train]"') from None
        session = wandb.init(project=log.wandb, dir=str(out), config=settings)
        found.append(lambda numbers, step: session.log(numbers, step=step))
    return found
