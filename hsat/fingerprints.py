"""Fingerprints of encoders, loaders, tables, attacks, batches and settings: all that can change an embedding."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from hsat.types import EmbeddingTable, HierarchicalBatch

_BLOCK_BYTES = 64 * 2**20  # rows of a table that are read at a time: it may lie on the disk


@runtime_checkable
class Fingerprinted(Protocol):
    """A thing that states its own fingerprint, as cohorts and encoders do."""

    def fingerprint(self) -> str:
        """Hex digits; the same for the same numbers."""


def fingerprint_settings(settings: Any) -> str:
    """SHA-256, as hex, of texts, numbers, lists and mappings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def digest_patient(name: str) -> str:
    """What files say of a patient: the first 16 hex digits of SHA-256 of "patient:" and the name, in UTF-8.

    Files of encoders state by it whom they were trained on, so that an evaluation can tell.  It hides nothing from who
    knows the names, or can guess them: names of a form such as P001 are found by trying all of them.

    Args:
        name: The name, as `Cohort.patient_names` has it.

    Returns:
        16 hexadecimal digits.
    """
    return hashlib.sha256(f"patient:{name}".encode()).hexdigest()[:16]


def fingerprint_state(module: nn.Module, prefix: str = "") -> str:
    """SHA-256 over names, dtypes, shapes and bytes of a module's state.

    The same for the same weights on any device and in any file; different when a single bit differs.

    Args:
        module: Any module.
        prefix: Further text that decides what the module computes, such as its pixel normalisation.
    """
    digest = hashlib.sha256(prefix.encode())
    for key, value in sorted(module.state_dict().items()):
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(tensor_bytes(value))
    return digest.hexdigest()


def fingerprint_weights(module: nn.Module) -> str:
    """What a module's `fingerprint()` says, if it has one, as an `Encoder` does; else `fingerprint_state` of it.

    Of an `Encoder`: SHA-256 over names, dtypes, shapes and bytes of its state, and over what it does to pixels.
    """
    return module.fingerprint() if isinstance(module, Fingerprinted) else fingerprint_state(module)


def fingerprint_encoder(encoder: object, checkpoint: str = "") -> dict[str, str] | None:
    """All that decides what an encoder computes, by name: weights, structure, and how this machine computes it.

    The structure is the module's repr, in which a dual BatchNorm names its active branch: two networks whose weights,
    names and repr agree are taken for one.

    Args:
        encoder: A module; it may state its `fingerprint()` itself.
        checkpoint: A name of the weights, for callables that are no modules.

    Returns:
        Texts by name; None for a callable that is no module and has no checkpoint.
    """
    if not isinstance(encoder, nn.Module):
        return {"checkpoint": checkpoint} if checkpoint else None
    parameters = list(encoder.parameters())
    layouts = {
        f"{parameter.dtype} {parameter.device.type} {memory_format_of(parameter)}"
        for parameter in parameters
        if parameter.ndim == 4
    }
    autocast = autocast_name(parameters[0].device.type if parameters else "cpu")
    return {
        **({"autocast": autocast} if autocast else {}),
        "weights": fingerprint_weights(encoder),
        "structure": hashlib.sha256(_without_addresses(repr(encoder)).encode()).hexdigest(),
        "layout": ",".join(sorted(layouts)),
        "torch": torch.__version__,
        "float32": torch.get_float32_matmul_precision(),
    }


def numerics_of(encoder: object) -> dict[str, str]:
    """How an encoder computes, where that is not the plain way; it moves the last bits, and so belongs to a number.

    Returns:
        Nothing for a contiguous float32 module as it was built.  Else "memory_format" (channels_last weights), "dtype"
        of the weights, "autocast" (the dtype of the `torch.autocast` block around the call), "batchnorm" ("folded").
    """
    if not isinstance(encoder, nn.Module):
        return {}
    numerics: dict[str, str] = {}
    weights = [parameter for parameter in encoder.parameters() if parameter.is_floating_point()]
    if any(memory_format_of(weight) == "channels_last" for weight in weights if weight.ndim == 4):
        numerics["memory_format"] = "channels_last"
    if dtypes := {str(weight.dtype).removeprefix("torch.") for weight in weights} - {"float32"}:
        numerics["dtype"] = ",".join(sorted(dtypes))
    if name := autocast_name(weights[0].device.type if weights else "cpu"):
        numerics["autocast"] = name
    if getattr(encoder, "batchnorm_folded", False):
        numerics["batchnorm"] = "folded"
    return numerics


def autocast_name(device_type: str) -> str:
    """The dtype of the autocast block that is open on a kind of device, such as "bfloat16"; "" for none."""
    if not torch.is_autocast_enabled(device_type):
        return ""
    return str(torch.get_autocast_dtype(device_type)).removeprefix("torch.")


