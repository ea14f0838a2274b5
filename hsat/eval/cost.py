"""What an evaluation will cost, said before it begins: passes, time, memory."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from hsat.attacks import margin
from hsat.classifiers import DecisionModel, NearestCentroid
from hsat.embedding import attack_unscored, encode, eval_mode, select_layer, using_branch
from hsat.eval.evaluation import Evaluation
from hsat.eval.masking import FULL_STEPS, POINTS, QUERIES, UNBOUNDED_SIZES, is_plain, same_climb
from hsat.eval.objectives import ObjectiveFactory
from hsat.eval.store import Session
from hsat.quantities import memory_text, time_text
from hsat.types import Attack, EmbeddingTable, HierarchicalBatch, Objective

_log = logging.getLogger(__name__)

SHARE = 0.25  # of an evaluation that its diagnosis may take
LEAST_DIAGNOSED, MOST_DIAGNOSED = 8, 32
_BACKWARD = 2  # forward passes that a backward pass costs, where nothing was measured
_STAND_IN_SIDE = 16  # pixels of the images on which passes are counted
_TIMED_IMAGES = 8  # on a CPU; a GPU is timed with a whole batch
_LARGE_BANK = 100e6  # bytes, or seconds below: a bank that is announced
LONG_BANK = 30.0


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
            lines += f", about {time_text(self.seconds)}"
            if self.diagnosed and self.diagnosis_seconds is not None:
                lines += f"; diagnosis of {self.diagnosed} of them about {time_text(self.diagnosis_seconds)}"
        parts = [("bank", self.bank_bytes), ("images of a batch", self.batch_bytes)]
        sizes = [f"{name} {memory_text(size) if size >= 1e6 else 'under 1 MB'}" for name, size in parts if size]
        return f"{lines}\nmemory beside the encoder: {', '.join(sizes)}"


def estimate_cost(
    evaluation: Evaluation,
    objectives: ObjectiveFactory,
    queries: Iterable[HierarchicalBatch],
    attacks: Mapping[str, Attack],
    *,
    bank: EmbeddingTable,
    finished: int = 0,
    ranks: int = 1,
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
        bank: The bank.
        finished: Batches that are finished already.
        ranks: Processes that share the work.

    Returns:
        The cost of what is left.
    """
    passes = [count_passes(attack, classes=len(bank.class_names)) for attack in attacks.values()]
    forwards, backwards = (sum(one[place] for one in passes) for place in (0, 1))
    conditions = len(attacks) + 1
    diagnosed = evaluation.run.diagnose
    checks = diagnosis_passes([attack for attack in attacks.values() if is_diagnosed(attack)]) if diagnosed else (0, 0)
    images = _count_images(queries)
    seconds = diagnosis_seconds = None
    sample = sample_batch(queries, _sample_size(queries, evaluation.device))
    if sample is not None:
        embed, value, gradient = _time_passes(evaluation, objectives, sample, bank.class_names)
        if images is not None:
            left = max(0, images - finished * (getattr(queries, "batch_size", None) or 0)) / ranks
            seconds = left * (conditions * embed + forwards * value + backwards * gradient)
            diagnosis_seconds = min(diagnosed, images) * (checks[0] * value + checks[1] * gradient) / ranks
    return EvaluationCost(
        images=images,
        forwards=forwards + conditions,
        backwards=backwards,
        diagnosed=0 if not any(checks) else diagnosed if images is None else min(diagnosed, images),
        seconds=seconds,
        diagnosis_seconds=diagnosis_seconds,
        bank_bytes=4 * bank.z.size,
        batch_bytes=0 if sample is None else _batch_bytes(queries, sample, conditions),
    )


