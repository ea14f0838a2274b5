"""Adversarial patches as files, and the accuracy on those files."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from hsat.classifiers import KNNClassifier
from hsat.embedding import Layer, embed, eval_mode, show_progress
from hsat.eval.conventions import How
from hsat.eval.export.adversarial_files import MANIFEST, AdversarialFiles
from hsat.eval.export.export_pass import ExportPass, batches_of, medium_of
from hsat.eval.measuring import Frame, condition_records, evaluation_frame
from hsat.eval.named_objectives import TARGETS
from hsat.eval.records import Record, software_versions
from hsat.types import Attack, EmbeddingFunction, EmbeddingTable, HierarchicalBatch, align_labels

if TYPE_CHECKING:
    from hsat.data import Cohort


@dataclass(frozen=True, eq=False)
class ExportResult:
    """What `save_adversarial` wrote and found.

    root: the folder.  cohort: the files in it, read again.  records: of the conditions "clean", name (the attack's own
    images, in floats) and "name (files)".  tables: embeddings of the three, by the same names.
    changed: share of the stored numbers that differ from the clean file's.
    """

    root: Path
    cohort: Cohort
    records: tuple[Record, ...]
    tables: dict[str, EmbeddingTable]
    changed: float


def save_adversarial(
    root: str | os.PathLike[str],
    encoder: EmbeddingFunction,
    bank: Iterable[HierarchicalBatch] | EmbeddingTable,
    cohort: Cohort,
    attack: Attack,
    *,
    split: str | None = "val",
    target: str = "features",
    layer: Layer = "features",
    k: int = 200,
    temperature: float = 0.07,
    index: str = "flat",
    how: How | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    batch_size: int = 16,
    bootstrap: int = 1000,
    name: str = "attack",
    model: str = "",
    checkpoint: str = "",
    progress: bool = False,
) -> ExportResult:
    """Attack the patches of a split, write them as files that open anywhere, read these again and score them.

    Files hold whole counts: each number is rounded inside the threat model (`on_grid.round_in_ball`).  Colour patches
    become 8-bit PNGs, SRH patches 16-bit TIFFs of two planes.  `root` must not exist; it appears whole or not at all,
    with the patches under their old paths, a manifest.csv, for SRH the OpenSRH meta files, and adversarial.json, which
    says how it was made.  `Cohort.read` takes it: layout "csv" always, "opensrh" for SRH, "folders" where the source
    was laid out so.

    Patches are attacked at the size of their files, since a file holds no other; an encoder that wants another size
    resizes inside (`build_encoder(..., input_size=...)`), and its bank should be read at its files' size as well.
    An SRH file holds two channels, so only attacks on those two can be stored: InSpace(RawChannels(srh_to_rgb), ...).
    Attacks without a ball of pixels (stains) are refused: whole counts need not lie in what they may do.

    target: "features", "embedding" or "knn", as in `evaluate_hierarchical_budget`.  bank and the other options: as in
    `evaluate_whitebox`.  name: of the attack.  The records of "name (files)" are measured on the files, and say so.
    Raises FileExistsError where root exists; ValueError for a root inside the cohort's folder, an unknown target or
    split, or a batch_size below 1; TypeError for attacks that cannot be stored; RuntimeError if a file does not read
    as it was written.
    """
    if target not in TARGETS:
        raise ValueError(f"unknown target {target!r}; choose one of {list(TARGETS)}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if name == "clean":
        raise ValueError("an attack cannot be called 'clean': that is the name of the patches as they are")
    medium = medium_of(cohort, attack)
    from hsat.data import PatchDataset

    data = PatchDataset(cohort, split)
    files = AdversarialFiles(root, cohort, data.rows.tolist())
    if not isinstance(bank, EmbeddingTable):
        bank = embed(encoder, bank, layer=layer, device=device, encoder_name=model, progress=progress)
    knn = KNNClassifier(k=k, temperature=temperature, index=index).fit(bank)
    align_labels(cohort.label[data.rows], cohort.class_names, knn.class_names)  # before any work is done
    passing = ExportPass(encoder, attack, cohort, knn=knn, target=target, layer=layer, seed=seed, device=device)
    about = {"source_cohort": cohort.fingerprint(), "grid": medium.grid.name}
    identity = {"target": target, "seed": seed, "model": model, "checkpoint": checkpoint}
    with eval_mode(encoder), files:
        for batch in show_progress(batches_of(data, batch_size), "attacking", shown=progress):
            passing.see(batch, files)
        of_attack = {"attack": repr(attack), "name": name, "split": split or "", "versions": software_versions()}
        files.complete(identity | of_attack | about)
        passing.read_again(PatchDataset(_read(files.folder, cohort)), batch_size)
        files.publish()
    again = _read(files.root, cohort)
    text = {"class_names": cohort.class_names, "split": split or "", "encoder": model}
    tables = passing.tables(name, text | {"cohort": about["source_cohort"]}, again.fingerprint())
    options = identity | {"layer": layer, "how": how, "compat": None, "bootstrap": bootstrap}
    frame = evaluation_frame(knn, tables["clean"], **options)  # type: ignore[arg-type]
    records = _records(passing, frame, tables, name=name, extra=about | {"from_files": True})
    return ExportResult(files.root, again, records, tables, passing.changed)


def _read(folder: Path, cohort: Cohort) -> Cohort:
    """The cohort in a folder of adversarial files, with the classes of its source."""
    from hsat.data import Cohort

    return Cohort.from_csv(folder, MANIFEST, kind=cohort.kind, class_names=cohort.class_names)


def _records(
    passing: ExportPass, frame: Frame, tables: dict[str, EmbeddingTable], *, name: str, extra: dict[str, object]
) -> tuple[Record, ...]:
    """Records of the three conditions; those of the files carry their fingerprint, and `extra` in their settings."""
    found: list[Record] = []
    for title, table in tables.items():
        attack, tally = (None, passing.clean) if title == "clean" else (passing.attack, passing.attacked)
        scores = {passing.knn.k: passing.knn.predict_proba(table)}
        records = condition_records(frame, name=title, attack=attack, tally=tally, table=table, scores=scores)
        if title not in ("clean", name):
            records = [
                dataclasses.replace(each, cohort=table.cohort, settings=each.settings | extra) for each in records
            ]
        found += records
    return tuple(found)
