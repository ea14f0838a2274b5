"""A run folder: what was run on what, the training log, and optional loggers."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from hsat.run_folder import RUN_FILE, TrainingLog, read_run_file, write_json, write_run_file
from settings import LoggerSettings

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


def device_named(name: str) -> torch.device:
    """The device that --device names; auto is a GPU where there is one.  ValueError for one that cannot be used."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from None
    return torch.device(name)


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
        begun = (out / RUN_FILE).exists()
        if begun:
            if not resume:
                raise SystemExit(
                    f"error: {out} holds a run already; add --resume to go on with it, or choose another --out"
                )
            self._check_same(out / RUN_FILE)
        out.mkdir(parents=True, exist_ok=True)
        self._loggers = _loggers(out, settings, log)  # first: one that is not installed leaves no run behind
        if not begun:
            write_run_file(out, settings, cohort=cohort, command=sys.argv)
        self._log = TrainingLog(out)

    def _check_same(self, path: Path) -> None:
        try:
            earlier = read_run_file(self.out)
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
        content, entry = read_run_file(self.out), {"step": step, "settings": changes}
        if entry not in (earlier_changes := content.setdefault("changes", [])):
            earlier_changes.append(entry)
            write_json(self.out / RUN_FILE, content)

    def keep_rows_before(self, step: int) -> None:
        """After a resume: drop what was logged behind the checkpoint, it will be logged again."""
        if self.writes:
            self._log.keep_rows_before(step)

    def log(self, row: dict[str, Any]) -> None:
        """Append one row to train.csv and to the loggers; `step` is required."""
        if not self.writes:
            return
        self._log.append(row)
        numbers = {key: value for key, value in row.items() if isinstance(value, int | float) and key != "step"}
        for logger in self._loggers:
            logger(numbers, int(row["step"]))


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