def announce_bank(evaluation: Evaluation, ranks: int, loader: Iterable[HierarchicalBatch]) -> None:
    """Say what a large bank will cost before it is embedded; nothing for a small one."""
    rows = _count_images(loader)
    sample = sample_batch(loader, _sample_size(loader, evaluation.device))
    if rows is None or sample is None:
        return
    layer, device = select_layer(evaluation.encoder, evaluation.layer), evaluation.device
    with eval_mode(evaluation.encoder), _own_random_state(device):
        images = sample.images.to(device)
        width = encode(layer, images[:1]).shape[1]
        seconds = rows / ranks * _time(lambda: encode(layer, images), device) / len(images)
    size = 4 * rows * width
    if size >= _LARGE_BANK or seconds >= LONG_BANK:
        _log.info("bank of %s patches: about %s to embed, %s", f"{rows:,}", time_text(seconds), memory_text(size))


def announce_cost(
    evaluation: Evaluation,
    objectives: ObjectiveFactory,
    queries: Iterable[HierarchicalBatch],
    attacks: Mapping[str, Attack],
    *,
    bank: EmbeddingTable | None,
    session: Session,
) -> None:
    """Say what is left of an evaluation, see `estimate_cost`; nothing for a classifier that has no bank."""
    if bank is None:
        return
    finished = sum("batch-" in name for name in session.finished)
    ranks = session.world.size
    cost = estimate_cost(evaluation, objectives, queries, attacks, bank=bank, finished=finished, ranks=ranks)
    for line in str(cost).splitlines():
        _log.info("%s", line)


def affordable_diagnosis(images: int, attacks: Mapping[str, Attack]) -> int:
    """So many images that their diagnosis takes at most a quarter of an evaluation of these attacks.

    By passes, so that the number depends on the settings alone; at least 8, with which gross masking is seen, and at
    most 32.

    Args:
        images: Queries of the evaluation.
        attacks: By name.
    """
    counted = [count_passes(attack) for attack in attacks.values()]
    evaluation = images * (1 + sum(1 + forwards + _BACKWARD * backwards for forwards, backwards in counted))
    forwards, backwards = diagnosis_passes([attack for attack in attacks.values() if is_diagnosed(attack)])
    each = forwards + _BACKWARD * backwards
    fitting = int(evaluation * SHARE / (1 - SHARE) / each) if each else MOST_DIAGNOSED
    return min(MOST_DIAGNOSED, max(LEAST_DIAGNOSED, fitting))


def is_diagnosed(attack: Attack) -> bool:
    """Whether an evaluation diagnoses this attack."""
    from hsat.eval.diagnostics import can_diagnose

    return can_diagnose(attack)


