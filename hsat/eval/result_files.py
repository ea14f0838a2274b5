"""Results of evaluations as files: what `result.save(folder)` and the commands write, and the page reads."""

from __future__ import annotations

import csv
import io
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from hsat.eval.artifact_files import ArtifactSource, HasConditions, write_artifacts
from hsat.eval.comparison import ScoreTable, save_scores
from hsat.eval.options import Provenance, Scoring
from hsat.eval.outcomes import EnsembleOutcome
from hsat.eval.records import Record, write_records
from hsat.eval.result_text import result_repr
from hsat.files import write_file
from hsat.run_folder import LOG_FILE, write_run_file
from hsat.types import GROUP_LABELS, align_labels
from hsat.untrusted import as_cell

RECORDS, EVIDENCE = "records.jsonl", "evidence"
RESULT_FILES = (
    RECORDS,
    "run.json",
    "table.md",
    "report.html",
    "scores.npz",
    "differences.json",
    "ensemble.csv",
    "groups.csv",
    "universal.safetensors",
    "accuracy_vs_eps.png",
    "certified_accuracy.png",
    "patches_*.png",
    "transfer_*.png",
)
"""Names of the files that results leave in a folder, beside evidence/<model>."""
_SCRATCH = ".saving-"


@dataclass(frozen=True, kw_only=True)
class RunAccount:
    """What run.json says of an evaluation beside versions.

    Attributes:
        settings: The options of a command, nested; of an evaluation in Python what its records say.
        cohort: Fingerprint of the cohort; by default that of the records.
        command: The words of the command line.
        about: Further entries.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    cohort: str = ""
    command: Sequence[str] = ()
    about: Mapping[str, Any] = field(default_factory=dict)


class MeasuredConditions(HasConditions, Protocol):
    """A `WhiteboxResult`."""

    @property
    def records(self) -> tuple[Record, ...]: ...  # noqa: D102
    @property
    def outcomes(self) -> Mapping[str, EnsembleOutcome]: ...  # noqa: D102


@contextmanager
def replaced_result(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """A block that writes a result into an empty folder, which then takes the place of the result in `folder`.

    Afterwards `folder` holds the new result and nothing of an earlier one; files under other names stay.  A block that
    fails changes nothing.  A process that is killed meanwhile leaves either result, or a folder without records.jsonl,
    which no reader takes for one; the next block cleans up.

    Args:
        folder: The folder of the result; it is made if need be.

    Yields:
        Where the block writes: an empty folder of the same name.

    Raises:
        ValueError: For the folder of a training, whose files belong to it.
    """
    folder = Path(folder)
    if (folder / LOG_FILE).exists() and not (folder / RECORDS).exists():
        raise ValueError(f"{folder} holds a training; save the result into another folder")
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    leftovers = list(folder.glob(f"{_SCRATCH}*"))
    try:
        with tempfile.TemporaryDirectory(prefix=_SCRATCH, dir=folder) as scratch:
            working = Path(scratch) / (folder.resolve().name or "result")
            working.mkdir()
            yield working
            if leftovers or (folder / RECORDS).exists():
                _remove_result(folder)
            for path in (working / EVIDENCE).glob("*"):
                (folder / EVIDENCE).mkdir(exist_ok=True)
                shutil.rmtree(folder / EVIDENCE / path.name, ignore_errors=True)
                path.replace(folder / EVIDENCE / path.name)
            written = sorted(working.iterdir(), key=lambda path: path.name == RECORDS)  # the records come last
            for path in (one for one in written if one.name != EVIDENCE):
                path.replace(folder / path.name)
            for leftover in leftovers:
                shutil.rmtree(leftover, ignore_errors=True)
    except BaseException:
        if is_new and not any(folder.iterdir()):
            folder.rmdir()
        raise


def _remove_result(folder: Path) -> None:
    """Remove what results write into a folder, the records first, and nothing else."""
    for path in [path for pattern in RESULT_FILES for path in folder.glob(pattern)]:
        path.unlink()
    if (folder / EVIDENCE).is_symlink():
        (folder / EVIDENCE).unlink()
    for about in (folder / EVIDENCE).glob("*/about.json"):
        shutil.rmtree(about.parent)
    if (folder / EVIDENCE).is_dir() and not any((folder / EVIDENCE).iterdir()):
        (folder / EVIDENCE).rmdir()


class SavedResult:
    """A result of an evaluation that `save` writes as files, and of which a prompt shows a few lines."""

    records: tuple[Record, ...]

    __repr__ = result_repr

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write the result into a folder, as the commands do.

        `hsat.report.write_report([folder], "page.html")` makes a page of it.

        Args:
            folder: The folder; it is made.  A result that it holds is replaced; other files stay.

        Returns:
            The folder.
        """
        with replaced_result(folder) as working:
            self._write(working)
        return Path(folder)

    def _write(self, folder: Path) -> None:
        """The files, into an empty folder."""
        save_records(folder, self.records)


