"""Certified robustness of an encoder's kNN vote at patch, slide and patient level, as records."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
import torch

from hsat.classifiers import FittedKNN, KNNClassifier
from hsat.embedding import (
    Layer,
    embed,
    eval_mode,
    loader_info,
    require_labels,
    resolve_device,
    select_layer,
    show_progress,
)
from hsat.eval.certification.certificates import ABSTAIN, POOLINGS, Certificates, Pooling, group_radius, patch_radius
from hsat.eval.certification.smoothing import Smoothing, count_votes, gaussian_noise, knn_vote
from hsat.eval.measuring import measured_record
from hsat.eval.records import Record, eps_text, software_versions
from hsat.eval.statistics.bootstrap import bootstrap_intervals
from hsat.eval.tally import shared_patients
from hsat.types import LEVELS, EmbeddingFunction, EmbeddingTable, HierarchicalBatch, align_labels

RADII = (0.0, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True, eq=False)
class CertificateResult:
    """What `certify` found.

    levels: `Certificates` by "patch", "slide" and "patient".  selected, counts: (n, classes) votes under noise of each
    patch, in the order of the queries; columns as in `class_names`.  knn: the bank that voted.  records: one per level
    and radius.  settings: the smoothing.
    """

    levels: dict[str, Certificates]
    selected: np.ndarray
    counts: np.ndarray
    records: tuple[Record, ...]
    knn: FittedKNN
    settings: Smoothing
    layer: str

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes of the bank."""
        return self.knn.class_names


def certify(
    encoder: EmbeddingFunction,
    bank: Iterable[HierarchicalBatch] | EmbeddingTable,
    queries: Iterable[HierarchicalBatch],
    *,
    smoothing: Smoothing,
    radii: Sequence[float] = RADII,
    layer: Layer = "features",
    k: int = 200,
    temperature: float = 0.07,
    index: str = "flat",
    how: Pooling = "mean",
    noisy_bank: bool = False,
    bootstrap: int = 1000,
    class_names: Sequence[str] | None = None,
    device: torch.device | str | None = None,
    model: str = "",
    checkpoint: str = "",
    progress: bool = False,
) -> CertificateResult:
    """Smooth the kNN vote with Gaussian noise and certify its decisions against every L2 attack of a radius.

    The base classifier is the hard kNN vote of the layer; the smoothed one answers what the base answers most often
    under noise.  See `patch_radius` and `group_radius` for the mathematics: patches by CERTIFY (Cohen et al.,
    arXiv:1902.02918), slides and patients against an attacker who moves every patch by the radius at once.

    bank: a loader of clean images, or their table.  noisy_bank=True embeds a loader's images with one draw of the noise
    each, so that bank and noisy queries look alike: any fixed bank is allowed, and this one usually certifies more.
    queries: a loader, read once, one row per patch.  radii: L2 norms in units of the pixel range, for the records.
    Each image costs selection + samples passes.  The noise of a draw depends on (seed, patch id, draw) only.

    Records: metric "certified_accuracy", the share of rows whose decision is right and cannot be changed within the
    radius (a lower bound of the accuracy under any attack of that norm); intervals from resampled patients.  A
    certificate is wrong with probability at most alpha, for each row of a level by itself.

    Raises ValueError for bad settings, repeated patch ids, a noisy bank that is a table, and as `embed` does.
    """
    wanted = _check(radii, how, noisy_bank, bank)
    if not isinstance(bank, EmbeddingTable):
        images = _Noisy(bank, smoothing) if noisy_bank else bank
        bank = embed(
            encoder, images, class_names=class_names, layer=layer, device=device, encoder_name=model, progress=progress
        )
    if len(np.unique(bank.label)) == 1:
        raise ValueError(f"the bank holds one class only, of {bank.class_names}: there is no decision to certify")
    knn = KNNClassifier(k=k, temperature=temperature, index=index).fit(bank)
    votes = _count(
        encoder, knn, queries, smoothing, layer=layer, class_names=class_names, device=device, progress=progress
    )
    levels = _levels(votes, smoothing, how)
    head: dict[str, Any] = {
        "model": model,
        "checkpoint": checkpoint,
        "k": knn.k,
        "temperature": temperature,
        "flags": shared_patients(bank, votes.table(knn.class_names)),
        "settings": {
            "layer": layer,
            "how": how,
            "sigma": smoothing.sigma,
            "alpha": smoothing.alpha,
            "noisy_bank": noisy_bank,
            "index": index,
            "bank_rows": len(bank),
            "bootstrap": bootstrap,
        },
    }
    records = _records(head, levels, votes, smoothing=smoothing, radii=wanted, bootstrap=bootstrap)
    return CertificateResult(levels, votes.selected, votes.counts, tuple(records), knn, smoothing, layer)


class _Noisy:
    """A loader whose images carry one draw of the noise each: draw -1, which no query uses."""

    def __init__(self, loader: Iterable[HierarchicalBatch], smoothing: Smoothing) -> None:
        self._loader, self._smoothing = loader, smoothing
        self.dataset = getattr(loader, "dataset", None)

    def __iter__(self) -> Iterator[HierarchicalBatch]:
        sigma, seed = self._smoothing.sigma, self._smoothing.seed
        for batch in self._loader:
            shape = tuple(batch.images.shape[1:])
            noise = [
                gaussian_noise(shape, patch, range(-1, 0), sigma=sigma, seed=seed) for patch in batch.patch.tolist()
            ]
            yield batch.replace(images=batch.images + torch.cat(noise).to(batch.images))


