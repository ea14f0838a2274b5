"""State dicts of encoders: names in files and in the encoder, the head among them, and whether one fits the other."""

from __future__ import annotations

import functools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from hsat.models.dual_norm import convert_to_dual
from hsat.models.heads import HeadSpec
from hsat.models.zoo import PAPER_NAMES, Architecture, create_backbone

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
MOST_PREFIXES = 8  # of those in a file, beside the usual ones
SMALLEST = 100  # tensors; every backbone of the paper has more
LISTED = 5  # misfits of a kind in a message
CHECKED = {torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128}

_COUNT = "num_batches_tracked"  # of a BatchNorm
_COMPILED = "_orig_mod."  # what torch.compile puts before names in a state dict
_LAYER = re.compile(r"(?P<where>(?:.*\.)?(?:proj|head)\.layers\.)(?P<number>\d+)\.(?P<entry>\w+)")
_WITH_BATCH_NORM = {0: 2, 1: 1, 3: 2, 4: 1, 6: 2, 7: 1}  # layer number: axes of its weight, as `projection_head` builds


@dataclass(frozen=True)
class KeyMapping:
    """A way to read a file's names as the encoder's: take the prefix off, then replace beginnings.

    Attributes:
        layout: A key of `LAYOUTS`.
        prefix: What all names in the file begin with.
    """

    layout: str
    prefix: str

    def __str__(self) -> str:
        return f"{self.layout}, prefix {self.prefix}" if self.prefix else self.layout

    def short_names(self, key: str) -> list[str]:
        """The key without the prefix, or without its beginning: what stands beside the backbone has less of it."""
        outer = [self.prefix[: i + 1] for i, letter in enumerate(self.prefix) if letter == "."]
        return [key.removeprefix(part) for part in ("", *outer)]

    def __call__(self, key: str) -> str:
        """The encoder's name for a key of the file; one in parentheses, that nothing has, where there is no place."""
        if not key.startswith(self.prefix):
            return f"(outside {self.prefix}) {key}"
        short = key.removeprefix(self.prefix).replace(_COMPILED, "")
        for old, new in DUAL_NAMES if self.layout == "published dual" else ():
            short = short.replace(old, new)
        for old, new in LAYOUTS[self.layout]:
            if short.startswith(old):
                return new + short.removeprefix(old)
        return f"(no place) {key}"


def match_keys(state: Iterable[str], target: Mapping[str, Tensor]) -> KeyMapping:
    """The reading of a file's names under which most of them have a place in the target; the first wins ties."""
    keys = list(state)
    beginnings = Counter(key[: i + 1] for key in keys for i, letter in enumerate(key) if letter == ".")
    prefixes = dict.fromkeys((*PREFIXES, *(prefix for prefix, _ in beginnings.most_common(MOST_PREFIXES))))
    mappings = [KeyMapping(layout, prefix) for layout in LAYOUTS for prefix in prefixes]
    return max(mappings, key=lambda mapping: sum(mapping(key) in target for key in keys))


def named_state(module: nn.Module) -> dict[str, Tensor]:
    """The state of a module under the names that it has without wrappers: torch.compile's, and those of data parallel.

    So an encoder whose backbone is compiled writes and reads the files of one whose backbone is not.
    """
    return {plain: value for plain, (_, value) in _named_entries(module).items()}


