"""The front door: how robust an encoder is on a folder of patches, in one call."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hsat.attacks import PGD, AttackEnsemble, Linf
from hsat.attacks.threat import eps_text
from hsat.classifiers import KNNClassifier
from hsat.data import BadPatch
from hsat.eval import (
    Difference,
    Record,
    Table,
    WhiteboxResult,
    evaluate_drift,
    evaluate_whitebox,
)
from hsat.eval.default_neighbours import default_k, explain_default_k
from hsat.eval.inputs import EvaluationPatches, NamedEncoder, open_encoder, open_patches
from hsat.eval.options import Provenance, RunOptions, Scoring
from hsat.eval.result_files import RunAccount
from hsat.files import write_file
from hsat.quantities import clip_lines
from hsat.report import (
    plot_accuracy_vs_eps,
    record_tables,
    records_csv,
    records_frame,
    records_latex,
    short_summary,
    write_report,
)
from hsat.report.evaluation_files import PAGE, compare_results, write_evaluation
from hsat.types import Attack, Classifier, EmbeddingTable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame

_log = logging.getLogger("hsat")
DRIFT_STEPS = 40
_SHOWN = RunOptions(progress=True, keep_examples=6)


class SummaryText(str):
    """A text of a few lines that a prompt shows as it is."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


