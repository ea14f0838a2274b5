"""Encoders and files: weights read without running code, loaded by name (all of them or none), and saved."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hsat.files import atomic_path
from hsat.models.dual_norm import is_dual
from hsat.models.encoder import Encoder
from hsat.models.metadata import LoadReport, WeightFile, check_training, parse_metadata
from hsat.models.pixel_check import check_pixels, find_encoder, stated_pixels
from hsat.models.state_dicts import (
    KeyMapping,
    check_fit,
    find_non_finite,
    list_entries,
    load_named,
    match_keys,
    named_state,
)
from hsat.tensor_files import (
    UNREADABLE,
    check_archive,
    check_safetensors_header,
    check_tensor_names,
    reason_of,
    refuse_text,
    refused_object,
)
from hsat.untrusted import open_regular

KIND = "file of weights"
MOST_BYTES = 64 << 30
MOST_PLAIN, DEEPEST_PLAIN, LONGEST_PLAIN = 10_000, 32, 64
STATE_NAMES = ("model", "state_dict", "model_state_dict", "encoder", "network")
SAFETENSORS_KEY = "hsat"
TRAINING_FORMAT = "hsat training"
CLASSIFIERS = ("fc.", "head.", "head.fc.", "classifier.", "proj.", "projector.")
NORMALISERS = ("0.mean", "0.std", "normalize.", "normalizer.", "normalise.", "normalization.")
_TORCH_STARTS = (b"PK", b"\x80")  # zip archives, and the pickles that older versions of torch wrote


def load_checkpoint(encoder: nn.Module, path: str | os.PathLike[str]) -> LoadReport:
    """Load a file into an encoder by name: all of it into all of it, or nothing.

    Reads what `save_encoder` and hsat's training write, safetensors, and published checkpoints: a dict with "model" or
    "state_dict" whose names begin with `module.model.bb.` (or `...bb.model.`) and `module.model.proj.layers.`; also
    plain state dicts of the encoder, and of the backbone where the encoder has no head.  A prefix that wrappers leave
    (`module.`, or the attribute of a Lightning module) is taken off where all entries have it.
    What a file says about building its encoder is not asked here: the encoder is the caller's.
    Published training resumes with strict=False, and can load nothing and go on; this cannot.

    Args:
        encoder: Where the values go, in its own dtypes and on its devices; DistributedDataParallel is unwrapped.
        path: The file.

    Returns:
        How the file's names were read, and what else it says.

    Raises:
        ValueError: Before anything is changed, listing every kind of misfit: entries that the file lacks or has too
            much, shapes that differ, values that are not finite; names of the paper that the file would fit are listed
            with them.  Also for files that hold no weights (see `read_weights`), and for a published file whose names
            say that its encoder normalised pixels where this one does not, or the reverse.
    """
    return load_state(encoder, path, read_weights(path))


def load_state(encoder: nn.Module, path: str | os.PathLike[str], content: WeightFile) -> LoadReport:
    """`load_checkpoint` with what `read_weights(path)` gave."""
    encoder = encoder.module if isinstance(encoder, DistributedDataParallel) else encoder
    mapping = check_state(encoder, path, content)
    filled = load_named(encoder, {mapping(key): value for key, value in content.state.items()})
    own = find_encoder(encoder)
    if own is not None and (stated_pixels(content) is not None or not own.pixels_stated_by):
        own.pixels_stated_by = "its file"
    loaded, digest = len(content.state), checkpoint_hash(path)
    return LoadReport(str(path), digest, str(mapping), loaded, metadata=content.metadata, filled=filled)


def check_state(encoder: nn.Module, path: str | os.PathLike[str], content: WeightFile) -> KeyMapping:
    """How the file's names are read, where all of it fits; the encoder may be without storage (on the meta device)."""
    target = named_state(encoder)
    mapping = match_keys(content.state, target)
    check_fit(path, mapping, target, content.state)
    if (own := find_encoder(encoder)) is not None:
        check_pixels(path, own, mapping.layout, content)
    return mapping


def load_backbone(encoder: Encoder, path: str | os.PathLike[str]) -> LoadReport:
    """Load a file into the encoder's backbone only, and say what of the file was left out.

    Entries left out are the classifier or projector, and pixel normalisation; `dropped` lists them.  Any other entry
    without a place, and any of the backbone's own that is absent, is an error as in `load_checkpoint`.
    """
    content = read_weights(path)
    mapping, dropped = check_backbone(encoder, path, content)
    places = {key: mapping(key).removeprefix("backbone.") for key in content.state if key not in dropped}
    filled = load_named(encoder.backbone, {place: content.state[key] for key, place in places.items()})
    digest = checkpoint_hash(path)
    return LoadReport(str(path), digest, str(mapping), len(places), dropped, content.metadata, filled)


