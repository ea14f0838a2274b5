"""The paper's backbones by their published names, and every timm model."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import nn

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALVES = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
ARES = "https://ml.cs.tsinghua.edu.cn/~xiaoyang/aresbench/ckpt-imagenet/ARES_"


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What a published name stands for.

    timm: the timm model.  options: what else timm is told.  normalisation: (mean, std), or None where the published
    encoder feeds [0, 1] straight to the first layer.  file: the local file its initial weights come from ("" where
    timm has them or the name is trained from scratch).  tag: timm's weight tag when not the default.
    scratch: the name stands for training from random weights.  dual: two BatchNorm branches.
    """

    timm: str
    normalisation: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    file: str = ""
    tag: str = ""
    scratch: bool = False
    dual: bool = False


def _ares(timm: str, file: str = "", *, tag: str = "", halves: bool = False, **options: Any) -> Architecture:
    return Architecture(
        timm=timm, file=file, tag=tag, normalisation=HALVES if halves else IMAGENET, options=dict(options)
    )


_VIT, _SWIN = "vit_{}_patch16_224", "swin_{}_patch4_window7_224"

PAPER_NAMES: Mapping[str, Architecture] = {
    "resnet50": Architecture(timm="resnet50", scratch=True),
    "resnet50_multi_bn": Architecture(timm="resnet50", scratch=True, dual=True),
    "resnetv2_50": Architecture(timm="resnetv2_50", scratch=True),
    "resnetv2_50_gn": Architecture(timm="resnetv2_50", scratch=True, options={"norm_layer": "group_norm_32"}),
    "wide_resnet50_2": Architecture(timm="wide_resnet50_2", scratch=True),
    "resnet50_timm": Architecture(timm="resnet50", scratch=True),
    "resnetv2_50_timm": Architecture(timm="resnetv2_50", scratch=True),
    "resnet50_timm_pretrained": Architecture(timm="resnet50"),
    "resnetv2_50_timm_pretrained": Architecture(timm="resnetv2_50"),
    "wide_resnet50_2_pretrained": Architecture(timm="wide_resnet50_2"),
    "resnet50_normal": _ares("resnet50", tag="tv_in1k"),
    "resnet50_at": _ares("resnet50", "ResNet50_AT"),
    "resnet101_normal": _ares("resnet101", tag="tv_in1k"),
    "resnet101_at": _ares("resnet101", "ResNet101_AT"),
    "resnet152_normal": _ares("resnet152", tag="tv_in1k"),
    "resnet152_at": _ares("resnet152", "ResNet152_AT", act_layer="gelu"),
    "wresnet50_normal": _ares("wide_resnet50_2"),
    "wresnet50_at": _ares("wide_resnet50_2", "Wide_ResNet50_2_AT", act_layer="gelu"),
    "convs_normal": _ares("convnext_small"),
    "convb_normal": _ares("convnext_base"),
    "convl_normal": _ares("convnext_large"),
    "convnexts_at": _ares("convnext_small", "ConvNext_Small_AT"),
    "convnextb_at": _ares("convnext_base", "ConvNext_Base_AT"),
    "convnextl_at": _ares("convnext_large", "ConvNext_Large_AT"),
    "swins_normal": _ares(_SWIN.format("small")),
    "swinb_normal": _ares(_SWIN.format("base"), "Swin_base_patch4_window7_224_Normal"),
    "swinl_21k": _ares(_SWIN.format("large")),
    "swins_at": _ares(_SWIN.format("small"), "Swin_small_patch4_window7_224_AT"),
    "swinb_at": _ares(_SWIN.format("base"), "Swin_base_patch4_window7_224_AT"),
    "swinl_at": _ares(_SWIN.format("large"), "Swin_large_patch4_window7_224_AT"),
    "vits_normal": _ares(_VIT.format("small"), "ViT_small_patch16_224_Normal", halves=True),
    "vits_at": _ares(_VIT.format("small"), "ViT_small_patch16_224_AT", img_size=(224, 224), dynamic_img_size=True),
    "vitb_normal": _ares(_VIT.format("base"), "ViT_base_patch16_224_Normal", halves=True),
    "vitb_at": _ares(_VIT.format("base"), "ViT_base_patch16_224_AT"),
    "vitl_normal": _ares(_VIT.format("large"), "ViT_large_patch16_224_Normal", halves=True),
}


