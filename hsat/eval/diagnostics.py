"""Is it robustness, or did the attack fail?  Diagnosis of attacks for masked gradients, as flags of records."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hsat.attacks import AttackEnsemble, FittedUniversal, RandomNoise, Square, margin
from hsat.attacks.initialization import image_seed
from hsat.attacks.threat import eps_value
from hsat.classifiers import DecisionModel, KNNClassifier
from hsat.embedding import Layer, embed, encode, eval_mode, require_labels, select_layer, using_branch
from hsat.eval.evaluation import Evaluation
from hsat.eval.masking import CRITERIA, DiagnosisTarget, SharedOutcomes, judge_criterion, run_checks
from hsat.eval.objectives import ObjectiveFactory
from hsat.eval.options import Provenance, RunOptions, Scoring, Target
from hsat.eval.store import Session, StoredResult
from hsat.fingerprints import fingerprint_batch, fingerprint_settings
from hsat.progress import Progress
from hsat.types import (
    Attack,
    Classifier,
    DecisionObjective,
    EmbeddingFunction,
    EmbeddingTable,
    FittedClassifier,
    HierarchicalBatch,
    Objective,
    align_labels,
)

_OF_RIGHT_ONES = ("black_box_breaks", "robust_to_unbounded_attack")  # criteria that need a decision which was right


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """The outcome of a diagnosis.

    Attributes:
        flags: A sentence for each criterion that a sound model would not meet so often; it begins with its name.
        measures: The share of images that meet each criterion, "images" and "images_right" (looked at, and recognised
            clean), and "accuracy_clean", "_noise", "_attack" and "_black_box" on these images.
    """

    flags: tuple[str, ...]
    measures: dict[str, float]


def diagnose(
    encoder: EmbeddingFunction,
    bank: Iterable[HierarchicalBatch] | EmbeddingTable,
    queries: Iterable[HierarchicalBatch],
    attack: Attack,
    *,
    classifier: Classifier = KNNClassifier(),
    target: Target | str = "decision",
    scoring: Scoring = Scoring(),
    run: RunOptions = RunOptions(diagnose=32),
    provenance: Provenance = Provenance(),
    surrogates: Sequence[EmbeddingFunction] = (),
) -> Diagnosis:
    """Look for signs that an attack fails because gradients are masked, not because the encoder is robust.

    The criteria (tolerated shares and reasons: `hsat.eval.masking`): zero gradient; never moved; noise of the same size
    as good as the attack; a search without gradients (random points, Square, surrogates) better than the attack, by
    value or by decision; the objective does not rise with the steps; decisions that stay right under an unlimited
    attack; a second pass that gives another embedding; embeddings that jump (noise seeded by the image).  Together they
    raise a flag for a sound model with a probability of at most 1 %.  With few images only gross masking is seen.  No
    flag is no proof of robustness.  Cost per image, for an attack of s steps: 2 s + 40 gradients at most (3.5 s for
    others than PGD, BIM and MI-FGSM) and about 100 passes; `evaluate_whitebox` shares most of it among its attacks.

    Args:
        encoder, bank, queries, classifier, target, scoring, provenance: As for `evaluate_whitebox`.
        attack: The attack under diagnosis.
        run: `run.diagnose` queries are looked at, chosen by a hash of (seed, patch id).
        surrogates: Other encoders, whose adversarial images are tried as well.

    Returns:
        Flags, and what was measured for them.

    Raises:
        ValueError: For an attack without a threat model or with eps 0, for one that follows no gradient (RandomNoise,
            Square, a universal perturbation, an ensemble), no queries, `run.diagnose` of 0, and as `embed` does.
    """
    check_attack_fits(attack)
    if run.diagnose < 1:
        raise ValueError("RunOptions(diagnose=...), the number of queries to look at, must be at least 1; got 0")
    if not isinstance(bank, EmbeddingTable):
        bank = embed(encoder, bank, class_names=provenance.class_names, layer=scoring.layer, device=run.device)
    fitted = classifier.fit(bank)
    evaluation = Evaluation(encoder, Target.of(target), scoring, run, provenance)
    info = evaluation.query_info(queries, fitted.class_names)
    subset = HashSubset(run.diagnose, seed=run.seed)
    for batch in queries:
        subset.add(batch, torch.from_numpy(align_labels(require_labels(batch), info.class_names, fitted.class_names)))
    batches = subset.batches()
    if not batches:
        raise ValueError(f"the queries gave no batches (split {info.split!r}): nothing to diagnose")
    objectives = ObjectiveFactory(encoder, evaluation.target, scoring.layer, fitted)
    subject = diagnosis_target(encoder, objectives, attack, layer=scoring.layer, classifier=fitted, seed=run.seed)
    layers = tuple(select_layer(other, scoring.layer) for other in surrogates)
    with ExitStack() as stack:
        for module in (encoder, *surrogates):
            stack.enter_context(eval_mode(module))
        return examine(dataclasses.replace(subject, surrogates=layers), batches, device=evaluation.device)


def diagnosis_target(
    encoder: EmbeddingFunction,
    objectives: ObjectiveFactory,
    attack: Attack,
    *,
    layer: Layer,
    classifier: FittedClassifier,
    seed: int,
) -> DiagnosisTarget:
    """A model and the attack on it, as `examine` takes them."""
    scored = select_layer(encoder, layer)

    def objective(images: Tensor, labels: Tensor) -> Objective:
        with using_branch(encoder, objectives.branch):
            made = objectives.objective(images, labels, encode(scored, images))
        return _in_branch(encoder, objectives.branch, made)

    attacked = scored if objectives.target == "decision" else select_layer(encoder, objectives.target)
    model = DecisionModel(encoder, classifier, layer=layer, wide=True)
    return DiagnosisTarget(
        attack=attack,
        attacked=attacked,
        model=model,
        objective=objective,
        decides=objectives.target == "decision" and objectives.branch is None,
        seed=seed,
    )


def _in_branch(encoder: EmbeddingFunction, branch: str | None, objective: Objective) -> Objective:
    """The objective, evaluated through a BatchNorm branch."""
    if branch is None:
        return objective
    function = objective.model if isinstance(objective, DecisionObjective) else objective

    def inside(images: Tensor) -> Tensor:
        with using_branch(encoder, branch):
            return function(images)

    return margin(inside, objective.labels) if isinstance(objective, DecisionObjective) else inside


def examine(
    subject: DiagnosisTarget,
    batches: Iterable[HierarchicalBatch],
    *,
    device: torch.device,
    shared: Sequence[SharedOutcomes] | None = None,
) -> Diagnosis:
    """The diagnosis of these images (labels as the classifier numbers them), for callers who hold the model frozen.

    shared: For each batch what diagnoses of other attacks on the same model and objective have left.
    """
    parts: list[dict[str, np.ndarray]] = []
    subject.model.to(device)
    for number, batch in enumerate(batches):
        images, labels = batch.images.to(device), torch.from_numpy(require_labels(batch))
        left = None if shared is None else shared[number]
        parts.append(run_checks(subject, images, labels, batch.patch, left))
    seen = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    right = seen["right_clean"]
    measures = {"images": float(len(right)), "images_right": float(right.sum())}
    for name in ("clean", "noise", "attack", "black_box"):
        measures[f"accuracy_{name}"] = float(seen[f"right_{name}"].mean())
    flags = []
    for criterion in CRITERIA:
        outcome = seen[criterion.name]
        share, flag = judge_criterion(criterion, outcome[right] if criterion.name in _OF_RIGHT_ONES else outcome)
        measures[f"{criterion.name}_share"] = share
        flags += [flag] if flag else []
    return Diagnosis(flags=tuple(flags), measures=measures)


def check_attack_fits(attack: Attack) -> None:
    """Raise ValueError unless there is something to diagnose: gradient steps inside a ball of some size."""
    threat = getattr(attack, "threat", None)
    if threat is None:
        raise ValueError(
            f"diagnosis needs an attack with a threat model, such as PGD(Linf(8/255), ...); got {attack!r}"
        )
    if isinstance(attack, RandomNoise | Square | FittedUniversal | AttackEnsemble):
        name = type(attack).__name__
        raise ValueError(f"{name} is no attack by gradients alone; diagnosis compares those with such searches")
    if eps_value(threat.eps) == 0:
        raise ValueError("an attack with eps 0 moves nothing, so that there is nothing to diagnose")


def can_diagnose(attack: Attack) -> bool:
    """Whether `check_attack_fits` accepts the attack."""
    try:
        check_attack_fits(attack)
    except ValueError:
        return False
    return True


class DiagnosticsCollector:
    """Collects queries while an evaluation sees them, then diagnoses its attacks on some of them.

    Attacks that cannot be diagnosed (random noise, ensembles, eps 0, attacks without a threat model on the pixels) are
    left out.

    Args:
        encoder: The encoder that is measured; the caller freezes it.
        objectives: What the attacks maximise.
        attacks: By name.
        layer: The layer that the classifier reads.
        classifier: The classifier that is attacked.
        run: `run.diagnose` queries are looked at; 0 for none.
        name: What progress calls the encoder.
    """

    def __init__(
        self,
        encoder: EmbeddingFunction,
        objectives: ObjectiveFactory,
        attacks: Mapping[str, Attack],
        *,
        layer: Layer,
        classifier: FittedClassifier,
        run: RunOptions,
        name: str = "",
    ) -> None:
        self._name = name
        self._encoder, self._objectives, self._layer, self._classifier = encoder, objectives, layer, classifier
        fitting = [(name, attack) for name, attack in attacks.items() if can_diagnose(attack)]
        self._attacks = dict(sorted(fitting, key=lambda item: repr(getattr(item[1], "threat", None))))
        self._subset = HashSubset(run.diagnose, seed=run.seed) if run.diagnose else None
        self._seed = run.seed

    def add(self, batch: HierarchicalBatch, labels: np.ndarray) -> None:
        """Consider the images of a batch; labels: (n,) as the classifier numbers them."""
        if self._subset is not None:
            self._subset.add(batch, torch.from_numpy(labels))

    def finish(self, device: torch.device, session: Session) -> dict[str, Diagnosis]:
        """Diagnose every attack on the queries that were kept.

        Each rank diagnoses attacks of its own, all on the same queries, and those of one threat model together, since
        they share searches.  Diagnoses that are in the store are taken from there.
        """
        if self._subset is None:
            return {}
        world = session.world
        subset = self._subset.merge(world.gather(self._subset))
        batches = subset.batches()
        seen = [fingerprint_batch(batch) for batch in batches]
        diagnoses: dict[str, Diagnosis] = {}
        shared = [SharedOutcomes() for _ in batches]
        names = list(self._attacks) if batches else []
        first, last = (place * len(names) // world.size for place in (world.rank, world.rank + 1))
        with eval_mode(self._encoder):
            for name in self._show_progress(names[first:last], shown=session.shows):
                key = ("diagnosis", name, fingerprint_settings(seen))
                stored = session.store.get(*key)
                if stored is None:
                    subject = diagnosis_target(
                        self._encoder,
                        self._objectives,
                        self._attacks[name],
                        layer=self._layer,
                        classifier=self._classifier,
                        seed=self._seed,
                    )
                    diagnosis = examine(subject, batches, device=device, shared=shared)
                    stored = StoredResult(dataclasses.asdict(diagnosis), {})
                    session.store.put(stored, *key)
                header = stored.header
                diagnoses[name] = Diagnosis(flags=tuple(header["flags"]), measures=header["measures"])
        return {name: diagnosis for part in world.gather(diagnoses) for name, diagnosis in part.items()}

    def _show_progress(self, names: Sequence[str], *, shown: bool) -> Iterator[str]:
        """The names of attacks, with a bar that says which attack on which encoder is being diagnosed."""
        if not shown or not names:
            yield from names
            return
        with Progress("diagnosing", total=len(names), unit="attack") as progress:
            for name in names:
                progress.describe(" ".join(filter(None, ("diagnosing", name, self._name and f"on {self._name}"))))
                yield name
                progress.update()


_Entry = tuple[int, tuple[int, ...], Tensor]  # hash; patch, slide, patient and label; image


class HashSubset:
    """Keeps the `size` patches whose hash of (seed, patch id) is smallest: a random choice that no order changes."""

    def __init__(self, size: int, *, seed: int) -> None:
        self._size, self._seed = size, seed
        self._kept: list[_Entry] = []
        self._widest = 1

    def add(self, batch: HierarchicalBatch, label: Tensor) -> None:
        """Consider the patches of a batch.  label: (n,) classes as the classifier numbers them."""
        self._widest = max(self._widest, len(batch))
        ids = torch.stack([batch.patch.cpu(), batch.slide.cpu(), batch.patient.cpu(), label.cpu()], 1).tolist()
        limit = self._kept[-1][0] if len(self._kept) == self._size else 2**63
        for row, values in enumerate(ids):
            if (rank := image_seed(self._seed, values[0], -1)) < limit:
                self._kept.append((rank, tuple(values), batch.images[row].detach().cpu().clone()))
        self._kept = sorted(self._kept, key=lambda entry: entry[:2])[: self._size]

    def merge(self, subsets: Iterable[HashSubset]) -> HashSubset:
        """The subset that would have seen everything that these saw."""
        parts = list(subsets)
        merged = HashSubset(self._size, seed=self._seed)
        entries = [entry for part in parts for entry in part._kept]
        merged._kept = sorted(entries, key=lambda entry: entry[:2])[: self._size]
        merged._widest = max(part._widest for part in parts)
        return merged

    def batches(self) -> list[HierarchicalBatch]:
        """The patches that were kept, by ascending patch id, in batches no wider than those that were seen."""
        rows = sorted(self._kept, key=lambda entry: entry[1])
        parts = [rows[start : start + self._widest] for start in range(0, len(rows), self._widest)]
        return [_batch(part) for part in parts]


def _batch(rows: list[_Entry]) -> HierarchicalBatch:
    columns = torch.tensor([values for _, values, _ in rows]).T
    return HierarchicalBatch(torch.stack([image for _, _, image in rows]), *columns)
