"""Loading and saving encoders by name: everything fits, or nothing is loaded."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hsat.models.dual_norm import is_dual
from hsat.models.encoder import Encoder
from hsat.models.weight_files import SAFETENSORS_KEY, LoadReport, checkpoint_hash, read_weights

PREFIXES = (
    "",
    "module.",
    "model.",
    "module.model.",
    "model.model.",
    "model.module.",
    "model.module.model.",
    "encoder.",
    "_orig_mod.",
    "module._orig_mod.",
    "_orig_mod.module.",
)
LAYOUTS: Mapping[str, tuple[tuple[str, str], ...]] = {  # (begins with, becomes), the first that applies
    "hsat": (("", ""),),
    "published": (("bb.", "backbone."), ("proj.", "head.")),
    "published zoo": (("bb.model.", "backbone."), ("proj.", "head.")),
    "published dual": (("bb.", "backbone."), ("proj.", "head.")),
    "backbone": (("", "backbone."),),
}
DUAL_NAMES = ((".downsample.conv.", ".downsample.0."), (".downsample.bn.", ".downsample.1."))
CLASSIFIERS = ("fc.", "head.", "head.fc.", "classifier.", "proj.", "projector.")
NORMALISERS = ("0.mean", "0.std", "normalize.", "normalizer.", "normalise.", "normalization.")
LISTED = 5
MOST_PREFIXES = 8  # of those found in a file, beside the usual ones


def load_checkpoint(encoder: nn.Module, path: str | os.PathLike[str]) -> LoadReport:
    """Load a file into an encoder by name: all of it into all of it, or nothing.

    Reads what `save_encoder` and hsat's training write, safetensors, and published checkpoints: a dict with "model" or
    "state_dict" whose names begin with `module.model.bb.` (or `...bb.model.`) and `module.model.proj.layers.`; also
    plain state dicts of the encoder, and of the backbone where the encoder has no head.  A prefix that wrappers leave
    (`module.`, or the attribute of a Lightning module) is taken off where all entries have it.
    Values go to the encoder's own dtypes and devices.
    Raises ValueError, before anything is changed, listing every kind of misfit: entries that the file lacks or has too
    much, shapes that differ, values that are not finite; and for files that hold no weights (see `read_weights`).
    Published training resumes with strict=False, and can load nothing and go on; this cannot.
    """
    encoder = encoder.module if isinstance(encoder, DistributedDataParallel) else encoder
    state, metadata = read_weights(path)
    target = encoder.state_dict()
    naming = _best_naming(state, target)
    fits = {naming(key): value for key, value in state.items() if naming(key) in target}
    _check_fit(path, naming, target, fits, [key for key in state if naming(key) not in target])
    encoder.load_state_dict(fits, strict=True)
    return LoadReport(str(path), checkpoint_hash(path), str(naming), len(fits), metadata=metadata)


def load_backbone(encoder: Encoder, path: str | os.PathLike[str]) -> LoadReport:
    """Load a file into the encoder's backbone only, and say what of the file was left out.

    Entries left out are the classifier or projector, and pixel normalisation; `dropped` lists them.  Any other entry
    without a place, and any of the backbone's own that is absent, is an error as in `load_checkpoint`.
    """
    state, metadata = read_weights(path)
    target = {f"backbone.{key}": value for key, value in encoder.backbone.state_dict().items()}
    naming = _best_naming(state, target)
    fits = {naming(key): value for key, value in state.items() if naming(key) in target}
    others = [key for key in state if naming(key) not in target]
    dropped = [key for key in others if any(map(_is_left_out, naming.shortened(key)))]
    _check_fit(path, naming, target, fits, [key for key in others if key not in dropped])
    encoder.backbone.load_state_dict({key.removeprefix("backbone."): value for key, value in fits.items()}, strict=True)
    return LoadReport(str(path), checkpoint_hash(path), str(naming), len(fits), tuple(dropped), metadata)


def save_encoder(encoder: Encoder, path: str | os.PathLike[str], *, metadata: Mapping[str, Any] | None = None) -> Path:
    """Write weights and what is needed to rebuild the encoder as one safetensors file, whole or not at all.

    metadata: plain values (JSON) kept beside the weights, such as epoch or the cohort's fingerprint.  Encoders of
    `wrap_encoder`, or with a head of the user's, are saved without the rebuilding part: build them yourself, then
    `load_checkpoint`.  Raises TypeError when metadata is not JSON.
    """
    from safetensors.torch import save_file

    spec = None if encoder.spec is None else {**encoder.spec, "dual_norm": is_dual(encoder.backbone)}
    try:
        text = json.dumps({**(metadata or {}), "encoder": spec}, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise TypeError(f"metadata must be plain JSON values: {error}") from error
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {key: value.detach().cpu().clone().contiguous() for key, value in encoder.state_dict().items()}
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


def load_encoder(path: str | os.PathLike[str]) -> Encoder:
    """Rebuild the encoder that `save_encoder` wrote, weights included, in evaluation mode, on the CPU.

    Also reads a training checkpoint that keeps `encoder.spec` under "encoder", itself or in its "extra".  Nothing is
    downloaded and torch's global random state stays.  Raises ValueError when the file does not say how to build its
    encoder.
    """
    from hsat.models.building import build_encoder

    _, metadata = read_weights(path)
    extra = metadata.get("extra")
    spec = metadata.get("encoder", extra.get("encoder") if isinstance(extra, dict) else None)
    if not isinstance(spec, dict):
        raise ValueError(
            f"{path} does not say how to build its encoder; build it with build_encoder or wrap_encoder and call"
            f" load_checkpoint(encoder, {str(path)!r})"
        )
    size = spec.get("input_size")
    encoder = build_encoder(**{**spec, "input_size": None if size is None else tuple(size)}, seed=0)
    load_checkpoint(encoder, path)
    return encoder.eval()


def state_fingerprint(encoder: nn.Module) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of the state, and over what the encoder does to pixels.

    The same for the same weights on any device and in any file; different when a single bit differs.
    """
    digest = hashlib.sha256()
    if isinstance(encoder, Encoder):
        digest.update(repr((encoder.mean, encoder.std, encoder.input_size)).encode())
    for key, value in sorted(encoder.state_dict().items()):
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
        flat = value.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _is_left_out(name: str) -> bool:
    return name in {"mean", "std"} or name.startswith((*CLASSIFIERS, *NORMALISERS))


