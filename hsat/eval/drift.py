"""How far attacks move the features of images that bear no labels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hsat.eval.announcements import announce_cost
from hsat.eval.budget import mean_interval
from hsat.eval.confidence import Interval
from hsat.eval.evaluation import Evaluation
from hsat.eval.objectives import ObjectiveFactory
from hsat.eval.options import Provenance, RunOptions, Scoring, Target
from hsat.eval.paper_attacks import add_noise_baselines
from hsat.eval.records import AttackFacts, ClassifierFacts, Record
from hsat.eval.runner import CLEAN, AttackRunner
from hsat.eval.store import CleanEmbeddings, open_session, open_world
from hsat.eval.whitebox import WhiteboxResult, check_attacks
from hsat.types import Attack, EmbeddingFunction, HierarchicalBatch
from hsat.types.batch import UNLABELLED

DRIFT = "drift"


def evaluate_drift(
    encoder: EmbeddingFunction,
    queries: Iterable[Any],
    attacks: Mapping[str, Attack],
    *,
    scoring: Scoring = Scoring(),
    run: RunOptions = RunOptions(),
    provenance: Provenance = Provenance(),
) -> WhiteboxResult:
    """Attack the features of images without labels, and measure how far they go.

    The drift of an image is the cosine distance 1 - cos between its features before and after, in [0, 2]; the attacks
    maximise it.  It says how much an encoder can be moved, and not whether a decision would change.

    Args:
        encoder: See `evaluate_whitebox`.
        queries: Batches with ids, whose labels are not looked at, batches of images (n, c, h, w), or of tuples that
            begin with images.
        attacks: {"PGD-8": PGD(...), ...}
        scoring: Its layer, and the resamples of the intervals, which are drawn among patients.
        run: Seed, device, folders, noise baselines, examples.
        provenance: What records say of the encoder.

    Returns:
        Records of the metric "drift" at the level of patches, and the embeddings; there are no scores.

    Raises:
        TypeError: For batches of another kind.
        ValueError: As `evaluate_whitebox` does.

    Example:
        >>> from hsat import PGD, Linf
        >>> images = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> attack = PGD(Linf(8 / 255), step_size=2 / 255, steps=5)
        >>> result = evaluate_drift(lambda x: x.flatten(1), [images], {"PGD-8": attack})
        >>> [(record.attack_name, record.metric, record.n) for record in result.records]
        [('noise-8', 'drift', 4), ('PGD-8', 'drift', 4)]
    """
    check_attacks(attacks, queries)
    has_cohort = hasattr(getattr(queries, "dataset", None), "cohort")  # it says what it is, and labels its batches
    batches = queries if has_cohort else UnlabelledBatches(queries)
    evaluation = Evaluation(encoder, Target("features"), scoring, run, provenance).checked(batches)
    chosen = add_noise_baselines(attacks) if run.noise else dict(attacks)
    info = evaluation.query_info(batches, (UNLABELLED,))
    with open_world(run) as (world, cache):
        session = open_session(run, evaluation.settings(batches, chosen) | {"measured": DRIFT}, world, cache)
        key = evaluation.clean_key(batches) if cache else None
        objectives = ObjectiveFactory(encoder, evaluation.target, evaluation.layer, None)
        announce_cost(evaluation, objectives, batches, chosen, bank=None, session=session)
        conditions = AttackRunner(evaluation, objectives).run(
            batches, chosen, session, info, clean=CleanEmbeddings(cache, key)
        )
    tables = {name: replace(one.tables[""], encoder=provenance.model) for name, one in conditions.items()}
    template = evaluation.template(None, tables[CLEAN], info.class_names, loader=batches)
    template = replace(template, settings={**template.settings, "layer": evaluation.layer})
    records: list[Record] = []
    for name, attack in chosen.items():
        moved = 1.0 - (tables[CLEAN].z.astype(np.float64) * tables[name].z).sum(1)
        records.append(
            template.build(
                AttackFacts(name=name, attack=attack, stats=conditions[name].stats),
                ClassifierFacts(name=""),
                level="patch",
                metric=DRIFT,
                value=float(moved.mean()),
                n=len(moved),
                interval=drift_interval(moved, tables[CLEAN].patient, resamples=scoring.bootstrap, seed=run.seed),
            )
        )
    examples = {name: torch.cat(one.examples) for name, one in conditions.items() if one.examples}
    return WhiteboxResult(
        tuple(records),
        tables,
        {name: {} for name in tables},
        examples,
        info.class_names,
        example_rows=conditions[CLEAN].example_rows,
    )


def drift_interval(drift: np.ndarray, patients: np.ndarray, *, seed: int, resamples: int) -> Interval:
    """The interval of a mean drift over resampled patients, by the method of all records: half a drift is in [0, 1]."""
    half = mean_interval(drift / 2, patients, seed=seed, resamples=resamples)
    if half.low is None or half.high is None:
        return half
    return replace(half, low=2 * half.low, high=2 * half.high)


class UnlabelledBatches:
    """Batches of one class, whatever labels they had or had not; images without ids are patients of their own."""

    def __init__(self, queries: Iterable[Any]) -> None:
        self.source = queries
        self.dataset = _Unlabelled()

    def __len__(self) -> int:
        return len(self.source)  # type: ignore[arg-type]  # TypeError for loaders that do not know it

    def __iter__(self) -> Iterator[HierarchicalBatch]:
        start = 0
        for item in self.source:
            images = _images_of(item)
            label = torch.zeros(len(images), dtype=torch.int64)
            if isinstance(item, HierarchicalBatch):
                yield HierarchicalBatch(images, item.patch, item.slide, item.patient, label)
                continue
            ids = torch.arange(start, start + len(images))
            start += len(images)
            yield HierarchicalBatch(images, ids, ids, ids, label)


class _Unlabelled:
    """Stands for the dataset of loaders that know no classes."""

    class_names = (UNLABELLED,)


def _images_of(item: Any) -> Tensor:
    if isinstance(item, HierarchicalBatch):
        return item.images
    first = item[0] if isinstance(item, tuple | list) and item else item
    if not isinstance(first, Tensor) or first.ndim != 4:
        what = f"a tensor of shape {tuple(first.shape)}" if isinstance(first, Tensor) else type(first).__name__
        raise TypeError(
            "the loader must give batches of images (n, c, h, w), or tuples that begin with them, or batches with ids"
            f" (hsat.data.patch_loader); got {what}"
        )
    return first
