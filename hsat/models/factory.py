"""Encoders made: by the name of a backbone, around the user's own module, or from a file."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from hsat.models.checkpoints import WeightFile, check_backbone, check_state, load_backbone, load_state, read_weights
from hsat.models.dual_norm import convert_to_dual
from hsat.models.encoder import Encoder, Features, check_normalisation
from hsat.models.heads import HeadSpec, ProjectionHead, head_spec, projection_head
from hsat.models.metadata import EncoderSpec, read_spec
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


def build_encoder(
    name: str,
    *,
    embedding_dim: int | None = None,
    head: str | int | HeadSpec | nn.Module | None = "linear",
    weights: str | os.PathLike[str] | None = None,
    pretrained: bool = False,
    input_size: int | tuple[int, int] | None = None,
    mean: Sequence[float] | float | None = None,
    std: Sequence[float] | float | None = None,
    dual_norm: bool = False,
    seed: int | None = None,
) -> Encoder:
    """An encoder by one of the paper's names (`PAPER_NAMES`) or any timm name, with its projection head.

    A paper name gives the published architecture and pixel normalisation; its weights are random unless asked for,
    also where the name says "pretrained", "normal" or "at".  Any other timm name takes pixels as they are, unless
    pretrained=True, which brings the mean and std those weights were trained with.

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
        mean: Replaces the name's normalisation, on the [0, 1] scale, together with std; 0 and 1 switch it off.
        std: See mean.
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
    mean, std = check_normalisation(mean, std)
    with _seeded(seed):
        backbone = create_backbone(architecture, pretrained=pretrained)
        width = feature_width(backbone)
        spec = None if head is None or isinstance(head, nn.Module) else head_spec(head, embedding_dim)
        if head is None and embedding_dim not in {None, width}:
            raise ValueError(f"head=None gives features of width {width}, not embedding_dim={embedding_dim}")
        built = head if isinstance(head, nn.Module) else None if spec is None else _projection_head(spec, width)
    if mean is None:
        trained = pretrained and (architecture.scratch or name not in PAPER_NAMES)
        mean, std = pretrained_normalisation(backbone) if trained else architecture.normalisation or (None, None)
    encoder = Encoder(
        backbone,
        feature_dim=width,
        head=built,
        embedding_dim=getattr(built, "out_features", None),
        mean=mean,
        std=std,
        input_size=input_size,
        fixed_size=fixed_size(backbone),
    )
    if weights is not None:
        encoder.weights_report = load_backbone(encoder, weights)
    if architecture.dual or dual_norm:
        convert_to_dual(encoder.backbone)
    if not isinstance(head, nn.Module):
        encoder.spec = _spec_of(encoder, name, spec, dual_norm=architecture.dual or dual_norm)
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


def wrap_encoder(
    module: nn.Module,
    *,
    mean: Sequence[float] | float | None = None,
    std: Sequence[float] | float | None = None,
    head: int | str | HeadSpec | nn.Module | None = None,
    embedding_dim: int | None = None,
    input_size: int | tuple[int, int] | None = None,
    features: str | Features | nn.Module | None = None,
    feature_dim: int | None = None,
) -> Encoder:
    """Any nn.Module as an encoder: images (n, c, h, w) in [0, 1] -> unit rows, pixel handling inside.

    Args:
        module: The user's module; it is held, not copied.
        mean: Pixel normalisation the module was trained with, on the [0, 1] scale; None if it does its own.
        std: See mean.
        head: None gives normalised features; otherwise as in `build_encoder`.
        embedding_dim: Width of the head's output.
        input_size: Side or (height, width) to which images are resized inside, differentiably; None takes them as they
            are.
        features: Where the features come from.  None: `module(x)`.  A name such as "forward_features" or
            "trunk.encode": that method of the module; if it names a submodule, or is one, that submodule is wrapped
            instead.  A function: it gets the normalised, resized images; write it against the module passed here (a
            deep copy of the encoder still calls the original through it, whereas a name follows the copy).  Features
            may be (n, d) or (n, d, h, w), averaged over h and w; tokens (n, t, d) need a `features` that picks.
        feature_dim: Width of the features; found by running black images when a head needs it and it is not given.

    Returns:
        The encoder, which holds the module.

    Raises:
        TypeError, ValueError: Naming the option.
    """
    if not isinstance(module, nn.Module):
        hint = "; for a function pass the module it calls, and the function as features=" if callable(module) else ""
        raise TypeError(f"wrap_encoder takes a torch.nn.Module, got {type(module).__name__}{hint}")
    backbone, source = _feature_source(module, features)
    own_head = head if isinstance(head, nn.Module) else None
    encoder = Encoder(
        backbone,
        feature_dim=feature_dim,
        head=own_head,
        embedding_dim=None if own_head is None else embedding_dim,
        mean=mean,
        std=std,
        input_size=input_size,
        features=source,
    )
    if head is not None and not isinstance(head, nn.Module):
        built = _projection_head(head_spec(head, embedding_dim), encoder.feature_dim)
        like = next((p for p in backbone.parameters() if p.is_floating_point()), None)
        encoder.attach_head(built if like is None else built.to(like), embedding_dim=built.out_features)
    elif own_head is None and embedding_dim is not None and embedding_dim != encoder.feature_dim:
        raise ValueError(f"embedding_dim={embedding_dim} needs a head; write head={embedding_dim} for a linear one")
    return encoder


