"""Options of the commands: the command line wins over a YAML file, that over a recipe, that over the defaults.

Every option of a class below is a flag (`--data.root`, `--attack.eps 8/255`) and a key of the YAML file that `--config`
names.  A key that does not exist is an error.  Nothing is read from the environment.
"""

from __future__ import annotations

import argparse
import difflib
import logging
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, Self

from pydantic import BaseModel, BeforeValidator, Field, ValidationError
from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from hsat.cli.data_options import DataSettings, EvaluationDataSettings, SourceSettings
from hsat.cli.yaml_files import read_yaml
from hsat.training.config import Pixels, Section, parse_pixels
from hsat.untrusted import shown

__all__ = [
    "Counts",
    "DataSettings",
    "EvaluationDataSettings",
    "Names",
    "Pixels",
    "PixelsList",
    "Section",
    "Settings",
    "SourceSettings",
    "parse_pixels",
    "split_commas",
]


class _StandardError(logging.Handler):
    """Writes to what sys.stderr is at the time."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr)


_MOST_LINES, _MOST_SHOWN = 20, 1000  # of mistakes in options, and characters of a mistake
_log = logging.getLogger("hsat.cli")
if not _log.handlers:
    _log.addHandler(_StandardError())
    _log.setLevel(logging.INFO)
    _log.propagate = False


def split_commas(value: Any) -> Any:
    """a,b,c as a list; lists stay."""
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


PixelsList = Annotated[list[Pixels], BeforeValidator(split_commas)]
Names = Annotated[list[str], BeforeValidator(split_commas)]
Counts = Annotated[list[int], BeforeValidator(split_commas)]


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
    image_size: int | None = Field(
        None, gt=0, description="side of the images that a ViT or Swin is built for, in place of the usual 224"
    )
    factory: str | None = Field(
        None, description="package.module:function that makes your own network, in place of --model.backbone"
    )
    features: str | None = Field(
        None,
        description="of a network from --model.factory: method, submodule or entry of the output with the features",
    )
    norm: str | None = Field(
        None,
        description="pixel normalisation of its weights, where neither file nor name says: imagenet, timm, none,"
        " image (each image's own) or m,m,m/s,s,s",
    )


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


class CommandParser(argparse.ArgumentParser):
    """Reads the words of a command; its help ends with the examples of the command's module."""

    names: Sequence[str] = ()  # of all options, without the dashes

    @classmethod
    def of(cls, settings: type[BaseModel]) -> Self:
        """The parser of a command, named by the module of its options: hsat train is hsat.cli.train."""
        program = f"hsat {settings.__module__.rpartition('.')[2]}"
        text, examples = split_docstring(sys.modules[settings.__module__].__doc__ or "")
        parser = cls(
            prog=program,
            usage=f"{program} [--option VALUE ...]",
            description=text,
            epilog=f"examples:\n{examples}" if examples else None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        parser.names = option_names(settings)
        return parser

    def error(self, message: str) -> NoReturn:
        """End the program with the message and, for a mistyped option, the nearest one."""
        mistyped = re.search(r"unrecognized arguments: --([\w.]+)", message)
        near = difflib.get_close_matches(mistyped[1], self.names, n=1) if mistyped else []
        hint = f"; did you mean --{near[0]}?" if near else f"; {self.prog} --help lists the options"
        self.exit(2, f"error: {message}{hint}\n")

    def format_help(self) -> str:
        """The help, without defaults that say no more than the description: None, and an empty list."""
        text = re.sub(r"\s+\(default:\s+(None|\[\])\)", "", super().format_help())
        text = re.sub(r"(?<=default:)\s+(True|False)\b", lambda found: found[0].lower(), text)
        return re.sub(r"^  -(\w) ", r"  --\1 ", text, flags=re.MULTILINE)  # as it may be typed, too


def split_docstring(text: str) -> tuple[str, str]:
    """The paragraphs of a module's docstring, and its indented commands."""
    lines = text.splitlines()
    examples = [line for line in lines if line.startswith("    ")]
    rest = "\n".join(line for line in lines if not line.startswith("    "))
    return re.sub(r"\n{3,}", "\n\n", rest).strip(), "\n".join(line[2:] for line in examples)


class Settings(BaseSettings):
    """Base of every command's options; `load` reads the command line."""

    model_config = SettingsConfigDict(
        extra="forbid",
        frozen=True,
        validate_default=True,
        cli_avoid_json=True,
        cli_enforce_required=False,
        cli_hide_none_type=True,
    )

    config: Path | None = Field(None, description="YAML file with any of these options")

    @classmethod
    def load(cls, argv: list[str], *, recipe: dict[str, Any] | None = None) -> Self:
        """Options from argv over the YAML file named in it over a recipe; bad ones end the program with the reason."""
        path = find_option(argv, "config", Path)
        layer = merge_layers(recipe or {}, read_yaml(path) if path else {})
        words = normalize_words(argv, option_names(cls, kind=bool))
        source: CliSettingsSource[Any] = CliSettingsSource(cls, root_parser=CommandParser.of(cls))
        try:
            return cls(**layer, _cli_settings_source=source(args=words))
        except ValidationError as error:
            raise SystemExit(explain(error, cls, path)) from None
        except SettingsError as error:
            raise SystemExit(f"error: {error}; write --section.option VALUE, as in --data.root PATH") from None

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Only what is passed in: no environment variables, no secret files."""
        return (init_settings,)

    def plain(self) -> dict[str, Any]:
        """The options as numbers, texts and lists, for records."""
        return self.model_dump(mode="json", exclude={"config"})


def find_option(argv: list[str], name: str, kind: type) -> Any:
    """The value of one option that has to be known before the others are read.

    Args:
        argv: Words of the command line.
        name: The option, without dashes.
        kind: Makes the value from its word.

    Returns:
        The value; None where the option is not given.
    """
    value = None
    for word, following in zip(argv, [*argv, ""][1:], strict=True):
        option, equals, text = word.partition("=")
        if option == f"--{name}":
            value = kind(text if equals else following)
    return value


def merge_layers(lower: dict[str, Any], upper: dict[str, Any]) -> dict[str, Any]:
    """Nested options: those of `upper`, and those of `lower` that it does not name."""
    merged = dict(lower)
    for key, value in upper.items():
        below = merged.get(key)
        merged[key] = merge_layers(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def normalize_words(argv: list[str], flags: list[str]) -> list[str]:
    """What people type as argparse wants it: --k 20 as -k 20 (one letter, one dash), --resume as --resume true."""
    words: list[str] = []
    for word, following in zip(argv, [*argv, "--"][1:], strict=True):
        name, equals, value = word.partition("=")
        is_short = len(name) == 3 and name.startswith("--")
        words += [name[1:], *([value] if equals else [])] if is_short else [word]
        if word.removeprefix("--") in flags and following.startswith("-"):
            words.append("true")
    return words


def collect_words(argv: list[str], option: str) -> list[str]:
    """The words before the first option and all those behind `--option` as one `--option a,b,c`; the rest as it was.

    An option of one word is followed by that word only, so that `--k 20 DIR` leaves DIR where it is.  Commas separate
    folders here as in a configuration file; a folder whose own name holds one ends the program.
    """
    collected: list[str] = []
    rest: list[str] = []
    collecting = True
    for word in argv:
        name, equals, value = word.partition("=")
        if word.startswith("-"):
            collecting = name == f"--{option}"
            if not collecting:
                rest.append(word)
            elif equals:
                collected.append(value)
        else:
            (collected if collecting else rest).append(word)
    for word in collected:
        if "," in word and Path(word).exists():
            raise SystemExit(f"error: commas separate folders, so {word!r} cannot be named here; rename it")
    return [*rest, *([f"--{option}", ",".join(collected)] if collected else [])]


def explain(error: ValidationError, cls: type[BaseModel], path: Path | None) -> str:
    """What is wrong with which option, one line each, with the nearest name for a mistyped one."""
    known = option_names(cls)
    sections = {name.partition(".")[0] for name in known}
    lines = []
    for item in error.errors()[:_MOST_LINES]:
        name = ".".join(str(part) for part in item["loc"])[:_MOST_SHOWN]
        message = item["msg"].removeprefix("Value error, ")[:_MOST_SHOWN]
        if item["type"] != "extra_forbidden":
            lines.append(f"option {name}: {message}" + ("" if "got" in message else f" (got {shown(item['input'])})"))
        elif name in known:
            section, _, key = name.partition(".")
            lines.append(f"unknown option {name!r}; write it nested, as in {section}: {{{key}: ...}}")
        else:
            near = difflib.get_close_matches(name, [*known, *sections], n=1)
            lines.append(f"unknown option {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    return "\n".join(["error:" + (f" (options and {path})" if path else ""), *(f"  {line}" for line in lines)])


def option_names(cls: type[BaseModel], prefix: str = "", *, kind: type | None = None) -> list[str]:
    """Every option of a class (of one kind, such as bool) as it is typed, without the dashes."""
    names = []
    for name, field in cls.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            names += option_names(inner, f"{prefix}{name}.", kind=kind)
        elif kind is None or inner is kind:
            names.append(prefix + name)
    return names


def device_of(name: str) -> str:
    """The name of the device that --device means; auto is a GPU where there is one.

    Raises:
        ValueError: For a device that cannot be used here.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from None
    return name


def say(text: str) -> None:
    """Write a line for people to standard error, by the logger "hsat.cli": ranks other than the first are silent."""
    _log.info(text)
