"""What a transfer evaluation refuses, and by what it knows its settings again."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple
from typing import Any

from hsat.classifiers import KNNClassifier
from hsat.distributed import World
from hsat.embedding import LAYERS, loader_info
from hsat.eval.transfer.drops import OTHERS
from hsat.eval.transfer.ledger import Ledger
from hsat.eval.transfer.lending import Lender
from hsat.eval.transfer.work import Banks, Queries, Reading
from hsat.types import Attack, EmbeddingTable


def check_names(
    encoders: Mapping[str, Any],
    banks: Banks,
    surrogates: Sequence[str] | None,
    targets: Sequence[str] | None,
    *,
    checkpoints: Mapping[str, str],
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The surrogates and the targets: what was asked for, else all encoders.

    Raises TypeError for encoders that are no mapping of callables, ValueError for names that are unknown, doubled,
    taken or missing, naming them, and for banks that do not go round.
    """
    if not isinstance(encoders, Mapping) or not encoders:
        raise TypeError(f"encoders must be a mapping such as {{'a': encoder}}, got {type(encoders).__name__}")
    for name, encoder in encoders.items():
        if not isinstance(name, str) or not callable(encoder):
            raise TypeError(
                f"encoders must map names to encoders, or to functions that load one; got {name!r}: {encoder!r}"
            )
    if taken := {"", OTHERS} & encoders.keys():
        raise ValueError(f"an encoder cannot be called {taken.pop()!r}: records need that name for something else")
    found = [_chosen(encoders, names, what) for names, what in ((surrogates, "surrogates"), (targets, "targets"))]
    if unknown := sorted(checkpoints.keys() - encoders.keys()):
        raise ValueError(f"checkpoints names {unknown}, which are no encoders; there are {list(encoders)}")
    _check_banks(banks, found[1])
    return found[0], found[1]


def _chosen(encoders: Mapping[str, Any], names: Sequence[str] | None, what: str) -> tuple[str, ...]:
    if isinstance(names, str):
        raise TypeError(f"{what} must be several names, as in ({names!r},); got the text {names!r}")
    chosen = tuple(encoders) if names is None else tuple(names)
    if not chosen:
        raise ValueError(f"{what} are empty; name at least one of {list(encoders)}")
    if unknown := [name for name in chosen if name not in encoders]:
        raise ValueError(f"unknown {what} {unknown}; the encoders are {list(encoders)}")
    if len(set(chosen)) < len(chosen):
        raise ValueError(f"{what} name an encoder twice: {list(chosen)}")
    return chosen


def _check_banks(banks: Banks, targets: Sequence[str]) -> None:
    if isinstance(banks, EmbeddingTable):
        raise TypeError("one table cannot be the bank of every target; give a loader, or {name: table} by target")
    if isinstance(banks, Mapping):
        if missing := [name for name in targets if name not in banks]:
            raise ValueError(f"banks have no table for the targets {missing}; they have {list(banks)}")
        if wrong := [name for name in targets if not isinstance(banks[name], EmbeddingTable)]:
            raise TypeError(f"the banks of {wrong} are no EmbeddingTables, as embed gives; give tables, or one loader")
    elif isinstance(banks, Iterator) and len(targets) > 1:
        raise ValueError(
            f"the bank is read once per target, and a {type(banks).__name__} can be read only once;"
            " give a list of batches, a loader such as hsat.data.patch_loader, or {name: table}"
        )


def check_hold(hold: str, state: Any) -> None:
    """ValueError for an unknown hold, and for hold="one" without a folder for the images."""
    if hold not in ("all", "one"):
        raise ValueError(f"hold must be 'all' or 'one', got {hold!r}")
    if hold == "one" and state is None:
        raise ValueError("hold='one' keeps adversarial images on the disk meanwhile; say where: state='transfer_state'")


def check_layer(layer: str) -> None:
    """ValueError for a layer that no encoder has."""
    if layer not in LAYERS:
        raise ValueError(f"unknown layer {layer!r}; choose one of {list(LAYERS)}")


def identity(
    lender: Lender,
    names: Sequence[str],
    *,
    banks: Banks,
    queries: Queries,
    attacks: Mapping[str, Attack],
    knn: KNNClassifier,
    ks: Sequence[int],
    reading: Reading,
) -> dict[str, Any]:
    """All that decides the class scores, by name; see `Ledger` for what may be added later.

    Callables that are no modules and have no checkpoint are known by their name alone.
    """
    found: dict[str, Any] = {"target": reading.target, "layer": reading.layer, "seed": reading.seed, "k": list(ks)}
    found |= {"temperature": knn.temperature, "index": knn.index, "attack_branch": reading.attack_branch}
    found |= {"attack_branch_of_the_paper": reading.compat == "paper" and reading.attack_branch is None}
    found |= _of_loader("queries", queries, reading)
    if isinstance(banks, Mapping):
        found |= {f"bank.{name}": _of_table(banks[name]) for name in names if name in banks}
    else:
        found |= _of_loader("banks", banks, reading)
    found |= {f"encoder.{name}": lender.fingerprint(name) for name in names}
    return found | {f"attack.{name}": re.sub(r" at 0x[0-9a-f]+", "", repr(attack)) for name, attack in attacks.items()}


def open_ledger(state: str | os.PathLike[str] | None, settings: Mapping[str, Any], world: World) -> Ledger:
    """The ledger of this evaluation, opened by the first rank; ValueError for ranks that are called unlike.

    All ranks have to know the same of what is finished, or they would wait for each other in vain.
    """
    world.assert_same(settings)
    ledger = Ledger(state, settings) if world.is_main else None
    world.gather("opened")
    ledger = ledger or Ledger(state, settings, writes=False)
    world.assert_same({"the state": ledger.listing()})
    return ledger


def _of_loader(what: str, loader: Any, reading: Reading) -> dict[str, Any]:
    names, cohort, split = astuple(loader_info(loader, reading.class_names))
    dataset = getattr(loader, "dataset", None)
    found: dict[str, Any] = {"classes": list(names), "cohort": cohort, "split": split}
    found["image_size"] = getattr(dataset, "image_size", None)
    try:
        found["images"] = len(dataset)  # type: ignore[arg-type]
    except TypeError:
        found["images"] = None
    return {f"{what}.{key}": value for key, value in found.items()}


def _of_table(table: EmbeddingTable) -> str:
    digest = hashlib.sha256(repr((table.class_names, table.z.shape)).encode())
    for name in ("z", "label", "patch", "slide", "patient"):
        digest.update(getattr(table, name).tobytes())
    return digest.hexdigest()
