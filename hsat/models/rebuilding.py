"""Encoders from files: rebuilt as the file says, or built by name around the head that is in the file."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hsat.models.building import build_encoder
from hsat.models.checkpoints import check_backbone, check_state, load_backbone, load_state
from hsat.models.encoder import Encoder
from hsat.models.file_heads import head_in
from hsat.models.metadata import EncoderSpec, read_spec
from hsat.models.weight_files import WeightFile, read_weights

MOST_GROWTH = 8  # from file to memory: 16-bit weights double, tied ones are stored once


def load_encoder(
    path: str | os.PathLike[str],
    backbone: str | None = None,
    *,
    head: str | None = "auto",
    embedding_dim: int | None = None,
    head_hidden: Sequence[int] = (),
    dual_norm: bool = False,
    input_size: int | tuple[int, int] | None = None,
) -> Encoder:
    """The encoder of a file, weights included, in evaluation mode, on the CPU; `weights_report` says what was read.

    Without `backbone` the file has to say how to build it: one of `save_encoder`, or a training checkpoint that keeps
    `encoder.spec` under "encoder", itself or in its "extra".  The other options are not looked at then.
    With `backbone`, a name of the paper or of timm, any file that `load_checkpoint` reads will do, published ones
    above all.  head="auto" takes the projection head from the file: kind, widths, or none where the file has none.
    head="linear", "mlp" or "mlp3_bn" with embedding_dim and head_hidden: that one and no other (what is not said comes
    from the file where it can).  head=None: the backbone alone; a head or classifier in the file is left out, and
    listed in `weights_report.dropped`.  dual_norm: two BatchNorm branches; also taken from the file.  input_size: see
    `build_encoder`.

    Nothing is downloaded, no other file is opened and torch's global random state stays.  The encoder is first built
    without storage and compared with the file, so that a small file cannot ask for a large encoder.
    Raises ValueError when the file does not say how to build its encoder or says another backbone, when what it says is
    unknown or out of limits (naming the key, see `read_spec`), when its head cannot be told or does not fit the
    backbone's features, and what `load_checkpoint` and `build_encoder` raise.
    """
    content = read_weights(path)
    spec = spec_in(content, path)
    if backbone is None:
        if spec is None:
            raise ValueError(
                f"{path} does not say how to build its encoder; name its backbone, as in load_encoder({str(path)!r},"
                f" 'resnet50'), or build it with build_encoder or wrap_encoder and call load_checkpoint"
            )
        encoder = _built_to_fit(path, content, partial(_build, spec), stated=spec)
        encoder.weights_report = load_state(encoder, path, content)
        return encoder.eval()
    options: dict[str, Any] = {"dual_norm": dual_norm or any(".bn_list." in key for key in content.state)}
    options["input_size"] = input_size
    if spec is not None and spec.name == backbone:
        options |= {key: value for key, value in (("mean", spec.mean), ("std", spec.std)) if value is not None}
        options["input_size"] = spec.input_size if input_size is None else input_size
    chosen = {"head": None} if head is None else _head_options(path, content.state, head, embedding_dim, head_hidden)
    build = partial(build_encoder, backbone, **chosen, **options, seed=0)
    other = "" if spec is None or spec.name == backbone else f"the file says that it holds {spec.name!r}"
    try:
        encoder = _built_to_fit(path, content, build, backbone_only=head is None)
        load = load_backbone(encoder, path) if head is None else load_state(encoder, path, content)
    except ValueError as error:
        if other:
            raise ValueError(f"{error}; {other}") from error
        raise
    if other:
        raise ValueError(f"{path} fits {backbone!r}, but {other}; leave the name out, or say that one")
    encoder.weights_report = load
    return encoder.eval()


def states_its_encoder(path: str | os.PathLike[str]) -> bool:
    """Whether the file says how to build its encoder, so that `load_encoder(path)` needs no name.  Reads it whole."""
    return _statement(read_weights(path)) is not None


def spec_in(content: WeightFile, path: str | os.PathLike[str]) -> EncoderSpec | None:
    """How to build the encoder, checked, where the file says so; ValueError as `read_spec`."""
    statement = _statement(content)
    return None if statement is None else read_spec(statement, path)


def _statement(content: WeightFile) -> Mapping[str, Any] | None:
    """The "encoder" of a file, unchecked; a dict without a name in a file of another program is not meant for hsat."""
    extra = content.metadata.get("extra")
    statement = content.metadata.get("encoder", extra.get("encoder") if isinstance(extra, dict) else None)
    return statement if isinstance(statement, dict) and (content.own or "name" in statement) else None


def _build(spec: EncoderSpec) -> Encoder:
    return build_encoder(
        spec.name,
        embedding_dim=spec.embedding_dim,
        head=spec.head,
        head_hidden=spec.head_hidden,
        input_size=spec.input_size,
        mean=spec.mean,
        std=spec.std,
        dual_norm=spec.dual_norm,
        seed=0,
    )


def _built_to_fit(
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
    wanted = sum(value.nbytes for value in draft.state_dict().values())
    storages = (value.untyped_storage() for value in content.state.values())
    held = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
    if wanted > MOST_GROWTH * held:
        raise ValueError(f"{path} holds {held} bytes of tensors, and its encoder takes {wanted}; nothing was built")
    return build()


def _head_options(
    path: str | os.PathLike[str],
    state: Mapping[str, Tensor],
    head: str,
    embedding_dim: int | None,
    head_hidden: Sequence[int],
) -> dict[str, Any]:
    """head, embedding_dim and head_hidden for `build_encoder`: what was said, completed from the file."""
    said = head != "auto" or embedding_dim is not None or bool(head_hidden)
    kind = ("mlp" if head_hidden else "linear") if head == "auto" else head
    try:
        found = head_in(state)
    except ValueError as error:
        if said:
            return {"head": kind, "embedding_dim": embedding_dim, "head_hidden": head_hidden}
        raise ValueError(
            f"{path}: {error}; say head= and embedding_dim=, or head=None for the backbone alone"
        ) from None
    if found is None:
        return {"head": kind, "embedding_dim": embedding_dim, "head_hidden": head_hidden} if said else {"head": None}
    kind = found.kind if head == "auto" else head
    same = kind == found.kind
    hidden = tuple(head_hidden) or (found.hidden if same else ())
    return {"head": kind, "embedding_dim": embedding_dim or found.embedding_dim, "head_hidden": hidden}
