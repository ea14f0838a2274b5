"""Options that choose patches: where they are, how they are laid out, and how batches are drawn from them."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from hsat.data import ReadOptions
from hsat.data.assembly import Mixed
from hsat.data.opensrh import PATIENTS_FILE
from hsat.training.config import Section, ViewConfig


def split_pairs(value: Any) -> Any:
    """a=b,c=d as a mapping; mappings stay.

    Args:
        value: The text or the mapping.

    Returns:
        The mapping.

    Raises:
        ValueError: For a part without "=".
    """
    if not isinstance(value, str):
        return value
    parts = [part.strip() for part in value.split(",")]
    if wrong := [part for part in parts if "=" not in part]:
        raise ValueError(
            "write pairs, such as class=label,patient=case_id (what a column is, and its name) or"
            f" train=Training,val=Testing (what a split is for, and its name); got {wrong[0]!r}"
        )
    return {key.strip(): name.strip() for key, _, name in (part.partition("=") for part in parts)}


Pairs = Annotated[str | dict[str, str], AfterValidator(split_pairs)]


class SourceSettings(Section):
    """Where the patches are, and how they are laid out."""

    root: Path | None = Field(None, description="folder of the cohort; without it a synthetic cohort is written")
    layout: Literal["found", "opensrh", "folders", "classes", "csv"] = Field(
        "found", description="how the folder is laid out; found: it is looked at, and said in a line"
    )
    manifest: str = Field("manifest.csv", description="csv layout: the table, relative to the root")
    columns: Pairs | None = Field(
        None, description="csv layout: which column is what, path=file,class=label,patient=case_id,slide=slide_id"
    )
    path_template: str | None = Field(
        None, description="csv layout: paths made of cells, patches/{patient}/{slide}_{x_coord}.png"
    )
    patient: str | None = Field(None, description="classes layout: regular expression that finds the patient in a path")
    slide: str | None = Field(None, description="classes layout: regular expression that finds the slide in a path")
    split_folders: bool = Field(False, description="folders and classes layout: the first level is the split")
    splits: Literal["draw"] | Pairs | None = Field(
        None,
        description="names of the splits to train on and to attack, where they are others: train=0,val=1; draw:"
        " patients are drawn anew",
    )
    mixed: Mixed = Field("keep", description="what to do with patients whose patches are of several classes")
    on_empty: Literal["error", "skip"] = Field("error", description="what to do with folders without a patch")
    kind: Literal["srh", "rgb"] | None = Field(None, description="what the files hold; found from the first files")
    allow_links: bool = Field(False, description="read files outside of the root that links lead to")
    exclude: Path | None = Field(None, description="list of patches to leave out, as hsat check writes it")
    val_fraction: float = Field(0.3, gt=0, lt=1, description="share of patients to validate on, without split files")
    split_seed: int = Field(0, ge=0, description="seed of that split")

    @model_validator(mode="before")
    @classmethod
    def _name_opensrh(cls, values: Any) -> Any:
        """An OpenSRH folder is called so in the records of a run."""
        if not isinstance(values, dict) or values.get("layout", "found") != "found":
            return values
        root = values.get("root")
        if isinstance(root, str | Path) and os.path.isfile(os.path.join(root, PATIENTS_FILE)):
            return {**values, "layout": "opensrh"}
        return values

    def reader_options(self) -> ReadOptions:
        """The options of the layout's reader."""
        names = {one.name for one in dataclasses.fields(ReadOptions)} & type(self).model_fields.keys()
        options = {name: getattr(self, name) for name in names}
        if self.splits == "draw" and self.layout != "opensrh":
            options["keep_splits"] = False
        return ReadOptions(**options)


class DataSettings(ViewConfig, SourceSettings):
    """Where the patches are, and how batches are drawn from them."""

    tune_fraction: float = Field(0.15, ge=0, lt=1, description="share of training patients held out to choose the best")
    packed: Literal["auto"] | Path | None = Field(
        None, description="folder of packed patches, made where it does not exist; auto puts one beside the run"
    )


class EvaluationDataSettings(SourceSettings):
    """Where the patches are."""

    image_size: int = Field(300, gt=0, description="side of the square the network sees, in pixels")
    workers: int = Field(0, ge=0, description="processes that read patches")
