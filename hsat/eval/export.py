"""Adversarial patches as files that open anywhere, and the accuracy on those files."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils.data import SequentialSampler

from hsat.attacks import RawChannels, Reparametrized
from hsat.attacks.srh_space import CHANNELS
from hsat.classifiers import KNNClassifier
from hsat.distributed import World
from hsat.embedding import LoaderInfo, label_by_group
from hsat.eval.adversarial_files import MANIFEST, AdversarialFiles
from hsat.eval.announcements import announce_bank, announce_cost
from hsat.eval.evaluation import Bank, Evaluation, classifier_settings, fit_bank, score_queries
from hsat.eval.objectives import ObjectiveFactory
from hsat.eval.options import Provenance, RunOptions, Scoring, Target, software_versions
from hsat.eval.quantize import PNG_GRID, TIFF_GRID, ValueGrid, quantize_in_ball
from hsat.eval.records import Record
from hsat.eval.result_files import SavedResult
from hsat.eval.runner import CLEAN, AttackRunner, Condition
from hsat.eval.store import CleanEmbeddings, open_session, open_world
from hsat.eval.whitebox import condition_records
from hsat.types import (
    GROUP_LABELS,
    Attack,
    AttackResult,
    Classifier,
    EmbeddingFunction,
    EmbeddingTable,
    HierarchicalBatch,
    ThreatModel,
    align_labels,
)

if TYPE_CHECKING:  # the room of data is loaded when files are written, not with the evaluation
    from hsat.data import Cohort, PatchDataset, Sample


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What `save_adversarial` writes.

    Attributes:
        split: The split whose patches are attacked; None for all.
        batch_size: Patches per batch.
        name: Of the attack.
        bootstrap: Resamples of patients for the intervals of the records; 0 for none.

    Raises:
        ValueError: For a batch_size below 1, a negative bootstrap, and the name "clean".
    """

    split: str | None = "val"
    batch_size: int = 16
    name: str = "attack"
    bootstrap: int = 1000

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")
        if self.name == CLEAN:
            raise ValueError("an attack cannot be called 'clean': that is the name of the patches as they are")
        Scoring(bootstrap=self.bootstrap)  # raises for a count below 0


@dataclass(frozen=True, eq=False, repr=False)
class ExportResult(SavedResult):
    """The result of `save_adversarial`.

    Attributes:
        root: The folder.
        cohort: The files in it, read again.
        records: Of the conditions "clean", name (the attack's own images, in floats) and "name (files)".
        tables: Embeddings of the three, by the same names.
        changed: Share of the stored numbers that differ from the clean file's.
    """

    root: Path
    cohort: Cohort
    records: tuple[Record, ...]
    tables: dict[str, EmbeddingTable]
    changed: float


@dataclass(frozen=True)
class ImageFormat:
    """How images become stored numbers: the grid, the stored channels, and the threat model that holds for them."""

    grid: ValueGrid
    channels: slice
    threat: ThreatModel


def image_format(cohort: Cohort, attack: Attack) -> ImageFormat:
    """The format of a cohort's files for an attack; TypeError for an attack that they cannot hold, with what to do."""
    if cohort.kind == "srh":
        if not (isinstance(attack, Reparametrized) and isinstance(attack.space, RawChannels)):
            raise TypeError(
                "an SRH file holds two channels and encoders see three, so an attack that moves the three cannot be"
                f" stored. Attack the two: Reparametrized(RawChannels(srh_to_rgb), PGD(...)); got {attack!r}"
            )
        threat, grid, channels = getattr(attack.attack, "threat", None), TIFF_GRID, CHANNELS
    else:
        threat, grid, channels = getattr(attack, "threat", None), PNG_GRID, slice(None)
    if not isinstance(threat, ThreatModel):
        raise TypeError(
            "files hold whole counts, which are rounded inside the attack's threat model; this attack has none of"
            f" pixels (no .threat), so rounding could leave what it may do: {attack!r}"
        )
    return ImageFormat(grid, channels, threat)


