"""What evaluations will cost, said before they begin, where progress is shown."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from hsat.embedding import encode, eval_mode, select_layer
from hsat.eval.cost import (
    TIMED_IMAGES,
    EvaluationCost,
    Workload,
    count_images,
    estimate_cost,
    estimate_workloads,
    finished_share,
    own_random_state,
    sample_batch,
    sample_size,
    time_of,
)
from hsat.eval.evaluation import Evaluation
from hsat.eval.objectives import ObjectiveFactory
from hsat.eval.options import Provenance, RunOptions, Scoring, Target
from hsat.eval.passes import count_passes
from hsat.eval.runner import finished_numbers
from hsat.eval.slide_attacks import SlideAttacker, patches_within
from hsat.eval.smoothing import Smoothing, Vote, count_votes
from hsat.eval.store import Session
from hsat.quantities import memory_text, time_text
from hsat.types import Attack, EmbeddingFunction, EmbeddingTable, HierarchicalBatch, Objective

_log = logging.getLogger(__name__)

_LARGE_BANK = 100e6  # bytes, or seconds below: a bank that is announced
LONG_BANK = 30.0


def announce_bank(evaluation: Evaluation, ranks: int, loader: Iterable[HierarchicalBatch]) -> None:
    """Say what a large bank will cost before it is embedded; nothing for a small one."""
    rows = count_images(loader)
    sample = sample_batch(loader, sample_size(loader, evaluation.device))
    if rows is None or sample is None:
        return
    layer, device = select_layer(evaluation.encoder, evaluation.layer), evaluation.device
    with eval_mode(evaluation.encoder), own_random_state(device):
        images = sample.images.to(device)
        width = encode(layer, images[:1]).shape[1]
        seconds = rows / ranks * time_of(lambda: encode(layer, images), device) / len(images)
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
    classes: int | None = None,
    embeddings: int | None = None,
) -> None:
    """Say what is left of an evaluation, see `estimate_cost`, where progress is shown; nothing is measured elsewhere.

    Args:
        evaluation: Encoder and options.
        objectives: What the attacks maximise.
        queries: Their loader.
        attacks: By name.
        bank: What the classifier was fitted on; None without one.
        session: World, store, progress.
        classes: That the classifier knows; by default those of the bank.
        embeddings: Passes that embed each image, where they are not one for each condition.
    """
    if not session.shows:
        return
    if classes is None:
        classes = 2 if bank is None else len(bank.class_names)
    finished = sum("batch-" in name for name in session.finished)
    ranks = session.world.size
    say_cost(
        estimate_cost(
            evaluation,
            objectives,
            queries,
            attacks,
            classes=classes,
            bank_bytes=0 if bank is None else 4 * bank.z.size,
            finished=finished,
            ranks=ranks,
            embeddings=embeddings,
        )
    )


def announce_votes(
    evaluation: Evaluation,
    vote: Vote,
    queries: Iterable[HierarchicalBatch],
    smoothing: Smoothing,
    *,
    bank: EmbeddingTable,
    session: Session,
) -> None:
    """Say what the votes under noise of a certification will cost: a pass for each draw and patch.

    Args:
        evaluation: The encoder.
        vote: The decision of the classifier on images.
        queries: The patches.
        smoothing: The draws.
        bank: What the classifier was fitted on.
        session: World, store, progress.
    """
    draws, classes, device = smoothing.selection + smoothing.samples, len(bank.class_names), evaluation.device
    images, sample, seconds = count_images(queries), sample_batch(queries, 1), None
    if images is not None and sample is not None:
        count = min(draws, smoothing.chunk if device.type == "cuda" else TIMED_IMAGES)
        drawn = range(-1 - count, -1)  # which neither queries nor bank use
        shown, ids = sample.images.to(device), sample.patch

        def draw_votes() -> np.ndarray:
            sigma, seed = smoothing.sigma, smoothing.seed
            return count_votes(vote, shown, ids, classes=classes, draws=drawn, sigma=sigma, seed=seed, chunk=count)

        with eval_mode(evaluation.encoder), own_random_state(device):
            taken = time_of(draw_votes, device)
        left = images * (1.0 - finished_share(queries, len(finished_numbers(session.finished, ()))))
        seconds = left / session.world.size * draws * taken / count
    say_cost(EvaluationCost(images=images, forwards=draws, backwards=0, seconds=seconds, bank_bytes=4 * bank.z.size))


def announce_transfer(
    evaluations: Mapping[str, Evaluation],
    objectives: Mapping[str, ObjectiveFactory],
    pairs: Sequence[tuple[str, str]],
    attacks: Mapping[str, Attack],
    queries: Iterable[HierarchicalBatch],
    *,
    banks: Sequence[EmbeddingTable],
    session: Session,
) -> None:
    """Say what a transfer will cost: each attack once on each surrogate, what comes out embedded by each target.

    Args:
        evaluations: By encoder.
        objectives: What the attacks maximise, by surrogate.
        pairs: (surrogate, target).
        attacks: By name.
        queries: Their loader.
        banks: Of the encoders that have one.
        session: World, store, progress.
    """
    classes = len(banks[0].class_names)
    passes = {name: count_passes(attack, classes=classes) for name, attack in attacks.items()}

    def finished(*key: str) -> float:
        return finished_share(queries, len(finished_numbers(session.finished, key)))

    works = [
        Workload(evaluation=evaluations[name], finished=finished("clean", name))
        for name in dict.fromkeys(target for _, target in pairs)
    ]
    for surrogate in dict.fromkeys(name for name, _ in pairs):
        readers = {target for first, target in pairs if first == surrogate}
        for name, (forwards, backwards) in passes.items():
            share = finished("attacked", surrogate, name)
            works.append(
                Workload(
                    evaluation=evaluations[surrogate],
                    objective=objectives[surrogate].objective,
                    branch=objectives[surrogate].branch,
                    embeddings=1 + (surrogate in readers),  # of the clean image, too
                    forwards=forwards,
                    backwards=backwards,
                    finished=share,
                )
            )
            works += [Workload(evaluation=evaluations[reader], finished=share) for reader in readers - {surrogate}]
    say_cost(
        estimate_workloads(
            works,
            queries,
            ranks=session.world.size,
            bank_bytes=sum(4 * bank.z.size for bank in banks),
            conditions=2,
        )
    )


def announce_slides(attacker: SlideAttacker, session: Session) -> None:
    """Say what attacks on slides will cost: of a patch that may be altered all passes, of another one the first.

    Args:
        attacker: Slides, attacks, fractions.
        session: World, store, progress.
    """
    evaluation, bags, fractions = attacker.evaluation, attacker.bags, attacker.fractions
    sizes, chunk = bags.sizes(), bags.chunk or TIMED_IMAGES
    altered = again = float(sum(fractions))
    if sizes is not None:
        counts = [np.array([patches_within(one, size) for size in sizes.tolist()]) for one in fractions]
        altered = sum(float(count.sum()) for count in counts) / float(sizes.sum())
        again = sum(float(count[count > chunk].sum()) for count in counts) / float(sizes.sum())
    passes = [
        count_passes(attack, classes=len(attacker.classifier.class_names), of_slides=True)
        for attack in attacker.attacks.values()
    ]
    backwards, chosen = sum(one[1] for one in passes), attacker.order == "gradient"
    layer = select_layer(evaluation.encoder, evaluation.layer)

    def objective(images: Tensor, labels: Tensor, clean: Tensor) -> Objective:
        return lambda moved: layer(moved).sum(1)

    work = Workload(
        evaluation=evaluation,
        objective=objective,
        embeddings=1 + altered * len(passes),
        forwards=chosen + altered * sum(one[0] for one in passes) + again * backwards,  # activations of pieces, again
        backwards=chosen + altered * backwards,
        finished=0.0 if sizes is None else min(1.0, len(finished_numbers(session.finished, ())) / len(sizes)),
    )
    say_cost(estimate_workloads([work], bags.loader, ranks=session.world.size))


def announce_fit(
    encoder: EmbeddingFunction,
    loader: Iterable[HierarchicalBatch],
    *,
    epochs: int,
    device: torch.device | str | None = None,
) -> None:
    """Say what fitting a universal perturbation to the features will cost: a step is two passes forward, one back.

    Args:
        encoder: What it is fitted on.
        loader: The images that it is fitted on.
        epochs: Passes over the loader.
        device: Where images go.
    """
    evaluation = Evaluation(encoder, Target("features"), Scoring(), RunOptions(device=device), Provenance())
    objective = ObjectiveFactory(encoder, evaluation.target, evaluation.layer, None).objective
    work = Workload(evaluation=evaluation, objective=objective, embeddings=epochs, forwards=epochs, backwards=epochs)
    say_cost(estimate_workloads([work], loader, conditions=1))


def say_cost(cost: EvaluationCost) -> None:
    """Log a cost, a line each."""
    for line in str(cost).splitlines():
        _log.info("%s", line)