@dataclass(frozen=True)
class _Naming:
    """A way to read a file's names as the encoder's: take the prefix off, then replace beginnings."""

    layout: str
    prefix: str

    def __str__(self) -> str:
        return f"{self.layout}, prefix {self.prefix}" if self.prefix else self.layout

    def shortened(self, key: str) -> list[str]:
        """The key without the prefix, or without its beginning: what stands beside the backbone has less of it."""
        outer = [self.prefix[: i + 1] for i, letter in enumerate(self.prefix) if letter == "."]
        return [key.removeprefix(part) for part in ("", *outer)]

    def __call__(self, key: str) -> str:
        if not key.startswith(self.prefix):
            return f"(outside {self.prefix}) {key}"
        short = key.removeprefix(self.prefix)
        for old, new in DUAL_NAMES if self.layout == "published dual" else ():
            short = short.replace(old, new)
        for old, new in LAYOUTS[self.layout]:
            if short.startswith(old):
                return new + short.removeprefix(old)
        return f"(no place) {key}"


def _best_naming(state: Iterable[str], target: Mapping[str, Tensor]) -> _Naming:
    """The reading of the file's names under which most of them have a place; the first wins ties."""
    keys = list(state)
    found = Counter(key[: i + 1] for key in keys for i, letter in enumerate(key) if letter == ".")
    prefixes = dict.fromkeys((*PREFIXES, *(prefix for prefix, _ in found.most_common(MOST_PREFIXES))))
    readings = [_Naming(layout, prefix) for layout in LAYOUTS for prefix in prefixes]
    return max(readings, key=lambda naming: sum(naming(key) in target for key in keys))


def _check_fit(
    path: str | os.PathLike[str],
    naming: _Naming,
    target: Mapping[str, Tensor],
    fits: Mapping[str, Tensor],
    extra: list[str],
) -> None:
    missing = [key for key in target if key not in fits]
    shapes = [
        f"{key} is {tuple(value.shape)} in the file, {tuple(target[key].shape)} in the encoder"
        for key, value in fits.items()
        if value.shape != target[key].shape
    ]
    kinds = [key for key, value in fits.items() if value.is_floating_point() != target[key].is_floating_point()]
    broken = [key for key, value in fits.items() if value.is_floating_point() and not value.isfinite().all()]
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
    hint = ""
    if missing and all(key.startswith("head.") for key in missing):
        hint = "; for a backbone without its head write build_encoder(..., weights=PATH)"
    raise ValueError(f"{path} does not fit (read as {naming}); nothing was loaded. {'. '.join(problems)}{hint}")
