"""Is it robustness, or did the attack fail?  Signs of masked gradients, as flags for a record."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import astuple, dataclass

import numpy as np
import torch
from torch import Tensor

from hsat.attacks import FittedUniversal, RandomNoise, Square, feature_drift
from hsat.classifiers import FittedKNN, KNNClassifier
from hsat.embedding import Layer, embed, eval_mode, loader_info, require_labels, resolve_device, select_layer
from hsat.eval.doubt.probing import MakeObjective, Suspect, probe
from hsat.eval.doubt.signs import SIGNS, judge
from hsat.eval.doubt.subset import Handful
from hsat.eval.records import eps_value
from hsat.types import Attack, EmbeddingFunction, EmbeddingTable, HierarchicalBatch, Objective, align_labels

_OF_RIGHT_ONES = ("black_box_fools", "withstands_everything")  # signs that need a decision which was right


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """What `diagnose` found.

    flags: a sentence for each sign that a sound model would not show so often; its first words are the sign's name.
    measures: the share of images that show each sign, "images" and "images_right" (looked at, and recognised clean),
    and "accuracy_clean", "_noise", "_attack" and "_black_box" on these images.
    """

    flags: tuple[str, ...]
    measures: dict[str, float]


def diagnose(
    encoder: EmbeddingFunction,
    bank: Iterable[HierarchicalBatch] | EmbeddingTable,
    queries: Iterable[HierarchicalBatch],
    *,
    attack: Attack,
    images: int = 32,
    target: Layer = "features",
    objective: MakeObjective | None = None,
    layer: Layer = "features",
    k: int = 200,
    temperature: float = 0.07,
    index: str = "flat",
    surrogates: Sequence[EmbeddingFunction] = (),
    class_names: Sequence[str] | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> Diagnosis:
    """Look for signs that an attack fails because gradients are masked, not because the encoder is robust.

    encoder, bank, queries, target, layer, k, temperature, index: as for `evaluate_whitebox`.  `images` queries are
    looked at, chosen by a hash of (seed, patch id).  objective: what the attack maximises, as a function of (clean
    images, labels); by default the cosine drift of `target`.  surrogates: other encoders, whose adversarial images
    are tried as well.

    The signs (tolerated shares and reasons: `hsat.eval.doubt.signs`), after Athalye et al., arXiv:1802.00420,
    section 3.1, and the flags of AutoAttack: zero gradient; never moved; noise of the same size as good as the attack;
    a search without gradients (random points, Square, surrogates) better than the attack, by value or by decision; the
    objective does not rise with the steps; decisions that stay right under an unlimited attack; a second pass that
    gives another embedding; embeddings that jump (noise seeded by the image).  Each is raised by an exact one-sided
    binomial test; together they are raised for a sound model with a probability of at most 1 %.  With few images only
    gross masking is seen.  No flag is no proof of robustness.

    Cost per image, for an attack of s steps: 3.5 s + 41 gradients and about 100 passes.

    Raises ValueError for an attack without a threat model or with eps 0, for one that follows no gradient (RandomNoise,
    Square, a universal perturbation), no queries, images < 1, and as `embed` does.
    """
    check_attack_fits(attack)
    if isinstance(images, bool) or not isinstance(images, int) or images < 1:
        raise ValueError(f"images, the number of queries to look at, must be at least 1; got {images!r}")
    if not isinstance(bank, EmbeddingTable):
        bank = embed(encoder, bank, class_names=class_names, layer=layer, device=device)
    knn = KNNClassifier(k=k, temperature=temperature, index=index).fit(bank)
    names, _, split = astuple(loader_info(queries, class_names))
    handful = Handful(images, seed=seed)
    for batch in queries:
        handful.see(batch, torch.from_numpy(align_labels(require_labels(batch), names, knn.class_names)))
    batches = handful.batches()
    if not batches:
        raise ValueError(f"the queries gave no batches (split {split!r}): nothing to diagnose")
    suspect = suspect_of(
        encoder, knn, attack=attack, target=target, layer=layer, objective=objective, surrogates=surrogates, seed=seed
    )
    with ExitStack() as frozen:
        for each in (encoder, *surrogates):
            frozen.enter_context(eval_mode(each))
        return examine(suspect, batches, device=resolve_device(encoder, device))


def suspect_of(
    encoder: EmbeddingFunction,
    knn: FittedKNN,
    *,
    attack: Attack,
    target: str,
    layer: str,
    objective: MakeObjective | None = None,
    surrogates: Sequence[EmbeddingFunction] = (),
    seed: int = 0,
) -> Suspect:
    """The layers of an encoder, its bank and the attack, as `examine` takes them; see `diagnose`."""
    scored = select_layer(encoder, layer)
    attacked = scored if objective is not None else select_layer(encoder, target)

    def drift(images: Tensor, labels: Tensor) -> Objective:
        return feature_drift(attacked, images, "cosine")

    return Suspect(
        attack=attack,
        attacked=attacked,
        scored=scored,
        knn=knn,
        objective=objective or drift,
        surrogates=tuple(select_layer(other, layer) for other in surrogates),
        seed=seed,
    )


def examine(suspect: Suspect, batches: Iterable[HierarchicalBatch], *, device: torch.device) -> Diagnosis:
    """The diagnosis of these images (labels as the bank numbers them), for callers who hold the model frozen."""
    found: list[dict[str, np.ndarray]] = []
    for batch in batches:
        images = batch.images.to(device)
        found.append(probe(suspect, images, torch.from_numpy(require_labels(batch)), batch.patch))
    seen = {name: np.concatenate([part[name] for part in found]) for name in found[0]}
    right = seen["right_clean"]
    measures = {"images": float(len(right)), "images_right": float(right.sum())}
    for name in ("clean", "noise", "attack", "black_box"):
        measures[f"accuracy_{name}"] = float(seen[f"right_{name}"].mean())
    flags = []
    for sign in SIGNS:
        outcome = seen[sign.name]
        share, flag = judge(sign, outcome[right] if sign.name in _OF_RIGHT_ONES else outcome)
        measures[f"{sign.name}_share"] = share
        flags += [flag] if flag else []
    return Diagnosis(flags=tuple(flags), measures=measures)


def check_attack_fits(attack: Attack) -> None:
    """Raise ValueError unless there is something to diagnose: gradient steps inside a ball of some size."""
    threat = getattr(attack, "threat", None)
    if threat is None:
        raise ValueError(
            f"diagnosis needs an attack with a threat model, such as PGD(Linf(8/255), ...); got {attack!r}"
        )
    if isinstance(attack, RandomNoise | Square | FittedUniversal):
        name = type(attack).__name__
        raise ValueError(f"{name} follows no gradient; diagnosis compares gradient attacks with such searches")
    if eps_value(threat.eps) == 0:
        raise ValueError("an attack with eps 0 moves nothing, so that there is nothing to diagnose")