def save_adversarial(
    root: str | os.PathLike[str],
    encoder: EmbeddingFunction,
    bank: Bank,
    cohort: Cohort,
    attack: Attack,
    *,
    options: ExportOptions = ExportOptions(),
    classifier: Classifier = KNNClassifier(),
    target: Target | str = "decision",
    run: RunOptions = RunOptions(),
    provenance: Provenance = Provenance(),
) -> ExportResult:
    """Attack the patches of a split, write them as files that open anywhere, read these again and score them.

    Files hold whole counts: each number is rounded inside the threat model (`quantize_in_ball`).  Colour patches
    become 8-bit PNGs, SRH patches 16-bit TIFFs of two planes.  `root` must not exist; it appears whole or not at all,
    with the patches under their old paths, a manifest.csv, for SRH the OpenSRH meta files, and adversarial.json, which
    says how it was made.

    Patches are attacked at the size of their files, since a file holds no other; an encoder that wants another size
    resizes inside (`build_encoder(..., input_size=...)`), and its bank should be read at its files' size as well.
    An SRH file holds two channels, so only attacks on those two can be stored:
    Reparametrized(RawChannels(srh_to_rgb), ...).  Attacks without a ball of pixels (stains) are refused: whole counts
    need not lie in what they may do.

    Args:
        root: The folder to write.
        encoder, bank, classifier, target, run, provenance: As for `evaluate_whitebox`; the classifier reads the
            features.  With `run.resume_dir` an interrupted export goes on from its finished batches.
        cohort: Where the patches are.
        attack: The attack.
        options: Split, batch size, name.

    Returns:
        The folder, its cohort, records and embeddings.

    Raises:
        FileExistsError: If the root exists.
        ValueError: For a root inside the cohort's folder, and an unknown target or split.
        TypeError: For attacks that cannot be stored.
        RuntimeError: If a file does not read as it was written.
    """
    from hsat.data import PatchDataset

    run = dataclasses.replace(run, keep_examples=0, diagnose=0)
    evaluation = Evaluation(encoder, Target.of(target), Scoring(bootstrap=options.bootstrap), run, provenance)
    form, name = image_format(cohort, attack), options.name
    data = PatchDataset(cohort, options.split)
    queries = ShapeBatches(data, options.batch_size)
    files = AdversarialFiles(root, cohort, data.rows.tolist(), resumable=run.resume_dir is not None)
    about = {"source_cohort": cohort.fingerprint(), "grid": form.grid.name}
    with open_world(run) as (world, cache):
        table = evaluation.embed_bank(bank, world, cache, announce=partial(announce_bank, evaluation, world.size))
        classifiers = fit_bank(classifier, table)
        fitted = classifiers[0].fitted
        align_labels(cohort.label[data.rows], cohort.class_names, fitted.class_names)  # before any work is done
        settings = evaluation.settings(queries, {name: attack}) | classifier_settings(classifiers, table)
        settings |= {"root": str(files.root), "cohort": cohort.fingerprint(), "batch_size": options.batch_size}
        session = open_session(run, settings, world, cache)
        objectives = ObjectiveFactory(encoder, evaluation.target, evaluation.layer, fitted)
        announce_cost(evaluation, objectives, queries, {name: attack}, bank=table, session=session, embeddings=3)
        with files.open(world):
            conditions = AttackRunner(
                evaluation,
                objectives,
                inspect=lambda batch, _, images, result: _write_batch(files, form, batch, images, result),
                accept=lambda batch, _: all(map(files.has, batch.patch.tolist())),
            ).run(
                queries,
                {name: attack},
                session,
                _cohort_info(cohort, options.split, cohort=cohort.fingerprint()),
                clean=CleanEmbeddings(cache, evaluation.clean_key(queries) if cache else None),
            )
            written = conditions[name].inspected
            if world.is_main:
                files.complete(_account(evaluation, options) | about | {"attack": repr(attack)})
            world.gather("written")
            digests = [digest for batch in written for digest in batch["digests"]]
            stored = _embed_files(evaluation, files, cohort, form=form, digests=digests, options=options, world=world)
            files.publish(world)
    again = _read_files(files.root, cohort)
    attacked, stored = conditions[name], dataclasses.replace(stored, cohort=again.fingerprint())
    conditions[f"{name} (files)"] = Condition({"": stored}, attacked.stats, outcome=attacked.outcome)
    tables = {key: dataclasses.replace(one.tables[""], encoder=provenance.model) for key, one in conditions.items()}
    template = evaluation.template(table, tables[CLEAN], fitted.class_names, loader=queries)
    templates = dict.fromkeys(tables, template) | {f"{name} (files)": template.of_files(again.fingerprint(), about)}
    records: list[Record] = []
    for key, condition in conditions.items():
        scores, own = score_queries(classifiers, tables[key]), None if key == CLEAN else attack
        records += condition_records(
            key,
            condition,
            own,
            tables[key],
            scores,
            classifiers=classifiers,
            template=templates[key].with_clean(records),
        )
    changed = sum(batch["changed"] for batch in written) / max(1, sum(batch["numbers"] for batch in written))
    return ExportResult(files.root, again, tuple(records), tables, changed)


