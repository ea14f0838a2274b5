"""Encoders made by the name of a backbone, or from a file."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hsat.models.checkpoints import (
    check_backbone,
    check_state,
    load_backbone,
    load_state,
    read_weights,
)
from hsat.models.dual_norm import convert_to_dual
from hsat.models.encoder import Encoder, check_size
from hsat.models.heads import HeadSpec, ProjectionHead, head_spec, projection_head
from hsat.models.metadata import EncoderSpec, WeightFile, read_spec
from hsat.models.pixel_check import stated_spec
from hsat.models.pixel_normalisation import NOBODY, PixelNormalisation, choose_normalisation
from hsat.models.state_dicts import find_head
from hsat.models.zoo import (
    PAPER_NAMES,
    create_backbone,
    feature_width,
    find_architecture,
    fixed_size,
    pretrained_normalisation,
)

MOST_GROWTH = 8  # from file to memory: 16-bit weights double, tied ones are stored once


def build_encoder(  # noqa: PLR0913  # the stations of one assembly; each is needed by itself
    name: str,
    *,
    embedding_dim: int | None = None,
    head: str | int | HeadSpec | nn.Module | None = "linear",
    weights: str | os.PathLike[str] | None = None,
    pretrained: bool = False,
    input_size: int | tuple[int, int] | None = None,
    image_size: int | tuple[int, int] | None = None,
    mean: Sequence[float] | float | None = None,
    std: Sequence[float] | float | None = None,
    norm: str | None = None,
    dual_norm: bool = False,
    seed: int | None = None,
) -> Encoder:
    """An encoder by one of the paper's names (`PAPER_NAMES`) or any timm name, with its projection head.

    A paper name gives the published architecture and pixel normalisation; its weights are random unless asked for,
    also where the name says "pretrained", "normal" or "at".  Any other timm name takes pixels as they are, to be
    trained so, unless pretrained=True, which brings the mean and std those weights were trained with; for weights from
    a file it has to be stated: by the file, by mean and std, or by norm.

    Args:
        name: The backbone.
        embedding_dim: Width of the embedding; None is the default of the head, see `projection_head`.
        head: A kind of `projection_head`, or a `HeadSpec` with the widths of its layers; an int is a linear head of
            that width; a module maps (n, feature_dim) to (n, anything); None gives normalised features.
        weights: A local file with backbone weights (plain, or under "model" or "state_dict"; prefixes such as "module."
            are recognised); classifier, projector and normalisation entries are left out, and listed in
            `encoder.weights_report`; any other mismatch is an error.  The adversarial ImageNet weights of the "..._at"
            names come in this way; asking for them with pretrained=True names the file to fetch.
        pretrained: Fetch timm's ImageNet weights; the one way in which hsat downloads anything.
        input_size: Side or (height, width) to which images are resized inside; needed when a backbone takes one size
            only.
        image_size: Side or (height, width) of the images that a backbone of one size only, such as a ViT, is built for;
            pretrained positions are resampled.  Backbones that take any size are the same with and without it.
        mean: Replaces the name's normalisation, on the [0, 1] scale, together with std; 0 and 1 switch it off.
        std: See mean.
        norm: In place of mean and std: "imagenet"; "timm", the values that come with the timm model; "none", pixels as
            they are; "image", each image's channels by their own mean and std, which takes out how strong a stain is
            (`standardise_images`); or "m,m,m/s,s,s".
        dual_norm: BatchNorm in two branches, see `branch`.
        seed: Draws the random weights and leaves torch's global generator alone; None: from that generator.

    Returns:
        The encoder, in training mode, on the CPU.

    Raises:
        ValueError: Naming the option; for an unknown name with the closest known ones.
        ImportError: Where timm cannot be imported.
    """
    if weights is not None and pretrained:
        raise ValueError("pretrained=True and weights= both set the backbone's weights; give one of them")
    architecture = find_architecture(name, pretrained=pretrained)
    with _seeded(seed):
        backbone = create_backbone(architecture, pretrained=pretrained, image_size=check_size(image_size))
        width = feature_width(backbone)
        spec = None if head is None or isinstance(head, nn.Module) else head_spec(head, embedding_dim)
        if head is None and embedding_dim not in {None, width}:
            raise ValueError(f"head=None gives features of width {width}, not embedding_dim={embedding_dim}")
        built = head if isinstance(head, nn.Module) else None if spec is None else _projection_head(spec, width)
    pixels = choose_normalisation(norm, mean, std, backbone=backbone)
    if pixels is None:
        if pretrained and (architecture.scratch or name not in PAPER_NAMES):
            pixels = PixelNormalisation(*pretrained_normalisation(backbone), "timm's pretrained weights")
        else:
            centre, scale = architecture.normalisation or (None, None)
            pixels = PixelNormalisation(centre, scale, f"the name {name}" if name in PAPER_NAMES else NOBODY)
    encoder = Encoder(
        backbone,
        feature_dim=width,
        head=built,
        embedding_dim=getattr(built, "out_features", None),
        mean=pixels.mean,
        std=pixels.std,
        input_size=input_size,
        fixed_size=fixed_size(backbone),
        per_image=pixels.per_image,
    )
    encoder.pixels_stated_by = pixels.stated_by
    if weights is not None:
        encoder.weights_report = load_backbone(encoder, weights)
    if architecture.dual or dual_norm:
        convert_to_dual(encoder.backbone)
    if not isinstance(head, nn.Module):
        encoder.spec = _spec_of(encoder, name, spec, dual_norm=architecture.dual or dual_norm)
        if image_size is not None:
            encoder.spec["image_size"] = check_size(image_size)
        if encoder.per_image:
            encoder.spec["per_image"] = True
    return encoder


def _spec_of(encoder: Encoder, name: str, head: HeadSpec | None, *, dual_norm: bool) -> dict[str, Any]:
    """What a file says of an encoder of `build_encoder`, see `hsat.models.metadata`."""
    return {
        "name": name,
        "embedding_dim": encoder.embedding_dim,
        "head": None if head is None else head.kind,
        "head_hidden": [] if head is None else list(head.hidden),
        "input_size": encoder.input_size,
        "mean": encoder.mean,
        "std": encoder.std,
        "dual_norm": dual_norm,
    }


@contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    """Random weights from the seed, with torch's global CPU generator put back; None: from that generator."""
    if seed is None:
        yield
        return
    state = torch.default_generator.get_state()
    try:
        torch.default_generator.manual_seed(seed)
        yield
    finally:
        torch.default_generator.set_state(state)


