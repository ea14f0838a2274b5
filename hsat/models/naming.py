"""Reading the names in a file of weights as the encoder's own: prefixes of wrappers, published and plain layouts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

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
MOST_PREFIXES = 8  # of those found in a file, beside the usual ones


@dataclass(frozen=True)
class Naming:
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
        """The encoder's name for a key of the file; one in parentheses, that nothing has, where there is no place."""
        if not key.startswith(self.prefix):
            return f"(outside {self.prefix}) {key}"
        short = key.removeprefix(self.prefix)
        for old, new in DUAL_NAMES if self.layout == "published dual" else ():
            short = short.replace(old, new)
        for old, new in LAYOUTS[self.layout]:
            if short.startswith(old):
                return new + short.removeprefix(old)
        return f"(no place) {key}"


def best_naming(state: Iterable[str], target: Mapping[str, Tensor]) -> Naming:
    """The reading of the file's names under which most of them have a place; the first wins ties."""
    keys = list(state)
    found = Counter(key[: i + 1] for key in keys for i, letter in enumerate(key) if letter == ".")
    prefixes = dict.fromkeys((*PREFIXES, *(prefix for prefix, _ in found.most_common(MOST_PREFIXES))))
    readings = [Naming(layout, prefix) for layout in LAYOUTS for prefix in prefixes]
    return max(readings, key=lambda naming: sum(naming(key) in target for key in keys))
