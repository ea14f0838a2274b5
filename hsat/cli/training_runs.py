"""What an evaluation takes from the folder of a training: --run names it, and run.json in it says the rest."""

from __future__ import annotations

import os
import shlex
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, Field, ValidationError

from hsat.cli.options import Names, Settings, find_option, merge_layers, say, split_commas
from hsat.cli.yaml_files import read_yaml
from hsat.data.synthetic import synthetic_patient_name
from hsat.fingerprints import digest_patient
from hsat.models.checkpoints import read_weights
from hsat.run_folder import RUN_FILE, read_run_file
from hsat.training.encoder_files import BEST, FINAL
from hsat.untrusted import shown

NEVER_OF_FILES = ("workers", "allow_links")
"""Of the data options: what another machine has otherwise, and a guard that only its owner may drop."""
OF_OWN_MODELS = ("norm", "input_size")
MOST_SIDE = 4096  # pixels: the largest patch that is read
_MOST_TEXT, _MOST_SEED = 1000, 2**63
_MOST_SYNTHETIC = 1000  # patients of a synthetic cohort


class RunSettings(Settings):
    """Options of a command that measures encoders, and may take the rest from the folder of their training."""

    run: Names = Field(
        [],
        description="folder of a training: its best encoder (else the final one) and its data options, where no others"
        " are given; several with commas between: data options of the first",
    )

    @classmethod
    def load(cls, argv: list[str], *, recipe: dict[str, Any] | None = None) -> Self:
        """Options as of `Settings.load`, above those of the trainings that --run names."""
        config = find_option(argv, "config", Path)
        own = read_yaml(config) if config else {}
        named = find_option(argv, "run", str) or own.get("run")
        layer = {} if not named else options_of_trainings(_folders(named), cls, given=_given(argv, own))
        settings = super().load(argv, recipe=merge_layers(recipe or {}, layer))
        if named:
            say(f"from --run: {layer['checkpoint']}; {_data_text(getattr(settings, 'data', None), layer['data'])}")
        return settings


def options_of_trainings(
    folders: Sequence[str], settings: type[BaseModel], *, given: Container[str] = ()
) -> dict[str, Any]:
    """The options that an evaluation has from the folders of trainings, whose run.json somebody else may have written.

    It does not say what is run, opened elsewhere or followed: a network of one's own (`model.factory`), a table outside
    of the data, a list of exclusions outside of the folder and links have to be given by the user.

    Args:
        folders: Of trainings; the first one says which data.
        settings: The class of the options.
        given: Names of options that the user gives, such as "data.exclude".

    Returns:
        checkpoint, data, and what else decides the encoder and the cohort, nested.

    Raises:
        SystemExit: For a folder without a run or without an encoder, and for what the user has to give, with what to
            type.
    """
    try:
        files = [_encoder_in(Path(folder)) for folder in folders]
        run = _Run(Path(folders[0]))
        layer: dict[str, Any] = {"checkpoint": ",".join(map(str, files))}
        known = settings.model_fields["data"].annotation
        assert isinstance(known, type) and issubclass(known, BaseModel)
        layer["data"] = run.data_options(known, given)
        if "data" in run.settings and layer["data"].get("root") is None and "seed" in run.settings:
            layer["seed"] = run.whole("seed", run.settings["seed"], most=_MOST_SEED)  # of the synthetic cohort
        if model := run.model_options(given):
            layer["model"] = model
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: --run {','.join(folders)}: {error}") from None
    return layer


class _Run:
    """What run.json of a training says; every method raises ValueError that names file and field."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.file = folder, folder / RUN_FILE
        content = read_run_file(folder)
        if "settings" not in content:
            raise ValueError(f"{self.file} has no settings; give the folder of a training")
        self.settings = self.mapping("settings", content["settings"])

    def mapping(self, field: str, value: object) -> Mapping[str, Any]:
        """The value, which has to be an object."""
        if not isinstance(value, Mapping):
            raise ValueError(f"{self.file}: {field} must be an object, got {shown(value)}")
        return value

    def whole(self, field: str, value: object, *, most: int) -> int:
        """The value, which has to be a whole number up to a limit."""
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
            raise ValueError(f"{self.file}: {field} must be a whole number from 0 to {most}, got {shown(value)}")
        return value

    def section(self, name: str) -> Mapping[str, Any]:
        """A section of the settings; empty where there is none."""
        value = self.settings.get(name)
        return {} if value is None else self.mapping(f"settings.{name}", value)

    def data_options(self, known: type[BaseModel], given: Container[str]) -> dict[str, Any]:
        """The data options that are no danger; ValueError for one that the user has to give."""
        data = self.section("data")
        if not data:  # a training by Trainer in Python, which knows the views and not where the patches lie
            views = self.section("train").get("views")
            data = {} if views is None else self.mapping("settings.train.views", views)
            data = {name: data[name] for name in ("image_size",) if name in data}
        options = {
            name: data[name]
            for name in known.model_fields
            if data.get(name) is not None and name not in NEVER_OF_FILES and f"data.{name}" not in given
        }
        for name, value in options.items():
            parts = [*value, *value.values()] if isinstance(value, Mapping) else [value]
            if any(isinstance(part, str) and len(part) > _MOST_TEXT for part in parts):
                raise ValueError(f"{self.file}: settings.data.{name} has more than {_MOST_TEXT} characters")
        if "image_size" in options:
            self.whole("settings.data.image_size", options["image_size"], most=MOST_SIDE)
        try:
            known.model_validate(options)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"]))
            message = first["msg"].removeprefix("Value error, ")
            raise ValueError(f"{self.file}: settings.data.{field}: {message}, got {shown(first['input'])}") from None
        self._check_files(data, options, given)
        return options

    def _check_files(self, data: Mapping[str, Any], options: Mapping[str, Any], given: Container[str]) -> None:
        """ValueError for options that would open what lies elsewhere."""
        if data.get("allow_links") and "data.allow_links" not in given:
            raise ValueError(
                f"{self.file} says that files outside of the data are read through links, which no file may allow; give"
                " --data.allow_links true if the links are your own, else --data.allow_links false"
            )
        if "exclude" in options and not _lies_in(self.folder, options["exclude"]):
            raise ValueError(
                f"the patches of the list {shown(options['exclude'])} were left out of this training, and the list does"
                f" not lie in {self.folder}; give --data.exclude FILE yourself (None: no list)"
            )
        manifest = options.get("manifest", "")
        if Path(manifest).anchor or ".." in Path(manifest).parts or manifest.startswith("~"):
            raise ValueError(
                f"{self.file} names the table {shown(manifest)}, which is no plain path below the root of the data;"
                " give --data.manifest FILE yourself"
            )

    def model_options(self, given: Container[str]) -> dict[str, Any]:
        """Of a network of the user's own what its function does not say; the function has to be given by the user."""
        model = self.section("model")
        if not model.get("factory"):
            return {}
        missing = [name for name in ("factory", "features") if model.get(name) and f"model.{name}" not in given]
        if missing:
            typed = " ".join(f"--model.{name} {shlex.quote(_plain(model[name]))}" for name in missing)
            raise ValueError(
                f"the network of this training was made by {shown(model['factory'])}, which {self.file} says and hsat"
                f" would run; if you know that code, give {typed} yourself"
            )
        norm = model.get("norm")
        if norm is not None and (not isinstance(norm, str) or len(norm) > _MOST_TEXT):
            raise ValueError(f"{self.file}: settings.model.norm must be a text, got {shown(norm)}")
        if model.get("input_size") is not None:
            self.whole("settings.model.input_size", model["input_size"], most=MOST_SIDE)
        return {name: model[name] for name in OF_OWN_MODELS if model.get(name) is not None}