def check_backbone(
    encoder: Encoder, path: str | os.PathLike[str], content: WeightFile
) -> tuple[KeyMapping, tuple[str, ...]]:
    """How the file's names are read, where it fits the backbone, and which of its entries are left out."""
    target = {f"backbone.{key}": value for key, value in named_state(encoder.backbone).items()}
    mapping = match_keys(content.state, target)
    others = [key for key in content.state if mapping(key) not in target]
    dropped = dict.fromkeys(key for key in others if any(map(_is_left_out, mapping.short_names(key))))
    check_fit(path, mapping, target, {key: value for key, value in content.state.items() if key not in dropped})
    check_pixels(path, encoder, mapping.layout, content)
    return mapping, tuple(dropped)


def _is_left_out(name: str) -> bool:
    return name in {"mean", "std"} or name.startswith((*CLASSIFIERS, *NORMALISERS))


def save_encoder(encoder: Encoder, path: str | os.PathLike[str], *, metadata: Mapping[str, Any] | None = None) -> Path:
    """Write weights and what is needed to rebuild the encoder as one safetensors file, whole or not at all.

    Encoders of `wrap_encoder`, or with a head of the user's, are saved without the rebuilding part: build them
    yourself, then `load_checkpoint`.

    Args:
        encoder: The encoder.
        path: The file to write; missing folders are made.
        metadata: Plain values (JSON) kept beside the weights, such as epoch or the cohort's fingerprint; "training" has
            keys of its own, see `check_training`.

    Returns:
        The path.

    Raises:
        TypeError: When metadata is not JSON.
        ValueError: Before anything is written, for the name "encoder" in metadata, which is the rebuilding part, and
            for metadata that no reader would take.
        FloatingPointError: Leaving `path` as it was, naming the entries that hold NaN or infinity: `load_checkpoint`
            would not take them.
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
    state = {key: value.detach().cpu().clone().contiguous() for key, value in named_state(encoder).items()}
    if entries := find_non_finite(state):
        raise FloatingPointError(f"{path} was not written, for the encoder is not finite in {list_entries(entries)}")
    with atomic_path(path) as working:
        # One entry only: safetensors writes several in random order, and equal encoders should be equal files.
        save_file(state, working, metadata={SAFETENSORS_KEY: text})
    return path


def checkpoint_hash(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a regular file's bytes, as lower-case hex.

    Args:
        path: The file.

    Returns:
        64 hexadecimal digits.

    Raises:
        ValueError: For what is no regular file.
    """
    with open_regular(path, kind=KIND) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_weights(path: str | os.PathLike[str]) -> WeightFile:
    """Named tensors of a safetensors or torch file, on the CPU, and its plain metadata; nothing is unpickled blindly.

    A torch file is either a flat dict of tensors or holds one under "model", "state_dict" and the like.  What is
    allocated is bounded by the file: its tables of contents must agree with its size, torch archives must hold their
    tensors uncompressed (as torch.save writes them), and no tensor may be larger than what is stored for it.

    Raises:
        FileNotFoundError: If there is no file.
        ValueError: Naming the file and what it is: a folder, a pipe or a device, empty, an HTML page, a Git LFS
            pointer, something else, truncated, a pickle with code in it, or one without tensors.  No error shows what
            is in a file that is none of weights.
    """
    path = Path(path)
    with open_regular(path, kind=KIND) as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(512)
        refuse_text(path, size, start, kind=KIND)
        if size > MOST_BYTES:
            raise ValueError(f"{path} has {size} bytes; files of weights of at most {MOST_BYTES} are read")
        file.seek(0)
        if _is_safetensors(path, start):
            return _read_safetensors(path, file, size)
        if not start.startswith(_TORCH_STARTS):
            raise ValueError(f"{path} is neither a torch nor a safetensors file; it is {_looks_like(start)}")
        return _read_torch(path, file, size)


def _looks_like(start: bytes) -> str:
    """What a file seems to be, by its beginning, without showing any of it."""
    if start.lstrip()[:1] in {b"{", b"["}:
        return "a JSON text, such as the answer of a server; open it and see"
    is_text = all(32 <= byte < 127 or byte in b"\t\r\n" for byte in start)
    return "some text; open it and see" if is_text else "some other binary file"


def _is_safetensors(path: Path, start: bytes) -> bool:
    return path.suffix == ".safetensors" or (start[8:9] == b"{" and not start.startswith((b"PK", b"\x80")))


