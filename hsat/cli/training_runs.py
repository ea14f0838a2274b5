"""What an evaluation takes from the folder of a training: --run names it, and run.json in it says the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, Field

from hsat.cli.options import Names, Settings, find_option, merge_layers, read_yaml, say, split_commas
from hsat.data.synthetic import synthetic_patient_name
from hsat.fingerprints import digest_patient
from hsat.models.checkpoints import read_weights
from hsat.run_folder import read_run_file
from hsat.training.encoder_files import BEST, FINAL

OF_THIS_MACHINE = ("workers",)  # of the data options: what another machine or command has otherwise
OF_OWN_MODELS = ("factory", "features", "norm", "input_size")
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
        named = find_option(argv, "run", str) or (read_yaml(config).get("run") if config else None)
        layer = {} if not named else options_of_trainings(split_commas(named), cls)
        settings = super().load(argv, recipe=merge_layers(recipe or {}, layer))
        if named:
            say(f"from --run: {layer['checkpoint']}; {_data_text(getattr(settings, 'data', None))}")
        return settings


def options_of_trainings(folders: Sequence[str], settings: type[BaseModel]) -> dict[str, Any]:
    """The options that an evaluation has from the folders of trainings.

    Args:
        folders: Of trainings; the first one says which data.
        settings: The class of the options.

    Returns:
        checkpoint, data, and what else decides the encoder and the cohort, nested.

    Raises:
        SystemExit: For a folder without a run or without an encoder, with what to type.
    """
    try:
        files = [_encoder_in(Path(folder)) for folder in folders]
        of_run = read_run_file(folders[0])["settings"]
    except (OSError, ValueError, KeyError) as error:
        raise SystemExit(f"error: --run {','.join(folders)}: {error}") from None
    layer: dict[str, Any] = {"checkpoint": ",".join(map(str, files))}
    known = settings.model_fields["data"].annotation
    assert isinstance(known, type) and issubclass(known, BaseModel)
    data = of_run.get("data")
    if isinstance(data, Mapping):
        names = [name for name in known.model_fields if name in data and name not in OF_THIS_MACHINE]
        layer["data"] = {name: data[name] for name in names if data[name] is not None}
        if data.get("root") is None and "seed" in of_run:
            layer["seed"] = of_run["seed"]  # of the synthetic cohort
    else:  # a training by Trainer in Python, which knows the views and not where the patches lie
        views = of_run.get("train", {}).get("views", {})
        layer["data"] = {name: views[name] for name in ("image_size",) if name in views}
    model = of_run.get("model", {})
    if isinstance(model, Mapping) and model.get("factory"):
        layer["model"] = {name: model[name] for name in OF_OWN_MODELS if model.get(name) is not None}
    return layer


def _data_text(data: Any) -> str:
    """The data that are measured, after options of the command line have replaced those of the training."""
    root, size = getattr(data, "root", None), getattr(data, "image_size", None)
    text = "the synthetic cohort" if root is None else f"data {root}, layout {getattr(data, 'layout', '')}"
    return text if size is None else f"{text}, images of {size} pixels a side"


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
