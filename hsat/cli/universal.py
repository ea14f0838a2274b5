r"""One label-free perturbation for all images, fitted on one encoder and measured on every encoder.

    hsat universal --checkpoint hidisc=runs/a/final.safetensors,hsat=runs/b/best.safetensors \
        --data.root /data/opensrh --eps 8/255

It is fitted on the training patches of --fit_on (the first checkpoint), without their labels, and added to the
validation patches; noise of the same size is beside it.  Writes universal.safetensors (`FittedUniversal.load` reads
it), records.jsonl, table.md and run.json.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field

from hsat.attacks import L2, FittedUniversal, Linf, RandomNoise, UniversalPerturbation
from hsat.attacks.threat import eps_text
from hsat.cli.attacks import Lengths, check_radii
from hsat.cli.classifiers import ClassifierOptions, choose_classifiers, describe_classifiers
from hsat.cli.cohort import describe, open_cohort
from hsat.cli.encoders import name_file, open_encoders
from hsat.cli.evaluation import OUT, check_folder, open_loaders, remove_results, upper_bound_note
from hsat.cli.failures import explain_failure
from hsat.cli.folders import choose_folder
from hsat.cli.image_size import settle_image_size
from hsat.cli.options import EvaluationDataSettings, Names, Pixels, StoredModelSettings, device_of, say
from hsat.cli.threads import Threads, computing_threads
from hsat.cli.training_runs import RunSettings, check_synthetic
from hsat.data import Cohort
from hsat.eval import Provenance, Record, RunOptions, Scoring, evaluate_whitebox, write_records
from hsat.eval.announcements import announce_fit
from hsat.models import frozen
from hsat.report import markdown_table
from hsat.run_folder import lock_folder, write_run_file
from hsat.training.config import written


class Universal(ClassifierOptions, RunSettings):
    """Fit a universal perturbation on one encoder and measure it on all."""

    checkpoint: Names = Field([], description="file, or name=file, or several with commas between")
    fit_on: str | None = Field(None, description="name of the encoder it is fitted on; the first if not given")
    data: EvaluationDataSettings = EvaluationDataSettings()
    model: StoredModelSettings = StoredModelSettings()
    threat: Literal["linf", "l2"] = Field("linf", description="the ball of the perturbation")
    eps: Lengths = Field(written("8/255"), description="its radius; one")
    step_size: Pixels | None = Field(None, description="size of a step; eps / 8 if not given")
    epochs: int = Field(5, gt=0, description="passes over the training patches")
    distance: Literal["cosine", "l2", "l1"] = Field("cosine", description="drift of the features that is climbed")
    bank_patches: int | None = Field(None, gt=0, description="use this many training patches; all if not given")
    query_patches: int | None = Field(None, gt=0, description="measure on this many validation patches; all if not")
    batch_size: int = Field(64, gt=0, description="patches per batch")
    bootstrap: int = Field(1000, ge=0, description="resamples of patients for the intervals")
    seed: int = Field(0, ge=0, description="of the random start")
    device: str = Field("auto", description="cpu, cuda, cuda:1; auto takes a GPU where there is one")
    threads: Threads = Field("auto", description="threads of a CPU; auto: torch's own number")
    out: Path = Field(written("runs/universal-TIME"), description=OUT)
    overwrite: bool = Field(False, description="remove the results of an earlier run in --out first")
    quiet: bool = Field(False, description="no progress bars")


def run(settings: Universal, cohort: Cohort) -> tuple[FittedUniversal, list[Record]]:
    """Fit one perturbation and measure it on every encoder.

    Args:
        settings: The options.
        cohort: With the splits "train" and "val".

    Returns:
        The perturbation, and the records of all encoders.

    Raises:
        ValueError: For several radii, and for an encoder to fit on that is none of those given.
    """
    if len(settings.eps) != 1:
        raise ValueError(f"one perturbation has one radius; --eps has {len(settings.eps)}")
    (eps,) = check_radii(settings.threat, settings.eps)
    device, (bank, queries) = device_of(settings.device), open_loaders(settings, cohort)
    classifiers = choose_classifiers(settings, bank)
    encoders = {
        title: (encoder.to(device), digest)
        for title, encoder, digest in open_encoders(settings.checkpoint, settings.model)
    }
    source = settings.fit_on or next(iter(encoders))
    if source not in encoders:
        raise ValueError(f"--fit_on {source} is none of the encoders {', '.join(encoders)}")
    threat = Linf(eps) if settings.threat == "linf" else L2(eps)
    fit = UniversalPerturbation(
        threat=threat, step_size=settings.step_size or eps / 8, epochs=settings.epochs, distance=settings.distance
    )
    encoder, _ = encoders[source]
    say(f"fitting on {source}")
    if not settings.quiet:
        announce_fit(encoder, bank, epochs=settings.epochs, device=device)
    with frozen(encoder):
        generator = torch.Generator().manual_seed(settings.seed)
        note = f"train split of {cohort.fingerprint()[:12]} on {source}"
        delta = fit.fit(bank, encoder.features, generator=generator, device=device, note=note)
    say("mean drift of each pass: " + ", ".join(f"{value:.4g}" for value in delta.history))
    name = f"universal-{eps_text(eps).removesuffix('/255')}"
    records: list[Record] = []
    for title, (other, digest) in encoders.items():
        result = evaluate_whitebox(
            other,
            bank,
            queries,
            {name: delta, name.replace("universal", "noise"): RandomNoise(threat)},
            classifier=classifiers,
            target="features",  # what the perturbation was fitted on
            scoring=Scoring(bootstrap=settings.bootstrap),
            run=RunOptions(seed=settings.seed, noise=False, progress=not settings.quiet),
            provenance=Provenance(model=title, checkpoint=digest),
        )
        records += result.records
    return delta, records


def main(argv: list[str]) -> None:
    """Read the options, fit, measure, write, print."""
    settings = Universal.load(argv)
    if not settings.checkpoint:
        raise SystemExit("error: give --run FOLDER, --checkpoint FILE or name=FILE; hsat train writes best.safetensors")
    try:
        settings = settings.model_copy(update={"out": choose_folder(settings.out)})
        with lock_folder(settings.out), computing_threads(settings.threads):
            check_folder(settings.out, overwrite=settings.overwrite)
            if settings.data.root is None:
                check_synthetic([name_file(text)[1] for text in settings.checkpoint])
            cohort = open_cohort(settings.data, seed=settings.seed)
            say(describe(cohort))
            files = [name_file(text)[1] for text in settings.checkpoint]
            data = settle_image_size(settings.data, cohort, files, settings.model)
            settings = settings.model_copy(update={"data": data})
            delta, records = run(settings, cohort)
            if settings.overwrite:
                remove_results(settings.out)
            delta.save(settings.out / "universal.safetensors")
            write_records(settings.out / "records.jsonl", records)
            table = markdown_table(records)
            (settings.out / "table.md").write_text(table)
            write_run_file(
                settings.out,
                settings.plain(),
                cohort=cohort.fingerprint(),
                command=sys.argv,
                history=delta.history,
                classifiers=describe_classifiers(records),
            )
    except Exception as error:
        message = explain_failure(error, workers=settings.data.workers, resumable=False)
        if message is None:
            raise
        raise SystemExit(f"error: {message}") from None
    print(table)
    say(f"results are in {settings.out}")
    say(upper_bound_note("features"))
