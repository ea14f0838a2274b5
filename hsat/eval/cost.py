"""What an evaluation will cost, estimated before it begins: passes, time, memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from hsat.embedding import encode, eval_mode, select_layer, using_branch
from hsat.eval.evaluation import Evaluation
from hsat.eval.objectives import ObjectiveFactory
from hsat.eval.passes import count_passes, diagnosis_passes, is_diagnosed
from hsat.quantities import memory_text, time_text
from hsat.types import Attack, HierarchicalBatch, Objective

TIMED_IMAGES = 8  # on a CPU; a GPU is timed with a whole batch


@dataclass(frozen=True, kw_only=True)
class EvaluationCost:
    """What is left of an evaluation, before it begins.

    Attributes:
        images: Queries; None where the loader does not say.
        forwards, backwards: Passes per image of all conditions together, at most; the embedding of each is among them.
        diagnosed: Images that the diagnosis looks at.
        seconds: Of attacks and embedding, by a short measurement; None where nothing was measured.
        diagnosis_seconds: Of the diagnosis.
        bank_bytes: Embeddings of the bank.
        batch_bytes: Images of a batch under all conditions, which an ensemble keeps as candidates.
    """

    images: int | None
    forwards: float
    backwards: float
    diagnosed: int = 0
    seconds: float | None = None
    diagnosis_seconds: float | None = None
    bank_bytes: int = 0
    batch_bytes: int = 0

    def __str__(self) -> str:
        """Two lines for people."""
        count = "patches" if self.images is None else f"{self.images:,} patches"
        lines = f"{count}: at most {self.forwards:,.0f} forward and {self.backwards:,.0f} backward passes each"
        if self.seconds is not None:
            lines += f", about {time_text(self.seconds)} at most"
            if self.diagnosed and self.diagnosis_seconds is not None:
                lines += f"; diagnosis of {self.diagnosed} of them about {time_text(self.diagnosis_seconds)}"
        parts = [("bank", self.bank_bytes), ("images of a batch", self.batch_bytes)]
        sizes = [f"{name} {memory_text(size) if size >= 1e6 else 'under 1 MB'}" for name, size in parts if size]
        return f"{lines}\nmemory beside the encoder: {', '.join(sizes)}" if sizes else lines


ObjectiveMaker = Callable[[Tensor, Tensor, Tensor], Objective]
"""(images, labels, clean embeddings) -> the objective of a batch."""


class PassTimes(NamedTuple):
    """Seconds per image to embed, for a value of the objective, and for its gradient on top of that."""

    embed: float
    value: float = 0.0
    gradient: float = 0.0


@dataclass(frozen=True, eq=False, kw_only=True)
class Workload:
    """What one encoder has to do for every image of an evaluation.

    Attributes:
        evaluation: The encoder and its options.
        objective: What attacks on it maximise; None where there are none.
        branch: That attacks go through.
        embeddings: Passes that embed, attacked images among them.
        forwards, backwards: Passes of the attacks.
        finished: Share of the images that is finished already.
    """

    evaluation: Evaluation
    objective: ObjectiveMaker | None = None
    branch: str | None = None
    embeddings: float = 1.0
    forwards: float = 0.0
    backwards: float = 0.0
    finished: float = 0.0

    def seconds(self, times: PassTimes) -> float:
        """Time for each image of all, as far as it is left."""
        each = self.embeddings * times.embed + self.forwards * times.value + self.backwards * times.gradient
        return (1.0 - self.finished) * each

    def time(self, sample: HierarchicalBatch) -> PassTimes:
        """What the passes of a small batch take."""
        encoder, device = self.evaluation.encoder, self.evaluation.device
        layer, images = select_layer(encoder, self.evaluation.layer), sample.images.to(device)
        labels, n = torch.zeros(len(images), dtype=torch.int64, device=device), len(images)
        with ExitStack() as stack:
            stack.enter_context(eval_mode(encoder))
            stack.enter_context(own_random_state(device))
            embed = time_of(lambda: encode(layer, images), device)
            if self.objective is None or not (self.forwards or self.backwards):
                return PassTimes(embed / n)
            stack.enter_context(using_branch(encoder, self.branch))
            objective = self.objective(images, labels, encode(layer, images))

            def value() -> Tensor:
                with torch.no_grad():
                    return objective(images)

            forward = time_of(value, device)
            if not self.backwards:  # an attack without gradients may be on an encoder without any
                return PassTimes(embed / n, forward / n)
            both = time_of(lambda: _gradient(objective, images), device)
        return PassTimes(embed / n, forward / n, max(0.0, both - forward) / n)


def estimate_workloads(
    workloads: Sequence[Workload],
    queries: Iterable[HierarchicalBatch],
    *,
    ranks: int = 1,
    bank_bytes: int = 0,
    conditions: int = 0,
    diagnosed: int = 0,
    checks: tuple[int, int] = (0, 0),
) -> EvaluationCost:
    """Add up what several encoders have to do, each timed on a few images.

    Args:
        workloads: Of each encoder.
        queries: The images' loader.
        ranks: Processes that share the work.
        bank_bytes: Embeddings of the banks.
        conditions: Images that are kept of each image of a batch.
        diagnosed: Images that are diagnosed on the first encoder, at most.
        checks: Forward and backward passes of that, for each of them.

    Returns:
        The cost of what is left.
    """
    images, seconds, diagnosis = count_images(queries), None, None
    sample = sample_batch(queries, sample_size(queries, workloads[0].evaluation.device))
    looked_at = 0 if not any(checks) else diagnosed if images is None else min(diagnosed, images)
    if sample is not None and images is not None:
        times: dict[int, PassTimes] = {}
        for one in sorted(workloads, key=lambda work: -work.backwards - work.forwards):  # an encoder is timed once
            place = id(one.evaluation.encoder)
            times[place] = times[place] if place in times else one.time(sample)
        seconds = images / ranks * sum(one.seconds(times[id(one.evaluation.encoder)]) for one in workloads)
        first = times[id(workloads[0].evaluation.encoder)]
        diagnosis = looked_at * (checks[0] * first.value + checks[1] * first.gradient) / ranks
    return EvaluationCost(
        images=images,
        forwards=sum(one.forwards + one.embeddings for one in workloads),
        backwards=sum(one.backwards for one in workloads),
        diagnosed=looked_at,
        seconds=seconds,
        diagnosis_seconds=diagnosis,
        bank_bytes=bank_bytes,
        batch_bytes=0 if sample is None else _batch_bytes(queries, sample, conditions),
    )


def estimate_cost(
    evaluation: Evaluation,
    objectives: ObjectiveFactory,
    queries: Iterable[HierarchicalBatch],
    attacks: Mapping[str, Attack],
    *,
    classes: int,
    bank_bytes: int = 0,
    finished: int = 0,
    ranks: int = 1,
    embeddings: int | None = None,
) -> EvaluationCost:
    """Count the passes of an evaluation, and time a few of its own images.

    Passes are counted by running every attack on one small stand-in image, on which nothing succeeds: an ensemble stops
    earlier on images that it breaks.  Time is that of one small batch of the queries, where their loader lets itself be
    asked for it; reading of files is not in it.

    Args:
        evaluation: Encoder and options.
        objectives: What the attacks maximise.
        queries: Their loader.
        attacks: By name.
        classes: That the classifier knows.
        bank_bytes: Embeddings of the bank.
        finished: Batches that are finished already.
        ranks: Processes that share the work.
        embeddings: Passes that embed each image; None: one of the clean image and one for each attack.

    Returns:
        The cost of what is left.
    """
    passes = [count_passes(attack, classes=classes) for attack in attacks.values()]
    work = Workload(
        evaluation=evaluation,
        objective=objectives.objective,
        branch=objectives.branch,
        embeddings=len(attacks) + 1 if embeddings is None else embeddings,
        forwards=sum(one[0] for one in passes),
        backwards=sum(one[1] for one in passes),
        finished=finished_share(queries, finished),
    )
    diagnosed = evaluation.run.diagnose
    checks = diagnosis_passes([attack for attack in attacks.values() if is_diagnosed(attack)]) if diagnosed else (0, 0)
    return estimate_workloads(
        [work],
        queries,
        ranks=ranks,
        bank_bytes=bank_bytes,
        conditions=len(attacks) + 1,
        diagnosed=diagnosed,
        checks=checks,
    )


def sample_batch(loader: object, count: int) -> HierarchicalBatch | None:
    """The first images of a loader, at most `count`, read anew; None where asking it would cost one of its batches."""
    loader = getattr(loader, "source", loader)  # of plain batches
    if isinstance(loader, DataLoader):
        try:
            samples = [loader.dataset[row] for row in range(min(count, len(loader.dataset)))]  # type: ignore[arg-type]
            batch = loader.collate_fn(samples)
        except Exception:  # a file that cannot be read is the loader's to report, not that of an estimate
            return None
        return batch if isinstance(batch, HierarchicalBatch) else None
    if isinstance(loader, Sequence) and len(loader) and isinstance(loader[0], HierarchicalBatch):
        first: HierarchicalBatch = loader[0]
        patch, slide, patient = (column[:count] for column in (first.patch, first.slide, first.patient))
        return HierarchicalBatch(first.images[:count], patch, slide, patient)
    return _dataset_batch(getattr(loader, "dataset", None), count)


def _dataset_batch(dataset: object, count: int) -> HierarchicalBatch | None:
    """The first images of a `PatchDataset` that have the shape of the first, for loaders that are not torch's."""
    from hsat.data import PatchDataset, collate

    if not isinstance(dataset, PatchDataset) or not len(dataset):
        return None
    try:
        samples = [dataset[row] for row in range(min(count, len(dataset)))]
    except Exception:  # likewise
        return None
    return collate([one for one in samples if one.images.shape == samples[0].images.shape])


