"""One slide under attacks: its batches as one bag, the patches that an attack may alter, and what comes of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from torch import Tensor, nn

from hsat.attacks.bags import NEEDS_LABEL, SlideTarget, slide_logits, slide_objective
from hsat.classifiers import bag_scores
from hsat.embedding import attack_unscored, encode, select_layer, to_device
from hsat.eval.evaluation import Evaluation
from hsat.eval.outcomes import AttackStats
from hsat.eval.store import CleanEmbeddings, StoredResult
from hsat.fingerprints import Fingerprinted, fingerprint_attack, fingerprint_state
from hsat.types import Attack, EmbeddingFunction, HierarchicalBatch, SlideClassifier

PatchOrder = Literal["attention", "gradient", "random"]
ORDERS = get_args(PatchOrder)


def patches_within(fraction: float, patches: int) -> int:
    """How many patches of a slide an attack may alter: floor(fraction * patches), and at least one."""
    return max(1, int(np.floor(fraction * patches + 1e-9)))


class SlideBags:
    """The batches of a loader as one batch per slide, read slide by slide.

    Attributes:
        loader: Batches in which the patches of a slide follow one another.
        dataset: That of the loader, where it has one.
        chunk: Images that go through the encoder at a time: the loader's batch size, else the length of its first
            batch, once that is read.
    """

    def __init__(self, loader: Iterable[HierarchicalBatch]) -> None:
        self.loader, self.dataset = loader, getattr(loader, "dataset", None)
        first = loader[0] if isinstance(loader, Sequence) and loader else ()
        self.chunk: int = getattr(loader, "batch_size", None) or len(first)

    def __len__(self) -> int:
        """The number of slides; TypeError where the loader's dataset does not say it."""
        cohort, rows = getattr(self.dataset, "cohort", None), getattr(self.dataset, "rows", None)
        if rows is None or not hasattr(cohort, "slide"):
            raise TypeError(f"{type(self.loader).__name__} does not know its slides")
        return len(np.unique(cast(Any, cohort).slide[rows]))

    def sizes(self) -> np.ndarray | None:
        """Patches of each slide, (slides,), by what the loader says without being read; None where it does not."""
        cohort, rows = getattr(self.dataset, "cohort", None), getattr(self.dataset, "rows", None)
        if rows is not None and hasattr(cohort, "slide"):
            return np.unique(cast(Any, cohort).slide[rows], return_counts=True)[1]
        if isinstance(self.loader, Sequence) and self.loader:
            return np.unique(np.concatenate([batch.slide.cpu().numpy() for batch in self.loader]), return_counts=True)[
                1
            ]
        return None

    def __iter__(self) -> Iterator[HierarchicalBatch]:
        parts: list[HierarchicalBatch] = []
        finished: set[int] = set()
        for batch in self.loader:
            self.chunk = self.chunk or len(batch)
            for part in _split_by_slide(batch):
                slide = int(part.slide[0])
                if parts and slide != (before := int(parts[0].slide[0])):
                    yield _merge(parts)
                    finished.add(before)
                    parts = []
                if slide in finished:
                    raise ValueError(
                        f"slide {slide} comes again after other slides: its patches have to follow one another."
                        " hsat.slide_loader(dataset) gives them so"
                    )
                parts.append(part)
        if parts:
            yield _merge(parts)


def _split_by_slide(batch: HierarchicalBatch) -> Iterator[HierarchicalBatch]:
    slides = batch.slide.cpu().numpy()
    edges = [0, *(np.flatnonzero(np.diff(slides)) + 1).tolist(), len(slides)]
    for start, end in pairwise(edges):
        if start == 0 and end == len(slides) and end:
            yield batch
        elif end > start:
            label = None if batch.label is None else batch.label[start:end]
            patch, slide, patient = batch.patch[start:end], batch.slide[start:end], batch.patient[start:end]
            yield HierarchicalBatch(batch.images[start:end], patch, slide, patient, label)


def _merge(parts: Sequence[HierarchicalBatch]) -> HierarchicalBatch:
    if len(parts) == 1:
        return parts[0]
    images, patch, slide, patient = (
        torch.cat([getattr(part, name) for part in parts]) for name in ("images", "patch", "slide", "patient")
    )
    labels = [part.label for part in parts if part.label is not None]
    label = torch.cat(labels) if len(labels) == len(parts) else None
    return HierarchicalBatch(images, patch, slide, patient, label)