def _projection_head(spec: HeadSpec, width: int) -> ProjectionHead:
    return projection_head(spec.kind, in_features=width, embedding_dim=spec.embedding_dim, hidden=spec.hidden)


def load_encoder(
    path: str | os.PathLike[str],
    backbone: str | None = None,
    *,
    head: str | HeadSpec | None = "auto",
    embedding_dim: int | None = None,
    dual_norm: bool = False,
    input_size: int | tuple[int, int] | None = None,
    image_size: int | tuple[int, int] | None = None,
    mean: Sequence[float] | float | None = None,
    std: Sequence[float] | float | None = None,
    norm: str | None = None,
) -> Encoder:
    """The encoder of a file, weights included, in evaluation mode, on the CPU; `weights_report` says what was read.

    Nothing is downloaded, no other file is opened and torch's global random state stays.  The encoder is first built
    without storage and compared with the file, so that a small file cannot ask for a large encoder.

    Args:
        path: The file.
        backbone: None: the file has to say how to build its encoder, as files of `save_encoder` do, and training
            checkpoints that keep `encoder.spec` under "encoder", itself or in their "extra"; the other options are not
            looked at then.  With a name of the paper or of timm, any file that `load_checkpoint` reads will do.
        head: "auto" takes the projection head from the file: kind, widths, or none where the file has none.  A kind or
            a `HeadSpec`: that one and no other; widths that it does not say come from the file where they can.  None:
            the backbone alone; a head or classifier in the file is left out, and listed in `weights_report.dropped`.
        embedding_dim: Width of the head's output, where the file does not say it.
        dual_norm: Two BatchNorm branches; also taken from the file.
        input_size: See `build_encoder`.
        image_size: See `build_encoder`; where it is not given, the file may say it.
        mean: Pixel normalisation that the weights were trained with, on the [0, 1] scale, together with std.  Files of
            `save_encoder` and names of the paper state it; for any other file it has to be given, here or by norm.
        std: See mean.
        norm: In place of mean and std, see `build_encoder`.

    Returns:
        The encoder.

    Raises:
        ValueError: When nobody states the pixel normalisation, or the file states another one; when the file does not
            say how to build its encoder or says another backbone, when what it says is unknown or out of limits (naming
            the key, see `read_spec`), when its head cannot be told or does not fit the backbone's features, and
            what `load_checkpoint` and `build_encoder` raise.
    """
    content = read_weights(path)
    spec = _read_encoder_spec(content, path)
    if backbone is None:
        if spec is None:
            raise ValueError(
                f"{path} does not say how to build its encoder; name its backbone, as in load_encoder({str(path)!r},"
                f" 'resnet50'), or build it with build_encoder or wrap_encoder and call load_checkpoint"
            )
        encoder = _build_to_fit(path, content, partial(_rebuild, spec), stated=spec)
        asked = choose_normalisation(norm, mean, std, backbone=encoder.backbone)
        if asked is not None and not asked.agrees_with(encoder.pixels):
            raise ValueError(
                f"{path} states {encoder.pixels.describe()}, and the caller {asked.describe()}; leave norm, mean and"
                " std out: the file was written with the weights"
            )
        encoder.weights_report = load_state(encoder, path, content)
        return encoder.eval()
    options: dict[str, Any] = {"dual_norm": dual_norm or any(".bn_list." in key for key in content.state)}
    options |= {"input_size": input_size, "image_size": image_size, "mean": mean, "std": std, "norm": norm}
    if spec is not None and spec.name == backbone:
        if norm is None and mean is None and std is None:
            options |= {"mean": spec.mean, "std": spec.std, "norm": spec.norm}
        options["input_size"] = spec.input_size if input_size is None else input_size
        options["image_size"] = spec.image_size if image_size is None else image_size
    chosen = None if head is None else _choose_head(path, content.state, head, embedding_dim)
    build = partial(build_encoder, backbone, head=chosen, **options, seed=0)
    other = "" if spec is None or spec.name == backbone else f"the file says that it holds {spec.name!r}"
    try:
        encoder = _build_to_fit(path, content, build, backbone_only=head is None)
        report = load_backbone(encoder, path) if head is None else load_state(encoder, path, content)
    except ValueError as error:
        if other:
            raise ValueError(f"{error}; {other}") from error
        raise
    if other:
        raise ValueError(f"{path} fits {backbone!r}, but {other}; leave the name out, or say that one")
    encoder.weights_report = report
    return encoder.eval()