def load_named(module: nn.Module, state: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Load values under the names of `named_state`; others are passed over.

    Args:
        module: Where they go.
        state: The values; of each entry of the module but for counts of batches.

    Returns:
        The counts that `state` lacks, as files of old versions of torch do; they are set to zero, as torch sets them.
    """
    entries = _named_entries(module)
    filled = tuple(name for name in entries if name not in state and name.endswith(_COUNT))
    values = {actual: state[name] for name, (actual, _) in entries.items() if name in state}
    zeros = {entries[name][0]: torch.zeros_like(entries[name][1]) for name in filled}
    module.load_state_dict(values | zeros, strict=True)
    return filled


def _named_entries(module: nn.Module) -> dict[str, tuple[str, Tensor]]:
    """(actual name, value) of each entry of a module's state, by its name without wrappers."""
    kinds = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    wrappers = [f"{name}." if name else "" for name, part in module.named_modules() if isinstance(part, kinds)]
    entries = {}
    for actual, value in module.state_dict().items():
        plain = actual
        for prefix in sorted(wrappers, key=len, reverse=True):
            if plain.startswith(f"{prefix}module."):
                plain = prefix + plain.removeprefix(f"{prefix}module.")
        entries[plain.replace(_COMPILED, "")] = actual, value
    return entries


class StoredHead(NamedTuple):
    """A projection head in a file: the options that build one of the same shapes, and the width that it reads."""

    spec: HeadSpec
    in_features: int


def find_head(state: Mapping[str, Tensor]) -> StoredHead | None:
    """The head among named tensors: `...proj.layers.N.weight` as published, or `...head.layers.N.weight` as here.

    Returns:
        The head; None where there is no such entry.

    Raises:
        ValueError: For two heads, and for layers that no head of `projection_head` has.
    """
    heads: dict[str, dict[int, Tensor]] = defaultdict(dict)
    for key, value in state.items():
        match = _LAYER.fullmatch(key)
        if match and match["entry"] == "weight":
            heads[match["where"]][int(match["number"])] = value
    if not heads:
        return None
    if len(heads) > 1:
        raise ValueError(f"there are several projection heads: {', '.join(sorted(heads))}")
    ((where, weights),) = heads.items()
    axes = {number: weight.ndim for number, weight in sorted(weights.items())}
    linear = [weights[number] for number, n in axes.items() if n == 2]
    widths = [int(weight.shape[0]) for weight in linear]
    chained = all(a.shape[0] == b.shape[1] for a, b in pairwise(linear))
    plain = {2 * i: 2 for i in range(len(linear))}
    if not linear or not chained or axes not in (plain, _WITH_BATCH_NORM):
        shapes = ", ".join(f"{number}: {tuple(weights[number].shape)}" for number in axes)
        raise ValueError(f"the layers under {where} are those of no known projection head (weights {shapes})")
    kind = "mlp3_bn" if axes == _WITH_BATCH_NORM else "mlp" if len(linear) > 1 else "linear"
    return StoredHead(HeadSpec(kind, widths[-1], tuple(widths[:-1])), int(linear[0].shape[1]))


def find_matching_backbones(state: Mapping[str, Tensor]) -> list[str]:
    """The names of `PAPER_NAMES` whose backbone has exactly the names and shapes that the file has, in their order.

    Where the file's names say whether pixels were normalised, only names that agree.  Backbones are built without
    storage for this, once per process: a second or two.
    """
    if len(state) < SMALLEST:
        return []
    shapes = Counter(tuple(value.shape) for value in state.values())
    matching = []
    for name, architecture in PAPER_NAMES.items():
        target = _backbone_state(_first_of_kind(name))
        if Counter(tuple(value.shape) for value in target.values()) - shapes:
            continue
        mapping = match_keys(state, target)
        fits = {mapping(key): value for key, value in state.items()}
        zoo, normalises = mapping.layout == "published zoo", architecture.normalisation is not None
        agrees = zoo == normalises or not mapping.layout.startswith("published")
        if agrees and all(key in fits and fits[key].shape == value.shape for key, value in target.items()):
            matching.append(name)
    return matching


def find_equivalent_backbones(name: str) -> list[str]:
    """The other names of `PAPER_NAMES` that stand for a backbone of the same names and shapes."""
    shapes = _backbone_shapes(name)
    return [other for other in PAPER_NAMES if other != name and _backbone_shapes(other) == shapes]


def _backbone_shapes(name: str) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in _backbone_state(_first_of_kind(name)).items()}


def _first_of_kind(name: str) -> str:
    """The first name with the same architecture, so that each is built once."""

    def kind(architecture: Architecture) -> tuple[object, ...]:
        return architecture.timm, architecture.options, architecture.dual

    return next(other for other, entry in PAPER_NAMES.items() if kind(entry) == kind(PAPER_NAMES[name]))


