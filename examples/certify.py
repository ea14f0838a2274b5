"""Certified robustness of one or several encoders: records.jsonl, table.md, curves of certified accuracy.

    python examples/certify.py --checkpoint runs/hsat/best.safetensors --data.root /data/opensrh --sigma 0.1
    python examples/certify.py --checkpoint hidisc=runs/a/final.safetensors,hsat=runs/b/best.safetensors --challenge 50

The kNN vote is smoothed with Gaussian noise; what it then answers cannot be changed by any attack of an L2 norm below
the certified radius, in units of the pixel range (arXiv:1902.02918; docs/honesty.md).  Every patch costs
--selection + --samples passes, so begin with a few: --query_patches 100.  Encoders that never saw noise certify little.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field

from cohorts import describe, open_cohort
from evaluate_whitebox import load_named, loaders
from hsat.data import BadPatch, Cohort
from hsat.eval import (
    CertificateResult,
    Record,
    Smoothing,
    certify,
    challenge_certificates,
    markdown_table,
    plot_certified_accuracy,
    write_records,
)
from runs import device_named, versions, write_json
from settings import DataSettings, Names, Settings, StoredModelSettings, listed

Radii = Annotated[list[float], BeforeValidator(listed)]


class Certify(Settings):
    """Certify the kNN vote of encoders at patch, slide and patient level."""

    checkpoint: Names = Field([], description="file, or name=file, or several with commas between")
    data: DataSettings = DataSettings()
    model: StoredModelSettings = StoredModelSettings()
    sigma: float = Field(0.1, gt=0, description="standard deviation of the noise, in units of the pixel range")
    samples: int = Field(1000, gt=0, description="noisy copies of a patch that bound its radius")
    selection: int = Field(100, gt=0, description="noisy copies of a patch that choose its class")
    alpha: float = Field(0.001, gt=0, lt=0.5, description="probability with which a certificate may be wrong")
    radii: Radii = Field([0.0, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0], description="L2 radii of the curve")
    how: Literal["mean", "vote"] = Field("mean", description="how patches decide about slides and patients")
    noisy_bank: bool = Field(True, description="embed the bank with the same noise")
    challenge: int = Field(0, ge=0, description="attack this many certified patches, to try to break the certificates")
    layer: Literal["features", "embedding"] = Field("features", description="what kNN reads")
    k: int = Field(200, gt=0, description="neighbours")
    temperature: float = Field(0.07, gt=0, description="of the kNN vote")
    bank_patches: int | None = Field(None, gt=0, description="use this many training patches; all if not given")
    query_patches: int | None = Field(None, gt=0, description="certify this many validation patches; all if not given")
    batch_size: int = Field(64, gt=0, description="patches, or noisy copies, per batch")
    bootstrap: int = Field(1000, ge=0, description="resamples of patients for the intervals")
    seed: int = Field(0, ge=0, description="of the noise")
    device: str = Field("auto", description="cpu, cuda, cuda:1; auto takes a GPU where there is one")
    out: Path = Field(Path("runs/certificates"), description="folder for the results")
    quiet: bool = Field(False, description="no progress bars")
    compat: ClassVar[None] = None  # load_named asks; the published evaluation has no certificates


def run(settings: Certify, cohort: Cohort) -> list[Record]:
    """Certify every encoder, challenge it where asked; its records."""
    device = device_named(settings.device)
    bank, queries = loaders(settings, cohort)
    smoothing = Smoothing(
        sigma=settings.sigma,
        selection=settings.selection,
        samples=settings.samples,
        alpha=settings.alpha,
        seed=settings.seed,
        chunk=settings.batch_size,
    )
    records: list[Record] = []
    encoders = [load_named(settings, text) for text in settings.checkpoint]
    if len({name for name, _, _ in encoders}) < len(encoders):
        raise ValueError("two encoders have one name; name them: --checkpoint a=FILE,b=FILE")
    for name, encoder, digest in encoders:
        print(f"certifying {name} (sigma {settings.sigma:g})", file=sys.stderr)
        found = certify(
            encoder.to(device),
            bank,
            queries,
            smoothing=smoothing,
            radii=settings.radii,
            layer=settings.layer,
            k=settings.k,
            temperature=settings.temperature,
            how=settings.how,
            noisy_bank=settings.noisy_bank,
            bootstrap=settings.bootstrap,
            model=name,
            checkpoint=digest,
            progress=not settings.quiet,
        )
        if settings.challenge:
            challenge(settings, name, encoder, queries, found)
        records += found.records
    return records


def challenge(settings: Certify, name: str, encoder: object, queries: object, found: CertificateResult) -> None:
    """Attack certified patches and say what came of it; a refuted certificate ends the program."""
    if not (found.levels["patch"].radius > 0).any():
        print(f"{name}: no patch is certified, nothing to challenge", file=sys.stderr)
        return
    result = challenge_certificates(
        encoder, found, queries, limit=settings.challenge, samples=settings.samples, progress=not settings.quiet
    )
    told = f"{name}: {result.tested} certified patches attacked, {result.changed} decisions changed"
    print(f"{told} (p = {result.p_value:.3g})", file=sys.stderr)
    if result.refuted:
        raise ValueError(f"{told}: the certificates of {name} are wrong; please report this")


def main(argv: list[str]) -> None:
    """Read the options, certify, write, print."""
    settings = Certify.load(argv)
    if not settings.checkpoint:
        raise SystemExit("error: give --checkpoint FILE, or name=FILE; train_hsat.py writes best.safetensors")
    cohort = open_cohort(settings.data, seed=settings.seed)
    print(describe(cohort), file=sys.stderr)
    try:
        settings.out.mkdir(parents=True, exist_ok=True)
        records = run(settings, cohort)
        write_records(settings.out / "records.jsonl", records)
        table = markdown_table(records, metrics=("certified_accuracy",))
        (settings.out / "table.md").write_text(table)
        about = {"settings": settings.plain(), "cohort": cohort.fingerprint(), "versions": versions()}
        write_json(settings.out / "run.json", about | {"command": sys.argv})
    except (BadPatch, OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None
    try:
        plot_certified_accuracy(records, settings.out / "certified_accuracy.png")
    except ImportError as error:
        print(f"no figures: {error}", file=sys.stderr)
    print(table)
    print(f"results are in {settings.out}", file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1:])
