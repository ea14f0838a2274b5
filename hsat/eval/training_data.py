"""What an encoder was trained on, where its file says so, beside what it is measured on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from torch import nn

from hsat.eval.options import Provenance
from hsat.fingerprints import digest_patient
from hsat.models.metadata import check_training


def stated_training(encoder: object, provenance: Provenance = Provenance()) -> Mapping[str, Any] | None:
    """What is known of an encoder's training: `kind`, `image_size` and `patients`, as in encoder files.

    Args:
        encoder: Any; the file of a module's weights, or of a module in it, may state the training.
        provenance: What it says of the training comes first.

    Returns:
        The facts; None where nobody states them.

    Raises:
        ValueError: For facts of another form in the provenance.
    """
    if provenance.training is not None:
        check_training(provenance.training, "provenance")
        return provenance.training
    if isinstance(encoder, nn.Module):
        for module in encoder.modules():
            report = getattr(module, "weights_report", None)
            metadata = getattr(report, "metadata", None)
            if isinstance(metadata, Mapping) and _is_training(metadata.get("training")):
                return cast(Mapping[str, Any], metadata["training"])
    return None


@dataclass(frozen=True)
class MeasuredData:
    """What a loader's dataset says of the images that an encoder is measured on.

    Attributes:
        kind: Of the patches; "" where it is unknown.
        image_size: The side of the images that the encoder is given; None where it is unknown.
        patients: Names of the patients; empty where they are unknown.
    """

    kind: str = ""
    image_size: int | None = None
    patients: tuple[str, ...] = ()

    @classmethod
    def of(cls, loader: object, encoder: object = None) -> MeasuredData:
        """What is known of the images of a loader; images of their own size have that which the encoder resizes to."""
        dataset = getattr(loader, "dataset", None)
        cohort, size = getattr(dataset, "cohort", None), getattr(dataset, "image_size", None)
        if size is None:
            size = _side(getattr(encoder, "input_size", None))
        names, ids = getattr(cohort, "patient_names", ()), getattr(cohort, "patient", None)
        rows = getattr(dataset, "rows", None)
        if ids is not None and rows is not None:
            names = tuple(names[number] for number in np.unique(ids[np.asarray(rows, dtype=np.int64)]))
        return cls(str(getattr(cohort, "kind", "")), size if isinstance(size, int) else None, tuple(names))

    def trained_on(self, training: Mapping[str, Any] | None) -> int:
        """How many of the patients an encoder of this training was trained on, by digests of their names."""
        known = set(training["patients"]) if training else set()
        return sum(digest_patient(name) in known for name in self.patients) if known else 0

    def flags(self, training: Mapping[str, Any] | None) -> tuple[str, ...]:
        """Reasons to distrust numbers of an encoder of this training on these images."""
        if training is None:
            return ()
        flags = []
        if count := self.trained_on(training):
            flags.append(f"{count} of {len(self.patients)} queries' patients were trained on")
        if (size := _side(training["image_size"])) and self.image_size and size != self.image_size:
            flags.append(f"the encoder was trained on images of {size} pixels a side, and these have {self.image_size}")
        if self.kind and training["kind"] != self.kind:
            flags.append(f"the encoder was trained on {training['kind']} patches, and these are {self.kind}")
        return tuple(flags)


def _is_training(values: object) -> bool:
    """Whether these are facts of a training of ours: a file of another program may use the word for something else."""
    try:
        check_training(values, "")
    except ValueError:
        return False
    return True


def _side(size: Any) -> int | None:
    """The side of squares, as files state it: a number, a pair or null."""
    if isinstance(size, list | tuple):
        return int(size[0]) if size[0] == size[1] else None
    return None if size is None else int(size)