@dataclass(frozen=True, eq=False)
class RobustnessResult:
    """The result of `evaluate_robustness`.

    Attributes:
        evaluations: The whole result of each model, by its name: tables, scores, images, outcomes of the ensembles.
        differences: Where there are several models, what each has more than the first, on the same patches.
        notes: How data and encoder were taken, in words.
        settings: What was asked for, for run.json.
        cohort: Fingerprint of the cohort, "" for loaders.
    """

    evaluations: dict[str, WhiteboxResult]
    differences: tuple[Difference, ...] = ()
    notes: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    cohort: str = ""

    @property
    def records(self) -> tuple[Record, ...]:
        """All numbers: one record per condition, classifier, level and metric."""
        return tuple(record for result in self.evaluations.values() for record in result.records)

    @property
    def metric(self) -> str:
        """What the summary speaks of: "accuracy", or "drift" without labels."""
        return "accuracy" if any(record.metric == "accuracy" for record in self.records) else "drift"

    def summary(self) -> SummaryText:
        """Model, clean, noise, the ensemble at each eps, chance and difference, of patches with intervals.

        Returns:
            At most 10 lines of at most 100 characters; `print(result.summary())`.
        """
        return SummaryText("\n".join(short_summary(self.records, differences=self.differences)))

    def __repr__(self) -> str:
        return clip_lines(self.summary())

    def _repr_html_(self) -> str:
        return f"{self.table().to_html()}\n" + "".join(f"<p>{note}</p>" for note in map(_escaped, self.notes))

    def table(self) -> Table:
        """Accuracy with its interval, a row per level and model, a column per condition; without labels the drift.

        Returns:
            The table; print it, or take its `to_latex`, `to_csv`, `to_html`, `to_frame`.
        """
        chosen = [record for record in self.records if record.metric == self.metric]
        tables = [table for table in record_tables(chosen) if table.rows]
        levels = [table.caption.partition(" level")[0] for table in tables]
        rows = [(level, *row) for level, table in zip(levels, tables, strict=True) for row in table.rows]
        caption = "Accuracy in %" if self.metric == "accuracy" else "Drift, 100 (1 - cos)"
        return Table(("level", *tables[0].head), rows, caption=f"{caption}, with 95 % intervals")

    def to_frame(self) -> DataFrame:
        """All numbers as a DataFrame of pandas; see `hsat.report.records_frame`."""
        return records_frame(self.records)

    def to_latex(self) -> str:
        """The tables for a paper, with the rules of booktabs; see `hsat.report.records_latex`."""
        return records_latex(self.records)

    def to_csv(self, path: str | os.PathLike[str] | None = None) -> str:
        """All numbers as CSV, a line each.

        Args:
            path: A file to write, too.

        Returns:
            The text.
        """
        text = records_csv(self.records)
        if path is not None:
            write_file(path, text)
        return text

    def plot(
        self, path: str | os.PathLike[str] | None = None, *, axes: Axes | Sequence[Axes] | None = None
    ) -> Path | Figure:
        """Accuracy against eps, a panel per level; see `hsat.report.plot_accuracy_vs_eps`.

        Args:
            path: The file, a .png, .pdf or .svg.
            axes: Where to draw instead, one for each level.

        Returns:
            The path, or the figure where none was given.
        """
        return plot_accuracy_vs_eps(self.records, path, metric=self.metric, axes=axes)

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write everything: records, scores, tables, figures, what a page shows, the page itself (report.html).

        Args:
            folder: The folder; it is made.  `hsat report` and `hsat compare` read it as those of `hsat evaluate`.

        Returns:
            The folder.
        """
        out = Path(folder)
        self._write(out)
        write_report([out], out / PAGE)
        return out

    def report(self, path: str | os.PathLike[str]) -> Path:
        """Write the page alone: no other files, no network; see `hsat.report.write_report`.

        Args:
            path: The page, an .html.

        Returns:
            The page.
        """
        with tempfile.TemporaryDirectory() as scratch:
            self._write(Path(scratch) / "evaluation")
            return write_report([Path(scratch) / "evaluation"], path)

    def _write(self, out: Path) -> None:
        scoring = Scoring(bootstrap=self.settings.get("bootstrap", Scoring().bootstrap))
        seed, about = self.settings.get("seed", 0), {"notes": list(self.notes)}
        command = ("hsat.evaluate_robustness",)
        account = RunAccount(settings=self.settings, cohort=self.cohort, command=command, about=about)
        write_evaluation(out, self.evaluations, scoring=scoring, seed=seed, account=account)


def evaluate_robustness(
    encoder: object,
    data: object,
    *,
    eps: Sequence[float] | float = (2 / 255, 4 / 255, 8 / 255),
    norm: str | None = None,
    image_size: int | None = None,
    classifier: Classifier | None = None,
    val_fraction: float = 0.3,
    query_patches: int | None = None,
    run: RunOptions = _SHOWN,
) -> RobustnessResult:
    """How many patches an encoder still gets right under the strongest attacks of each strength.

    A classifier of the encoder's embeddings is fitted on a bank of clean training patches; an ensemble of attacks is
    run on each of the other patches, which counts as robust only if all of them fail on it.  The numbers are those of
    `evaluate_whitebox` with `AttackEnsemble.standard`.  Notes say how the data were taken; they are logged, and kept.

    Args:
        encoder: An `Encoder`, any torch module or function of images (n, 3, h, w) in [0, 1], the path of a file of
            hsat, or several by name, {"ours": ..., "baseline": ...}, which are compared on the same patches.
        data: A `Cohort`; a folder in any layout, which is found (OpenSRH, class/patient/slide/patch, class/patch, a
            table); a pair (bank loader or `EmbeddingTable`, query loader); a loader of images without labels.  Splits
            are known by their names (train, Training, val, test); a cohort without any is split by patient.  Without
            patients the numbers are flagged; without labels only the drift of the features is measured.
        eps: Linf radii as shares of the pixel range.
        norm: How the pixels were normalised that a module was trained on: "imagenet", "timm", "none", or
            "m,m,m/s,s,s".  It must be given for a module or function, for nobody else knows it.
        image_size: Side to which patches are resized; by default the encoder's fixed size, else the patches' own.
        classifier: What decides; by default the nearest neighbours, whose number depends on the bank.
        val_fraction: Share of each class's patients that are attacked, where there is no split.
        query_patches: How many of a cohort's queries are attacked, evenly spread, for a first look; all by default.
        run: Seed, device, folders, progress; by default bars and an estimate of the time are shown, and six patches of
            each condition are kept for the page.

    Returns:
        The result; printing it shows the six lines that matter.

    Raises:
        ValueError: For a module without `norm`, patches of several sizes without `image_size`, a folder in no layout,
            and what `evaluate_whitebox` refuses.
        TypeError: For encoders and data of another kind.

    Example:
        >>> images = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> result = evaluate_robustness(lambda x: x.flatten(1), [images], eps=8 / 255, norm="none")
        >>> print(result.summary().splitlines()[0])
        model       <lambda> on 4 patches without labels: cosine distance between features before and after
    """
    encoders = _open_encoders(encoder, norm)
    radii = [float(one) for one in (eps if isinstance(eps, Sequence) else (eps,))]
    if not radii:
        raise ValueError("eps is empty; give Linf radii such as eps=(4/255, 8/255)")
    patches = open_patches(
        data,
        {one.name: one.encoder for one in encoders},
        image_size=image_size,
        val_fraction=val_fraction,
        query_patches=query_patches,
        run=run,
    )
    notes = [*(one.note for one in encoders), *patches.notes]
    with _shown_log(run.progress):
        if patches.bank is not None and classifier is None:
            source = patches.bank if isinstance(patches.bank, EmbeddingTable) else patches.bank.dataset
            classifier = KNNClassifier(k=default_k(source))
            notes.append(f"{explain_default_k(source)}; classifier=KNNClassifier(k=...) sets another number")
        for note in notes:
            _log.warning("note: %s", note)
        attacks = standard_attacks(radii, labelled=patches.bank is not None)
        try:
            results = {one.name: _evaluate(one, encoders, patches, attacks, classifier, run) for one in encoders}
        except BadPatch as error:
            error.add_note("cohort.check_files() lists all bad files, as `hsat check DATA` does")
            raise
    settings = {"eps": radii, "norm": norm, "image_size": image_size, "val_fraction": val_fraction}
    settings |= {"query_patches": query_patches, "seed": run.seed, "bootstrap": Scoring().bootstrap}
    settings |= {"classifier": None if classifier is None else repr(classifier)}
    return RobustnessResult(
        results,
        compare_results(results, scoring=Scoring(), seed=run.seed),
        tuple(notes),
        settings,
        "" if patches.cohort is None else patches.cohort.fingerprint(),
    )


def standard_attacks(eps: Sequence[float], *, labelled: bool = True) -> dict[str, Attack]:
    """The attacks of `evaluate_robustness`: an ensemble at each eps, or PGD on the features where nothing has labels.

    Args:
        eps: Linf radii.
        labelled: Whether there is a decision to attack.

    Returns:
        {"ensemble-8": ...} or {"PGD-8": ...}
    """
    attacks: dict[str, Attack] = {}
    for radius in sorted(set(eps)):
        name = eps_text(radius).removesuffix("/255")
        if labelled:
            attacks[f"ensemble-{name}"] = AttackEnsemble.standard(Linf(radius))
        else:
            attacks[f"PGD-{name}"] = PGD(Linf(radius), step_size=radius / 4, steps=DRIFT_STEPS)
    return attacks


def _open_encoders(encoder: object, norm: str | None) -> list[NamedEncoder]:
    if not isinstance(encoder, Mapping):
        return [open_encoder(encoder, norm=norm)]
    if not encoder:
        raise ValueError("encoder is an empty mapping; give {'ours': ..., 'baseline': ...}")
    return [open_encoder(one, norm=norm, name=str(name)) for name, one in encoder.items()]


def _evaluate(
    one: NamedEncoder,
    encoders: Sequence[NamedEncoder],
    patches: EvaluationPatches,
    attacks: Mapping[str, Attack],
    classifier: Classifier | None,
    run: RunOptions,
) -> WhiteboxResult:
    """One encoder, in folders of its own where several share those of the run; the others are surrogates."""
    provenance = Provenance(model=one.name, checkpoint=one.digest, class_names=patches.class_names)
    if run.resume_dir is not None:
        run = replace(run, resume_dir=Path(run.resume_dir) / one.name)
    for each in encoders:
        if isinstance(each.encoder, torch.nn.Module) and run.device is not None:
            each.encoder.to(run.device)
    if patches.bank is None or classifier is None:
        result = evaluate_drift(one.encoder, patches.queries, attacks, run=run, provenance=provenance)
    else:
        result = evaluate_whitebox(
            one.encoder,
            patches.bank,
            patches.queries,
            attacks,
            classifier=classifier,
            run=run,
            provenance=provenance,
            surrogates={other.name: other.encoder for other in encoders if other is not one},
        )
    records = [record for record in result.records if record.level == "patch" or not patches.patch_only]
    return replace(result, records=tuple(replace(one, flags=(*one.flags, *patches.flags)) for one in records))


@contextmanager
def _shown_log(shown: bool) -> Iterator[None]:
    """A block in which the library's notes and estimates of time are seen, where nobody set up logging."""
    if not shown or _log.hasHandlers():
        yield
        return
    handler, level = logging.StreamHandler(sys.stderr), _log.level
    handler.setFormatter(logging.Formatter("%(message)s"))
    _log.addHandler(handler)
    _log.setLevel(logging.INFO)
    try:
        yield
    finally:
        _log.removeHandler(handler)
        _log.setLevel(level)


def _escaped(text: str) -> str:
    from html import escape

    return escape(text)
