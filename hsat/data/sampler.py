"""Seeded draws of patients, slides and patches: pure functions of (seed, epoch, patient, occurrence, slot).

Nothing here reads a file or a global generator, so resumed and re-sharded runs see the same draws.  Patients, slides
and patches are counted as the cohort's rows come, so the same rows in another order are drawn otherwise.
"""

from __future__ import annotations

import hashlib
import operator
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np

from hsat.data.cohort import Cohort

Order = Literal["spread", "plain"]


class PatientDraw(NamedTuple):
    """One place in an epoch: which patient, and what decides its images.

    Attributes:
        patient: Index in cohort.patient_names.
        epoch: Counted from 0.
        occurrence: Counts the draws of this patient within the epoch from 0, so that repeats differ.
        strength: In [0, 1], for the augmentation.
    """

    patient: int
    epoch: int = 0
    occurrence: int = 0
    strength: float = 1.0


def slot_seed(seed: int, epoch: int, patient_name: str, occurrence: int, slot: int) -> int:
    """A seed in [0, 2**63) for one image slot; the same on every machine, Python and process (blake2b of the tuple)."""
    numbers = (operator.index(number) for number in (seed, epoch, occurrence, slot))
    text = " ".join(map(str, numbers)) + " " + patient_name
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def order_patients(
    labels: Sequence[int] | np.ndarray,
    patients: Sequence[int] | np.ndarray,
    *,
    batch: int,
    seed: int,
    epoch: int,
    balance: bool = True,
    order: Order = "spread",
) -> list[tuple[int, int]]:
    """The order of one epoch: (patient, occurrence) pairs, to be cut into consecutive batches of `batch`.

    Promised for the consecutive batches: (1) a patient comes twice in a batch only when the others are used up: where
    it comes n times, every patient with a draw left for a later batch comes at least n - 1 times; (2) no batch holds a
    patient twice, if the epoch's length is a multiple of `batch` and no patient has more draws than there are batches.
    Otherwise the order is random, a function of (seed, epoch, batch).

    Args:
        labels: (n,) the class of each patient.
        patients: (n,) distinct numbers.
        batch: Patients per batch.
        seed: Of the order.
        epoch: Counted from 0.
        balance: Give every class as many draws as the largest class has patients: a smaller class repeats all of its
            patients in full rounds, and a random part of them once more.  False draws each patient once.
        order: "spread" keeps the two promises.  "plain" keeps neither: the draws are shuffled as they come, as in the
            published code, and repeats of a patient may meet in a batch.

    Returns:
        Pairs whose occurrences count 0, 1, ... in the order of the draws of a patient.

    Raises:
        ValueError: Lengths differ, there are no patients, a patient is given twice, or batch is below 1.
    """
    ids, classes = np.asarray(patients, dtype=np.int64), np.asarray(labels, dtype=np.int64)
    if ids.ndim != 1 or ids.shape != classes.shape:
        raise ValueError(f"labels and patients must be equally long lists, got shapes {classes.shape} and {ids.shape}")
    if not len(ids):
        raise ValueError("an epoch needs at least one patient, got none")
    if len(np.unique(ids)) < len(ids):
        twice = Counter(ids.tolist()).most_common(1)[0][0]
        raise ValueError(f"patient {twice} is listed twice; repeats come from balance=True")
    if batch < 1:
        raise ValueError(f"batch must be at least 1 patient, got {batch}")
    if order not in ("spread", "plain"):
        raise ValueError(f"order must be 'spread' or 'plain', got {order!r}")
    rng = np.random.default_rng(slot_seed(seed, epoch, "", 0, 0))
    left = _draw_counts(classes, rng) if balance else np.ones(len(ids), dtype=np.int64)
    if order == "spread":
        drawn = _balanced_order(left, batch, rng)
    else:
        drawn = rng.permutation(np.repeat(np.arange(len(ids)), left))
    seen: Counter[int] = Counter()
    pairs = []
    for patient in ids[drawn].tolist():
        pairs.append((patient, seen[patient]))
        seen[patient] += 1
    return pairs