@dataclass(frozen=True, eq=False)
class _Votes:
    """Votes and ids of all queries."""

    selected: np.ndarray
    counts: np.ndarray
    ids: dict[str, np.ndarray]
    cohort: str
    split: str

    def table(self, class_names: tuple[str, ...]) -> EmbeddingTable:
        """The ids as a table without embeddings."""
        columns: dict[str, Any] = {"z": np.zeros((len(self.counts), 1), dtype=np.float32), **self.ids}
        return EmbeddingTable(**columns, class_names=class_names, cohort=self.cohort, split=self.split)


def _count(
    encoder: EmbeddingFunction,
    knn: FittedKNN,
    queries: Iterable[HierarchicalBatch],
    smoothing: Smoothing,
    *,
    layer: str,
    class_names: Sequence[str] | None,
    device: torch.device | str | None,
    progress: bool,
) -> _Votes:
    names, cohort, split = astuple(loader_info(queries, class_names))
    place, vote = resolve_device(encoder, device), knn_vote(select_layer(encoder, layer), knn)
    last = smoothing.selection + smoothing.samples
    parts: list[tuple[np.ndarray, ...]] = []
    with eval_mode(encoder):
        for batch in show_progress(queries, "certifying", shown=progress):
            label = align_labels(require_labels(batch), names, knn.class_names)
            found = [
                count_votes(
                    vote,
                    batch.images.to(place),
                    batch.patch,
                    classes=len(knn.class_names),
                    draws=draws,
                    sigma=smoothing.sigma,
                    seed=smoothing.seed,
                    chunk=smoothing.chunk,
                )
                for draws in (range(smoothing.selection), range(smoothing.selection, last))
            ]
            parts.append((*found, label, *(getattr(batch, level).cpu().numpy() for level in LEVELS)))
    if not parts:
        raise ValueError(f"the queries gave no batches (split {split!r}): nothing to certify")
    selected, counts, label, *levels = (np.concatenate(column) for column in zip(*parts, strict=True))
    ids = {"label": label, **dict(zip(LEVELS, levels, strict=True))}
    if len(np.unique(ids["patch"])) < len(counts):
        raise ValueError("the queries repeat patch ids; noise is drawn by id, so that each patch must come once")
    return _Votes(selected, counts, ids, cohort, split)


def _levels(votes: _Votes, smoothing: Smoothing, how: Pooling) -> dict[str, Certificates]:
    label, patient, sigma, alpha = votes.ids["label"], votes.ids["patient"], smoothing.sigma, smoothing.alpha
    prediction, radius = patch_radius(votes.selected, votes.counts, sigma=sigma, alpha=alpha)
    levels = {"patch": Certificates(votes.ids["patch"], prediction, radius, label, patient)}
    for level in LEVELS[1:]:
        groups, first, member_of = np.unique(votes.ids[level], return_index=True, return_inverse=True)
        if len(wrong := np.flatnonzero(label != label[first][member_of])):
            raise ValueError(f"{level} {groups[member_of[wrong[0]]]} holds patches with different labels; it has one")
        found = [
            group_radius(votes.selected[rows], votes.counts[rows], sigma=sigma, alpha=alpha, how=how)
            for rows in (np.flatnonzero(member_of == group) for group in range(len(groups)))
        ]
        answer, reach = (np.array(column) for column in zip(*found, strict=True))
        levels[level] = Certificates(groups, answer, reach, label[first], patient[first])
    return levels


def _records(
    head: dict[str, Any],
    levels: dict[str, Certificates],
    votes: _Votes,
    *,
    smoothing: Smoothing,
    radii: Sequence[float],
    bootstrap: int,
) -> Iterator[Record]:
    versions = software_versions()
    for level, found in levels.items():
        extra = {"abstained": float((found.prediction == ABSTAIN).mean())}
        for radius in radii:
            holds = found.holds(radius)
            interval = bootstrap_intervals(
                np.stack((holds, ~holds), 1),
                np.zeros(len(holds), dtype=np.int64),
                found.patient,
                generator=np.random.default_rng(smoothing.seed),
                names=("accuracy",),
                resamples=bootstrap,
            )["accuracy"]
            place = Record(
                **head | {"settings": head["settings"] | extra},
                attack=f"certificate: {smoothing!r}",
                attack_name=f"certified-{eps_text(radius)}",
                eps=eps_text(radius),
                eps_value=float(radius),
                target="any",
                level=level,
                metric="certified_accuracy",
                value=float(holds.mean()),
                n=len(holds),
                seed=smoothing.seed,
                versions=versions,
                cohort=votes.cohort,
                split=votes.split,
                forwards=float(smoothing.selection + smoothing.samples),
            )
            yield measured_record(place, place.metric, place.value, interval)


def _check(radii: Sequence[float], how: str, noisy_bank: bool, bank: object) -> tuple[float, ...]:
    found = tuple(float(radius) for radius in radii)
    if not found or not all(radius >= 0 and np.isfinite(radius) for radius in found):
        raise ValueError(f"radii must be numbers of at least 0, in units of the pixel range; got {radii!r}")
    if how not in POOLINGS:
        raise ValueError(f"unknown pooling {how!r} of certificates; choose one of {list(POOLINGS)}")
    if noisy_bank and isinstance(bank, EmbeddingTable):
        raise ValueError("noisy_bank=True needs the bank's images, and a table has none; give its loader")
    return found
