"""Encoders from files: rebuilt as the file says, or built by name around the head that is in the file."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from hsat.models.building import build_encoder
from hsat.models.checkpoints import load_backbone, load_state
from hsat.models.encoder import Encoder
from hsat.models.file_heads import head_in
from hsat.models.weight_files import read_weights


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

    Nothing is downloaded and torch's global random state stays.  Raises ValueError when the file does not say how to
    build its encoder or says another backbone, when its head cannot be told or does not fit the backbone's features,
    and what `load_checkpoint` and `build_encoder` raise.
    """
    state, metadata = read_weights(path)
    spec = spec_in(metadata)
    if backbone is None:
        if spec is None:
            raise ValueError(
                f"{path} does not say how to build its encoder; name its backbone, as in load_encoder({str(path)!r},"
                f" 'resnet50'), or build it with build_encoder or wrap_encoder and call load_checkpoint"
            )
        encoder = build_encoder(**{**spec, "input_size": _size(spec)}, seed=0)
        encoder.weights_report = load_state(encoder, path, state, metadata)
        return encoder.eval()
    options: dict[str, Any] = {"dual_norm": dual_norm or any(".bn_list." in key for key in state)}
    options |= {"input_size": input_size, "seed": 0}
    if spec is not None and spec.get("name") == backbone:
        kept = {key: spec[key] for key in ("mean", "std") if spec.get(key) is not None}
        options |= kept | ({"input_size": _size(spec)} if input_size is None else {})
    chosen = {"head": None} if head is None else _head_options(path, state, head, embedding_dim, head_hidden)
    encoder = build_encoder(backbone, **chosen, **options)
    other = "" if spec is None or spec.get("name") == backbone else f"the file says that it holds {spec.get('name')!r}"
    try:
        if head is None:
            encoder.weights_report = load_backbone(encoder, path)
        else:
            encoder.weights_report = load_state(encoder, path, state, metadata)
    except ValueError as error:
        if other:
            raise ValueError(f"{error}; {other}") from error
        raise
    if other:
        raise ValueError(f"{path} fits {backbone!r}, but {other}; leave the name out, or say that one")
    return encoder.eval()


def states_its_encoder(path: str | os.PathLike[str]) -> bool:
    """Whether the file says how to build its encoder, so that `load_encoder(path)` needs no name.  Reads it whole."""
    return spec_in(read_weights(path)[1]) is not None


def spec_in(metadata: Mapping[str, Any]) -> dict[str, Any] | None:
    """How to build the encoder, where the file says so."""
    extra = metadata.get("extra")
    spec = metadata.get("encoder", extra.get("encoder") if isinstance(extra, dict) else None)
    return spec if isinstance(spec, dict) else None


def _size(spec: Mapping[str, Any]) -> tuple[int, int] | None:
    size = spec.get("input_size")
    return None if size is None else (int(size[0]), int(size[1]))


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