def _draw_counts(classes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """How often each patient is drawn in a balanced epoch."""
    largest = int(np.unique(classes, return_counts=True)[1].max())
    counts = np.zeros(len(classes), dtype=np.int64)
    for label in np.unique(classes):
        members = np.flatnonzero(classes == label)
        rounds, rest = divmod(largest, len(members))
        counts[members] = rounds
        counts[rng.choice(members, size=rest, replace=False)] += 1
    return counts


def _balanced_order(counts: np.ndarray, batch: int, rng: np.random.Generator) -> np.ndarray:
    """Positions repeated `counts` times, in random order, spread so that batches hold distinct ones where they can.

    Each batch is a weighted sample without replacement (weights: draws left; exponential races).  Who has as many draws
    left as there are batches left goes first, which is what makes promise (2) of order_patients hold.
    """
    if counts.max() == 1:
        return rng.permutation(len(counts))
    left, total = counts.copy(), int(counts.sum())
    order: list[np.ndarray] = []
    for start in range(0, total, batch):
        size, batches_left = min(batch, total - start), -(-(total - start) // batch)
        chosen: list[np.ndarray] = []
        while size:
            alive = np.flatnonzero(left)
            race = rng.exponential(size=len(alive)) / left[alive]
            first = np.where(left[alive] >= batches_left, -race, race).argsort(kind="stable")[:size]
            chosen.append(alive[first])
            left[alive[first]] -= 1
            size -= len(first)
        order.append(rng.permutation(np.concatenate(chosen)))
    return np.concatenate(order)


def _repeat_permutations(items: int, count: int, rng: np.random.Generator) -> list[int]:
    """`count` of the numbers below `items`: fresh permutations one after the other, the last one cut."""
    order: list[int] = []
    while len(order) < count:
        order.extend(rng.permutation(items).tolist())
    return order[:count]


def _most_frequent(member_of: np.ndarray, labels: np.ndarray, groups: int) -> np.ndarray:
    """The label that most members of each group have, (groups,)."""
    counts = np.zeros((groups, int(labels.max(initial=0)) + 1), dtype=np.int64)
    np.add.at(counts, (member_of, labels), 1)
    most: np.ndarray = counts.argmax(1)
    return most


def _take_turns(labels: Sequence[int] | np.ndarray, count: int, rng: np.random.Generator) -> list[int]:
    """`count` places: the classes come in turn, in a random order, each with its own members as they come anew."""
    classes, members = np.unique(labels), np.asarray(labels)
    if len(classes) == 1:
        return _repeat_permutations(len(members), count, rng)
    order = rng.permutation(classes)
    own = [np.flatnonzero(members == name) for name in order]
    share = -(-count // len(own))
    drawn = [[int(rows[i]) for i in _repeat_permutations(len(rows), share, rng)] for rows in own]
    return [place for turn in zip(*drawn, strict=True) for place in turn][:count]


def draw_images(
    slides: Sequence[Sequence[int] | np.ndarray],
    *,
    slides_drawn: int,
    patches_drawn: int,
    rng: np.random.Generator,
    labels: np.ndarray | None = None,
) -> list[int]:
    """Rows of slides_drawn x patches_drawn images of one patient, slide by slide.

    Slides are drawn without replacement while there are any, then again in fresh rounds; the patches of a slide
    likewise, going on where the slide's previous draw stopped, so a patch comes twice only after all others of its
    slide.

    Args:
        slides: The rows of each of the patient's slides.
        slides_drawn: Slides to draw.
        patches_drawn: Patches to draw of each of them.
        rng: The source of randomness.
        labels: (n,) the class of every row; the classes of a slide then come in turn, in a random order, so that each
            is drawn equally often.  None draws patches alike, whatever their class.

    Raises:
        ValueError: No slide, an empty slide, or a count below 1.
    """
    if slides_drawn < 1 or patches_drawn < 1:
        raise ValueError(f"slides and patches must be at least 1, got {slides_drawn} and {patches_drawn}")
    if not slides:
        raise ValueError("a patient without slides has no images to draw")
    for position, rows in enumerate(slides):
        if not len(rows):
            raise ValueError(f"slide number {position} of {len(slides)} holds no patches")
    chosen = _repeat_permutations(len(slides), slides_drawn, rng)
    times = Counter(chosen)
    orders = {
        slide: iter(
            _repeat_permutations(len(slides[slide]), patches_drawn * times[slide], rng)
            if labels is None
            else _take_turns(labels[np.asarray(slides[slide])], patches_drawn * times[slide], rng)
        )
        for slide in dict.fromkeys(chosen)
    }
    return [int(slides[slide][next(orders[slide])]) for slide in chosen for _ in range(patches_drawn)]


class PatientBatchSampler:
    """Batches of PatientDraws for a HierarchicalDataset: a seeded and resumable `batch_sampler` for a DataLoader.

    Each epoch orders the split's patients as `order_patients` says.  With several ranks the order is cut into batches
    of world_size x batch_patients, of which rank r takes the r-th part: ranks never share a draw, and together they see
    exactly what one process with the product as its batch_patients sees.  `set_epoch` chooses the epoch, the
    augmentation strength, and where in the epoch to begin.

    Args:
        cohort: The table of patches.
        split: Whose patients are drawn; None for all.
        batch_patients: Patients per batch on each rank.
        seed: Of all orders.
        balance: See `order_patients`.  A patient with patches of several classes counts to the one that most of them
            have (of equals, the first).
        drop_last: Leave an incomplete last batch out.
        order: See `order_patients`; None is "spread", or "plain" under compat="paper".
        compat: "paper" for the published order.
        rank: Of this process.
        world_size: Processes that share an epoch.

    Raises:
        ValueError: No full batch fits into an epoch (drop_last=True), the ranks do not fit, or drop_last=False would
            give ranks batches of different sizes.
    """

    def __init__(
        self,
        cohort: Cohort,
        split: str | None = "train",
        *,
        batch_patients: int,
        seed: int = 0,
        balance: bool = True,
        drop_last: bool = True,
        order: Order | None = None,
        compat: Literal["paper"] | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if batch_patients < 1:
            raise ValueError(f"batch_patients must be at least 1, got {batch_patients}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must lie in 0 .. world_size - 1, got rank {rank} of world_size {world_size}")
        if world_size > 1 and not drop_last:
            raise ValueError(f"drop_last=False leaves {world_size} ranks with unequal last batches; use drop_last=True")
        if compat not in (None, "paper"):
            raise ValueError(f"compat must be None or 'paper', got {compat!r}")
        self.order: Order = order or ("plain" if compat == "paper" else "spread")
        rows = cohort.rows(split)
        self.patients, member_of = np.unique(cohort.patient[rows], return_inverse=True)
        self.labels = _most_frequent(member_of, cohort.label[rows], len(self.patients))
        self.cohort, self.split, self.batch_patients, self.seed = cohort, split, batch_patients, seed
        self.balance, self.drop_last, self.rank, self.world_size = balance, drop_last, rank, world_size
        self.epoch, self.strength, self.start_batch = 0, 1.0, 0
        together = batch_patients * world_size
        if drop_last and together > self.draws_per_epoch:
            most = self.draws_per_epoch // world_size
            advice = f"batch_patients={most} or fewer" if most else f"at most {self.draws_per_epoch} rank(s)"
            raise ValueError(
                f"batch_patients={batch_patients} on {world_size} rank(s) asks for {together} patients at once, but an"
                f" epoch of split {split!r} has {self.draws_per_epoch} (balance={balance}); use {advice}"
            )

    def __repr__(self) -> str:
        options = ("split", "batch_patients", "seed", "balance", "drop_last", "order", "rank", "world_size")
        return f"PatientBatchSampler({', '.join(f'{name}={getattr(self, name)!r}' for name in options)})"

    @property
    def draws_per_epoch(self) -> int:
        """Patients drawn in an epoch by all ranks together, before the incomplete batch is dropped."""
        if not self.balance:
            return len(self.patients)
        counts = np.unique(self.labels, return_counts=True)[1]
        return int(len(counts) * counts.max())

    @property
    def batches_per_epoch(self) -> int:
        """Batches of a whole epoch on each rank."""
        together = self.batch_patients * self.world_size
        return self.draws_per_epoch // together if self.drop_last else -(-self.draws_per_epoch // together)

    def set_epoch(self, epoch: int, *, strength: float = 1.0, start_batch: int = 0) -> None:
        """What the next iteration yields: this epoch, from batch number `start_batch` on, at this strength.

        Args:
            epoch: Number of the epoch, from 0.
            strength: Of the augmentation, in [0, 1].
            start_batch: Batches of the epoch that are left out.

        Raises:
            ValueError: For values out of range.
        """
        if epoch < 0:
            raise ValueError(f"epoch must not be negative, got {epoch}")
        if not 0.0 <= strength <= 1.0:
            raise ValueError(f"strength must be a number in [0, 1], got {strength!r}")
        if not 0 <= start_batch <= self.batches_per_epoch:
            raise ValueError(f"start_batch must lie in 0 .. {self.batches_per_epoch}, got {start_batch}")
        self.epoch, self.strength, self.start_batch = epoch, float(strength), start_batch

    def __len__(self) -> int:
        """Batches that the next iteration yields."""
        return self.batches_per_epoch - self.start_batch

    def __iter__(self) -> Iterator[list[PatientDraw]]:
        together = self.batch_patients * self.world_size
        pairs = order_patients(
            self.labels,
            self.patients,
            batch=together,
            seed=self.seed,
            epoch=self.epoch,
            balance=self.balance,
            order=self.order,
        )
        draws = [PatientDraw(patient, self.epoch, occurrence, self.strength) for patient, occurrence in pairs]
        begin = [number * together + self.rank * self.batch_patients for number in range(self.batches_per_epoch)]
        return iter([draws[at : at + self.batch_patients] for at in begin[self.start_batch :]])