def _feature_source(
    module: nn.Module, features: str | Features | nn.Module | None
) -> tuple[nn.Module, str | Features | None]:
    """The module to hold, and how to call it."""
    if getattr(features, "__self__", None) is module:
        features = str(features.__name__)  # type: ignore[union-attr]  # a name follows deep copies
    if isinstance(features, str):
        try:
            attribute = attrgetter(features)(module)
        except AttributeError:
            children = ", ".join(name for name, _ in module.named_children()) or "none"
            raise ValueError(
                f"{type(module).__name__} has no attribute {features!r} to take features from; its submodules:"
                f" {children}"
            ) from None
        if isinstance(attribute, nn.Module):
            return attribute, None
        if not callable(attribute):
            raise TypeError(f"features={features!r} is a {type(attribute).__name__}, not a method or submodule")
        return module, features
    if isinstance(features, nn.Module):
        return features, None
    if features is not None and not callable(features):
        raise TypeError(f"features must be a name, a function of images or None, got {type(features).__name__}")
    return module, features


def load_encoder(
    path: str | os.PathLike[str],
    backbone: str | None = None,
    *,
    head: str | HeadSpec | None = "auto",
    embedding_dim: int | None = None,
    dual_norm: bool = False,
    input_size: int | tuple[int, int] | None = None,
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

    Returns:
        The encoder.

    Raises:
        ValueError: When the file does not say how to build its encoder or says another backbone, when what it says is
            unknown or out of limits (naming the key, see `read_spec`), when its head cannot be told or does not fit the
            backbone's features, and what `load_checkpoint` and `build_encoder` raise.
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
        encoder.weights_report = load_state(encoder, path, content)
        return encoder.eval()
    options: dict[str, Any] = {"dual_norm": dual_norm or any(".bn_list." in key for key in content.state)}
    options["input_size"] = input_size
    if spec is not None and spec.name == backbone:
        options |= {key: value for key, value in (("mean", spec.mean), ("std", spec.std)) if value is not None}
        options["input_size"] = spec.input_size if input_size is None else input_size
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
    return _stated_spec(read_weights(path)) is not None


def _read_encoder_spec(content: WeightFile, path: str | os.PathLike[str]) -> EncoderSpec | None:
    """How to build the encoder, checked, where the file says so; ValueError as `read_spec`."""
    stated = _stated_spec(content)
    return None if stated is None else read_spec(stated, path)


def _stated_spec(content: WeightFile) -> Mapping[str, Any] | None:
    """The "encoder" of a file, unchecked; a dict without a name in a file of another program is not meant for hsat."""
    extra = content.metadata.get("extra")
    stated = content.metadata.get("encoder", extra.get("encoder") if isinstance(extra, dict) else None)
    return stated if isinstance(stated, dict) and (content.from_hsat or "name" in stated) else None


def _rebuild(spec: EncoderSpec) -> Encoder:
    return build_encoder(
        spec.name,
        embedding_dim=spec.embedding_dim,
        head=None if spec.head is None else HeadSpec(spec.head, hidden=spec.head_hidden),
        input_size=spec.input_size,
        mean=spec.mean,
        std=spec.std,
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
