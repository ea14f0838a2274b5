"""The folder of a training: run.json, train.csv, last.pt, best and final encoder, and optional loggers."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from hsat.run_folder import RUN_FILE, TrainingLog, read_run_file, write_json, write_run_file

NumberLogger = Callable[[dict[str, float], int], None]
"""Takes the numbers of a step and the step, such as a TensorBoard writer."""

MAY_DIFFER = frozenset({"train.views.workers", "train.save_every", "train.max_memory"})
"""Dotted names of options that change no number, so that a resumed run may have others."""

_log = logging.getLogger("hsat")


class SettingsChangedError(ValueError):
    """A run is resumed with other settings than it began with.

    Attributes:
        names: Dotted names of the settings.
    """

    def __init__(self, message: str, names: Sequence[str]) -> None:
        super().__init__(message)
        self.names = tuple(names)


class OccupiedRunError(ValueError):
    """The folder holds a run, and a new one was to begin in it."""


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings with dotted names."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


class TrainingFolder:
    """The folder `out` of one training.

    Args:
        out: The folder.
        settings: What run.json records of the run, nested; a resumed run has to have the same.
        cohort: Fingerprint of the cohort.
        command: The words of the command line.
        defaults: Values of settings that an earlier version did not have, for runs that it began.
        may_differ: Dotted names of settings that may have other values in a resumed run.
        change: Dotted names of settings that have other values on purpose from the next step on.
        resume: Go on with the run in the folder; without one a new run begins all the same.
        writes: False for ranks that only read last.pt, where another one checks, logs and writes.
        loggers: Take the numbers of every step besides train.csv.

    Raises:
        OccupiedRunError: If the folder holds a run and resume is False.
        SettingsChangedError: If the run began with other settings.
        ValueError: If run.json is damaged or the run was trained on another cohort.
    """

    def __init__(
        self,
        out: Path,
        settings: Mapping[str, Any],
        *,
        cohort: str,
        command: Sequence[str] = (),
        defaults: Mapping[str, Any] | None = None,
        may_differ: Collection[str] = MAY_DIFFER,
        change: Collection[str] = (),
        resume: bool = False,
        writes: bool = True,
        loggers: Sequence[NumberLogger] = (),
    ) -> None:
        self.out, self.settings, self.cohort = Path(out), dict(settings), cohort
        self.last, self.writes = self.out / "last.pt", writes
        self.change, self.began = frozenset(change), self.settings
        self._may_differ, self._defaults = frozenset(may_differ), flatten(_as_json(defaults or {}))
        self._loggers = tuple(loggers)
        if not writes:
            return
        begun = (self.out / RUN_FILE).exists()
        if begun and not resume:
            raise OccupiedRunError(f"{self.out} holds a run already; go on with it (--resume), or choose another --out")
        if begun:
            self._check_run_file()
        else:
            self.out.mkdir(parents=True, exist_ok=True)
            write_run_file(self.out, self.settings, cohort=cohort, command=command)
        self._log = TrainingLog(self.out)

    def _check_run_file(self) -> None:
        path = self.out / RUN_FILE
        try:
            content = read_run_file(self.out)
            before, cohort = content["settings"], str(content["cohort"])
            differing = self._differing(before)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path} is damaged ({type(error).__name__}: {error}); --resume needs it, or take another --out"
            ) from None
        self._refuse(differing, "the run began with")
        self.began = before
        if cohort != self.cohort:
            raise ValueError(
                f"{self.out} was trained on another cohort (fingerprint {cohort[:12]}, now {self.cohort[:12]});"
                " resuming would mix the two"
            )

    def check_settings(self, earlier: Mapping[str, Any], origin: str) -> None:
        """Raise SettingsChangedError where these differ from the settings of now, but for those that may.

        Args:
            earlier: Settings of the run at an earlier time.
            origin: Where they come from, as in "the run began with".
        """
        self._refuse(self._differing(earlier), origin)

    def _refuse(self, differing: Mapping[str, Sequence[Any]], origin: str) -> None:
        refused = {key: pair for key, pair in differing.items() if key not in self.change}
        if refused:
            listed = "; ".join(f"{key} was {before}, now {now}" for key, (before, now) in refused.items())
            raise SettingsChangedError(f"--resume needs the settings {origin}: {listed}", list(refused))

    def _differing(self, earlier: Mapping[str, Any]) -> dict[str, list[Any]]:
        """Settings that are others now, as [then, now], but for those that change no number."""
        before = self._defaults | flatten(_as_json(earlier))
        now = flatten(_as_json(self.settings))
        return {
            key: [before.get(key), now.get(key)]
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key) and key not in self._may_differ
        }

    def note_changes(self, earlier: Mapping[str, Any], step: int) -> None:
        """Log, and write into run.json, which settings are others from this step on."""
        changes = self._differing(earlier)
        if not (self.writes and changes):
            return
        for key, (before, now) in changes.items():
            _log.info("note: from step %d on %s is %s; it was %s", step, key, now, before)
        content, entry = read_run_file(self.out), {"step": step, "settings": changes}
        if entry not in (noted := content.setdefault("changes", [])):
            noted.append(entry)
            write_json(self.out / RUN_FILE, content)

    def keep_rows_before(self, step: int) -> None:
        """After a resume: drop what was logged behind the checkpoint, it will be logged again."""
        if self.writes:
            self._log.keep_rows_before(step)

    def log(self, row: Mapping[str, Any]) -> None:
        """Append one row to train.csv and hand its numbers to the loggers; `step` is required."""
        if not self.writes:
            return
        self._log.append(row)
        numbers = {key: float(value) for key, value in row.items() if isinstance(value, int | float) and key != "step"}
        for logger in self._loggers:
            logger(numbers, int(row["step"]))


def _as_json(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings as they come back from a JSON file, so that a tuple equals a list."""
    content: dict[str, Any] = json.loads(json.dumps(settings, default=str))
    return content


class FolderFactory(Protocol):
    """Opens the run folder once the trainer knows the cohort's fingerprint."""

    def __call__(self, *, cohort: str, writes: bool) -> TrainingFolder:
        """The folder of the run."""