@dataclass(frozen=True, eq=False, kw_only=True)
class SlideAttacker:
    """Attacks slides, one at a time.

    Attributes:
        evaluation: The encoder that is attacked, which the caller freezes, and the options of the run.
        classifier: What decides about a slide, on the device of the images.
        attacks: By name.
        fractions: Shares of the patches that may be altered, ascending.
        order: How the patches are chosen.
        target: What the attacks maximise.
        bags: The slides; they say how many images go through the encoder at a time.
        lookup: (classes of the loader,) each as a class of the classifier, or -1.
        known: Clean embeddings of an earlier evaluation.
    """

    evaluation: Evaluation
    classifier: SlideClassifier
    attacks: Mapping[str, Attack]
    fractions: Sequence[float]
    order: PatchOrder
    target: SlideTarget
    bags: SlideBags
    lookup: np.ndarray
    known: CleanEmbeddings

    def attack_slide(self, number: int, batch: HierarchicalBatch) -> StoredResult:
        """All attacks on the slide of this number among all slides.

        Returns:
            scores clean (classes,) and scores NAME (fractions, classes); goal NAME (fractions,) bool, whether the
            decision is what the attack wants; order (n,), ids of the patches in the order in which they are chosen;
            and, in the header, ids, label and counts of each attack at each fraction.
        """
        slide, label = int(batch.slide[0]), self.label_of(batch)
        clean = self._clean_bag(number, batch)
        scores = self._scores(clean)
        own = int(scores.argmax())
        goal = own if self.target not in NEEDS_LABEL or label is None else label
        order = self._choose(batch, clean, goal)
        header: dict[str, Any] = {"slide": slide, "patient": int(batch.patient[0]), "patches": len(batch), "counts": {}}
        header |= {"label": own if label is None else label, "labelled": label is not None}
        arrays = {"scores clean": scores, "order": batch.patch.cpu().numpy()[order.cpu().numpy()]}
        for name, attack in self.attacks.items():
            rows, counts, reached = [], [], own != goal
            reached_at, best = [], scores
            for fraction in self.fractions:
                stats = AttackStats()
                if not reached:  # a larger share of the patches can do what a smaller one has done
                    index = order[: patches_within(fraction, len(batch))].sort().values
                    best = self._scores(self._attacked_bag(name, attack, batch, clean, index, label, stats))
                    reached = int(best.argmax()) != goal
                rows.append(best)
                reached_at.append(reached)
                counts.append(stats.counts())
            arrays[f"scores {name}"], arrays[f"goal {name}"] = np.stack(rows), np.array(reached_at)
            header["counts"][name] = counts
        return StoredResult(header, arrays)

    def label_of(self, batch: HierarchicalBatch) -> int | None:
        """The class of a slide, as the classifier numbers it; None where the loader gives no labels."""
        slide = int(batch.slide[0])
        if batch.label is None:
            if self.target in NEEDS_LABEL:
                raise ValueError(
                    f"slide {slide} has no label, which target={self.target!r} needs; give HierarchicalBatch(label=..."
                    "), or attack without labels by target='own_decision' or 'representation'"
                )
            return None
        labels = torch.unique(batch.label).tolist()
        if len(labels) > 1:
            raise ValueError(f"slide {slide} holds patches with labels {labels}; a slide has one label")
        own = int(self.lookup[labels[0]]) if 0 <= labels[0] < len(self.lookup) else -1
        if own < 0:
            raise ValueError(
                f"slide {slide} has a class that the slide classifier does not know; it knows"
                f" {list(self.classifier.class_names)}. Give both the same class names"
            )
        return own

    def _clean_bag(self, number: int, batch: HierarchicalBatch) -> Tensor:
        clean = self.known.get(number, batch, self.evaluation.device)
        if clean is None:
            clean = torch.cat([encode(self._encode, part) for part in self._chunks(batch.images)])
            self.known.put(number, batch, clean)
        if not bool(clean.isfinite().all()):
            raise ValueError(f"embeddings of slide {int(batch.slide[0])} are not finite")
        try:
            with torch.no_grad():
                slide_logits(self.classifier, clean)
        except (ValueError, RuntimeError) as error:
            raise ValueError(
                f"the slide classifier cannot read the encoder's embeddings {tuple(clean.shape)} of slide"
                f" {int(batch.slide[0])}: {error}"
            ) from error
        return clean

    @property
    def _encode(self) -> EmbeddingFunction:
        return select_layer(self.evaluation.encoder, self.evaluation.layer)

    def _chunks(self, images: Tensor) -> Iterator[Tensor]:
        """Images on the device, so many as go through the encoder at a time."""
        for part in torch.split(images, self.bags.chunk):
            yield to_device(part, self.evaluation.device)

    def _scores(self, bag: Tensor) -> np.ndarray:
        with torch.no_grad():
            scores: np.ndarray = bag_scores(self.classifier, bag).cpu().double().numpy()
        return scores

    def _choose(self, batch: HierarchicalBatch, clean: Tensor, goal: int) -> Tensor:
        """Numbers of the patches (n,), those that are altered first at the beginning; a smaller share is in a larger.

        Attention and gradients are those of the slide as it is; equal patches stay in the order of the loader.
        """
        if self.order == "random":
            draws = np.random.default_rng((self.evaluation.run.seed, int(batch.slide[0])))
            return torch.from_numpy(draws.permutation(len(batch))).to(clean.device)
        if self.order == "attention":
            with torch.no_grad():
                weight = cast(Any, self.classifier).attention(clean)
            if weight.shape != (len(batch),):
                raise ValueError(
                    f"attention must give one weight per patch, ({len(batch)},); got {tuple(weight.shape)}"
                )
        else:
            weight = self._gradient_sizes(batch.images, clean, goal)
        order: Tensor = weight.argsort(descending=True, stable=True)
        return order

    def _gradient_sizes(self, images: Tensor, clean: Tensor, goal: int) -> Tensor:
        """Length of the gradient of the decision's margin with respect to each patch, (n,)."""
        objective = slide_objective(self._encode, self.classifier, clean, label=goal)
        bag, sizes = clean.detach().clone().requires_grad_(), []
        with torch.enable_grad():
            (of_bag,) = torch.autograd.grad(objective.of_bag(bag), bag)
            for part, of_part in zip(self._chunks(images), torch.split(of_bag, self.bags.chunk), strict=True):
                leaf = part.detach().clone().requires_grad_()
                z = self._encode(leaf)
                (gradient,) = torch.autograd.grad(z, leaf, of_part.to(z.dtype))
                sizes.append(gradient.flatten(1).norm(dim=1))
        return torch.cat(sizes)

    def _attacked_bag(
        self,
        name: str,
        attack: Attack,
        batch: HierarchicalBatch,
        clean: Tensor,
        index: Tensor,
        label: int | None,
        stats: AttackStats,
    ) -> Tensor:
        """The bag (n, d) in which an attack altered the patches `index`; `stats` takes in what it did."""
        places = index.cpu()
        chosen = to_device(batch.images[places.to(batch.images.device)], self.evaluation.device)
        objective = slide_objective(
            self._encode,
            self.classifier,
            clean,
            target=self.target,
            label=label if self.target in NEEDS_LABEL else None,
            index=index,
            chunk=self.bags.chunk,
        )
        generator = torch.Generator().manual_seed(self.evaluation.run.seed)
        try:
            ids = batch.patch.cpu()[places]
            result = attack_unscored(attack, chosen, objective, generator=generator, ids=ids)
        except (AttributeError, TypeError, ValueError, IndexError) as error:
            raise ValueError(
                f"attack {name!r} failed on slide {int(batch.slide[0])}: {error}. The objective of a slide is one"
                " number for all its patches: an attack that needs labels or values of single images cannot be used"
            ) from error
        stats.add(result, chosen)
        with torch.no_grad():
            return objective.bag(result.x_adv)