def memory_format_of(weight: Tensor) -> str:
    """Either "contiguous" or "channels_last", of weights (o, i, h, w)."""
    plain = weight.is_contiguous() or not weight.is_contiguous(memory_format=torch.channels_last)
    return "contiguous" if plain else "channels_last"


def fingerprint_loader(
    loader: object, describe: Callable[[object], tuple[tuple[str, ...], str, str]]
) -> dict[str, Any] | None:
    """The patches of a loader over a `PatchDataset`, in order.

    The cohort's fingerprint covers names, sizes and ids of files; sizes and times of modification of the files are
    read now, so that a file that was written anew counts as another one.

    Args:
        loader: A loader of batches.
        describe: Gives its class names, cohort fingerprint and split.

    Returns:
        Texts and numbers by name; None for loaders that cannot say what they will give: shuffled, with a transform, or
        without a dataset that knows its cohort and rows.
    """
    dataset, batch_size = getattr(loader, "dataset", None), getattr(loader, "batch_size", None)
    cohort: Any = getattr(dataset, "cohort", None)
    rows: Any = getattr(dataset, "rows", None)
    if not (batch_size and hasattr(cohort, "fingerprint") and hasattr(cohort, "path") and rows is not None):
        return None
    transform = getattr(dataset, "transform", None)
    if transform is not None or type(getattr(loader, "sampler", None)).__name__ != "SequentialSampler":
        return None
    names, fingerprint, split = describe(loader)
    files = hashlib.sha256()
    for row in rows:
        status = cohort.path(int(row)).stat()
        files.update(f"{int(row)} {status.st_size} {status.st_mtime_ns}\n".encode())
    return {
        "cohort": fingerprint,
        "split": split,
        "classes": list(names),
        "files": files.hexdigest(),
        "images": len(rows),
        "image_size": getattr(dataset, "image_size", None),
        "batch_size": int(batch_size),
    }


def fingerprint_table(table: EmbeddingTable) -> str:
    """SHA-256 over shape, rows, labels and class names of a table, read in blocks."""
    digest = hashlib.sha256(json.dumps([list(table.z.shape), list(table.class_names)]).encode())
    digest.update(np.ascontiguousarray(table.label, dtype="<i8").tobytes())
    step = max(1, _BLOCK_BYTES // (4 * max(table.z.shape[1], 1)))
    for start in range(0, len(table.z), step):
        digest.update(np.ascontiguousarray(table.z[start : start + step], dtype="<f4").tobytes())
    return digest.hexdigest()


def fingerprint_attack(attack: object) -> str:
    """The complete settings of an attack: its repr, without the addresses in memory that a function's repr holds."""
    return _without_addresses(repr(attack))


def fingerprint_classifier(classifier: object) -> str:
    """The complete settings of a classifier, or of several: its repr, and the weights of a module, such as a head."""
    if isinstance(classifier, list | tuple):
        return f"[{', '.join(map(fingerprint_classifier, classifier))}]"
    text = _without_addresses(repr(classifier))
    return f"{text} {fingerprint_state(classifier)}" if isinstance(classifier, nn.Module) else text


def fingerprint_batch(batch: HierarchicalBatch) -> str:
    """SHA-256 over the images, ids and labels of a batch."""
    digest = hashlib.sha256()
    columns: Mapping[str, Tensor | None] = {
        "images": batch.images,
        "patch": batch.patch,
        "slide": batch.slide,
        "patient": batch.patient,
        "label": batch.label,
    }
    for name, column in columns.items():
        if column is not None:
            digest.update(f"{name} {column.dtype} {tuple(column.shape)}\n".encode())
            digest.update(tensor_bytes(column))
    return digest.hexdigest()


def tensor_bytes(tensor: Tensor) -> bytes:
    """The values of a tensor, row by row, as they lie in memory; any shape, strides, dtype and device.

    The last axis is made for the view as bytes: torch wants a stride of 1 there, which `contiguous` does not promise
    (one number out of a column of a table is contiguous with the stride of its row).
    """
    return tensor.detach().cpu().reshape(-1).unsqueeze(-1).view(torch.uint8).numpy().tobytes()


def _without_addresses(text: str) -> str:
    return re.sub(r" at 0x[0-9a-f]+", "", text)


def normalisation_of(encoder: object) -> dict[str, Any]:
    """What records say of an encoder's pixel normalisation: mean, std and who states them.

    Args:
        encoder: An `hsat.models.Encoder`, or any other callable, of which nothing is known.

    Returns:
        Plain values by name.
    """
    if not hasattr(encoder, "pixels_stated_by"):
        return {"mean": None, "std": None, "stated_by": "", "note": "whatever the encoder itself does to pixels"}
    mean, std = (None if values is None else list(values) for values in (encoder.mean, encoder.std))  # type: ignore[attr-defined]
    own = {"per_image": True} if getattr(encoder, "per_image", False) else {}
    return {"mean": mean, "std": std, "stated_by": encoder.pixels_stated_by, **own}