def finished_share(loader: object, batches: int) -> float:
    """The share of a loader's images that so many finished batches hold, in [0, 1]; 0 where it does not say."""
    images, size = count_images(loader), getattr(loader, "batch_size", None) or 0
    return min(1.0, batches * size / images) if images else 0.0


def count_images(loader: object) -> int | None:
    """Images of a loader; None where it does not say."""
    loader = getattr(loader, "source", loader)  # of plain batches
    if isinstance(loader, Sequence) and all(isinstance(batch, HierarchicalBatch) for batch in loader):
        return sum(map(len, loader))
    try:
        return len(loader.dataset)  # type: ignore[attr-defined]
    except (AttributeError, TypeError):
        return None


def sample_size(loader: object, device: torch.device) -> int:
    """Images that are timed at once."""
    size = getattr(loader, "batch_size", None) or TIMED_IMAGES
    return size if device.type == "cuda" else min(size, TIMED_IMAGES)


def _batch_bytes(loader: object, sample: HierarchicalBatch, conditions: int) -> int:
    size = getattr(loader, "batch_size", None) or len(sample)
    return int(conditions * size * sample.images[0].numel() * sample.images.element_size())


def _gradient(objective: Objective, images: Tensor) -> Tensor:
    with torch.enable_grad():
        leaf = (images * 0.999).detach().requires_grad_()
        return torch.autograd.grad(objective(leaf).sum(), leaf)[0]


def time_of(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, after one that warms up."""
    work()
    _wait(device)
    begin = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - begin


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def own_random_state(device: torch.device) -> AbstractContextManager[None]:
    """A block that leaves torch's random states as they are: a randomised model draws from them."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
