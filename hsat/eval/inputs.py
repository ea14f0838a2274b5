"""What the front door is given, made ready: encoders of any kind, and patches of any kind, with notes in words."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from torch import Tensor, nn

from hsat.data import Cohort, PatchDataset, find_cohort, find_splits, patch_loader
from hsat.data.folders import MASKS_READ, NO_PATIENTS
from hsat.data.patch_sizes import count_sizes
from hsat.data.readers import read_patch
from hsat.data.split_names import describe_unused, split_role
from hsat.eval.loader_inputs import NO_BANK, open_alone, open_pair
from hsat.models import Encoder, checkpoint_hash, load_encoder, wrap_encoder
from hsat.models.pixel_normalisation import PixelNormalisation, choose_normalisation, standardise_images
from hsat.types import EmbeddingFunction
from hsat.types.batch import UNLABELLED

BATCH_SIZE = 32
NORMS = (
    "norm='imagenet', 'timm', 'none' (it takes [0, 1], or normalises by itself), 'image' (each image's own mean and"
    " std) or 'm,m,m/s,s,s'"
)
NO_LABELS = (
    "the patches have no labels, or all the same, so that no decision can be measured: only how far attacks move the"
    " features is"
)


class NamedEncoder(NamedTuple):
    """An encoder that is measured; digest: the SHA-256 of its file, "" without one."""

    name: str
    encoder: EmbeddingFunction
    digest: str
    note: str


@dataclass(frozen=True, eq=False)
class EvaluationPatches:
    """The patches of an evaluation.

    Attributes:
        bank: Clean training patches: their loader, their table, or a `LoaderBank`; None where nothing has labels.
        queries: The patches that are attacked.
        class_names: Of the queries' labels, where their loader does not say.
        cohort: The cohort behind both, where there is one.
        notes: What a reader of the numbers has to know.
        flags: Those of them that are reasons to distrust numbers.
        patch_only: No slides and patients are known.
    """

    bank: Any
    queries: Any
    class_names: tuple[str, ...] | None = None
    cohort: Cohort | None = None
    notes: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    patch_only: bool = False


class NormalisedFunction:
    """A function of images that gets them normalised.

    Args:
        function: Normalised images -> what it gives.
        pixels: How, by mean and std or by each image's own.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], pixels: PixelNormalisation) -> None:
        self._function, self._pixels = function, pixels

    def __call__(self, images: Tensor) -> Tensor:
        """What the function gives for images (n, c, h, w) in [0, 1]."""
        if self._pixels.per_image:
            return self._function(standardise_images(images))
        mean, std = (images.new_tensor(values or ()).view(1, -1, 1, 1) for values in self._pixels.values)
        return self._function((images - mean) / std)


def open_encoder(encoder: object, *, norm: str | None = None, name: str = "") -> NamedEncoder:
    """An encoder from whatever it comes as; its pixel normalisation is stated by somebody, never assumed.

    Args:
        encoder: An `Encoder`, any module or function of images, or the path of a file of hsat.
        norm: The pixel normalisation of a module or function, as `wrap_encoder` takes it.
        name: What to call it; by default its file, its timm name or its class.

    Returns:
        The encoder, with a note on how pixels are handled.

    Raises:
        ValueError: For a module or function without `norm`, and one that contradicts what the encoder or file states.
        TypeError: For anything else.
    """
    if isinstance(encoder, str | os.PathLike):
        path = Path(encoder)
        loaded = load_encoder(path, norm=norm)
        title = path.parent.name if path.stem in ("best", "final", "last") else path.stem
        return NamedEncoder(name or title, loaded, checkpoint_hash(path), f"{path}: {loaded.pixels}")
    if isinstance(encoder, Encoder):
        stated = choose_normalisation(norm, None, None, backbone=encoder.backbone)
        if stated is not None and not stated.agrees_with(encoder.pixels):
            raise ValueError(f"the encoder has {encoder.pixels.describe()}, and norm={norm!r} differs; leave norm out")
        title = name or str((encoder.spec or {}).get("name") or type(encoder.backbone).__name__)
        return NamedEncoder(title, encoder, "", f"{title}: {encoder.pixels}")
    if not callable(encoder):
        raise TypeError(
            "encoder must be an hsat Encoder, a torch.nn.Module, a function of images (n, 3, h, w), or the path of a"
            f" file of hsat; got {type(encoder).__name__}"
        )
    title = name or getattr(encoder, "__name__", type(encoder).__name__)
    if norm is None:
        raise ValueError(
            f"say how the pixels were normalised that {title} was trained on: evaluate_robustness(..., norm=...) with"
            f" {NORMS}; another normalisation gives wrong numbers without any error"
        )
    if isinstance(encoder, nn.Module):
        wrapped = wrap_encoder(encoder, norm=norm)
        title, note = name or _timm_name(encoder) or title, describe_logits(encoder)
        return NamedEncoder(title, wrapped, "", f"{title}: {wrapped.pixels}{'; ' * bool(note)}{note}")
    pixels = choose_normalisation(norm, None, None)
    assert pixels is not None
    function = cast(EmbeddingFunction, encoder)
    if pixels.per_image or pixels.mean is not None:
        function = NormalisedFunction(function, pixels)
    return NamedEncoder(title, function, "", f"{title}: {pixels}")