def save_records(folder: str | os.PathLike[str], records: Sequence[Record], account: RunAccount = RunAccount()) -> Path:
    """Write records.jsonl and run.json into a folder, which is made if need be; earlier ones are replaced.

    Args:
        folder: The folder of the run.
        records: Of any evaluation.
        account: What run.json says.

    Returns:
        The folder.

    Raises:
        ValueError: Without records.
    """
    if not records:
        raise ValueError("no records, so there is nothing to save")
    folder, first = Path(folder), records[0]
    folder.mkdir(parents=True, exist_ok=True)
    write_records(folder / RECORDS, records)
    stated = account.settings or {"model": first.model, "target": first.target, "seed": first.seed}
    cohort = account.cohort or first.cohort
    write_run_file(folder, stated, cohort=cohort, command=account.command, **account.about)
    return folder


def save_conditions(
    folder: str | os.PathLike[str], results: Sequence[MeasuredConditions], account: RunAccount = RunAccount()
) -> Path:
    """Write what `evaluate_whitebox` gave, of one encoder or several, into a folder that `hsat report` shows whole.

    records.jsonl, run.json, scores.npz, evidence/ and, of ensembles, ensemble.csv (docs/files.md).

    Args:
        folder: The folder of the run.
        results: One per encoder; their records name the encoders.
        account: What run.json says.

    Returns:
        The folder.

    Raises:
        ValueError: Without records.
    """
    folder = save_records(folder, [record for result in results for record in result.records], account)
    tables = [table for result in results for table in score_tables(result)]
    if tables:  # drift has no scores
        save_scores(folder / "scores.npz", tables)
    for result in results:
        _save_evidence(folder / EVIDENCE, result)
    _save_ensembles(folder / "ensemble.csv", results)
    return folder


def score_tables(result: HasConditions) -> tuple[ScoreTable, ...]:
    """The scores of an evaluation as tables, one per condition and classifier.

    Args:
        result: What `evaluate_whitebox` gave.

    Returns:
        The tables; `model` is what the evaluation was given.
    """
    return tuple(
        ScoreTable(
            scores=scores,
            label=align_labels(table.label, table.class_names, result.class_names),
            patch=table.patch,
            slide=table.slide,
            patient=table.patient,
            class_names=result.class_names,
            cohort=table.cohort,
            split=table.split,
            model=table.encoder,
            condition=condition,
            k=key if isinstance(key, int) else 0,
            classifier="" if isinstance(key, int) else key,
            **{name: _aligned(getattr(table, name), table.class_names, result.class_names) for name in GROUP_LABELS},
        )
        for condition, table in result.tables.items()
        for key, scores in result.scores[condition].items()
    )


def _aligned(labels: np.ndarray | None, own: tuple[str, ...], names: tuple[str, ...]) -> np.ndarray | None:
    """Labels of groups in other classes; -1 stays, and for a class that is not among them."""
    if labels is None:
        return None
    places = np.array([names.index(name) if name in names else -1 for name in own] + [-1])
    return np.asarray(places[labels])


def _save_evidence(folder: Path, result: MeasuredConditions) -> None:
    """Predictions, a map of the embeddings and the first patches; of natural shifts the page shows the numbers only."""
    first = result.records[0]
    shifts = {record.attack_name for record in result.records if "natural_shift" in record.settings}
    names = [name for name in result.tables if name not in shifts]
    source = ArtifactSource(
        tables={name: result.tables[name] for name in names},
        scores={name: result.scores[name] for name in names},
        class_names=result.class_names,
        examples={name: result.examples[name] for name in names if name in result.examples},
        example_rows=result.example_rows,
    )
    scoring = Scoring(pooling=first.settings.get("how", "mean"), group_by=first.settings.get("keys", "id"))
    provenance = Provenance(model=first.model, checkpoint=first.checkpoint)
    write_artifacts(folder, source, target=first.target, provenance=provenance, scoring=scoring)


def _save_ensembles(path: Path, results: Sequence[MeasuredConditions]) -> None:
    """A line per encoder, ensemble and patch; no file without ensembles."""
    file = io.StringIO()
    lines = csv.writer(file, lineterminator="\n")
    lines.writerow(["model", "attack", "patch", "broken_by", "margin"])
    for result in results:
        for name, outcome in result.outcomes.items():
            rows = zip(outcome.patch, outcome.broken_by, outcome.margin, strict=True)
            model, attack = as_cell(result.records[0].model), as_cell(name)
            lines.writerows([model, attack, int(patch), by, f"{margin:.6f}"] for patch, by, margin in rows)
    if any(result.outcomes for result in results):
        write_file(path, file.getvalue())
