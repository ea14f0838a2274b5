"""Loading and saving encoders by name: everything fits, or nothing is loaded."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hsat.fingerprints import fingerprint_state
from hsat.models.dual_norm import is_dual
from hsat.models.encoder import Encoder
from hsat.models.file_heads import head_in
from hsat.models.finite import listed_entries, non_finite_entries
from hsat.models.metadata import parse_metadata
from hsat.models.naming import Naming, best_naming
from hsat.models.suggestions import alike_names, fitting_names
from hsat.models.weight_files import SAFETENSORS_KEY, LoadReport, WeightFile, checkpoint_hash, read_weights
from hsat.models.zoo import PAPER_NAMES

CLASSIFIERS = ("fc.", "head.", "head.fc.", "classifier.", "proj.", "projector.")
NORMALISERS = ("0.mean", "0.std", "normalize.", "normalizer.", "normalise.", "normalization.")
LISTED = 5


def load_checkpoint(encoder: nn.Module, path: str | os.PathLike[str]) -> LoadReport:
    """Load a file into an encoder by name: all of it into all of it, or nothing.

    Reads what `save_encoder` and hsat's training write, safetensors, and published checkpoints: a dict with "model" or
    "state_dict" whose names begin with `module.model.bb.` (or `...bb.model.`) and `module.model.proj.layers.`; also
    plain state dicts of the encoder, and of the backbone where the encoder has no head.  A prefix that wrappers leave
    (`module.`, or the attribute of a Lightning module) is taken off where all entries have it.
    Values go to the encoder's own dtypes and devices.
    Raises ValueError, before anything is changed, listing every kind of misfit: entries that the file lacks or has too
    much, shapes that differ, values that are not finite; names of the paper that the file would fit are listed with
    them.  Also for files that hold no weights (see `read_weights`), and for a published file whose names say that its
    encoder normalised pixels where this one does not, or the reverse.
    What a file says about building its encoder is not asked here: the encoder is the caller's.
    Published training resumes with strict=False, and can load nothing and go on; this cannot.
    """
    return load_state(encoder, path, read_weights(path))


def load_state(encoder: nn.Module, path: str | os.PathLike[str], content: WeightFile) -> LoadReport:
    """`load_checkpoint` with what `read_weights(path)` gave."""
    encoder = encoder.module if isinstance(encoder, DistributedDataParallel) else encoder
    naming = check_state(encoder, path, content)
    target = encoder.state_dict()
    fits = {naming(key): value for key, value in content.state.items() if naming(key) in target}
    encoder.load_state_dict(fits, strict=True)
    return LoadReport(str(path), checkpoint_hash(path), str(naming), len(fits), metadata=content.metadata)


def check_state(encoder: nn.Module, path: str | os.PathLike[str], content: WeightFile) -> Naming:
    """How the file's names are read, where all of it fits; the encoder may be without storage (on the meta device)."""
    target = encoder.state_dict()
    naming = best_naming(content.state, target)
    _check_fit(path, naming, target, content.state)
    if isinstance(encoder, Encoder):
        _check_pixels(path, encoder, naming.layout)
    return naming


def load_backbone(encoder: Encoder, path: str | os.PathLike[str]) -> LoadReport:
    """Load a file into the encoder's backbone only, and say what of the file was left out.

    Entries left out are the classifier or projector, and pixel normalisation; `dropped` lists them.  Any other entry
    without a place, and any of the backbone's own that is absent, is an error as in `load_checkpoint`.
    """
    content = read_weights(path)
    naming, dropped = check_backbone(encoder, path, content)
    target = encoder.backbone.state_dict()
    places = {key: naming(key).removeprefix("backbone.") for key in content.state if key not in dropped}
    fits = {place: content.state[key] for key, place in places.items() if place in target}
    encoder.backbone.load_state_dict(fits, strict=True)
    return LoadReport(str(path), checkpoint_hash(path), str(naming), len(fits), dropped, content.metadata)


def check_backbone(
    encoder: Encoder, path: str | os.PathLike[str], content: WeightFile
) -> tuple[Naming, tuple[str, ...]]:
    """How the file's names are read, where it fits the backbone, and which of its entries are left out."""
    target = {f"backbone.{key}": value for key, value in encoder.backbone.state_dict().items()}
    naming = best_naming(content.state, target)
    others = [key for key in content.state if naming(key) not in target]
    dropped = dict.fromkeys(key for key in others if any(map(_is_left_out, naming.shortened(key))))
    _check_fit(path, naming, target, {key: value for key, value in content.state.items() if key not in dropped})
    _check_pixels(path, encoder, naming.layout)
    return naming, tuple(dropped)