def _timm_name(module: nn.Module) -> str:
    settings = getattr(module, "pretrained_cfg", None)
    return str(settings.get("architecture", "")) if isinstance(settings, Mapping) else ""


def describe_logits(module: nn.Module) -> str:
    """What to say of a whole classifier that serves as encoder: its logits are no features; "" of any other module.

    Args:
        module: The module, before or after it was wrapped.
    """
    if isinstance(module, Encoder):
        module = module.backbone
    classes = getattr(module, "num_classes", 0)
    if not callable(getattr(module, "get_classifier", None)) or not isinstance(classes, int) or classes < 1:
        last = list(module.children())[-1:] if getattr(module, "fc", None) is None else [module.fc]
        classes = getattr(last[0], "out_features", 0) if _is_torchvision(module) and last else 0
        remedy = "replace its last layer: module.fc = torch.nn.Identity(), or what it is called"
    else:
        remedy = "build it with timm.create_model(..., num_classes=0), or call module.reset_classifier(0)"
    if not classes:
        return ""
    return f"its output are the {classes} logits of a classifier: for its features {remedy}"


def _is_torchvision(module: nn.Module) -> bool:
    """Whether this is a classifier of torchvision, which all end in a linear layer."""
    return type(module).__module__.startswith("torchvision.models.")


def open_patches(
    data: object,
    encoders: Mapping[str, EmbeddingFunction],
    *,
    image_size: int | None = None,
    val_fraction: float = 0.3,
    query_patches: int | None = None,
) -> EvaluationPatches:
    """The bank and the queries of an evaluation.

    Args:
        data: A Cohort, a folder or CSV file (`find_cohort`), a pair (bank loader or table, query loader), or a loader
            without labels.
        encoders: By name; their fixed size is the patches' default one.
        image_size: Side to which patches of a cohort are resized.
        val_fraction: Share of each class's patients that become queries, where the cohort has no split.
        query_patches: How many of a cohort's queries are taken, evenly spread; all by default.

    Returns:
        The patches.

    Raises:
        ValueError: Patches of several sizes without image_size, image_size or query_patches beside loaders, and what
            readers and splits refuse.
        TypeError: For anything else.
    """
    if isinstance(data, str | os.PathLike):
        data = find_cohort(data)
    if isinstance(data, Cohort):
        return _of_cohort(data, encoders, image_size, val_fraction, query_patches)
    for name, value in (("image_size", image_size), ("query_patches", query_patches)):
        if value is not None:
            raise ValueError(f"{name} is for cohorts and folders; a loader gives its own images at their own size")
    if isinstance(data, tuple) and len(data) == 2 and not any(isinstance(part, Tensor) for part in data):
        pair = open_pair(data[0], data[1], encoders=len(encoders))
        names, plain = pair.class_names, pair.patch_only
        return EvaluationPatches(pair.bank, pair.queries, names, notes=pair.flags, flags=pair.flags, patch_only=plain)
    if isinstance(data, Iterable) and not isinstance(data, Mapping | Tensor):
        queries, labelled = open_alone(data)
        return EvaluationPatches(None, queries, notes=(NO_BANK if labelled else NO_LABELS,), patch_only=True)
    raise TypeError(
        "data must be a Cohort, a folder, a pair (bank loader or table, query loader), or a loader of images without"
        f" labels; got {type(data).__name__}"
    )


def _of_cohort(
    cohort: Cohort,
    encoders: Mapping[str, EmbeddingFunction],
    image_size: int | None,
    val_fraction: float,
    query_patches: int | None,
) -> EvaluationPatches:
    notes, flags = list(cohort.notes), []
    if any("no patients are known" in note for note in cohort.notes):
        flags.append(NO_PATIENTS)
    flags += [note for note in cohort.notes if MASKS_READ in note]
    labelled = len(cohort.class_names) > 1 and cohort.class_names != (UNLABELLED,)
    size, note = choose_size(cohort, encoders, image_size)
    notes.append(note)
    if not labelled:
        patches = PatchDataset(cohort, None, image_size=size)
        notes += [*_thinning_note(patches, query_patches), NO_LABELS]
        queries = patch_loader(patches.thin(query_patches), batch_size=BATCH_SIZE)
        return EvaluationPatches(None, queries, cohort=cohort, notes=tuple(notes), flags=tuple(flags))
    cohort, (bank, held_out), more = _settle_splits(cohort, val_fraction)
    notes += more
    known, asked = (PatchDataset(cohort, name, image_size=size) for name in (bank, held_out))
    notes += _thinning_note(asked, query_patches)
    loaders = [patch_loader(part, batch_size=BATCH_SIZE) for part in (known, asked.thin(query_patches))]
    return EvaluationPatches(loaders[0], loaders[1], cohort=cohort, notes=tuple(notes), flags=tuple(flags))


