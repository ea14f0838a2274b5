"""Command line, YAML file and defaults of the examples, in one place and one order: options win over the file.

Every option of a class below is a flag (`--data.root`, `--attack.eps 8/255`) and a key of the YAML file given with
`--config`.  A key that does not exist is an error.  Nothing is read from the environment.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)


def pixels(value: Any) -> float:
    """A size in units of the pixel range: 8/255, 0.03; a bare 8 is refused with a hint."""
    try:
        number = float(Fraction(value.strip()) if isinstance(value, str) else value)
    except (ValueError, ZeroDivisionError, TypeError) as error:
        raise ValueError(f"write a fraction such as 8/255 or a number such as 0.03; got {value!r}") from error
    if not 0 <= number <= 1:
        raise ValueError(f"it must lie in [0, 1], the range of the pixels; got {value}. For 8 grey levels write 8/255")
    return number


def listed(value: Any) -> Any:
    """a,b,c as a list; lists stay."""
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


Pixels = Annotated[float, BeforeValidator(pixels)]
PixelsList = Annotated[list[Pixels], BeforeValidator(listed)]
Names = Annotated[list[str], BeforeValidator(listed)]
Counts = Annotated[list[int], BeforeValidator(listed)]


class Section(BaseModel):
    """A group of options."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class DataSettings(Section):
    """Where the patches are and how batches are drawn from them."""

    root: Path | None = Field(None, description="folder of the cohort; without it a synthetic cohort is written")
    layout: Literal["opensrh", "folders", "csv"] = Field("opensrh", description="how the folder is laid out")
    manifest: str = Field("manifest.csv", description="csv layout: the table, relative to the root")
    image_size: int = Field(300, gt=0, description="side of the square the network sees, in pixels")
    slides: int = Field(2, gt=0, description="slides per patient")
    patches: int = Field(2, gt=0, description="patches per slide")
    views: int = Field(2, gt=0, description="augmented views per patch")
    augmentation: Literal["none", "static", "v0", "v1"] = Field("v0", description="augmentation pipeline")
    strength: float = Field(1.0, ge=0, le=1, description="strength of the augmentation at the beginning (v0 and v1)")
    dynamic: bool = Field(True, description="lower the augmentation's strength over training (v0 and v1)")
    ids: Literal["true", "slots"] | None = Field(
        None, description="who counts as a positive: true ids, or one id per place in the batch; true unless --compat"
    )
    order: Literal["spread", "plain"] | None = Field(
        None, description="keep repeats of a patient apart, or shuffle plainly; spread unless --compat"
    )
    uncropped: Literal["resize", "keep"] | None = Field(
        None, description="what happens to patches that are not cropped; resize unless --compat"
    )
    static_epochs: int | None = Field(
        None,
        ge=0,
        description="epochs at the start with the static augmentation; 0, or the first plateau with --compat",
    )
    val_fraction: float = Field(0.3, gt=0, lt=1, description="share of patients to validate on, without split files")
    split_seed: int = Field(0, ge=0, description="seed of that split")
    tune_fraction: float = Field(0.15, ge=0, lt=1, description="share of training patients held out to choose the best")
    on_bad: Literal["raise", "replace"] = Field("raise", description="what to do with an unreadable training patch")
    workers: int = Field(0, ge=0, description="processes that read patches")
    packed: Literal["auto"] | Path | None = Field(
        None, description="folder of packed patches, made where it does not exist; auto puts one beside the run"
    )
    augment: Literal["images", "items"] = Field("images", description="views one by one, or an item at a time (faster)")


class EncoderSettings(Section):
    """What an encoder is made of."""

    backbone: str = Field("resnet50", description="a backbone of the paper, or any timm model")
    embedding_dim: int | None = Field(
        None, gt=0, description="width of the projected embedding; 128 unless the head says otherwise"
    )
    head: Literal["linear", "mlp", "mlp3_bn", "none"] = Field("linear", description="projection head")
    head_hidden: Counts = Field([], description="widths of the hidden layers of an mlp head: 2048,2048")
    dual_norm: bool = Field(False, description="two BatchNorm branches: normal (clean), pgd (adversarial)")
    input_size: int | None = Field(None, gt=0, description="resize inside the encoder to squares of this side")


class ModelSettings(EncoderSettings):
    """The encoder to train."""

    weights: Path | None = Field(None, description="local file with backbone weights to start from")
    pretrained: bool = Field(False, description="download ImageNet weights through timm")


class StoredModelSettings(EncoderSettings):
    """The encoder in a file.  What is not said is read from it."""

    branch: Literal["normal", "pgd"] | None = Field(
        None, description="BatchNorm branch to attack and score, of a dual encoder; pgd where that was trained"
    )


