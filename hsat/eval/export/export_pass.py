"""The pass over a split that attacks, rounds, writes, and reads again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hsat.attacks import InSpace, RawChannels
from hsat.attacks.raw_channels import CHANNELS
from hsat.classifiers import FittedKNN
from hsat.embedding import LoaderInfo, encode, require_labels, resolve_device, select_layer
from hsat.eval.export.adversarial_files import AdversarialFiles
from hsat.eval.export.on_grid import PNG_GRID, TIFF_GRID, Grid, round_in_ball
from hsat.eval.named_objectives import objective_named
from hsat.eval.tally import Tally
from hsat.types import Attack, EmbeddingFunction, EmbeddingTable, HierarchicalBatch, ThreatModel, align_labels

if TYPE_CHECKING:
    from hsat.data import Cohort, PatchDataset
    from hsat.data.samples import Sample


@dataclass(frozen=True)
class Medium:
    """How images become stored numbers: the grid, the stored channels, and the threat model that holds for them."""

    grid: Grid
    channels: slice
    threat: ThreatModel


def medium_of(cohort: Cohort, attack: Attack) -> Medium:
    """The medium of a cohort's files for an attack; TypeError for an attack that they cannot hold, with what to do."""
    if cohort.kind == "srh":
        if not (isinstance(attack, InSpace) and isinstance(attack.space, RawChannels)):
            raise TypeError(
                "an SRH file holds two channels and encoders see three, so an attack that moves the three cannot be"
                f" stored. Attack the two: InSpace(RawChannels(srh_to_rgb), PGD(...)); got {attack!r}"
            )
        threat, grid, channels = getattr(attack.attack, "threat", None), TIFF_GRID, CHANNELS
    else:
        threat, grid, channels = getattr(attack, "threat", None), PNG_GRID, slice(None)
    if not isinstance(threat, ThreatModel):
        raise TypeError(
            "files hold whole counts, which are rounded inside the attack's threat model; this attack has none of"
            f" pixels (no .threat), so rounding could leave what it may do: {attack!r}"
        )
    return Medium(grid, channels, threat)


class ExportPass:
    """Three sets of embeddings: clean, attacked in floats, and attacked as stored."""

    def __init__(
        self,
        encoder: EmbeddingFunction,
        attack: Attack,
        cohort: Cohort,
        *,
        knn: FittedKNN,
        target: str,
        layer: str,
        seed: int,
        device: torch.device | str | None,
    ) -> None:
        self.attack, self.cohort, self.seed, self.knn = attack, cohort, seed, knn
        self.medium = medium_of(cohort, attack)
        self.scored, self.place = select_layer(encoder, layer), resolve_device(encoder, device)
        self.make = objective_named(encoder, target, layer, knn)
        self.clean, self.attacked, self.stored = Tally(), Tally(), Tally()
        self._digests: list[str] = []
        self._numbers = self._changed = 0

    @property
    def changed(self) -> float:
        """Share of the stored numbers that differ from those of the clean files."""
        return self._changed / max(1, self._numbers)

    def see(self, batch: HierarchicalBatch, files: AdversarialFiles) -> None:
        """Attack a batch, round it, write it."""
        images, channels, grid = batch.images.to(self.place), self.medium.channels, self.medium.grid
        labels = torch.from_numpy(align_labels(require_labels(batch), self.cohort.class_names, self.knn.class_names))
        objective = self.make(images, HierarchicalBatch(batch.images, batch.patch, batch.slide, batch.patient, labels))
        generator = torch.Generator().manual_seed(self.seed)
        result = self.attack.run(images, objective, generator=generator, ids=batch.patch)
        self.attacked.count(result, images)
        self.clean.rows.append(batch, encode(self.scored, images))
        self.attacked.rows.append(batch, encode(self.scored, result.x_adv))
        counts = round_in_ball(result.x_adv[:, channels], images[:, channels], self.medium.threat, grid).cpu()
        self._numbers += counts.numel()
        self._changed += int((counts != grid.counts(batch.images[:, channels])).sum())
        for row, one in zip(batch.patch.tolist(), counts, strict=True):
            self._digests.append(_digest(one))
            files.write(row, one)

    def read_again(self, data: PatchDataset, batch_size: int) -> None:
        """Embed the files; RuntimeError for one that holds other numbers than were written."""
        place = 0
        for batch in batches_of(data, batch_size):
            for one in self.medium.grid.counts(batch.images[:, self.medium.channels]):
                if _digest(one) != self._digests[place]:
                    raise RuntimeError(f"{data.cohort.path(place)} does not read as it was written")
                place += 1
            self.stored.rows.append(batch, encode(self.scored, batch.images.to(self.place)))

    def tables(self, name: str, text: dict[str, Any], fingerprint: str) -> dict[str, EmbeddingTable]:
        """The embeddings as "clean", name, and "name (files)"; fingerprint: of the files' cohort."""
        encoder = text.pop("encoder")
        info, of_files = LoaderInfo(**text), LoaderInfo(**text | {"cohort": fingerprint})
        tables = {
            "clean": self.clean.rows.table(info, encoder=encoder),
            name: self.attacked.rows.table(info, encoder=encoder),
        }
        return tables | {f"{name} (files)": self.stored.rows.table(of_files, encoder=encoder)}


def batches_of(data: PatchDataset, batch_size: int) -> Iterator[HierarchicalBatch]:
    """Patches in order, in batches of up to batch_size of one shape: files of a cohort may have different sizes."""
    from hsat.data import collate

    waiting: list[Sample] = []
    for index in range(len(data)):
        sample = data[index]
        if waiting and (len(waiting) == batch_size or sample.images.shape != waiting[0].images.shape):
            yield collate(waiting)
            waiting = []
        waiting.append(sample)
    if waiting:
        yield collate(waiting)


def _digest(counts: Tensor) -> str:
    return hashlib.sha256(f"{tuple(counts.shape)}".encode() + counts.contiguous().numpy().tobytes()).hexdigest()