def find_architecture(name: str, *, pretrained: bool) -> Architecture:
    """What a paper name or timm name stands for; ValueError with the closest names when it is neither."""
    architecture = PAPER_NAMES.get(name)
    if architecture is not None:
        if pretrained and architecture.file:
            raise ValueError(
                f"timm has no weights for {name!r}; fetch {ARES}{architecture.file}.pth yourself and pass weights=PATH"
            )
        return architecture
    if name.startswith(("hf-hub:", "hf_hub:")):
        if not pretrained:
            raise ValueError(f"{name!r} names a model on the network; pass pretrained=True to allow the download")
        return Architecture(timm=name)
    timm = import_timm()
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, [*PAPER_NAMES, *timm.list_models()], n=5, cutoff=0.5)
        hint = f"; did you mean {', '.join(close)}?" if close else ""
        raise ValueError(f"{name!r} is neither a backbone of the paper nor a timm model{hint}")
    return Architecture(timm=name)


def create_backbone(
    architecture: Architecture, *, pretrained: bool, image_size: tuple[int, int] | None = None
) -> nn.Module:
    """The timm model without its classifier.

    Args:
        architecture: What to build.
        pretrained: Fetch timm's weights.
        image_size: The size that models with absolute positions or windows are built for; others take any.
    """
    timm = import_timm()
    options = dict(architecture.options)
    if options.get("norm_layer") == "group_norm_32":
        options["norm_layer"] = functools.partial(timm.layers.GroupNormAct, num_groups=32)
    name = f"{architecture.timm}.{architecture.tag}" if architecture.tag else architecture.timm
    if image_size is not None:
        try:
            built: nn.Module = timm.create_model(
                name, pretrained=pretrained, num_classes=0, **(options | {"img_size": image_size})
            )
            return built
        except TypeError as error:
            if "img_size" not in str(error):
                raise
    backbone: nn.Module = timm.create_model(name, pretrained=pretrained, num_classes=0, **options)
    return backbone


def feature_width(backbone: nn.Module) -> int:
    """Width of what timm returns without a classifier: some models widen the features in a last layer."""
    width: Any = getattr(backbone, "head_hidden_size", None) or backbone.num_features
    return int(width)


def pretrained_normalisation(backbone: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Pixel mean and std that timm's pretrained weights were trained with."""
    settings: Any = backbone.pretrained_cfg
    return tuple(settings["mean"]), tuple(settings["std"])


def fixed_size(backbone: nn.Module) -> tuple[int, int] | None:
    """The one image size that a backbone with absolute positions or windows takes, or None."""
    patches = getattr(backbone, "patch_embed", None)
    size = getattr(patches, "img_size", None)
    if size is None or not getattr(patches, "strict_img_size", False):
        return None
    height, width = size
    return int(height), int(width)


def import_timm() -> ModuleType:
    """timm, or an ImportError that says what is wrong and which command mends it."""
    try:
        with torch.device("cpu"):  # old releases of torchvision compute while they are imported, which "meta" cannot
            import timm
    except ModuleNotFoundError as error:
        raise ImportError(
            f"hsat.models builds backbones with timm, but {error.name} is missing: pip install timm torchvision"
        ) from error
    except (ImportError, RuntimeError, OSError) as error:
        raise ImportError(
            f"timm could not be imported, because torch {torch.__version__} and the installed torchvision come from"
            f" different builds ({error}). Install both from one place: pip install --force-reinstall torch torchvision"
            f" --index-url https://download.pytorch.org/whl/cpu (or the cu... index of your CUDA)"
        ) from error
    return timm  # type: ignore[no-any-return]
