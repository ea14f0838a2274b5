"""The options of a training: views, inner maximisation, outer minimisation.  `hsat train` offers the same ones."""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, field_validator, model_validator

from hsat.data.augment import default_augmentation
from hsat.training.resources import parse_memory
from hsat.untrusted import shown

Levels = Literal["p_s_pt", "p_s", "p_pt", "s_pt", "p", "s", "pt"]
TrainedLayer = Literal["embedding", "features"]
_LONGEST_NUMBER = 40  # characters
InnerAttackName = Literal["none", "pgd", "fgsm_rs", "nfgsm", "free", "warm"]


def parse_fraction(text: str) -> float:
    """The number in a text such as "8/255" or "0.03".

    Args:
        text: At most 40 characters, with a power of ten of at most two digits: 1e999999999 would fill the memory.

    Returns:
        The number.

    Raises:
        ValueError: For another text.
        ZeroDivisionError: For a fraction over 0.
    """
    if len(text) > _LONGEST_NUMBER or re.search(r"[eE][-+]?[\d_]{3}", text):
        raise ValueError(f"no fraction: {shown(text)}")
    return float(Fraction(text.strip()))


def parse_pixels(value: Any) -> float:
    """A size in units of the pixel range, from a fraction such as "8/255" or a number such as 0.03.

    Args:
        value: The text or the number.

    Returns:
        The size, in [0, 1].

    Raises:
        ValueError: For other texts, and for sizes outside [0, 1], such as a bare 8.

    Example:
        >>> parse_pixels("8/255") == 8 / 255
        True
        >>> parse_pixels("8")
        Traceback (most recent call last):
        ValueError: it must lie in [0, 1], the range of the pixels; got 8. For 8 grey levels write 8/255
    """
    try:
        number = parse_fraction(value) if isinstance(value, str) else float(value)
    except (ValueError, ZeroDivisionError, TypeError, OverflowError) as error:
        raise ValueError(f"write a fraction such as 8/255 or a number such as 0.03; got {shown(value)}") from error
    if not 0 <= number <= 1:
        raise ValueError(f"it must lie in [0, 1], the range of the pixels; got {value}. For 8 grey levels write 8/255")
    return number


def written(default: str) -> Any:
    """A default as a person writes it and --help shows it; it is parsed like a value that was given."""
    return default


Pixels = Annotated[float, BeforeValidator(parse_pixels)]


