"""Whether a file, a name or a caller states the pixel normalisation of weights, and whether they agree."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch import nn

from hsat.models.encoder import Encoder
from hsat.models.metadata import WeightFile
from hsat.models.pixel_normalisation import HOW_TO_STATE, PixelNormalisation, check_normalisation
from hsat.models.state_dicts import find_equivalent_backbones
from hsat.models.zoo import PAPER_NAMES

RAW_LAYOUTS = ("published", "published dual")  # whose names (bb.) are those of encoders that do not normalise pixels


def find_encoder(module: nn.Module) -> Encoder | None:
    """The encoder that a module is, or that a wrapper such as a compiled module holds; None where there is none."""
    return next((part for part in module.modules() if isinstance(part, Encoder)), None)


def stated_spec(content: WeightFile) -> Mapping[str, Any] | None:
    """The "encoder" of a file, unchecked; a dict without a name in a file of another program is not meant for hsat."""
    extra = content.metadata.get("extra")
    stated = content.metadata.get("encoder", extra.get("encoder") if isinstance(extra, dict) else None)
    return stated if isinstance(stated, dict) and (content.from_hsat or "name" in stated) else None


def stated_pixels(content: WeightFile) -> PixelNormalisation | None:
    """The pixel normalisation that a file states; None where it states none, or nonsense."""
    stated = stated_spec(content)
    if stated is None or not {"mean", "std"} <= stated.keys():
        return None
    try:
        values = check_normalisation(stated["mean"], stated["std"])
        return PixelNormalisation(*values, "the file", per_image=stated.get("per_image") is True)
    except (TypeError, ValueError):
        return None


def check_pixels(path: str | os.PathLike[str], encoder: Encoder, layout: str, content: WeightFile) -> None:
    """Somebody has to state the pixel normalisation, and nobody may contradict."""
    stated = stated_pixels(content)
    if stated is not None and not stated.agrees_with(encoder.pixels):
        raise ValueError(
            f"{path} was written with an encoder that takes {stated.describe()}, and this one takes"
            f" {encoder.pixels.describe()}; nothing was loaded.  load_encoder({str(path)!r}) builds the one of the file"
        )
    raw_by_name = layout in RAW_LAYOUTS and encoder.mean is None and not encoder.per_image
    if stated is None and not encoder.pixels_stated_by and not raw_by_name:
        raise ValueError(
            f"{path} does not say how the pixels were normalised that its weights were trained on, and neither does the"
            f" encoder; nothing was loaded.  Say it when the encoder is built or loaded: {HOW_TO_STATE}"
        )
    _check_published_pixels(path, encoder, layout)


def _check_published_pixels(path: str | os.PathLike[str], encoder: Encoder, layout: str) -> None:
    """The published names say whether pixels were normalised: `bb.model.` with, `bb.` without."""
    name = "" if encoder.spec is None else encoder.spec["name"]
    if encoder.per_image or name not in PAPER_NAMES or not layout.startswith("published"):
        return
    expected, zoo = PAPER_NAMES[name].normalisation, layout == "published zoo"
    if (encoder.mean, encoder.std) != (expected or (None, None)) or zoo == (expected is not None):
        return
    alike = [
        other for other in find_equivalent_backbones(name) if zoo == (PAPER_NAMES[other].normalisation is not None)
    ]
    kind, names = ("normalises", "bb.model.") if zoo else ("does not normalise", "bb.")
    raise ValueError(
        f"{path} fits {name!r} in shape, but its names ({names}) are those of a published encoder that {kind} pixels,"
        f" and {name!r} {'does not' if zoo else 'does'}; nothing was loaded."
        f" Use {' or '.join(alike) or 'another backbone'}, or give mean= and std= yourself"
    )
