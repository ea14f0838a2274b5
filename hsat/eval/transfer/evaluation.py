"""Black-box transfer: encoders measured on images that were attacked on other encoders."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hsat.classifiers import KNNClassifier
from hsat.distributed import shared_world
from hsat.embedding import Layer
from hsat.eval.conventions import Absent, Compat, How, Keys, resolve_arithmetic
from hsat.eval.records import Record
from hsat.eval.transfer.checks import check_hold, check_layer, check_names, identity, open_ledger
from hsat.eval.transfer.lending import EncoderSource, Hold, Lender
from hsat.eval.transfer.transfer_records import transfer_records
from hsat.eval.transfer.work import Banks, Queries, Reading, TransferRun
from hsat.eval.whitebox import check_options, several_k
from hsat.types import Attack, EmbeddingTable


@dataclass(frozen=True, eq=False)
class TransferResult:
    """What `evaluate_transfer` found.

    records: see there.  clean: class scores (n, classes) of the queries as they are, by target and k.  attacked: the
    same by (surrogate, attack, target) and k.  Columns follow class_names[target]; rows follow `queries`, a table with
    the ids and labels of the queries and no embeddings.  made: the (surrogate, attack) pairs that this call attacked,
    in order; the others came from the state.
    """

    records: tuple[Record, ...]
    clean: dict[str, dict[int, np.ndarray]]
    attacked: dict[tuple[str, str, str], dict[int, np.ndarray]]
    queries: EmbeddingTable
    class_names: dict[str, tuple[str, ...]]
    made: tuple[tuple[str, str], ...]


def evaluate_transfer(
    encoders: Mapping[str, EncoderSource],
    banks: Banks,
    queries: Queries,
    attacks: Mapping[str, Attack],
    *,
    surrogates: Sequence[str] | None = None,
    targets: Sequence[str] | None = None,
    target: Layer | None = None,
    layer: Layer = "features",
    k: int | Sequence[int] = 200,
    temperature: float = 0.07,
    index: str = "flat",
    seed: int = 0,
    device: torch.device | str | None = None,
    how: How | None = None,
    absent: Absent | None = None,
    keys: Keys | None = None,
    attack_branch: str | None = None,
    compat: Compat | None = None,
    bootstrap: int = 1000,
    class_names: Sequence[str] | None = None,
    checkpoints: Mapping[str, str] | None = None,
    hold: Hold = "all",
    state: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> TransferResult:
    """Attack the queries on each surrogate, and classify what comes out with each target's own bank.

    The published protocol (HSAT, arXiv:2503.10629, Table 2): the drop of a target is its accuracy on clean queries
    minus that on the surrogate's adversarial queries.  The published code makes the adversarial images anew for every
    target; here each (surrogate, attack) is attacked once, and each target embeds its bank once.

    encoders: by name; each takes the user's pixels, so sizes and normalisations may differ.  A function without
    arguments is called for the encoder when it is needed.  banks: a loader of clean training images, read once per
    target, or each target's table from `embed` with the same `layer`.  queries: a loader that gives the same batches
    each time; it is read once per target and once per (surrogate, attack).  attacks: {"PGD-8": PGD(...), ...}.
    surrogates, targets: names among the encoders, all by default.  One that is both has its white-box numbers on the
    diagonal, those of `evaluate_whitebox`.  target: the layer of the surrogate whose cosine drift the attacks maximise;
    layer: what kNN reads; attack_branch: the surrogate's BatchNorm branch.  checkpoints: what records say of each
    encoder's weights.  All other options, compat="paper" too, are as in `evaluate_whitebox`.

    Records, per k, level and metric: each target on clean queries (surrogate ""); each target under each surrogate's
    attack; "accuracy_drop" and "mca_drop" (clean minus attacked) with intervals from resampled patients, the same ones
    on both sides; and the mean of these drops over all surrogates but the target itself (surrogate "others").
    forwards and backwards are passes per image through the surrogate.

    hold="all" keeps all encoders, their banks and one batch of images in memory.  hold="one" has one encoder and one
    bank at a time; the adversarial images of one (surrogate, attack) wait on the disk, in `state`, with all their bits
    (n c h w floats), and are removed after it.  Both give the same numbers.
    state: a folder where finished pairs and banks are kept.  After an interruption, even by kill -9, the same call goes
    on from the finished pairs and ends with the same records.  Encoders and attacks may be added later; anything else
    that decides a number is refused when it differs.  One evaluation at a time may use it.
    Several processes share banks, clean queries and attacks as in `evaluate_whitebox`; a state has to be a folder that
    all of them see.

    Raises ValueError for unknown or doubled names, names that are taken ("clean", "others"), hold="one" without state,
    a state of other settings (naming them), queries that differ between readings, and what `evaluate_whitebox` refuses.
    """
    target = target or ("embedding" if compat == "paper" else "features")
    check_options(target, attacks, how, compat)
    check_layer(layer)
    check_hold(hold, state)
    resolve_arithmetic(compat, how=how, absent=absent, keys=keys)
    surrogates, targets = check_names(encoders, banks, surrogates, targets, checkpoints=checkpoints or {})
    ks = several_k(k)
    knn = KNNClassifier(k=max(ks), temperature=temperature, index=index)
    options: dict[str, Any] = {"layer": layer, "seed": seed, "compat": compat, "attack_branch": attack_branch}
    reading = Reading(target=target, device=device, class_names=class_names, progress=progress, **options)
    lender = Lender(encoders, checkpoints=checkpoints or {}, hold=hold)
    known: dict[str, Any] = {"banks": banks, "queries": queries, "knn": knn, "ks": ks, "reading": reading}
    names = tuple(dict.fromkeys((*surrogates, *targets)))
    with shared_world() as world:
        alone = state is None and world.size == 1
        settings = {} if alone else identity(lender, names, attacks=attacks, **known)
        run = TransferRun(lender, open_ledger(state, settings, world), world, **known)
        clean = {name: run.clean(name) for name in targets}
        pairs, made = {}, []
        for surrogate, (name, attack) in itertools.product(surrogates, attacks.items()):
            pairs[surrogate, name], fresh = run.pair(surrogate, name, attack, targets)
            made += [(surrogate, name)] if fresh else []
    classifiers = {name: run.classifier(name) for name in targets}
    records = transfer_records(
        classifiers,
        clean,
        pairs,
        attacks=attacks,
        queries=run.queries(),
        checkpoint=lender.checkpoint,
        options={"target": target, "how": how, "absent": absent, "keys": keys, "bootstrap": bootstrap, **options},
    )
    return TransferResult(
        records=tuple(records),
        clean=clean,
        attacked={(s, a, t): entry.scores[t] for (s, a), entry in pairs.items() for t in targets},
        queries=run.queries(),
        class_names={name: each.class_names for name, each in classifiers.items()},
        made=tuple(made),
    )