def has_encoder_spec(path: str | os.PathLike[str]) -> bool:
    """Whether the file says how to build its encoder, so that `load_encoder(path)` needs no name.  Reads it whole.

    Args:
        path: A file of weights.

    Returns:
        Whether it does.

    Raises:
        ValueError: For a file that holds no weights.
    """
    return stated_spec(read_weights(path)) is not None


def _read_encoder_spec(content: WeightFile, path: str | os.PathLike[str]) -> EncoderSpec | None:
    """How to build the encoder, checked, where the file says so; ValueError as `read_spec`."""
    stated = stated_spec(content)
    return None if stated is None else read_spec(stated, path)


def _rebuild(spec: EncoderSpec) -> Encoder:
    return build_encoder(
        spec.name,
        embedding_dim=spec.embedding_dim,
        head=None if spec.head is None else HeadSpec(spec.head, hidden=spec.head_hidden),
        input_size=spec.input_size,
        image_size=spec.image_size,
        mean=spec.mean,
        std=spec.std,
        norm=spec.norm,
        dual_norm=spec.dual_norm,
        seed=0,
    )


def _build_to_fit(
    path: str | os.PathLike[str],
    content: WeightFile,
    build: Callable[[], Encoder],
    *,
    backbone_only: bool = False,
    stated: EncoderSpec | None = None,
) -> Encoder:
    """The encoder, built after a draft of it without storage was compared with the file.

    The draft itself will not do: tables that a backbone computes while it is built, and keeps out of its state, would
    be without values.  Raises ValueError as `load_checkpoint` where the draft does not fit, and where the encoder would
    take far more memory than the file's tensors, which then are parts of each other.
    """
    try:
        with torch.device("meta"):
            draft = build()
    except (NotImplementedError, RuntimeError) as error:  # no model of timm today; one of the user's own may
        raise ValueError(
            f"{path}: its encoder cannot be compared with the file before it is built, because its code reads values of"
            f" tensors on the way; build it yourself: load_checkpoint(build_encoder(...), {str(path)!r})"
        ) from error
    except ValueError as error:
        if stated is None:
            raise
        raise ValueError(f"{path}: encoder.name and the rest do not go together: {error}") from error
    if stated is not None and stated.mean is None and draft.mean is not None:
        raise ValueError(
            f"{path}: encoder.mean is null, which is raw pixels, but {stated.name!r} normalises them; nothing was"
            f" built. Build it yourself: load_checkpoint(build_encoder({stated.name!r}, ...), {str(path)!r})"
        )
    if backbone_only:
        check_backbone(draft, path, content)
    else:
        check_state(draft, path, content)
    needed = sum(value.nbytes for value in draft.state_dict().values())
    storages = (value.untyped_storage() for value in content.state.values())
    stored = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
    if needed > MOST_GROWTH * stored:
        raise ValueError(f"{path} holds {stored} bytes of tensors, and its encoder takes {needed}; nothing was built")
    return build()


def _choose_head(
    path: str | os.PathLike[str], state: Mapping[str, Tensor], head: str | HeadSpec, embedding_dim: int | None
) -> HeadSpec | None:
    """The head for `build_encoder`: what was asked for, completed from the file."""
    automatic = head == "auto"
    asked = None
    if not automatic or embedding_dim is not None:
        asked = head_spec("linear" if automatic else head, embedding_dim)
    try:
        stored = find_head(state)
    except ValueError as error:
        if asked is not None:
            return asked
        raise ValueError(
            f"{path}: {error}; say head= and embedding_dim=, or head=None for the backbone alone"
        ) from None
    if stored is None or asked is None:
        return asked if stored is None else stored.spec
    kind = stored.spec.kind if automatic else asked.kind
    hidden = asked.hidden or (stored.spec.hidden if kind == stored.spec.kind else ())
    return HeadSpec(kind, asked.embedding_dim or stored.spec.embedding_dim, hidden)