def diagnosis_passes(attacks: Sequence[Attack]) -> tuple[int, int]:
    """Forward and backward passes per image, at most, of the diagnosis of these attacks on one model."""
    if not attacks:
        return 0, 0
    different = {same_climb(attack): attack for attack in attacks}.values()
    threats = {repr(getattr(attack, "threat", None)) for attack in attacks}
    climbs = 0
    for attack in different:
        steps, restarts = getattr(attack, "steps", None), getattr(attack, "restarts", 1)
        if not isinstance(steps, int):
            climbs += 1
        elif is_plain(attack):
            climbs += 2 * steps
        else:
            climbs += restarts * (1 + steps // 2 + 3 * steps)
    unbounded = len(UNBOUNDED_SIZES) * FULL_STEPS
    searches = 2 * POINTS + QUERIES + 7
    forwards = climbs + 6 * len(different) + searches * len(threats) + 2 * unbounded + 4
    return forwards, climbs + unbounded


def count_passes(attack: Attack, *, classes: int = 2) -> tuple[int, int]:
    """Forward and backward passes per image of an attack, at most.

    Args:
        attack: Any attack.
        classes: Number of classes, on which a targeted attack may depend.

    Returns:
        Both, counted on a stand-in that never gives way; of an attack that only fits images of another shape, such as
        one with a mask, what its settings say.
    """
    model = DecisionModel(_StandIn(max(2, classes)), NearestCentroid().fit(_stand_in_bank(max(2, classes))), wide=True)
    images = torch.linspace(0.2, 0.8, 3 * _STAND_IN_SIDE**2).reshape(1, 3, _STAND_IN_SIDE, _STAND_IN_SIDE)
    objective, ids = margin(model.eval(), torch.zeros(1, dtype=torch.int64)), torch.zeros(1, dtype=torch.int64)
    try:
        result = attack_unscored(attack, images, objective, generator=torch.Generator().manual_seed(0), ids=ids)
    except (ValueError, RuntimeError, TypeError, IndexError):  # such as a mask of another size
        return _stated_passes(attack)
    if result.members is None:
        return int(result.forwards), int(result.backwards)
    return sum(one.forwards for one in result.members), sum(one.backwards for one in result.members)


def _stated_passes(attack: Attack) -> tuple[int, int]:
    """What the settings of an attack say of its passes; those of the attack inside for one in another space."""
    inner = getattr(attack, "attack", attack)
    steps = getattr(inner, "steps", 0) * getattr(inner, "restarts", 1)
    return steps, steps


class _StandIn(nn.Module):
    """An encoder of no cost whose decisions stay: the first class, and a little of the others that images can move."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self._classes = classes

    def features(self, images: Tensor) -> Tensor:
        """Images (n, 3, h, w) -> (n, classes)."""
        middle = 1e-3 * (images.mean((1, 2, 3)) - 0.3)
        others = [middle * (place + 1) / self._classes for place in range(self._classes - 1)]
        return torch.stack((torch.ones_like(middle), *others), 1)

    def forward(self, images: Tensor) -> Tensor:
        """The same."""
        return self.features(images)


def _stand_in_bank(classes: int) -> EmbeddingTable:
    index = np.arange(classes)
    return EmbeddingTable(np.eye(classes), index, index, index, index, tuple(map(str, index)))


def sample_batch(loader: object, count: int) -> HierarchicalBatch | None:
    """The first images of a loader, at most `count`, read anew; None where asking it would cost one of its batches."""
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
    return None


def _count_images(loader: object) -> int | None:
    if isinstance(loader, Sequence) and all(isinstance(batch, HierarchicalBatch) for batch in loader):
        return sum(map(len, loader))
    try:
        return len(loader.dataset)  # type: ignore[attr-defined]
    except (AttributeError, TypeError):
        return None


def _sample_size(loader: object, device: torch.device) -> int:
    size = getattr(loader, "batch_size", None) or _TIMED_IMAGES
    return size if device.type == "cuda" else min(size, _TIMED_IMAGES)


def _batch_bytes(loader: object, sample: HierarchicalBatch, conditions: int) -> int:
    size = getattr(loader, "batch_size", None) or len(sample)
    return int(conditions * size * sample.images[0].numel() * sample.images.element_size())


def _time_passes(
    evaluation: Evaluation, objectives: ObjectiveFactory, sample: HierarchicalBatch, class_names: Sequence[str]
) -> tuple[float, float, float]:
    """Seconds per image to embed, for a value of the objective, and for its gradient on top of that."""
    encoder, device = evaluation.encoder, evaluation.device
    layer, images = select_layer(encoder, evaluation.layer), sample.images.to(device)
    labels = torch.zeros(len(images), dtype=torch.int64, device=device)
    with ExitStack() as stack:
        stack.enter_context(eval_mode(encoder))
        stack.enter_context(_own_random_state(device))
        embed = _time(lambda: encode(layer, images), device)
        stack.enter_context(using_branch(encoder, objectives.branch))
        objective = objectives.objective(images, labels, encode(layer, images))

        def value() -> Tensor:
            with torch.no_grad():
                return objective(images)

        forward = _time(value, device)
        both = _time(lambda: _gradient(objective, images), device)
    n = len(images)
    return embed / n, forward / n, max(0.0, both - forward) / n


def _gradient(objective: Objective, images: Tensor) -> Tensor:
    with torch.enable_grad():
        leaf = (images * 0.999).detach().requires_grad_()
        return torch.autograd.grad(objective(leaf).sum(), leaf)[0]


def _time(work: Callable[[], Tensor], device: torch.device) -> float:
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


def _own_random_state(device: torch.device) -> AbstractContextManager[None]:
    """A block that leaves torch's random states as they are: a randomised model draws from them."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
