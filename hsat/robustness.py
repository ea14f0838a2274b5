"""The front door: how robust an encoder is on a folder of patches, in one call."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from html import escape
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
from hsat.eval.doubts import list_doubts
from hsat.eval.inputs import EvaluationPatches, NamedEncoder, open_encoder, open_patches
from hsat.eval.loader_inputs import LoaderBank, size_flags
from hsat.eval.options import Provenance, RunOptions, Scoring
from hsat.eval.result_files import RunAccount
from hsat.files import write_file
from hsat.progress import shown_log
from hsat.quantities import clip_lines
from hsat.report import (
    plot_accuracy_vs_eps,
    record_tables,
    records_csv,
    records_frame,
    records_latex,
    short_summary,
)
from hsat.report.evaluation_files import PAGE, compare_results, write_evaluation
from hsat.types import LEVELS, Attack, Classifier, EmbeddingTable

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

    def doubts(self) -> tuple[str, ...]:
        """Reasons to distrust the numbers, the weightiest first: flags of records, and what only several show.

        The summary shows the first of them, of patches.

        Returns:
            The reasons in words, each once; none where there is nothing to say.
        """
        return list_doubts(self.records)

    def __repr__(self) -> str:
        return clip_lines(self.summary())

    def _repr_html_(self) -> str:
        return f"{self.table().to_html()}\n" + "".join(f"<p>{note}</p>" for note in map(escape, self.notes))

    def table(self) -> Table:
        """Accuracy with its interval, a row per level and model, a column per condition; without labels the drift.

        Returns:
            The table; print it, or take its `to_latex`, `to_csv`, `to_html`, `to_frame`.
        """
        chosen = [record for record in self.records if record.metric == self.metric]
        tables = [table for table in record_tables(chosen) if table.rows]
        levels = [table.caption.partition(" level")[0] for table in tables]
        rows = [(level, *row) for level, table in zip(levels, tables, strict=True) for row in table.rows]
        caption = "Accuracy in %" if self.metric == "accuracy" else "Drift, 1 - cos"
        return Table(("level", *tables[0].head), rows, caption=f"{caption}, with 95 % intervals")

    def to_frame(self) -> DataFrame:
        """All numbers as a DataFrame of pandas; see `hsat.report.records_frame`."""
        return records_frame(self.records)

    def to_latex(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        levels: Sequence[str] = LEVELS,
        metrics: Sequence[str] | None = None,
    ) -> str:
        """The tables for a paper, with the rules of booktabs; see `hsat.report.records_latex`.

        Args:
            path: A file to write, too.
            levels: Which levels.
            metrics: Which metrics; all by default.

        Returns:
            LaTeX text.

        Raises:
            ValueError: Where nothing of that was measured.
        """
        text = records_latex(
            one for one in self.records if one.level in levels and (metrics is None or one.metric in metrics)
        )
        if path is not None:
            write_file(path, text)
        return text

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
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        levels: Sequence[str] = LEVELS,
        axes: Axes | Sequence[Axes] | None = None,
    ) -> Path | Figure:
        """Accuracy against eps, a panel per level; see `hsat.report.plot_accuracy_vs_eps`.

        Args:
            path: The file, a .png, .pdf or .svg.
            levels: Which levels, each a panel: plot(axes=ax, levels=("patch",)).
            axes: Where to draw instead, one for each level.

        Returns:
            The path, or the figure where none was given.
        """
        return plot_accuracy_vs_eps(self.records, path, metric=self.metric, levels=levels, axes=axes)

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write everything: records, scores, tables, figures, what a page shows, the page itself (report.html).

        Args:
            folder: The folder; it is made.  A result that it holds is replaced; other files stay.  `hsat report` and
                `hsat compare` read it as those of `hsat evaluate`.

        Returns:
            The folder.
        """
        self._write(Path(folder))
        return Path(folder)

    def report(self, path: str | os.PathLike[str]) -> Path:
        """Write the page alone: no other files, no network; see `hsat.report.write_report`.

        Args:
            path: The page, an .html.

        Returns:
            The page.
        """
        with tempfile.TemporaryDirectory() as scratch:
            self._write(Path(scratch) / "evaluation")
            return write_file(path, (Path(scratch) / "evaluation" / PAGE).read_text(encoding="utf-8"))

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
    eps: Sequence[float | str] | float | str = (2 / 255, 4 / 255, 8 / 255),
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
        eps: Linf radii as shares of the pixel range, as numbers or texts: 8/255, (4/255, 8/255), "4/255,8/255".
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
        model       <lambda> on 4 patches without labels: drift of the features, 1 - cos
    """
    radii = _read_eps(eps)
    encoders = _open_encoders(encoder, norm)
    patches = open_patches(
        data,
        {one.name: one.encoder for one in encoders},
        image_size=image_size,
        val_fraction=val_fraction,
        query_patches=query_patches,
    )
    notes = [*(one.note for one in encoders), *patches.notes]
    with shown_log(run.progress):
        if run.device is not None:
            for module in (one.encoder for one in encoders if isinstance(one.encoder, torch.nn.Module)):
                module.to(run.device)
        bank = _bank_of(encoders[0], patches, run)
        if bank is not None and classifier is None:
            source = bank if isinstance(bank, EmbeddingTable) else bank.dataset
            classifier = KNNClassifier(k=default_k(source))
            notes.append(f"{explain_default_k(source)}; classifier=KNNClassifier(k=...) sets another number")
        for note in notes:
            _log.warning("note: %s", note)
        attacks = standard_attacks(radii, labelled=bank is not None)
        results = {}
        try:
            for one in encoders:
                own = replace(patches, bank=bank if one is encoders[0] else _bank_of(one, patches, run))
                results[one.name] = _evaluate(one, encoders, own, attacks, classifier, run)
        except BadPatch as error:
            error.add_note("cohort.check_files() lists all bad files, as `hsat check DATA` does")
            raise
    flags = size_flags(patches.bank, patches.queries)
    results = {name: _flagged(result, flags) for name, result in results.items()}
    settings = {"eps": radii, "norm": norm, "image_size": image_size, "val_fraction": val_fraction}
    settings |= {"query_patches": query_patches, "seed": run.seed, "bootstrap": Scoring().bootstrap}
    settings |= {"classifier": None if classifier is None else repr(classifier)}
    differences = compare_results(results, scoring=Scoring(), seed=run.seed)
    cohort = "" if patches.cohort is None else patches.cohort.fingerprint()
    return RobustnessResult(results, differences, tuple(notes), settings, cohort)


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
    return _flagged(replace(result, records=tuple(records)), patches.flags)


def _bank_of(one: NamedEncoder, patches: EvaluationPatches, run: RunOptions) -> Any:
    """The bank for one encoder, which embeds a loader of the caller's own; None without a bank."""
    if not isinstance(patches.bank, LoaderBank):
        return patches.bank
    return patches.bank.embed(one.encoder, name=one.name, run=run)


def _flagged(result: WhiteboxResult, flags: Sequence[str]) -> WhiteboxResult:
    """The result with further flags on all its records."""
    return replace(result, records=tuple(replace(one, flags=(*one.flags, *flags)) for one in result.records))


def _read_eps(eps: Sequence[float | str] | float | str) -> list[float]:
    """Linf radii, from numbers and texts such as "4/255" or "2/255,4/255"."""
    from hsat.training.config import parse_pixels

    given = eps.split(",") if isinstance(eps, str) else eps if isinstance(eps, Iterable) else (eps,)
    try:
        radii = [parse_pixels(one if isinstance(one, str) else float(one)) for one in given]
    except (ValueError, TypeError) as error:
        raise ValueError(f"eps: {error}") from None
    if not radii:
        raise ValueError("eps is empty; give Linf radii such as eps=(4/255, 8/255)")
    return radii