def _account(evaluation: Evaluation, options: ExportOptions) -> dict[str, Any]:
    """What adversarial.json says of the evaluation."""
    return {
        "target": evaluation.target.objective,
        "seed": evaluation.run.seed,
        "model": evaluation.provenance.model,
        "checkpoint": evaluation.provenance.checkpoint,
        "split": options.split or "",
        "name": options.name,
        "versions": software_versions(),
    }


def _write_batch(
    files: AdversarialFiles, form: ImageFormat, batch: HierarchicalBatch, images: Tensor, result: AttackResult
) -> Mapping[str, Any]:
    """Round a batch, write its files, and say how many numbers changed."""
    channels, grid = form.channels, form.grid
    counts = quantize_in_ball(result.x_adv[:, channels], images[:, channels], form.threat, grid).cpu()
    for row, one in zip(batch.patch.tolist(), counts, strict=True):
        files.write(row, one)
    return {
        "numbers": counts.numel(),
        "changed": int((counts != grid.counts(batch.images[:, channels])).sum()),
        "digests": [_digest(one) for one in counts],
    }


def _cohort_info(data: Cohort, split: str | None, *, cohort: str = "") -> LoaderInfo:
    groups = {name: label_by_group(data, name) for name in GROUP_LABELS}
    return LoaderInfo(class_names=data.class_names, split=split or "", cohort=cohort, **groups)


def _embed_files(
    evaluation: Evaluation,
    files: AdversarialFiles,
    cohort: Cohort,
    *,
    form: ImageFormat,
    digests: list[str],
    options: ExportOptions,
    world: World,
) -> EmbeddingTable:
    """Embed the files; RuntimeError for one that holds other numbers than were written."""
    from hsat.data import PatchDataset

    data = PatchDataset(_read_files(files.folder, cohort))

    def verify(images: Tensor, batch: HierarchicalBatch) -> Tensor:
        for row, counts in zip(batch.patch.tolist(), form.grid.counts(batch.images[:, form.channels]), strict=True):
            if _digest(counts) != digests[row]:
                raise RuntimeError(f"{data.cohort.path(row)} does not read as it was written")
        return images

    info = _cohort_info(cohort, options.split)
    return evaluation.embedder("").run(ShapeBatches(data, options.batch_size), info, world, change=verify)


class ShapeBatches:
    """Patches in order, in batches of up to batch_size of one shape: files of a cohort may have different sizes."""

    def __init__(self, data: PatchDataset, batch_size: int) -> None:
        self.dataset, self.batch_size, self.sampler = data, batch_size, SequentialSampler(data)

    def __iter__(self) -> Iterator[HierarchicalBatch]:
        from hsat.data import collate

        waiting: list[Sample] = []
        for index in range(len(self.dataset)):
            sample = self.dataset[index]
            if waiting and (len(waiting) == self.batch_size or sample.images.shape != waiting[0].images.shape):
                yield collate(waiting)
                waiting = []
            waiting.append(sample)
        if waiting:
            yield collate(waiting)


def _read_files(folder: Path, cohort: Cohort) -> Cohort:
    """The cohort in a folder of adversarial files, with the classes of its source."""
    from hsat.data import read_csv

    return read_csv(folder, MANIFEST, kind=cohort.kind, class_names=cohort.class_names)


def _digest(counts: Tensor) -> str:
    return hashlib.sha256(f"{tuple(counts.shape)}".encode() + counts.contiguous().numpy().tobytes()).hexdigest()