def _read_safetensors(path: Path, file: IO[bytes], size: int) -> WeightFile:
    from safetensors import SafetensorError, safe_open

    texts = check_safetensors_header(path, file, size)
    from_hsat = SAFETENSORS_KEY in texts
    metadata: dict[str, Any] = {key: value for key, value in texts.items() if key != SAFETENSORS_KEY}
    if from_hsat:
        metadata.update(parse_metadata(texts[SAFETENSORS_KEY], path))
    try:
        with safe_open(str(path), framework="pt", device="cpu") as opened:
            state = {key: opened.get_tensor(key) for key in opened.keys()}
    except (SafetensorError, ValueError, OSError) as error:
        raise ValueError(f"{path} is truncated or damaged, or no safetensors file: {error}; fetch it again") from error
    return WeightFile(state, metadata, from_hsat)


def _read_torch(path: Path, file: IO[bytes], size: int) -> WeightFile:
    try:
        check_archive(file, size)
        file.seek(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of foreign pickles before it refuses them
            content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "weights_only" not in str(error).lower():
            raise ValueError(f"{path} is no file of weights: its pickle cannot be read") from error
        raise ValueError(
            f"{path} holds Python objects beside its tensors, which loading refuses because they can run code"
            " or take memory without bound:"
            f" {refused_object(error) or 'a pickle that torch.save did not write'}."
            f" Where you trust it, save its state dict alone, with torch.save, and load that"
        ) from error
    except UNREADABLE as error:
        raise ValueError(
            f"{path} is truncated or damaged, or no torch file: {reason_of(error)}; fetch it again"
        ) from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a dict of named tensors")
    state, metadata = _state_of(path, content)
    _check_tensors(path, state)
    return WeightFile(state, metadata, str(metadata.get("format")).startswith(TRAINING_FORMAT))


def _state_of(path: Path, content: Mapping[Any, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if _is_state(content):
        return dict(content), {}
    for name in STATE_NAMES:
        if name in content and _is_state(content[name]):
            metadata = {str(k): v for k, v in content.items() if k != name and _is_plain(v)}
            extra = content.get("extra")  # of a training checkpoint: "encoder" may stand beside tensors in it
            if "extra" not in metadata and isinstance(extra, Mapping) and len(extra) <= LONGEST_PLAIN:
                metadata["extra"] = {str(k): v for k, v in extra.items() if _is_plain(v)}
            ours = str(metadata.get("format")).startswith(TRAINING_FORMAT)
            if ours and isinstance(extra, Mapping) and extra.get("training") is not None:
                check_training(extra["training"], f"{path}: extra")
                metadata["training"] = extra["training"]
            return dict(content[name]), metadata
    keys = ", ".join(key[:40] if isinstance(key, str) else type(key).__name__ for key in list(content)[:8])
    raise ValueError(
        f"{path} holds no named tensors, neither flat nor under {', '.join(STATE_NAMES)}; it holds {keys or 'nothing'}"
    )


def _check_tensors(path: Path, state: Mapping[str, Tensor]) -> None:
    """Raise ValueError for names and tensors that no encoder has, and for values that the file does not hold."""
    check_tensor_names(path, state)
    for key, value in state.items():
        if value.layout != torch.strided or value.is_quantized or value.device.type != "cpu":
            raise ValueError(f"{path}: {key} is no plain tensor on the CPU (sparse, quantised or without values)")
        stored = value.untyped_storage().nbytes()
        if value.numel() * value.element_size() > stored:
            raise ValueError(f"{path}: {key} has shape {tuple(value.shape)}, and the file holds {stored} bytes for it")


def _is_state(value: object) -> bool:
    return (
        isinstance(value, Mapping)
        and len(value) > 0
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())
    )


def _is_plain(value: object) -> bool:
    """Whether a value is made of plain ones, and small: a pickle may hold a list a million times, or in itself."""
    waiting: list[tuple[object, int]] = [(value, 0)]
    count = 0
    while waiting:
        item, depth = waiting.pop()
        count += 1
        if count > MOST_PLAIN or depth > DEEPEST_PLAIN:
            return False
        if isinstance(item, Mapping):
            if not all(isinstance(key, str) for key in item):
                return False
            waiting += [(entry, depth + 1) for entry in item.values()]
        elif isinstance(item, list | tuple):
            if len(item) > LONGEST_PLAIN:
                return False
            waiting += [(entry, depth + 1) for entry in item]
        elif item is not None and not isinstance(item, str | int | float | bool):
            return False
    return True