def _plain(value: object) -> str:
    """A name as it is typed; without what would move a terminal's cursor."""
    return "".join(one if one.isprintable() else "?" for one in str(value)[:200])


def _lies_in(folder: Path, file: str) -> bool:
    """Whether a file lies below a folder, with all links followed."""
    base, target = os.path.realpath(folder), os.path.realpath(file)
    return target.startswith(base.rstrip(os.sep) + os.sep)


def _folders(named: object) -> list[str]:
    """The folders that --run or a YAML file names."""
    folders = split_commas(named)
    if not isinstance(folders, list) or not all(isinstance(one, str) and one for one in folders):
        raise SystemExit(f"error: --run must name folders of trainings, with commas between; got {shown(named)}")
    return folders


def _given(argv: Sequence[str], own: Mapping[str, Any]) -> set[str]:
    """Options of a section that the command line or the user's YAML file gives, such as data.exclude."""
    names = {word.partition("=")[0].removeprefix("--") for word in argv if word.startswith("--")}
    for section, options in own.items():
        if isinstance(options, Mapping):
            names |= {f"{section}.{name}" for name in options}
    return names


def _data_text(data: Any, taken: Mapping[str, Any]) -> str:
    """The data that are measured, after options of the command line have replaced those of the training."""
    root, size = getattr(data, "root", None), getattr(data, "image_size", None)
    text = "the synthetic cohort" if root is None else f"data {root}, layout {getattr(data, 'layout', '')}"
    text += "" if size is None else f", images of {size} pixels a side"
    fields = type(data).model_fields
    others = [
        f"{name} {shown(value)}"
        for name, value in taken.items()
        if name not in ("root", "layout", "image_size") and value != fields[name].default
    ]
    return "; ".join([text, *([f"also {', '.join(others)}"] if others else [])])


def _encoder_in(folder: Path) -> Path:
    """The best encoder of a training, else the final one."""
    read_run_file(folder)  # names what is missing
    for name in (BEST, FINAL):
        if (folder / name).exists():
            return folder / name
    raise ValueError(
        f"no {BEST} and no {FINAL}: the training has not come to an encoder yet. Let it end, with hsat train --resume"
        f" --out {folder}, or give --checkpoint {folder / 'last.pt'}"
    )


def check_synthetic(files: Sequence[Path]) -> None:
    """Called where no --data.root is given: raise for an encoder whose file states that it was trained on other data.

    A file that states nothing, or patients of the synthetic cohort, may be measured there.  Files that cannot be read
    are left to those who open them.

    Args:
        files: Of encoders.

    Raises:
        ValueError: Naming the file, with what to type.
    """
    synthetic: set[str] = set()
    for path in files:
        try:
            training = read_weights(path).metadata.get("training")
        except (OSError, ValueError):
            continue
        if not isinstance(training, Mapping) or not isinstance(patients := training.get("patients"), list):
            continue
        synthetic = synthetic or {digest_patient(synthetic_patient_name(n)) for n in range(1, _MOST_SYNTHETIC)}
        if others := set(patients) - synthetic:
            raise ValueError(
                f"{path} was trained on {len(others)} patients of data of your own, and without --data.root it would be"
                f" measured on the synthetic cohort, which says nothing about it. Give --run {path.parent}, where its"
                " training is, or --data.root FOLDER, with --data.layout and --data.image_size"
                f" {_size_text(training.get('image_size'))} as it was trained"
            )


def _size_text(size: object) -> str:
    return str(size) if isinstance(size, int) else "SIZE"