def choose_order(order: PatchOrder | None, classifier: SlideClassifier) -> PatchOrder:
    """The order in which patches are chosen; None is attention where the classifier has it, else gradients.

    Raises:
        ValueError: For an unknown order, and for attention where the classifier has none.
    """
    has_attention = getattr(classifier, "attention", None) is not None
    if order is None:
        return "attention" if has_attention else "gradient"
    if order not in ORDERS:
        raise ValueError(f"order must be one of {list(ORDERS)}, or None; got {order!r}")
    if order == "attention" and not has_attention:
        raise ValueError(f"{classifier!r} has no attention(bag) to choose patches by; use order='gradient' or 'random'")
    return order


def slide_settings(
    classifier: SlideClassifier, fractions: Sequence[float], order: PatchOrder, target: SlideTarget
) -> dict[str, Any]:
    """What of classifier, fractions, order and target decides the results of a pass."""
    if isinstance(classifier, Fingerprinted):
        weights = classifier.fingerprint()
    else:
        weights = fingerprint_state(classifier) if isinstance(classifier, nn.Module) else ""
    text = fingerprint_attack(classifier)  # its repr, without addresses
    about = {"text": text, "weights": weights, "classes": list(classifier.class_names)}
    return {"slide_classifier": about, "fractions": list(fractions), "order": order, "slide_target": target}
