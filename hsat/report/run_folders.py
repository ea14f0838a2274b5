"""What a run left in its folder, and what it did not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hsat.eval import Difference, Record, read_records
from hsat.files import parse_json, read_fields, read_text
from hsat.report.aggregation import is_transfer, label_branch, label_branches
from hsat.report.artifacts import Artifacts, missing_pictures, read_artifacts
from hsat.run_folder import read_run_file, read_training_log

_FILES = ("records.jsonl", "run.json", "train.csv")


@dataclass(frozen=True, eq=False)
class RunFolder:
    """What the files of a run hold; empty where a file is absent.

    Attributes:
        path: The folder.
        records: Of records.jsonl.
        about: Of run.json.
        training: Columns of train.csv, NaN for empty cells.
        artifacts: Of evidence/, of the models in the records.
        differences: Of differences.json, between models on the same patients.
        absent: What a report would show and the folder does not hold, and how to make it.
    """

    path: Path
    records: tuple[Record, ...] = ()
    about: dict[str, Any] = field(default_factory=dict)
    training: dict[str, list[float]] = field(default_factory=dict)
    artifacts: tuple[Artifacts, ...] = ()
    differences: tuple[Difference, ...] = ()
    absent: tuple[str, ...] = ()

    @property
    def is_transfer(self) -> bool:
        """Whether attacks were made on one encoder and shown to others; its clean records belong to that, too."""
        return any(is_transfer(record) for record in self.records)


def open_runs(paths: Iterable[str | Path]) -> tuple[RunFolder, ...]:
    """Read run folders.  A folder that is none, but has run folders in it (as the demo's), stands for those.

    A run folder holds records.jsonl, run.json or train.csv.  Links that lead out of a run folder are refused.

    Args:
        paths: Run folders, or folders of those.

    Returns:
        The runs, each folder once.

    Raises:
        ValueError: Naming a path that is no run folder, or a file that is damaged.
    """
    folders: dict[Path, Path] = {}
    for path in map(Path, paths):
        if not path.is_dir():
            raise ValueError(f"{path} is not a folder; give the folder that a run wrote (--out)")
        inner = [path] if _is_run(path) else [child for child in sorted(path.iterdir()) if _is_run(child)]
        if not inner:
            raise ValueError(f"{path} holds none of {', '.join(_FILES)}: not the folder of a run")
        for folder in inner:
            folders.setdefault(folder.resolve(), folder)
    return tuple(_open(path) for path in folders.values())


def split_by_branch(folders: Iterable[RunFolder]) -> tuple[RunFolder, ...]:
    """The folders with another name for a model in each branch of dual BatchNorm, where it was measured in several."""
    folders = tuple(folders)
    names = label_branches(record for folder in folders for record in folder.records)
    return tuple(_renamed(folder, names) for folder in folders) if names else folders


def _renamed(folder: RunFolder, names: Mapping[tuple[str, str], str]) -> RunFolder:
    own = {record.model: names.get((record.model, label_branch(record)), record.model) for record in folder.records}

    def named(record: Record) -> Record:
        surrogate = names.get((record.surrogate, str(record.settings.get("surrogate_branch", ""))), record.surrogate)
        model = names.get((record.model, label_branch(record)), record.model)
        return replace(record, model=model, surrogate=surrogate)

    return replace(
        folder,
        records=tuple(map(named, folder.records)),
        artifacts=tuple(replace(one, model=own.get(one.model, one.model)) for one in folder.artifacts),
        differences=tuple(
            replace(one, model=own.get(one.model, one.model), against=own.get(one.against, one.against))
            for one in folder.differences
        ),
    )


def _is_run(path: Path) -> bool:
    return path.is_dir() and not path.name.startswith(".") and any((path / name).is_file() for name in _FILES)


def _open(path: Path) -> RunFolder:
    files = {name: _inside(path, path / name) for name in _FILES if (path / name).is_file()}
    records = read_records(files["records.jsonl"]) if "records.jsonl" in files else ()
    about = read_run_file(path) if "run.json" in files else {}
    training = read_training_log(files["train.csv"]) if "train.csv" in files else {}
    artifacts, stale = _matching(read_artifacts(_inside(path, path / "evidence")), records)
    absent = list(stale)
    if not about:
        absent.append("run.json, which says how the run was made: the commands write it")
    if any(is_transfer(record) for record in records):
        pass  # a transfer has no artifacts of its own
    elif records and not artifacts:
        absent.append(
            "evidence/ (confusion, embedding map, patches): evaluate again with hsat evaluate,"
            " or write the result with result.save(folder)"
        )
    elif records and not any(c.patches for one in artifacts for c in one.conditions.values()):
        absent.append("pictures of patches: evaluate with --gallery 6")
    for one in artifacts:
        if missing := missing_pictures(one):
            listed = ", ".join(missing[:3]) + " and others" * (len(missing) > 3)
            absent.append(f"pictures of {one.model!r}: {listed}; their patches are not shown")
    if not records and not training:
        absent.append("records.jsonl and train.csv: the run has not measured or trained anything yet")
    differences = _read_differences(path, path / "differences.json")
    return RunFolder(path, records, about, training, artifacts, differences, tuple(absent))


def _matching(artifacts: Iterable[Artifacts], records: Iterable[Record]) -> tuple[tuple[Artifacts, ...], list[str]]:
    """The artifacts that belong to the records, and a note for each that is left over from another evaluation."""
    measured = {(record.model, record.target, record.checkpoint) for record in records}
    kept, notes = [], []
    for one in artifacts:
        if (one.model, one.target, one.checkpoint) in measured:
            kept.append(one)
        else:
            notes.append(f"records for the artifacts of {one.model!r}, which are of another evaluation and not shown")
    return tuple(kept), notes


def _read_differences(root: Path, path: Path) -> tuple[Difference, ...]:
    if not path.is_file():
        return ()
    content = parse_json(read_text(_inside(root, path)), str(path))
    if not isinstance(content, list):
        raise ValueError(f"{path}: not a list of differences; evaluate again")
    return tuple(read_fields(Difference, one, f"{path}, entry {n}") for n, one in enumerate(content, start=1))


def _inside(root: Path, path: Path) -> Path:
    if not path.resolve().is_relative_to(root.resolve()):
        raise ValueError(f"{path} leads out of the run folder {root}; it is not followed")
    return path
