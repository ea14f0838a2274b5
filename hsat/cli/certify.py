"""Certified robustness of one or several encoders: records.jsonl, table.md, curves of certified accuracy.

    hsat certify --checkpoint runs/hsat/best.safetensors --data.root /data/opensrh --sigma 0.1
    hsat certify --checkpoint hidisc=runs/a/final.safetensors,hsat=runs/b/best.safetensors --check 50

The decision (--classifier) is smoothed with Gaussian noise; what it then answers cannot be changed by any attack of an
L2 norm below the certified radius, in units of the pixel range (arXiv:1902.02918; docs/honesty.md).  Every patch costs
--selection + --samples passes, so begin with a few: --query_patches 100.  Encoders that never saw noise certify little.
--resume goes on after an interruption, and torchrun shares the work among processes, as for hsat evaluate.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from hsat.cli.classifiers import ClassifierOptions, choose_classifier, describe_classifiers
from hsat.cli.encoders import open_encoders
from hsat.cli.evaluation import OUT, Loader, PatchSettings, begin_run, open_loaders, remove_state, run_evaluation
from hsat.cli.options import say, split_commas
from hsat.cli.ranks import Ranks
from hsat.cli.threads import name_threads
from hsat.data import Cohort
from hsat.distributed import world_rank
from hsat.eval import (
    CertificateResult,
    CertifyOptions,
    CheckOptions,
    Provenance,
    Record,
    RunOptions,
    Scoring,
    Smoothing,
    certify,
    check_certificates,
)
from hsat.eval.result_files import RunAccount, save_records
from hsat.models import Encoder
from hsat.report import markdown_table, plot_certified_accuracy
from hsat.training.config import written

Radii = Annotated[list[float], BeforeValidator(split_commas)]


class Certify(ClassifierOptions, PatchSettings):
    """Certify the decision of a classifier of embeddings at patch, slide and patient level."""

    sigma: float = Field(0.1, gt=0, description="standard deviation of the noise, in units of the pixel range")
    samples: int = Field(1000, gt=0, description="noisy copies of a patch that bound its radius")
    selection: int = Field(100, gt=0, description="noisy copies of a patch that choose its class")
    alpha: float = Field(0.001, gt=0, lt=0.5, description="probability with which a certificate may be wrong")
    radii: Radii = Field(written("0,0.05,0.1,0.25,0.5,0.75,1"), description="L2 radii of the curve")
    how: Literal["mean", "vote"] = Field("mean", description="how patches decide about slides and patients")
    noisy_bank: bool = Field(True, description="embed the bank with the same noise")
    check: int = Field(0, ge=0, description="attack this many certified patches, to try to break the certificates")
    layer: Literal["features", "embedding"] = Field("features", description="what the classifier reads")
    bootstrap: int = Field(1000, ge=0, description="resamples of patients for the intervals")
    seed: int = Field(0, ge=0, description="of the noise")
    out: Path = Field(written("runs/certificates-TIME"), description=OUT)


def evaluate(settings: Certify, cohort: Cohort, ranks: Ranks) -> list[Record]:
    """Certify every encoder, and attack its certificates where asked.

    Args:
        settings: The options.
        cohort: With the splits "train" and "val".
        ranks: The place of this process; all ranks call this and get the result of one.

    Returns:
        All records.
    """
    options = CertifyOptions(radii=settings.radii, pooling=settings.how, noisy_bank=settings.noisy_bank)
    smoothing = Smoothing(
        sigma=settings.sigma,
        selection=settings.selection,
        samples=settings.samples,
        alpha=settings.alpha,
        seed=settings.seed,
        chunk=settings.batch_size,
    )
    bank, queries = open_loaders(settings, cohort)
    classifier = choose_classifier(settings, bank)
    encoders = open_encoders(settings.checkpoint, settings.model)
    threads = begin_run(settings, ranks, encoders[0].encoder)
    records: list[Record] = []
    for title, encoder, digest in encoders:
        say(f"certifying {title} (sigma {settings.sigma:g})")
        certified = certify(
            encoder.to(ranks.device),
            bank,
            queries,
            smoothing,
            options=options,
            classifier=classifier,
            scoring=Scoring(layer=settings.layer, bootstrap=settings.bootstrap),
            run=RunOptions(seed=settings.seed, resume_dir=settings.state_of(title), progress=not settings.quiet),
            provenance=Provenance(model=title, checkpoint=digest),
        )
        if settings.check:
            attack_certificates(settings, title, encoder, queries, certified)
        records += certified.records
    return list(name_threads(records, threads))


def attack_certificates(
    settings: Certify, title: str, encoder: Encoder, queries: Loader, certified: CertificateResult
) -> None:
    """Attack certified patches and print what came of it.

    Args:
        settings: The options.
        title: Name of the encoder.
        encoder: The encoder.
        queries: The patches that were certified.
        certified: Their certificates.

    Raises:
        SystemExit: For certificates that do not hold.
    """
    if not (certified.levels["patch"].radius > 0).any():
        say(f"{title}: no patch is certified, nothing to check")
        return
    check = check_certificates(
        encoder,
        certified,
        queries,
        options=CheckOptions(limit=settings.check, samples=settings.samples),
        run=RunOptions(progress=not settings.quiet and world_rank() == 0),
    )
    sentence = f"{title}: {check.tested} certified patches attacked, {check.changed} decisions changed"
    say(f"{sentence} (p = {check.p_value:.3g})")
    if check.violated:
        raise ValueError(f"{sentence}: the certificates of {title} are wrong; please report this")


def write_results(settings: Certify, cohort: Cohort, records: list[Record]) -> str:
    """Write records, table, curves and the account of the run.

    Args:
        settings: The options.
        cohort: What was evaluated.
        records: Of all encoders.

    Returns:
        The table, as Markdown.
    """
    table = markdown_table(records, metrics=("certified_accuracy",))
    (settings.out / "table.md").write_text(table)
    about = {"classifiers": describe_classifiers(records)}
    account = RunAccount(settings=settings.plain(), cohort=cohort.fingerprint(), command=sys.argv, about=about)
    save_records(settings.out, records, account)
    plot_certified_accuracy(records, settings.out / "certified_accuracy.png")
    remove_state(settings)
    return table


def main(argv: list[str]) -> None:
    """Read the options, certify, write, print."""
    run_evaluation(Certify.load(argv), evaluate, write_results)
