"""White-box robustness of a plain classifier: how often its own logits are right on attacked images."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from hsat.classifiers import Head
from hsat.embedding import eval_mode, resolve_device, to_device
from hsat.eval.evaluation import Evaluation, ScoredClassifier
from hsat.eval.options import Provenance, RunOptions, Scoring, Target
from hsat.eval.paper_attacks import add_noise_baselines
from hsat.eval.store import open_session, open_world
from hsat.eval.whitebox import WhiteboxResult, attack_queries, check_attacks, measure_attacks
from hsat.fingerprints import fingerprint_weights
from hsat.types import Attack, HierarchicalBatch
from hsat.types.plain_batches import PlainBatches, pair_of
from hsat.types.row_checks import check_rows

LogitFunction = Callable[[Tensor], Tensor]
"""Images (n, c, h, w) in [0, 1] -> logits (n, classes); normalisation of the pixels happens inside."""

Batches = Iterable[HierarchicalBatch] | Iterable[Sequence[Tensor]]
"""Batches with ids, or pairs of images (n, c, h, w) and labels (n,)."""

PATCH_ONLY = (
    "the loader gives images and labels without slides and patients: only single images are measured, and intervals"
    " take them for independent"
)


def evaluate_classifier(
    model: LogitFunction,
    loader: Batches,
    attacks: Mapping[str, Attack],
    *,
    class_names: Sequence[str] | None = None,
    scoring: Scoring = Scoring(),
    run: RunOptions = RunOptions(),
    provenance: Provenance = Provenance(),
) -> WhiteboxResult:
    """Attack the decision of a trained classifier, and measure how often it stays right.

    What `evaluate_whitebox` is for an encoder and a bank, for a model that has its own logits: the same pass, records,
    intervals, flags, resuming, sharing among ranks, and report.  The attacks maximise the margin of the logits.

    Args:
        model: Images in [0, 1] -> logits; a module, which is frozen meanwhile and restored, or any function.  A
            `DecisionModel` will do.
        loader: Batches with ids, as `patch_loader` gives them, or any batches of (images, labels): then only single
            images are measured, and the records' flags say so.
        attacks: {"PGD-8": PGD(...), ...}, as for `evaluate_whitebox`.
        class_names: The classes in the order of the logits.  By default those of `provenance`, else of the loader's
            dataset (`class_names` or `classes`), else numbers.  Labels of a dataset with `class_names` of its own are
            matched by name; other labels are indices of the logits.
        scoring: How logits become numbers; its layer does not apply.
        run: Seed, device, folders, noise baselines, diagnosis, examples.
        provenance: What records say of the model.

    Returns:
        Records, scores and examples; its tables hold the logits, as unit rows and their lengths.

    Raises:
        ValueError: For logits of another shape, of another number of classes or not finite, for a class index that
            has no logit, and as `evaluate_whitebox` does.
        TypeError: For batches of another kind, and for attacks that are no mapping of attacks.

    Example:
        >>> import torch
        >>> from hsat import PGD, Linf
        >>> images = torch.tensor([0.2, 0.3, 0.7, 0.8]).view(4, 1, 1, 1)
        >>> loader = [(images, torch.tensor([0, 0, 1, 1]))]
        >>> attack = PGD(Linf(0.25), step_size=0.1, steps=5)
        >>> bright = lambda x: torch.cat((0.5 - x.flatten(1), x.flatten(1) - 0.5), 1)
        >>> result = evaluate_classifier(bright, loader, {"PGD": attack}, class_names=("dark", "bright"))
        >>> {record.attack_name: record.value for record in result.records if record.metric == "accuracy"}["PGD"]
        0.5
    """
    check_attacks(attacks)
    batches, first = open_batches(loader)
    names = _class_names(model, loader, first, class_names or provenance.class_names, run)
    logits = _LogitsModule(model, names) if isinstance(model, nn.Module) else _LogitsFunction(model, names)
    own = replace(provenance, class_names=_names_of_labels(loader, names))
    evaluation = Evaluation(logits, Target("decision"), scoring, run, own).checked(batches)
    chosen = add_noise_baselines(attacks) if run.noise else dict(attacks)
    head = _OwnLogits(nn.Identity(), names)
    classifiers = (ScoredClassifier(head, head, attacked=True),)
    with open_world(run) as (world, cache):
        settings = evaluation.settings(batches, chosen) | {"classifier": repr(head), "logits": list(names)}
        attacked = attack_queries(
            evaluation, batches, chosen, open_session(run, settings, world, cache), classifier=head
        )
    result = measure_attacks(evaluation, attacked, chosen, classifiers, bank=None)
    if not isinstance(batches, PlainBatches):
        return result
    records = (record for record in result.records if record.level == "patch")
    return replace(result, records=tuple(replace(record, flags=(*record.flags, PATCH_ONLY)) for record in records))


class _OwnLogits(Head):
    """Decides by the logits that it is given."""

    def __repr__(self) -> str:
        return "the model's own logits"


class _LogitsFunction:
    """A function of images whose logits are checked."""

    def __init__(self, model: LogitFunction, class_names: Sequence[str]) -> None:
        self.model, self.class_names = model, tuple(class_names)

    def __call__(self, images: Tensor) -> Tensor:
        return check_logits(self.model(images), len(images), self.class_names)


class _LogitsModule(nn.Module):
    """A module whose logits are checked; it has one layer, whatever the model calls its features."""

    def __init__(self, model: nn.Module, class_names: Sequence[str]) -> None:
        super().__init__()
        self.model, self.class_names = model, tuple(class_names)
        self.training = model.training

    def forward(self, images: Tensor) -> Tensor:
        return check_logits(self.model(images), len(images), self.class_names)

    def fingerprint(self) -> str:
        """That of the model, which may state its own."""
        return fingerprint_weights(self.model)


def check_logits(logits: Any, n: int, class_names: Sequence[str] | None = None) -> Tensor:
    """The logits (n, classes) of n images, unless they are none.

    Without a graph they must be finite as well: reading that in every step of an attack would hold up a GPU.

    Raises:
        TypeError: For what is no tensor.
        ValueError: For another shape or number of classes, for fewer than two, and for values that are not finite.
    """
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"the model must give a tensor of logits, got {type(logits).__name__}; wrap it:"
            " evaluate_classifier(lambda images: model(images).logits, ...), or whatever the field is called"
        )
    check_rows(logits, n, "the model", columns="classes")
    if logits.shape[1] < 2:
        raise ValueError(
            "the model gives one logit per image, and a decision needs one per class; write"
            " lambda x: torch.cat((-model(x) / 2, model(x) / 2), 1) for a model of two classes"
        )
    if class_names is not None and logits.shape[1] != len(class_names):
        raise ValueError(
            f"the model gives {logits.shape[1]} logits, and there are {len(class_names)} classes: {list(class_names)};"
            " class_names=(...) must name them in the order of the logits"
        )
    if not torch.is_grad_enabled() and not logits.isfinite().all():
        rows = (~logits.isfinite()).any(1).nonzero()[:, 0].tolist()
        raise ValueError(f"the model's logits are not finite for {len(rows)} of {n} images, first for image {rows[0]}")
    return logits


def open_batches(loader: Batches) -> tuple[Iterable[HierarchicalBatch], Any]:
    """Batches with ids, and the first item; a loader that can be read once is not read ahead."""
    source: Any = loader
    if hasattr(getattr(source, "dataset", None), "cohort"):  # hsat's own, whose batches need not be looked at
        return source, None
    first = next(iter(source), None)
    if first is None:
        raise ValueError("the loader gave no batches: nothing to evaluate")
    if isinstance(source, Iterator):
        source = itertools.chain((first,), source)
    return (source if isinstance(first, HierarchicalBatch) else PlainBatches(source)), first


def _names_of_labels(loader: object, names: Sequence[str]) -> tuple[str, ...]:
    """The classes that the labels of the loader index: its own where it names them, else those of the logits."""
    own = getattr(getattr(loader, "dataset", None), "class_names", None)
    return tuple(names if own is None else own)


def _class_names(
    model: LogitFunction, loader: object, first: Any, given: Sequence[str] | None, run: RunOptions
) -> tuple[str, ...]:
    """The classes in the order of the logits."""
    dataset = getattr(loader, "dataset", None)
    names = next(
        (
            names
            for names in (given, getattr(dataset, "class_names", None), getattr(dataset, "classes", None))
            if names is not None
        ),
        None,
    )
    if names is not None:
        return tuple(map(str, names))
    images = first.images if isinstance(first, HierarchicalBatch) else pair_of(first)[0]
    with eval_mode(model), torch.no_grad():
        logits = check_logits(model(to_device(images[:1], resolve_device(model, run.device))), 1)
    return tuple(map(str, range(logits.shape[1])))
