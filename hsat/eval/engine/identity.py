"""By what encoders, loaders and tables are known again: whatever decides a bit of an embedding."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import astuple
from typing import Any

import torch
from torch import nn

from hsat.embedding import loader_info
from hsat.eval.engine.precision import autocast_name, layout_of
from hsat.types import EmbeddingFunction, EmbeddingTable

_TABLE = ("z", "label", "patch", "slide", "patient")


def encoder_identity(encoder: EmbeddingFunction, checkpoint: str = "") -> dict[str, str] | None:
    """What an encoder computes: state, pixels, structure, active branch, and how this machine computes it.

    None for callables that are no modules, unless the checkpoint has a name.  The structure is what `repr` says of it:
    two networks whose weights, names and repr agree are taken for one.
    """
    if not isinstance(encoder, nn.Module):
        return {"checkpoint": checkpoint} if checkpoint else None
    from hsat.models import active_branch, state_fingerprint

    layouts = {_layout(p) for p in encoder.parameters() if p.ndim == 4}
    autocast = autocast_name(next((p.device.type for p in encoder.parameters()), "cpu"))
    return {
        **({"autocast": autocast} if autocast else {}),
        "weights": state_fingerprint(encoder),
        "structure": hashlib.sha256(_plain(repr(encoder)).encode()).hexdigest(),
        "branch": active_branch(encoder) or "",
        "layout": ",".join(sorted(layouts)),
        "torch": torch.__version__,
        "float32": torch.get_float32_matmul_precision(),
    }


def loader_identity(loader: Any) -> dict[str, Any] | None:
    """The patches of a loader over a `PatchDataset`, in order; None for loaders that cannot say what they will give.

    The cohort's fingerprint knows names, sizes and ids of files; sizes and times of modification of the files are asked
    for now, so that a file that was written anew counts as another one.
    """
    dataset, batch_size = getattr(loader, "dataset", None), getattr(loader, "batch_size", None)
    cohort: Any = getattr(dataset, "cohort", None)
    rows: Any = getattr(dataset, "rows", None)
    if not (batch_size and hasattr(cohort, "fingerprint") and hasattr(cohort, "path") and rows is not None):
        return None
    transform = getattr(dataset, "transform", None)
    if transform is not None or type(getattr(loader, "sampler", None)).__name__ != "SequentialSampler":
        return None
    names, fingerprint, split = astuple(loader_info(loader, None))
    files = hashlib.sha256()
    for row in rows:
        about = cohort.path(int(row)).stat()
        files.update(f"{int(row)} {about.st_size} {about.st_mtime_ns}\n".encode())
    return {
        "cohort": fingerprint,
        "split": split,
        "classes": list(names),
        "files": files.hexdigest(),
        "images": len(rows),
        "image_size": getattr(dataset, "image_size", None),
        "batch_size": int(batch_size),
    }


def table_identity(table: EmbeddingTable) -> str:
    """SHA-256 of a table's numbers and classes."""
    digest = hashlib.sha256(repr((table.class_names, table.z.shape)).encode())
    for name in _TABLE:
        digest.update(getattr(table, name).tobytes())
    return digest.hexdigest()


def attack_identity(attack: Any) -> str:
    """The settings of an attack, without the addresses in memory that a function's repr holds."""
    return _plain(repr(attack))


def key_of(content: Any) -> str:
    """SHA-256 of texts, numbers, lists and mappings."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _plain(text: str) -> str:
    return re.sub(r" at 0x[0-9a-f]+", "", text)


def _layout(parameter: torch.Tensor) -> str:
    return f"{parameter.dtype} {parameter.device.type} {layout_of(parameter)}"
