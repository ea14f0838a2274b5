"""The encoders that a training writes: the best one and the final one, with what they say of the training."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from hsat.data import Cohort
from hsat.fingerprints import digest_patient
from hsat.models import Encoder, save_encoder
from hsat.models.metadata import MOST_PATIENTS
from hsat.run_folder import write_json
from hsat.training.config import TrainConfig
from hsat.training.folder import TrainingFolder
from hsat.training.validation import HELD_OUT

BEST, FINAL = "best.safetensors", "final.safetensors"

_log = logging.getLogger("hsat")


def training_facts(cohort: Cohort, config: TrainConfig) -> dict[str, Any] | None:
    """What files of a training say of its data, the metadata `training`: an evaluation flags what does not fit it.

    Args:
        cohort: With a split "train", and with a split "tune" where patients were held out to choose the best encoder.
        config: The options.

    Returns:
        `kind` of the patches, `image_size`, and `patients`: the digests (`hsat.fingerprints.digest_patient`) of those
        the encoder was trained or chosen on, in alphabetical order.  None, with a note, for more patients than a
        reader takes.
    """
    splits = [split for split in ("train", HELD_OUT) if split in cohort.splits]
    patients = {cohort.records[row].patient for split in splits for row in cohort.rows(split)}
    if len(patients) > MOST_PATIENTS:
        _log.info("note: %d patients are too many to state them in the files of encoders", len(patients))
        return None
    digests = sorted(map(digest_patient, patients))
    return {"kind": cohort.kind, "image_size": config.views.image_size, "patients": digests}


def write_best(
    folder: TrainingFolder,
    encoder: Encoder,
    *,
    step: int,
    score: float,
    numbers: Mapping[str, float],
    training: Mapping[str, Any] | None,
) -> None:
    """Write best.safetensors, and best.json with the held-out numbers.

    Args:
        folder: The folder of the run.
        encoder: The best encoder so far.
        step: Steps made so far.
        score: What it was chosen by.
        numbers: The other held-out numbers.
        training: `training_facts`.
    """
    facts = {"step": step, "cohort": folder.cohort, "score": score}
    save_encoder(encoder, folder.out / BEST, metadata=facts | _stated(training))
    write_json(folder.out / "best.json", facts | dict(numbers))


def write_final(folder: TrainingFolder, encoder: Encoder, *, step: int, training: Mapping[str, Any] | None) -> None:
    """Write final.safetensors, the encoder after the last step; see `write_best`."""
    save_encoder(encoder, folder.out / FINAL, metadata={"step": step, "cohort": folder.cohort} | _stated(training))


def _stated(training: Mapping[str, Any] | None) -> dict[str, Any]:
    return {} if training is None else {"training": dict(training)}
