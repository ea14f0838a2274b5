r"""Adversarial patches as files that open anywhere, and the accuracy that is measured on these files.

    python examples/export_adversarial.py --checkpoint runs/hsat/best.safetensors --data.root /data/opensrh \
        --threat raw_srh --eps 8/255 --out runs/adversarial

Writes --out/cohort (8-bit PNGs of colour patches, 16-bit TIFFs of SRH, with a manifest; `--data.layout csv` reads it),
records.jsonl, table.md and run.json.  Patches are attacked at the size of their files and rounded inside the ball; the
numbers of "(files)" are those of the files, read again (docs/threats.md).  SRH cohorts need --threat raw_srh, since
their files hold two channels; the default is linf for colour patches and raw_srh for SRH.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import ClassVar, Literal

from hsat.eval.export.export_pass import batches_of
from pydantic import Field

from cohorts import describe, open_cohort
from evaluate_whitebox import load_named
from hsat.data import BadPatch, Cohort, PatchDataset
from hsat.eval import ExportResult, embed, markdown_table, save_adversarial, write_records
from runs import device_named, versions, write_json
from settings import DataSettings, Names, Pixels, Settings, StoredModelSettings
from threats import Lengths, attacks_under, check_radii, check_threat


class ExportAdversarial(Settings):
    """Attack the patches of a split, write them as lossless files, and score the files."""

    checkpoint: Names = Field([], description="file, or name=file; one")
    data: DataSettings = DataSettings()
    model: StoredModelSettings = StoredModelSettings()
    split: str = Field("val", description="the patches to attack")
    attacks: Names = Field(["pgd"], description="pgd, bim, mifgsm, fgsm or ffgsm; one")
    threat: Literal["linf", "l2", "raw_srh"] | None = Field(None, description="linf, or raw_srh for SRH, if not given")
    eps: Lengths = Field([8 / 255], description="radius, in the unit of --threat; one")
    step_size: Pixels | None = Field(None, description="size of a step; eps / 4 if not given")
    steps: int = Field(10, gt=0, description="gradient steps")
    target: Literal["features", "embedding", "knn"] = Field("features", description="what the attack moves")
    k: int = Field(200, gt=0, description="neighbours")
    temperature: float = Field(0.07, gt=0, description="of the kNN vote")
    batch_size: int = Field(16, gt=0, description="patches per batch")
    bootstrap: int = Field(1000, ge=0, description="resamples of patients for the intervals")
    seed: int = Field(0, ge=0, description="of the attack's random starts")
    device: str = Field("auto", description="cpu, cuda, cuda:1; auto takes a GPU where there is one")
    out: Path = Field(Path("runs/adversarial"), description="folder for the files and the results")
    quiet: bool = Field(False, description="no progress bars")
    compat: ClassVar[None] = None  # load_named asks; the published evaluation writes no files


def run(settings: ExportAdversarial, cohort: Cohort) -> ExportResult:
    """Attack, write, score."""
    for option in ("checkpoint", "attacks", "eps"):
        if len(found := getattr(settings, option)) != 1:
            raise ValueError(f"one run writes the files of one attack on one encoder; --{option} has {len(found)}")
    threat = settings.threat or ("raw_srh" if cohort.kind == "srh" else "linf")
    check_threat(threat, cohort)
    ((name, attack),) = attacks_under(
        threat,
        check_radii(threat, settings.eps),
        names=settings.attacks,
        steps=settings.steps,
        step_size=settings.step_size,
    ).items()
    title, encoder, digest = load_named(settings, settings.checkpoint[0])
    if encoder.fixed_size is None:
        encoder.input_size = (settings.data.image_size,) * 2  # patches come at the size of their files
    encoder.to(device_named(settings.device))
    size = settings.batch_size
    bank = embed(encoder, batches_of(PatchDataset(cohort, "train"), size), class_names=cohort.class_names)
    return save_adversarial(
        settings.out / "cohort",
        encoder,
        bank,
        cohort,
        attack,
        split=settings.split,
        target=settings.target,
        k=settings.k,
        temperature=settings.temperature,
        seed=settings.seed,
        batch_size=size,
        bootstrap=settings.bootstrap,
        name=name,
        model=title,
        checkpoint=digest,
        progress=not settings.quiet,
    )


def main(argv: list[str]) -> None:
    """Read the options, attack, write, print."""
    settings = ExportAdversarial.load(argv)
    if not settings.checkpoint:
        raise SystemExit("error: give --checkpoint FILE, or name=FILE; train_hsat.py writes best.safetensors")
    cohort = open_cohort(settings.data, seed=settings.seed)
    print(describe(cohort), file=sys.stderr)
    try:
        result = run(settings, cohort)
        write_records(settings.out / "records.jsonl", result.records)
        table = markdown_table(result.records)
        (settings.out / "table.md").write_text(table)
        about = {"settings": settings.plain(), "cohort": cohort.fingerprint(), "files": result.cohort.fingerprint()}
        about |= {"changed": result.changed, "versions": versions(), "command": sys.argv}
        write_json(settings.out / "run.json", about)
    except (BadPatch, FloatingPointError, OSError, TypeError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None
    print(table)
    print(
        f"{len(result.cohort)} files in {result.root}, {result.changed:.0%} of their numbers changed", file=sys.stderr
    )


if __name__ == "__main__":
    main(sys.argv[1:])