def _settle_splits(cohort: Cohort, val_fraction: float) -> tuple[Cohort, tuple[str, str], list[str]]:
    """The cohort with a split for the bank and one for the queries, their names, and notes.

    Raises:
        ValueError: Splits whose names do not say what they are for.
    """
    bank, held_out = find_splits(cohort.splits)
    if bank and held_out:
        note = [f"the bank is split {bank!r}, the queries are split {held_out!r}"] * bool(
            {bank, held_out} - {"train", "val"}
        )
        return cohort, (bank, held_out), [*note, *describe_unused(cohort, (bank, held_out))]
    if unknown := [name for name in cohort.splits if not split_role(name)]:
        raise ValueError(
            f"the names of the splits {', '.join(map(repr, unknown))} do not say which one is the bank of training"
            " patches and which one is attacked: hsat.data.rename_splits(cohort, {'train': ..., 'val': ...}) says it,"
            " and cohort.with_split(val_fraction=0.3) draws patients anew without regard to these splits"
        )
    alone = f"it has the split {cohort.splits[0]!r} only" if cohort.splits else "it has no split"
    cohort = cohort.with_split(val_fraction=val_fraction, seed=0)
    count = {name: len(np.unique(cohort.patient[cohort.rows(name)])) for name in ("train", "val")}
    drawn = (
        f"{alone}, so patients were drawn (seed 0): {count['train']} for the bank, {count['val']} as queries;"
        " cohort.with_split(...) draws others"
    )
    return cohort, ("train", "val"), [drawn]


def _thinning_note(queries: PatchDataset, count: int | None) -> list[str]:
    if count is None or count >= len(queries):
        return []
    return [f"{count} of {len(queries)} queries are attacked, evenly spread, as asked for"]


def choose_size(
    cohort: Cohort, encoders: Mapping[str, EmbeddingFunction], image_size: int | None
) -> tuple[int | None, str]:
    """The side to which patches are resized, None for their own, and a note on it.

    It is the caller's, else the one size that an encoder takes, else the patches' own where all have the same.

    Raises:
        ValueError: For encoders of several sizes, and patches of several sizes.
        OSError, BadPatch: Where no patch can be read, for the first one.
    """
    if image_size is not None:
        return image_size, f"patches resized to {image_size} x {image_size}, as asked for"
    wanted = {name: size for name, encoder in encoders.items() if (size := _size_of(encoder)) is not None}
    if len(set(wanted.values())) > 1:
        listed = ", ".join(f"{name} {height} x {width}" for name, (height, width) in wanted.items())
        raise ValueError(
            f"the encoders take different sizes ({listed}), and all must see the same patches; wrap them with"
            " hsat.wrap_encoder(module, norm=..., input_size=...), which resizes inside, and give image_size=..."
        )
    own = set(count_sizes(cohort))
    if not own:
        cohort.file_sizes()
        read_patch(cohort.path(0), kind=cohort.kind)  # says what is wrong with the first one
    if wanted:
        size = next(iter(wanted.values()))
        if own == {size}:
            return None, f"patches at their own size, {size[0]} x {size[1]}, which is the encoder's"
        if size[0] == size[1]:
            return size[0], f"patches resized to {size[0]} x {size[1]}, the size that the encoder takes"
        raise ValueError(f"the encoder takes {size[0]} x {size[1]}, and patches are resized to squares; cut them so")
    if len(own) != 1:
        listed = ", ".join(f"{height} x {width}" for height, width in sorted(own)[:4])
        raise ValueError(
            f"the patches have {len(own)} sizes ({listed}{', ...' if len(own) > 4 else ''}) and the encoder takes any:"
            " say to which side they are resized, as in evaluate_robustness(..., image_size=224)"
        )
    height, width = own.pop()
    return None, f"patches at their own size, {height} x {width}; image_size=... resizes them"


def _size_of(encoder: EmbeddingFunction) -> tuple[int, int] | None:
    """The one size that an encoder takes, or resizes to."""
    if not isinstance(encoder, Encoder):
        return None
    fixed = getattr(getattr(encoder.backbone, "patch_embed", None), "img_size", None)
    if getattr(getattr(encoder.backbone, "patch_embed", None), "strict_img_size", True) is False:
        fixed = None
    size = encoder.fixed_size or encoder.input_size or fixed
    return None if size is None else (int(size[0]), int(size[1]))