class LoggerSettings(Section):
    """Where training curves go besides train.csv."""

    tensorboard: bool = Field(False, description="write TensorBoard events into the run folder")
    wandb: str | None = Field(None, description="name of a Weights & Biases project")


class Settings(BaseSettings):
    """Base of every example's settings; `load` reads the command line."""

    model_config = SettingsConfigDict(extra="forbid", frozen=True, cli_avoid_json=True, cli_enforce_required=False)

    config: Path | None = Field(None, description="YAML file with any of these options")

    @classmethod
    def load(cls, argv: list[str] | None = None) -> Self:
        """Settings from argv over the YAML file named in it over the defaults; bad options end the program with why."""
        argv = sys.argv[1:] if argv is None else argv
        finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        finder.add_argument("--config", type=Path)
        path = finder.parse_known_args(argv)[0].config
        try:
            return cls.over(read_yaml(path) if path else {}, argv)
        except ValidationError as error:
            raise SystemExit(explain(error, cls, path)) from None
        except SettingsError as error:
            raise SystemExit(f"error: {error}; write --section.option VALUE, as in --data.root PATH") from None

    @classmethod
    def over(cls, layer: dict[str, Any], argv: list[str]) -> Self:
        """Settings from argv over a nested dictionary over the defaults.  Raises ValidationError."""
        words = _for_argparse(argv, option_names(cls, kind=bool))
        return _layered(cls, layer)(_cli_parse_args=words, _cli_prog_name=Path(sys.argv[0]).name)  # type: ignore[call-arg]

    @classmethod
    def settings_customise_sources(
        cls, settings_cls: type[BaseSettings], **sources: PydanticBaseSettingsSource
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Only what is passed in: no environment variables, no secret files."""
        return (sources["init_settings"],)

    def plain(self) -> dict[str, Any]:
        """The settings as numbers, strings and lists, for records."""
        return self.model_dump(mode="json", exclude={"config"})


def _layered(cls: type[Settings], layer: dict[str, Any]) -> type[Settings]:
    class Layered(cls):  # type: ignore[misc, valid-type]
        @classmethod
        def settings_customise_sources(
            inner, settings_cls: type[BaseSettings], **sources: PydanticBaseSettingsSource
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return sources["init_settings"], InitSettingsSource(settings_cls, init_kwargs=layer)

    Layered.__name__, Layered.__doc__ = cls.__name__, cls.__doc__
    return Layered


def _for_argparse(argv: list[str], flags: list[str]) -> list[str]:
    """What people type as argparse wants it: --k 20 as -k 20 (one letter, one dash), --resume as --resume true."""
    found: list[str] = []
    for word, following in zip(argv, [*argv, "--"][1:], strict=True):
        name, equals, value = word.partition("=")
        is_short = len(name) == 3 and name.startswith("--")
        found += [name[1:], *([value] if equals else [])] if is_short else [word]
        if word.removeprefix("--") in flags and following.startswith("-"):
            found.append("true")
    return found


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; anything else ends the program with the reason."""
    try:
        content = yaml.safe_load(path.read_text()) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SystemExit(f"error: cannot read the configuration {path}: {error}") from None
    if not isinstance(content, dict):
        raise SystemExit(
            f"error: the configuration {path} must hold a mapping of options, not a {type(content).__name__}"
        )
    return content


def explain(error: ValidationError, cls: type[BaseModel], path: Path | None) -> str:
    """What is wrong with which option, one line each, with the nearest name for a mistyped one."""
    known = option_names(cls)
    sections = {name.partition(".")[0] for name in known}
    lines = []
    for item in error.errors():
        name = ".".join(str(part) for part in item["loc"])
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] != "extra_forbidden":
            lines.append(f"option {name}: {message}" + ("" if "got" in message else f" (got {item['input']!r})"))
        elif name in known:
            section, _, key = name.partition(".")
            lines.append(f"unknown option {name!r}; write it nested, as in {section}: {{{key}: ...}}")
        else:
            near = difflib.get_close_matches(name, [*known, *sections], n=1)
            lines.append(f"unknown option {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    return "\n".join(["error:" + (f" (options and {path})" if path else ""), *(f"  {line}" for line in lines)])


def option_names(cls: type[BaseModel], prefix: str = "", *, kind: type | None = None) -> list[str]:
    """Every option of a settings class (of one kind, such as bool) as it is typed, without the dashes."""
    names = []
    for name, field in cls.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            names += option_names(inner, f"{prefix}{name}.", kind=kind)
        elif kind is None or inner is kind:
            names.append(prefix + name)
    return names
