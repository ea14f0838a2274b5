"""What an encoder file says of itself: fixed keys of fixed kinds within limits, checked before anything is built.

A file is data of somebody else.  It may say which registered architecture its weights belong to and what happens to
pixels; it may not decide what is fetched, which other file is opened or how much memory is taken.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from hsat.models.heads import HEADS
from hsat.models.zoo import PAPER_NAMES, import_timm
from hsat.untrusted import shown, strict_json

MOST_WIDTH = 65_536  # of an embedding or a hidden layer
MOST_HIDDEN = 8
MOST_SIDE = 2_048  # pixels; a side is what every image is resized to
MOST_CHANNELS = 64
MOST_PATIENTS = 50_000
MOST_TEXT = 4 << 20  # characters of JSON
DEPTH, CONTAINERS = 16, 10_000

Rules = Mapping[str, tuple[str, Callable[[object], bool]]]

_NAME = re.compile(r"[A-Za-z0-9_]{1,100}(?:\.[A-Za-z0-9_]{1,100})?")
_WORD = re.compile(r"[A-Za-z0-9_.-]{1,32}")
_DIGEST = re.compile(r"[0-9a-f]{8,64}")


@dataclass(frozen=True)
class LoadReport:
    """What was loaded from a file.

    Attributes:
        path: The file.
        sha256: SHA-256 of its bytes.
        layout: How its names were read: "hsat", "published", "published zoo", "published dual" or "backbone"; and the
            prefix that was removed from them.
        loaded: Number of tensors.
        dropped: Entries of the file that were left out on purpose (only ever not empty for backbone weights).
        metadata: What else the file says in plain values, such as epoch and loss.
        filled: Counts of batches that the file lacks, as files of old versions of torch do; they are zero.
    """

    path: str
    sha256: str
    layout: str
    loaded: int
    dropped: tuple[str, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)
    filled: tuple[str, ...] = ()


class WeightFile(NamedTuple):
    """What is in a file of weights: named tensors, and what else it says in plain values.

    Attributes:
        state: The tensors by name, on the CPU.
        metadata: The plain values by name.
        from_hsat: Whether hsat wrote it, so that its "encoder" is meant for hsat and is not the settings of another
            program.
    """

    state: dict[str, Tensor]
    metadata: dict[str, Any]
    from_hsat: bool


@dataclass(frozen=True, kw_only=True)
class EncoderSpec:
    """How to build the encoder of a file: what `Encoder.spec` holds, read from a file and checked."""

    name: str
    embedding_dim: int | None
    head: str | None
    head_hidden: tuple[int, ...]
    input_size: tuple[int, int] | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    dual_norm: bool
    image_size: tuple[int, int] | None = None
    per_image: bool = False

    @property
    def norm(self) -> str | None:
        """What `build_encoder` takes beside mean and std."""
        return "image" if self.per_image else None


def parse_metadata(text: str, path: object) -> dict[str, Any]:
    """The JSON under the key `hsat` of an encoder file; `training` is checked, `encoder` when it is asked for.

    Raises:
        ValueError: Naming the key that is not as it must be.
    """
    where = f"{path}: metadata 'hsat'"
    if len(text) > MOST_TEXT:
        raise ValueError(f"{where} has {len(text)} characters; at most {MOST_TEXT} are read")
    content = strict_json(text, where=where, depth=DEPTH, containers=CONTAINERS)
    if not isinstance(content, dict):
        raise ValueError(f"{where} must be a JSON object, got {shown(content)}")
    if not isinstance(content.get("encoder"), dict | None):
        raise ValueError(f"{where}: encoder must be an object or null, got {shown(content['encoder'])}")
    if content.get("training") is not None:
        check_training(content["training"], where)
    return content


def read_spec(values: Mapping[str, Any], path: object) -> EncoderSpec:
    """The `encoder` of a file's metadata, checked.

    Only names of the paper and of timm's own registry are taken, with timm's own tags: none of them makes timm fetch or
    open anything as long as pretrained weights are not asked for, which a file cannot do.

    Raises:
        ValueError: Naming the key that is unknown, missing or out of limits.
    """
    try:
        _check(values, _ENCODER, where="encoder")
        spec = EncoderSpec(
            name=_known_name(values["name"]),
            embedding_dim=values["embedding_dim"],
            head=values["head"],
            head_hidden=tuple(values["head_hidden"]),
            input_size=_pair(values["input_size"]),
            mean=_floats(values["mean"]),
            std=_floats(values["std"]),
            dual_norm=values["dual_norm"],
            image_size=_pair(values.get("image_size")),
            per_image=values.get("per_image", False),
        )
        if (spec.mean is None) != (spec.std is None) or len(spec.mean or ()) != len(spec.std or ()):
            raise ValueError("encoder.mean and encoder.std must have as many values as each other, or be null both")
        if spec.per_image and spec.mean is not None:
            raise ValueError("encoder.per_image is true, so that encoder.mean and encoder.std must be null")
    except ValueError as error:
        raise ValueError(
            f"{path}: {error}. Nothing was built, fetched or opened: a file does not decide that."
            f" Where you know the encoder, build it yourself: load_checkpoint(build_encoder(...), {str(path)!r})"
        ) from None
    return spec


def check_training(values: object, where: str) -> None:
    """What the encoder was trained on: kind of the images, image_size and digests of the patients' names.

    Raises:
        ValueError: Beginning with `where` and naming the key.
    """
    try:
        if not isinstance(values, Mapping):
            raise ValueError(f"training must be an object, got {shown(values)}")
        _check(values, _TRAINING, where="training")
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _check(values: Mapping[str, object], rules: Rules, *, where: str) -> None:
    for key in values:
        if key not in rules:
            raise ValueError(f"{where}.{_shown_key(key)} is no key of {where}, which has {', '.join(rules)}")
    if missing := [f"{where}.{key}" for key in rules if key not in values and f"{where}.{key}" not in _OPTIONAL]:
        raise ValueError(f"{', '.join(missing)} must be given")
    for key, (description, fits) in rules.items():
        if key in values and not fits(values[key]):
            raise ValueError(f"{where}.{key} must be {description}, got {shown(values[key])}")


def _shown_key(key: object) -> str:
    return key if isinstance(key, str) and _WORD.fullmatch(key) else shown(key)


def _is_int(value: object, most: int) -> bool:
    return type(value) is int and 1 <= value <= most


def _is_list(value: object, most: int, fits: Callable[[object], bool], *, least: int = 0) -> bool:
    return isinstance(value, list | tuple) and least <= len(value) <= most and all(map(fits, value))


def _is_float(value: object, low: float, high: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high  # no NaN is


def _is_side(value: object) -> bool:
    return _is_int(value, MOST_SIDE)


def _is_size(value: object) -> bool:
    return value is None or _is_side(value) or _is_list(value, 2, _is_side, least=2)


def _is_channels(value: object, low: float, high: float) -> bool:
    return value is None or _is_list(value, MOST_CHANNELS, lambda item: _is_float(item, low, high), least=1)


_WIDTHS, _SIDES = f"a whole number from 1 to {MOST_WIDTH}", f"a whole number from 1 to {MOST_SIDE}"
_OPTIONAL = ("encoder.image_size", "encoder.per_image")  # only files of encoders that were built so have them
_ENCODER: Rules = {
    "name": ("a text of at most 201 characters", lambda value: isinstance(value, str) and len(value) <= 201),
    "embedding_dim": (f"{_WIDTHS}, or null", lambda value: value is None or _is_int(value, MOST_WIDTH)),
    "head": (f"{', '.join(HEADS)} or null", lambda value: value is None or (type(value) is str and value in HEADS)),
    "head_hidden": (
        f"a list of at most {MOST_HIDDEN}, each {_WIDTHS}",
        lambda value: _is_list(value, MOST_HIDDEN, lambda item: _is_int(item, MOST_WIDTH)),
    ),
    "input_size": (f"{_SIDES}, a list of two, or null", _is_size),
    "mean": (
        f"a list of 1 to {MOST_CHANNELS} numbers from -1.5 to 1.5, or null",
        lambda value: _is_channels(value, -1.5, 1.5),
    ),
    "std": (
        f"a list of 1 to {MOST_CHANNELS} numbers from 0.0001 to 1000, or null",
        lambda value: _is_channels(value, 1e-4, 1e3),
    ),
    "dual_norm": ("true or false", lambda value: isinstance(value, bool)),
    "image_size": (f"{_SIDES}, a list of two, or null", _is_size),
    "per_image": ("true or false", lambda value: isinstance(value, bool)),
}
_TRAINING: Rules = {
    "kind": (
        "a word of at most 32 letters, digits, dots, dashes or underscores",
        lambda value: isinstance(value, str) and _WORD.fullmatch(value) is not None,
    ),
    "image_size": (f"{_SIDES}, a list of two, or null", _is_size),
    "patients": (
        f"a list of at most {MOST_PATIENTS} digests, each 8 to 64 digits of lower-case hex",
        lambda value: _is_list(
            value, MOST_PATIENTS, lambda item: isinstance(item, str) and bool(_DIGEST.fullmatch(item))
        ),
    ),
}


def _known_name(name: str) -> str:
    """The name, where the paper or timm's registry knows it; its tag, if any, must be one of timm's for that model."""
    if name in PAPER_NAMES:
        return name
    if _NAME.fullmatch(name):
        timm = import_timm()
        base, _, tag = name.partition(".")
        if timm.is_model(base) and (not tag or name in timm.list_models(base, include_tags=True)):
            return name
    raise ValueError(
        f"encoder.name is {shown(name)}, which is neither a backbone of the paper nor a model of timm's registry;"
        f" a network address, a folder or a file cannot be named there"
    )


def _pair(size: Any) -> tuple[int, int] | None:
    if size is None:
        return None
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _floats(values: Any) -> tuple[float, ...] | None:
    return None if values is None else tuple(map(float, values))