def save_encoder(encoder: Encoder, path: str | os.PathLike[str], *, metadata: Mapping[str, Any] | None = None) -> Path:
    """Write weights and what is needed to rebuild the encoder as one safetensors file, whole or not at all.

    metadata: plain values (JSON) kept beside the weights, such as epoch or the cohort's fingerprint; "training" has
    keys of its own, see `check_training`.  Encoders of `wrap_encoder`, or with a head of the user's, are saved without
    the rebuilding part: build them yourself, then `load_checkpoint`.
    Raises TypeError when metadata is not JSON; ValueError, before anything is written, for the name "encoder" in it,
    which is the rebuilding part, and for metadata that no reader would take; FloatingPointError, leaving `path` as it
    was, naming the entries that hold NaN or infinity: `load_checkpoint` would not take them.
    """
    from safetensors.torch import save_file

    if "encoder" in (metadata or {}):
        raise ValueError("metadata has the key 'encoder', under which the file says how to build it; take another one")
    spec = None if encoder.spec is None else {**encoder.spec, "dual_norm": is_dual(encoder.backbone)}
    try:
        text = json.dumps({**(metadata or {}), "encoder": spec}, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise TypeError(f"metadata must be plain JSON values: {error}") from error
    parse_metadata(text, path)
    path = Path(path)
    state = {key: value.detach().cpu().clone().contiguous() for key, value in encoder.state_dict().items()}
    if entries := non_finite_entries(state):
        raise FloatingPointError(f"{path} was not written, for the encoder is not finite in {listed_entries(entries)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    working = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        # One entry only: safetensors writes several in random order, and equal encoders should be equal files.
        save_file(state, working, metadata={SAFETENSORS_KEY: text})
        working.chmod(0o644)  # safetensors writes files that only their owner can read
        with working.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(working, path)
    except BaseException:
        working.unlink(missing_ok=True)
        raise
    return path


def state_fingerprint(encoder: nn.Module) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of the state, and over what the encoder does to pixels.

    The same for the same weights on any device and in any file; different when a single bit differs.
    """
    pixels = repr((encoder.mean, encoder.std, encoder.input_size)) if isinstance(encoder, Encoder) else ""
    return fingerprint_state(encoder, pixels)


def _is_left_out(name: str) -> bool:
    return name in {"mean", "std"} or name.startswith((*CLASSIFIERS, *NORMALISERS))


def _check_fit(
    path: str | os.PathLike[str], naming: Naming, target: Mapping[str, Tensor], state: Mapping[str, Tensor]
) -> None:
    fits = {naming(key): value for key, value in state.items() if naming(key) in target}
    extra = [key for key in state if naming(key) not in target]
    missing = [key for key in target if key not in fits]
    shapes = [
        f"{key} is {tuple(value.shape)} in the file, {tuple(target[key].shape)} in the encoder"
        for key, value in fits.items()
        if value.shape != target[key].shape
    ]
    kinds = [key for key, value in fits.items() if _kind(value) != _kind(target[key])]
    broken = [key for key, value in fits.items() if value.shape == target[key].shape and not _is_finite(value)]
    problems = [
        f"{len(keys)} {what}: {', '.join(keys[:LISTED])}{', ...' if len(keys) > LISTED else ''}"
        for what, keys in (
            ("missing in the file", missing),
            ("in the file without a place", extra),
            ("of another shape", shapes),
            ("integers where floats belong or the reverse", kinds),
            ("not finite", broken),
        )
        if keys
    ]
    if not problems:
        return
    hint = _hint(missing, extra, shapes, state) if missing or extra or shapes else ""
    raise ValueError(f"{path} does not fit (read as {naming}); nothing was loaded. {'. '.join(problems)}{hint}")


def _kind(value: Tensor) -> tuple[bool, bool]:
    return value.is_floating_point(), value.is_complex()


def _is_finite(value: Tensor) -> bool:
    if not value.is_floating_point():
        return True
    wide = value.float() if value.element_size() == 1 else value  # torch has no isfinite for 8-bit floats
    return bool(wide.isfinite().all())


def _hint(missing: list[str], extra: list[str], shapes: list[str], state: Mapping[str, Tensor]) -> str:
    """What to type instead, where that can be told."""
    if missing and not extra and not shapes and all(key.startswith("head.") for key in missing):
        return "; for a backbone without its head write build_encoder(..., weights=PATH)"
    with suppress(ValueError):
        if all(key.startswith("head.") for key in (*missing, *shapes)) and (head := head_in(state)):
            return (
                f"; the file's head is {head}, on features of width {head.in_features}."
                f" load_encoder(path, name) builds the head of the file, with head=None it takes the backbone alone"
            )
    names = fitting_names(state)
    return f"; its backbone is that of {', '.join(names)}" if names else ""


def _check_pixels(path: str | os.PathLike[str], encoder: Encoder, layout: str) -> None:
    """The published names say whether pixels were normalised: `bb.model.` with, `bb.` without."""
    name = "" if encoder.spec is None else encoder.spec["name"]
    if name not in PAPER_NAMES or not layout.startswith("published"):
        return
    expected, zoo = PAPER_NAMES[name].normalisation, layout == "published zoo"
    if (encoder.mean, encoder.std) != (expected or (None, None)) or zoo == (expected is not None):
        return
    alike = [other for other in alike_names(name) if zoo == (PAPER_NAMES[other].normalisation is not None)]
    kind, names = ("normalises", "bb.model.") if zoo else ("does not normalise", "bb.")
    raise ValueError(
        f"{path} fits {name!r} in shape, but its names ({names}) are those of a published encoder that {kind} pixels,"
        f" and {name!r} {'does not' if zoo else 'does'}; nothing was loaded."
        f" Use {' or '.join(alike) or 'another backbone'}, or give mean= and std= yourself"
    )