class Section(BaseModel):
    """A group of options; unknown names are refused, values are checked."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class ViewConfig(Section):
    """How the views of a batch are drawn."""

    image_size: int = Field(300, gt=0, description="side of the square the network sees, in pixels")
    slides: int = Field(2, gt=0, description="slides per patient")
    patches: int = Field(2, gt=0, description="patches per slide")
    views: int = Field(2, gt=0, description="augmented views per patch")
    balance_classes: bool = Field(False, description="draw the classes of a slide equally often (labels per patch)")
    augmentation: Literal["none", "static", "v0", "v1", "he"] | None = Field(
        None, description="augmentation pipeline; v0 for SRH, he (haematoxylin and eosin) for RGB patches"
    )
    strength: float = Field(
        1.0, ge=0, le=1, description="strength of the augmentation at the beginning (v0, v1 and he)"
    )
    dynamic: bool = Field(True, description="lower the strength of v0, v1 and he over training")
    ids: Literal["true", "slots"] | None = Field(
        None,
        description="what counts as a positive: true ids, or one id per place in the batch; true but for the preset",
    )
    order: Literal["spread", "plain"] | None = Field(
        None, description="keep repeats of a patient apart, or shuffle plainly; spread but for the preset"
    )
    uncropped: Literal["resize", "keep"] | None = Field(
        None, description="what happens to patches that are not cropped; resize but for the preset"
    )
    static_epochs: int | None = Field(
        None,
        ge=0,
        description="epochs at the start with the static augmentation; 0, or the first plateau with the preset",
    )
    on_bad: Literal["raise", "replace"] = Field("raise", description="what to do with an unreadable training patch")
    workers: int = Field(0, ge=0, description="processes that read patches")
    augment: Literal["images", "items"] = Field(
        "images", description="augment views one by one, or all views of an item at once (other draws, faster)"
    )


class InnerAttackConfig(Section):
    """The inner maximisation."""

    name: InnerAttackName = Field(
        "pgd", description="none trains the HiDisc baseline; the last four are cheaper (docs/cheaper_inner.md)"
    )
    eps: Pixels = Field(written("8/255"), description="radius of the l_inf ball")
    step_size: Pixels = Field(written("2/255"), description="size of a step")
    steps: int = Field(5, gt=0, description="gradient steps")
    levels: Levels = Field("p_s_pt", description="terms of the loss that it maximises")
    warmup_epochs: int | None = Field(None, ge=0, description="eps grows from 1/255 over these; an eighth of the run")
    replays: int = Field(4, gt=0, description="free: optimiser steps on each batch; give fewer train.steps for it")
    check_every: int = Field(
        20, ge=0, description="fgsm_rs, nfgsm, free: steps between comparisons with PGD; 0 is never"
    )
    check_share: float = Field(0.5, ge=0, le=1, description="they train with PGD below this share of its rise in loss")


class OuterConfig(Section):
    """The outer minimisation, its precision, checkpoints and held-out evaluations."""

    epochs: int = Field(40_000, gt=0, description="passes over the (class-balanced) patients")
    steps: int | None = Field(None, gt=0, description="optimiser steps; instead of epochs")
    batch_patients: int = Field(16, gt=0, description="patients per batch, of all ranks and parts together")
    accumulate: int = Field(1, gt=0, description="parts that a batch is computed in; less memory, the same negatives")
    lr: float = Field(1e-3, gt=0, description="peak learning rate of AdamW")
    weight_decay: float = Field(1e-2, ge=0, description="of AdamW")
    warmup: float = Field(0.1, ge=0, lt=1, description="share of the steps in which the learning rate rises")
    loss: Levels = Field("p_s_pt", description="terms of the loss that it minimises")
    layer: TrainedLayer = Field(
        "embedding", description="what the loss reads: the projected embedding, or the unit features, which kNN reads"
    )
    temperature: float = Field(0.07, gt=0, description="of the contrastive loss")
    clean: bool = Field(False, description="mix clean and adversarial losses with the paper's dynamic weight")
    plateau: int | None = Field(None, gt=0, description="epochs of equal augmentation strength; a share of the run")
    precision: Literal["32", "bf16", "16"] = Field(
        "32", description="of the passes through the encoder; bf16 is autocast, 16 is float16 with a scaled loss"
    )
    compile: bool = Field(
        False, description="torch.compile the encoder; TORCH_LOGS=graph_breaks shows where its graph breaks"
    )
    global_negatives: bool = Field(True, description="under torchrun: negatives of all ranks, not of each by itself")
    sync_norm: bool = Field(False, description="under torchrun: BatchNorm over the batch of all ranks (GPUs only)")
    max_memory: str | None = Field(None, description="such as 8GB: say after the first step what would fit into it")
    channels_last: bool = Field(False, description="memory layout that many CPUs and GPUs compute faster in")
    save_every: int = Field(500, gt=0, description="steps between checkpoints")
    eval_every: int | None = Field(None, gt=0, description="steps between held-out evaluations; a tenth of the run")
    eval_patches: int = Field(512, gt=0, description="held-out patches looked at in such an evaluation")
    eval_eps: Pixels = Field(written("4/255"), description="radius of the PGD-5 attack in it")
    k: int = Field(20, gt=0, description="neighbours in it")

    @model_validator(mode="after")
    def _check_length(self) -> Self:
        if self.steps is not None and "epochs" in self.model_fields_set:
            raise ValueError(f"give epochs or steps, not both; got epochs {self.epochs} and steps {self.steps}")
        return self

    @field_validator("max_memory")
    @classmethod
    def _check_memory(cls, value: str | None) -> str | None:
        if value is not None:
            parse_memory(value)
        return value


class TrainConfig(OuterConfig):
    """All options of a training; the defaults are the paper's for OpenSRH.

    The fields of `OuterConfig`, and:

    Attributes:
        views: How batches are drawn.
        attack: The inner maximisation.
        seed: Of draws, augmentation and attacks.
        preset: "paper" draws and augments as the published code does (docs/conventions.md).
        transform: A function of the caller's in place of `views.augmentation`; it sees torch's CPU generator seeded by
            the view, and what it returns is resized to `views.image_size`.

    Raises:
        pydantic.ValidationError: For unknown names and values out of range; a ValueError.
        ValueError: For an inner maximisation that the other options do not allow, with what to change.

    Example:
        >>> TrainConfig(steps=2000, attack={"eps": "4/255"}).attack.eps == 4 / 255
        True
        >>> TrainConfig.hidisc(steps=2000).attack.name
        'none'
        >>> TrainConfig(stepz=2000)
        Traceback (most recent call last):
        pydantic_core._pydantic_core.ValidationError: 1 validation error for TrainConfig
        stepz
          Extra inputs are not permitted ...
    """

    views: ViewConfig = ViewConfig()
    attack: InnerAttackConfig = InnerAttackConfig()
    seed: int = Field(0, ge=0, description="of draws, augmentation and attacks")
    preset: Literal["paper"] | None = Field(
        None, description="paper: draws and augments as the published code (docs/conventions.md)"
    )
    transform: Annotated[Callable[..., Any], PlainSerializer(repr, return_type=str)] | None = Field(
        None, description="a function from a patch (3, h, w) in [0, 1] to an image, in place of the augmentation"
    )

    def resolve(self, kind: str) -> Self:
        """The configuration with an augmentation that fits patches of this kind, where none was chosen.

        Args:
            kind: Of a cohort: "srh" or "rgb".

        Returns:
            The configuration.
        """
        if self.views.augmentation is not None or self.transform is not None:
            return self
        views = self.views.model_copy(update={"augmentation": default_augmentation(kind)})
        return self.model_copy(update={"views": views})

    @classmethod
    def hsat(cls, **changes: Any) -> Self:
        """Published HSAT: PGD with 5 steps of 2/255 at eps 8/255 on all three levels (arXiv:2503.10629).

        Args:
            changes: Fields that are to differ.

        Returns:
            The configuration.
        """
        return cls(**changes)

    @classmethod
    def hidisc(cls, **changes: Any) -> Self:
        """The baseline HiDisc: no attack (arXiv:2303.01605).

        Args:
            changes: Fields that are to differ.

        Returns:
            The configuration.
        """
        return cls(**{"attack": InnerAttackConfig(name="none"), **changes})

    @classmethod
    def hsat_plus(cls, **changes: Any) -> Self:
        """HSAT+, for encoders whose decisions are attacked: docs/recipes.md.

        Free training (Shafahi et al., arXiv:1904.12843) with 4 replays of steps of size eps, compared with PGD every 50
        batches; temperature 0.6; the loss reads the unit features that kNN reads, and no projection head.  A batch
        takes 4 steps of the optimiser and 4 passes, where published HSAT takes one step and 6 passes: three batches of
        HSAT+ cost what two of HSAT do.  Leave the augmentation on in a long training: without it the features of
        patients of one class drift apart.

        Args:
            changes: Fields that are to differ; of `attack` as a mapping, single ones.

        Returns:
            The configuration.

        Example:
            >>> config = TrainConfig.hsat_plus(steps=360, attack={"eps": "4/255"})
            >>> config.attack.name, config.attack.replays, config.attack.eps == 4 / 255, config.layer
            ('free', 4, True, 'features')
        """
        attack: Any = {"name": "free", "replays": 4, "check_every": 50}
        if isinstance(given := changes.pop("attack", {}), InnerAttackConfig):
            attack = given
        else:
            attack |= given
        return cls(**{"layer": "features", "temperature": 0.6, **changes, "attack": attack})

    @model_validator(mode="after")
    def _check_inner_attack(self) -> Self:
        views, attack = self.views, self.attack
        if attack.name == "warm" and (views.augmentation != "none" or views.ids == "slots" or self.preset == "paper"):
            raise ValueError(
                "warm starts belong to fixed pixels of known patches: give augmentation none and true ids"
                f" (got augmentation {views.augmentation}, ids {views.ids or 'true'}, preset {self.preset})"
            )
        if attack.name == "free" and self.precision == "16":
            raise ValueError("free training moves the images by an unscaled gradient; give precision bf16 or 32")
        if attack.name == "free" and (self.clean or attack.levels != self.loss):
            raise ValueError(
                "free training attacks the loss that it descends, on adversarial images only: leave out clean and"
                f" give the attack levels {self.loss}"
            )
        return self