@functools.cache
def _backbone_state(name: str) -> dict[str, Tensor]:
    """The state of a name's backbone, under the encoder's names, on the meta device."""
    with torch.device("meta"):
        backbone = create_backbone(PAPER_NAMES[name], pretrained=False)
        backbone = convert_to_dual(backbone) if PAPER_NAMES[name].dual else backbone
    return {f"backbone.{entry}": value for entry, value in backbone.state_dict().items()}


def check_fit(path: object, mapping: KeyMapping, target: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Raise ValueError, listing every kind of misfit, unless all of a file's state fits all of the target."""
    fits = {mapping(key): value for key, value in state.items() if mapping(key) in target}
    extra = [key for key in state if mapping(key) not in target]
    missing = [key for key in target if key not in fits and not key.endswith(_COUNT)]
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
    hint = _advice(missing, extra, shapes, state) if missing or extra or shapes else ""
    raise ValueError(f"{path} does not fit (read as {mapping}); nothing was loaded. {'. '.join(problems)}{hint}")


def _kind(value: Tensor) -> tuple[bool, bool]:
    return value.is_floating_point(), value.is_complex()


def _is_finite(value: Tensor) -> bool:
    if not value.is_floating_point():
        return True
    wide = value.float() if value.element_size() == 1 else value  # torch has no isfinite for 8-bit floats
    return bool(wide.isfinite().all())


_CLASSIFIER = re.compile(r"(^|\.)(fc|head|classifier|head\.fc)\.(weight|bias)$")


def _advice(missing: list[str], extra: list[str], shapes: list[str], state: Mapping[str, Tensor]) -> str:
    """What to type instead, where that can be told."""
    if missing and not extra and not shapes and all(key.startswith("head.") for key in missing):
        return "; for a backbone without its head write build_encoder(..., weights=PATH)"
    with suppress(ValueError):
        if all(key.startswith("head.") for key in (*missing, *shapes)) and (head := find_head(state)):
            return (
                f"; the file's head is {head.spec}, on features of width {head.in_features}."
                f" load_encoder(path, name) builds the head of the file, with head=None it takes the backbone alone"
            )
    if extra and not missing and not shapes and all(map(_CLASSIFIER.search, extra)):
        return "; these are a classifier on top of the backbone, which load_encoder leaves out for head=None"
    names = find_matching_backbones(state)
    return f"; its backbone is that of {', '.join(names)}" if names else ""


def largest_magnitude(tensors: Iterable[Tensor]) -> Tensor | None:
    """Largest absolute value in the tensors, () on the device of the first: NaN or infinite where any value is.

    A maximum overflows only where a value has, which a sum of squares does not promise.  Nothing is read from the
    device.  None where there is no value of a floating-point or complex type.
    """
    values = [tensor.detach() for tensor in tensors if _is_checked(tensor)]
    return get_total_norm(values, math.inf) if values else None


def find_non_finite(named: Mapping[str, object]) -> list[str]:
    """Which tensors hold NaN or infinity, as "name (3 of 64 values)", in the order given; other values are passed over.

    One read of the device where all is finite; one more per tensor where something is not.
    """
    tensors = {name: value for name, value in named.items() if isinstance(value, Tensor) and _is_checked(value)}
    largest = largest_magnitude(tensors.values())
    if largest is None or math.isfinite(float(largest)):
        return []
    counts = {name: int((~value.detach().isfinite()).sum()) for name, value in tensors.items()}
    return [f"{name} ({count} of {tensors[name].numel()} values)" for name, count in counts.items() if count]


def list_entries(entries: list[str], *, most: int = 3) -> str:
    """The first entries in words, with the number of those left out."""
    more = f" and {len(entries) - most} more" if len(entries) > most else ""
    return ", ".join(entries[:most]) + more


def _is_checked(tensor: Tensor) -> bool:
    return tensor.dtype in CHECKED and tensor.layout == torch.strided and tensor.numel() > 0
