"""The side of the square that an encoder sees: chosen where nobody gave it, said where patches are resized."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from hsat.cli.data_options import EvaluationDataSettings
from hsat.cli.options import StoredModelSettings, say
from hsat.data import Cohort
from hsat.data.patch_sizes import count_sizes
from hsat.models.checkpoints import read_weights

_LOOKED_AT = 500
_SHOWN = 3
D = TypeVar("D", bound=EvaluationDataSettings)


def settle_image_size(data: D, cohort: Cohort, files: Sequence[Path], model: StoredModelSettings) -> D:
    """The data options of an evaluation with the size of the patches, which is said where they are resized.

    A size that somebody gave stays, and so does the paper's for SRH patches.  For others it is the size that all files
    state as that of their training, else the one that the encoders are built for, else, where they take any and all
    patches are squares of one size, the patches' own.

    Args:
        data: Options.
        cohort: The patches.
        files: Of the encoders.
        model: What the files do not say.

    Returns:
        The options.
    """
    if data.root is None:
        return data
    sizes = count_sizes(cohort, most=_LOOKED_AT)
    if "image_size" not in data.model_fields_set and cohort.kind == "rgb":
        side = _side_of_training(files) or _side_that_fits(sizes, files, model)
        if side is not None:
            data = data.model_copy(update={"image_size": side})
    if set(sizes) == {(data.image_size,) * 2}:
        say(f"patches at their own size, {data.image_size} x {data.image_size}; --data.image_size sets another")
    else:
        say_image_size(cohort, data.image_size, sizes)
    return data


def say_image_size(cohort: Cohort, side: int, sizes: Mapping[tuple[int, int], int] | None = None) -> None:
    """Say in a line that patches are resized, and what keeps them; nothing where they are of this size.

    Args:
        cohort: The patches.
        side: To which they are resized.
        sizes: How many have each size; else 500 files are looked at.
    """
    counts = Counter(count_sizes(cohort, most=_LOOKED_AT) if sizes is None else sizes)
    if set(counts) <= {(side, side)}:
        return
    if len(counts) == 1:
        ((height, width),) = counts
        keeps = f"--data.image_size {height} keeps them" if height == width else "they are squeezed to squares"
        say(f"note: patches of {height} x {width} pixels are resized to {side} x {side}; {keeps}")
        return
    looked = sum(counts.values())
    resized = looked - counts[side, side]
    shown = ", ".join(f"{count} of {height} x {width}" for (height, width), count in counts.most_common(_SHOWN))
    more = ", ..." if len(counts) > _SHOWN else ""
    looked_at = f" of {looked} that were looked at" if looked < len(cohort) else ""
    say(
        f"note: patches have {len(counts)} sizes ({shown}{more}{looked_at}); {resized} of {looked} are resized to"
        f" {side} x {side}, so that their scales differ; --data.image_size sets another size"
    )


def _side_of_training(files: Sequence[Path]) -> int | None:
    """The size that all files state as that of their training."""
    sides = {training.get("image_size") if isinstance(training := _stated(path, "training"), Mapping) else None
             for path in files}  # fmt: skip
    side = sides.pop() if len(sides) == 1 else None
    return side if isinstance(side, int) else None


def _side_that_fits(sizes: Counter[tuple[int, int]], files: Sequence[Path], model: StoredModelSettings) -> int | None:
    """The one side that the encoders take; the patches' own, where they take any and all patches are such squares."""
    if model.factory or model.input_size:
        return None
    if model.image_size:
        return model.image_size
    taken = {_side_taken(path, model) for path in files}
    if taken == {0} and len(sizes) == 1:
        ((height, width),) = sizes
        return height if height == width else None
    side = taken.pop() if len(taken) == 1 else None
    return side or None


def _side_taken(path: Path, model: StoredModelSettings) -> int | None:
    """The side that the encoder of a file takes, 0 where it takes any, None where it resizes by itself."""
    import timm

    spec = _stated(path, "encoder")
    if not isinstance(spec, Mapping):
        spec = {"name": model.backbone}
    if spec.get("input_size"):
        return None
    if isinstance(built := spec.get("image_size"), Sequence) and len(set(built)) == 1:
        return int(built[0])
    known = timm.models.get_pretrained_cfg(str(spec.get("name")))
    return 0 if known is None or not known.fixed_input_size else int(known.input_size[1])


def _stated(path: Path, key: str) -> object:
    """What a file of weights states; files that cannot be read are left to those who open them."""
    try:
        return read_weights(path).metadata.get(key)
    except (OSError, ValueError):
        return None
