"""Robustness of decisions on slides: an attack on all patches of a slide, or on a small part of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, get_args

import numpy as np
from torch import nn

from hsat.attacks.bags import SlideTarget
from hsat.embedding import eval_mode
from hsat.eval.announcements import announce_slides
from hsat.eval.budget import mean_interval
from hsat.eval.evaluation import Evaluation
from hsat.eval.options import Provenance, RunOptions, Scoring, Target
from hsat.eval.outcomes import AttackStats
from hsat.eval.paper_attacks import add_noise_baselines
from hsat.eval.pooling import LevelRows
from hsat.eval.records import AttackFacts, ClassifierFacts, Record, RecordTemplate
from hsat.eval.result_files import SavedResult
from hsat.eval.runner import CLEAN, run_batches
from hsat.eval.slide_attacks import (
    PatchOrder,
    SlideAttacker,
    SlideBags,
    choose_order,
    patches_within,
    slide_settings,
)
from hsat.eval.slide_records import slide_records
from hsat.eval.store import CleanEmbeddings, StoredResult, open_session, open_world
from hsat.eval.whitebox import check_attacks
from hsat.types import Attack, EmbeddingFunction, FittedClassifier, HierarchicalBatch, SlideClassifier

SLIDE_FRACTIONS = (0.001, 0.01, 0.1, 1.0)
UNLABELLED = "the slides have no labels: shares are of slides whose decision stays what it is without an attack"


@dataclass(frozen=True, eq=False, repr=False)
class SlidesResult(SavedResult):
    """The result of `evaluate_slides`; rows are slides in the order of the loader.

    Attributes:
        records: Clean numbers, those of each attack at each fraction ("PGD-8@1%"), and each attack's mean smallest
            fraction, at the levels slide and, where slides of a patient agree about the class, patient.
        slide: (g,) ids.
        label: (g,) true classes as indices of `class_names`; the clean decisions where the loader gave no labels.
        patient: (g,) ids.
        sizes: (g,) numbers of patches.
        fractions: (f,) the fractions, ascending.
        clean: (g, classes) scores of the slides as they are.
        attacked: By attack, (f, g, classes) scores when that fraction of the patches may be altered.
        smallest_fraction: By attack, (g,) the smallest of the fractions that reaches the attack's goal; inf where none
            of them does.  The goal is a wrong decision, and 0 stands where the decision is wrong as it is.  Under the
            targets "own_decision" and "representation", and without labels, the goal is another decision than without
            an attack, right or wrong, so that 0 does not occur.
        order: By slide id, the ids of its patches in the order in which they are chosen.
        class_names: The classes of the slide classifier.
    """

    records: tuple[Record, ...]
    slide: np.ndarray
    label: np.ndarray
    patient: np.ndarray
    sizes: np.ndarray
    fractions: np.ndarray
    clean: np.ndarray
    attacked: dict[str, np.ndarray]
    smallest_fraction: dict[str, np.ndarray]
    order: dict[int, np.ndarray]
    class_names: tuple[str, ...]

    def accuracy(self, attack: str, fraction: float) -> float:
        """Share of the slides that are decided rightly.

        Args:
            attack: Its name; "clean" for the slides as they are.
            fraction: One of the fractions that were measured.

        Returns:
            The share, in [0, 1].

        Raises:
            ValueError: For a fraction that was not measured.
            KeyError: For an attack that was not measured.
        """
        if attack == CLEAN:
            return float((self.clean.argmax(1) == self.label).mean())
        at = np.flatnonzero(np.isclose(self.fractions, fraction, rtol=1e-9, atol=0))
        if not len(at):
            raise ValueError(f"fraction {fraction} was not measured; there are {self.fractions.tolist()}")
        return float((self.attacked[attack][at[0]].argmax(1) == self.label).mean())

    def distribution(self, attack: str) -> dict[float, int]:
        """How many slides need which smallest fraction.

        Args:
            attack: Its name.

        Returns:
            Slides by fraction: 0 for those that were wrong before (see `smallest_fraction`), each fraction, and inf for
            those that withstood all.
        """
        counts = Counter(self.smallest_fraction[attack].tolist())
        return {key: counts[key] for key in (0.0, *self.fractions.tolist(), np.inf)}


def evaluate_slides(
    encoder: EmbeddingFunction,
    slide_loader: Iterable[HierarchicalBatch],
    slide_classifier: SlideClassifier,
    attacks: Mapping[str, Attack],
    *,
    fractions: Sequence[float] = SLIDE_FRACTIONS,
    order: PatchOrder | None = None,
    target: SlideTarget = "decision",
    scoring: Scoring = Scoring(),
    run: RunOptions = RunOptions(),
    provenance: Provenance = Provenance(),
) -> SlidesResult:
    """Attack the decisions on slides by altering all of their patches, or a fraction.

    A slide is one bag: its decision is the slide classifier's on the embeddings of all its patches.  An attack alters
    the images of the chosen patches together, to move that one decision; the embeddings of the others stay.  So the
    objective is one number per slide, and of several restarts the best is kept whole.  An attack that may alter more
    patches may do what it did with fewer: a slide that fell at a fraction counts as fallen at all larger ones, and is
    not attacked again.

    Memory holds the images of one slide, and the encoder's activations of one batch of the loader: larger sets of
    patches go through it in pieces, which are computed again on the way back.  Noise, restarts and choices depend on
    the seed and the ids of slide and patches.  Several processes share the slides, and an interrupted run goes on with
    the next slide (`RunOptions(resume_dir=...)`).

    Without labels (`target="own_decision"` or "representation") the attacker knows encoder and classifier, but no class
    of any slide, in the setting of arXiv:2505.24141: a few patches are altered so that what is made of the whole slide
    moves.  Where the loader has labels all the same, slides that are wrong as they are get attacked like the others,
    and can become right.

    Args:
        encoder: Images -> embeddings, as for `evaluate_whitebox`; it is frozen meanwhile.
        slide_loader: Batches in which the patches of a slide follow one another: `hsat.slide_loader(dataset)`, or
            `patch_loader` over a cohort in order.  Its batch size is the number of images that go through the encoder
            at a time.
        slide_classifier: What decides: `MeanPooling(knn)`, `MIL(module, class_names)`, or any `SlideClassifier`.
        attacks: {"PGD-8": PGD(...), ...}, each of which has to take an objective that is one number.
        fractions: Shares of a slide's patches in (0, 1]; floor(share * patches) may be altered, and at least one.
        order: Which patches: those of the highest "attention" of the slide as it is, of the largest "gradient" of the
            decision's margin, or "random" ones.  None: attention where the classifier has it, else gradients.
        target: "decision": the margin of the true class; "cross_entropy" of the true class; "own_decision": the margin
            away from the decision on the slide as it is; "representation": the cosine distance of the slide's
            representation from that of the slide as it is.
        scoring: Layer, bootstrap, and how slides become patients.
        run: Seed, device, folders, noise baseline; diagnosis and examples do not apply.
        provenance: What records say of the encoder.

    Returns:
        Records, scores, the smallest fractions, and the chosen patches.

    Raises:
        ValueError: For fractions outside (0, 1], an unknown order or target, slides whose patches do not follow one
            another or have several labels, missing labels, classes that the classifier does not know, and for attacks
            that need values of single images, naming attack and slide.
        TypeError: For a classifier of patches, and for attacks that are no mapping of attacks.

    Example:
        >>> import hsat, torch
        >>> images, ids = torch.rand(6, 3, 8, 8), torch.arange(6)
        >>> slides, labels = torch.tensor([0, 0, 0, 1, 1, 1]), torch.tensor([0, 0, 0, 1, 1, 1])
        >>> loader = [hsat.HierarchicalBatch(images, ids, slides, slides, labels)]
        >>> encode = lambda images: images.mean((2, 3))
        >>> bank = hsat.EmbeddingTable(encode(images).numpy(), labels, ids, slides, slides, ("a", "b"))
        >>> classifier = hsat.MeanPooling(hsat.NearestCentroid().fit(bank))
        >>> attacks = {"PGD-8": hsat.PGD(hsat.Linf(8 / 255), step_size=2 / 255, steps=3)}
        >>> names = hsat.Provenance(class_names=("a", "b"))
        >>> result = hsat.evaluate_slides(encode, loader, classifier, attacks, fractions=(0.4, 1.0), provenance=names)
        >>> result.attacked["PGD-8"].shape  # fractions, slides, classes
        (2, 2, 2)
    """
    fractions = _check_options(slide_classifier, fractions, target)
    check_attacks(attacks)
    order = choose_order(order, slide_classifier)
    chosen = add_noise_baselines(attacks) if run.noise else dict(attacks)
    evaluation = Evaluation(encoder, Target(), scoring, replace(run, keep_examples=0), provenance)
    classifier = slide_classifier.to(evaluation.device)
    bags, names = SlideBags(slide_loader), classifier.class_names
    info = evaluation.query_info(slide_loader, names)
    with open_world(run) as (world, cache), ExitStack() as stack:
        for module in _modules_of(encoder, classifier):
            stack.enter_context(eval_mode(module))
        key = evaluation.clean_key(slide_loader) if cache else None
        known = CleanEmbeddings(cache, None if key is None else key | {"bags": "slide"})
        settings = evaluation.settings(slide_loader, chosen) | slide_settings(classifier, fractions, order, target)
        attacker = SlideAttacker(
            evaluation=evaluation,
            classifier=classifier,
            attacks=chosen,
            fractions=fractions,
            order=order,
            target=target,
            bags=bags,
            lookup=np.array([names.index(name) if name in names else -1 for name in info.class_names]),
            known=known,
        )
        session = open_session(run, settings, world, cache)
        if session.shows:
            announce_slides(attacker, session)
        results = run_batches(bags, attacker.attack_slide, session, description="attacking slides")
        known.close(len(results), world)
    if not results:
        raise ValueError(f"the loader gave no batches (split {info.split!r}): no slide to attack")
    result = _merge(results, chosen, np.array(fractions), names)
    template = evaluation.template(None, info, names, loader=slide_loader, target=target)
    if not results[0].header["labelled"]:
        template = replace(template, flags=(*template.flags, UNLABELLED))
    facts = {name: _facts(name, attack, results, result, order) for name, attack in chosen.items()}
    fitted = getattr(classifier, "classifier", None)
    of_classifier = ClassifierFacts(name=repr(classifier), k=int(getattr(fitted, "k", 0)))
    return replace(result, records=tuple(_records(result, template, facts, of_classifier)))


def _check_options(classifier: object, fractions: Sequence[float], target: str) -> tuple[float, ...]:
    if isinstance(classifier, FittedClassifier) or hasattr(classifier, "fit"):
        raise TypeError(
            f"slide_classifier is {classifier!r}, a classifier of patches or one that is not fitted; fit it and pool"
            " its scores, as in MeanPooling(KNNClassifier(k=20).fit(bank)), or give ABMIL().fit(bank)"
        )
    if not isinstance(classifier, SlideClassifier):
        raise TypeError(f"slide_classifier needs class_names, reads, logits(bag) and to(device); got {classifier!r}")
    if target not in get_args(SlideTarget):
        raise ValueError(f"target must be one of {list(get_args(SlideTarget))}; got {target!r}")
    if not len(fractions):
        raise ValueError("no fraction is given; (1.0,) alters all patches")
    if wrong := [value for value in fractions if not 0 < value <= 1]:
        raise ValueError(f"fractions of the patches lie in (0, 1]; got {wrong[0]}. For 10 % write 0.1")
    if len(classifier.class_names) < 2:
        raise ValueError(f"{classifier!r} has one class only, {classifier.class_names}: no decision can change")
    return tuple(sorted({float(value) for value in fractions}))


def _modules_of(encoder: EmbeddingFunction, classifier: SlideClassifier) -> list[Any]:
    """The modules that have to stand still: the encoder, the classifier or what it holds."""
    held = [classifier, *(vars(classifier).values() if hasattr(classifier, "__dict__") else ())]
    return [encoder, *(part for part in held if isinstance(part, nn.Module))]


def _merge(
    results: Sequence[StoredResult], attacks: Mapping[str, Attack], fractions: np.ndarray, names: tuple[str, ...]
) -> SlidesResult:
    """All slides, without records."""

    def column(name: str) -> np.ndarray:
        return np.array([result.header[name] for result in results], dtype=np.int64)

    smallest = {}
    for attack in attacks:
        reached = np.stack([result.arrays[f"goal {attack}"] for result in results])
        smallest[attack] = np.where(reached.any(1), fractions[reached.argmax(1)], np.inf)
        wrong_before = [not result.header["counts"][attack][0]["images"] for result in results]
        smallest[attack][np.array(wrong_before)] = 0.0
    return SlidesResult(
        records=(),
        slide=column("slide"),
        label=column("label"),
        patient=column("patient"),
        sizes=column("patches"),
        fractions=fractions,
        clean=np.stack([result.arrays["scores clean"] for result in results]),
        attacked={name: np.stack([result.arrays[f"scores {name}"] for result in results], 1) for name in attacks},
        smallest_fraction=smallest,
        order={int(result.header["slide"]): result.arrays["order"] for result in results},
        class_names=names,
    )


def _facts(
    name: str, attack: Attack, results: Sequence[StoredResult], result: SlidesResult, order: PatchOrder
) -> list[AttackFacts]:
    """What records say of an attack at each fraction, and of the attack as a whole."""
    facts, whole = [], AttackStats()
    shared = {
        "order": order,
        "already_wrong": int((result.clean.argmax(1) != result.label).sum()),
        "never_flipped": result.distribution(name)[np.inf],
    }
    for number, fraction in enumerate(result.fractions.tolist()):
        stats = AttackStats()
        for one in results:
            stats.merge(one.header["counts"][name][number])
        whole.merge(stats.counts())
        altered = np.array([patches_within(fraction, size) for size in result.sizes.tolist()])
        settings = shared | {
            "fraction": fraction,
            "patches_altered": int(altered.sum()),
            "patches": int(result.sizes.sum()),
        }
        at = AttackFacts(name=f"{name}@{100 * fraction:g}%", attack=attack, stats=stats, settings=settings)
        facts.append(at)
    distribution = {f"{100 * key:g}%": count for key, count in result.distribution(name).items() if np.isfinite(key)}
    note = "smallest of the fractions that changes the decision; never counts as 1"
    settings = shared | {"note": note, "smallest_fractions": distribution}
    return [*facts, AttackFacts(name=name, attack=attack, stats=whole, settings=settings)]


def _records(
    result: SlidesResult,
    template: RecordTemplate,
    facts: Mapping[str, Sequence[AttackFacts]],
    classifier: ClassifierFacts,
) -> list[Record]:
    """Clean numbers, those of each attack at each fraction, and each attack's mean smallest fraction."""

    def measure(of: AttackFacts, scores: np.ndarray) -> list[Record]:
        return slide_records(template, of, classifier, LevelRows(scores, result.label, result.patient))

    records = measure(AttackFacts(name=CLEAN), result.clean)
    template = template.with_clean(records)  # no attack should leave more
    for name, (*at_fractions, whole) in facts.items():
        for number, at in enumerate(at_fractions):
            records += measure(at, result.attacked[name][number])
        finite = np.minimum(result.smallest_fraction[name], 1.0)
        interval = mean_interval(finite, result.patient, seed=template.seed, resamples=template.scoring.bootstrap)
        records.append(
            template.build(
                whole,
                classifier,
                level="slide",
                metric="smallest_fraction",
                value=float(finite.mean()),
                n=len(finite),
                interval=interval,
            )
        )
    return records
