"""White-box robustness of one or several encoders: records.jsonl, table.md, curves and pictures.

    python examples/evaluate_whitebox.py --checkpoint runs/hsat/best.safetensors --data.root /data/opensrh
    python examples/evaluate_whitebox.py --checkpoint hidisc=runs/a/final.safetensors,hsat=runs/b/best.safetensors

A checkpoint written by train_hsat.py says how to build its encoder.  For any other file (published, plain) give
--model.backbone; the projection head is read from the file.  An encoder with dual BatchNorm is attacked and scored in
one branch, --model.branch.  Attacks move what --target says, "features" (what kNN reads) or "embedding" (as in
the paper) or "knn" (the vote itself, of the first --k); they start at random points, as in the published evaluation,
which makes BIM the same algorithm as PGD.  --threat says what they may change, and in which unit eps is: linf, l2,
raw_srh, stain or stain_image (docs/threats.md).  --attacks strongest is an ensemble that fells patches one by one
(docs/strongest.md); with several checkpoints it transfers between them.  --cache keeps embeddings for the next run,
--resume goes on after an interruption, --compute trades last bits for speed.  --compat paper repeats the published
evaluation.  With two checkpoints or more, table.md ends with the differences from the first, on the same patients;
scores.npz keeps what they rest on.  Several GPUs or processes share the work, with the same results
(docs/devices.md):

    torchrun --nproc_per_node=4 examples/evaluate_whitebox.py --checkpoint runs/hsat/best.safetensors
"""

from __future__ import annotations

import shutil
import sys
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from casualties import folder_name
from cohorts import describe, open_cohort
from computing import Way, computing_as, precision
from encoders import naming_branch, stored_encoder
from hsat.data import BadPatch, Cohort, PatchDataset, patch_loader
from hsat.eval import WhiteboxResult, evaluate_whitebox
from hsat.eval.engine.crew import RankStoppedError
from hsat.models import build_encoder, checkpoint_hash, is_dual, set_branch
from hsat.training import assert_ranks_agree
from one_voice import one_voice
from ranks import Ranks, joined, one_after_the_first
from runs import device_named, same_on_all_ranks
from settings import Counts, DataSettings, Names, Pixels, Settings, StoredModelSettings, listed
from threats import EPS, Lengths, Threat, attacks_under, check_radii, check_threat, strongest_under
from whitebox_files import STATE, write_results

STRONGEST = "strongest"


class EvaluateWhitebox(Settings):
    """Measure the white-box robustness of encoders by kNN at patch, slide and patient level."""

    checkpoint: Names = Field([], description="file, or name=file, or several with commas between")
    data: DataSettings = DataSettings()
    model: StoredModelSettings = StoredModelSettings()
    attacks: Names = Field(
        ["pgd", "bim", "mifgsm"], description="names separated by commas; strongest is the ensemble of attacks"
    )
    threat: Threat = Field("linf", description="what the attacks may change; see docs/threats.md")
    eps: Lengths = Field(EPS["linf"], description="radii: 4/255,8/255; in the unit of --threat, with its own defaults")
    step_size: Pixels = Field(2 / 255, description="size of a step; eps / 4 where --threat is given and this is not")
    steps: int = Field(10, gt=0, description="gradient steps")
    k: Counts = Field([200], description="neighbours; several with commas between")
    temperature: float = Field(0.07, gt=0, description="of the kNN vote")
    target: Literal["features", "embedding", "knn"] = Field("features", description="what the attacks move")
    compat: Literal["paper"] | None = Field(
        None, description="paper: the published evaluation throughout (docs/conventions.md); single options win over it"
    )
    noise: bool = Field(True, description="measure random noise of each eps, too")
    diagnose: int = Field(
        32, ge=0, description="look for masked gradients on this many patches per attack (about 80 steps each); 0: none"
    )
    untrained: bool = Field(False, description="measure an untrained encoder of the same kind, too")
    bank_patches: int | None = Field(None, gt=0, description="use this many training patches; all if not given")
    query_patches: int | None = Field(None, gt=0, description="attack this many validation patches; all if not given")
    batch_size: int = Field(64, gt=0, description="patches per batch")
    bootstrap: int = Field(1000, ge=0, description="resamples of patients for the intervals")
    gallery: int = Field(6, ge=0, description="patches in the picture of perturbations")
    seed: int = Field(0, ge=0, description="of the attacks' random starts")
    device: str = Field("auto", description="cpu, cuda, cuda:1; auto takes a GPU where there is one")
    rank_timeout: float = Field(300, gt=0, description="seconds to wait for other ranks to start")
    compute: Annotated[list[Way], BeforeValidator(listed)] = Field(
        [], description="channels_last, bfloat16, fold_batchnorm: faster on some machines, other last bits"
    )
    out: Path = Field(Path("runs/whitebox"), description="folder for the results")
    cache: Path | None = Field(None, description="folder that keeps clean embeddings for later runs")
    resume: bool = Field(False, description="go on with the finished batches of an interrupted run in --out")
    quiet: bool = Field(False, description="no progress bars")

    @model_validator(mode="before")
    @classmethod
    def _radii_of_the_threat(cls, values: Any) -> Any:
        threat = values.get("threat") if isinstance(values, dict) else None
        return {"eps": EPS[threat], **values} if threat in EPS else values

    @field_validator("eps")
    @classmethod
    def _radii_fit(cls, eps: list[float], info: ValidationInfo) -> list[float]:
        return check_radii(info.data.get("threat", "linf"), eps)

    @model_validator(mode="before")
    @classmethod
    def _published_target(cls, values: Any) -> Any:
        """Under --compat paper the attacks move the embedding, unless --target says otherwise."""
        published = isinstance(values, dict) and values.get("compat") == "paper"
        return {"target": "embedding", **values} if published else values


def load_named(settings: EvaluateWhitebox, text: str) -> tuple[str, torch.nn.Module, str]:
    """(name, encoder, SHA-256 of its file) of `file` or `name=file`."""
    name, file = ("", text) if Path(text).exists() or "=" not in text else text.split("=", 1)
    path = Path(file)
    name = name or (path.parent.name if path.stem in ("best", "final", "last") else path.stem)
    try:
        encoder = stored_encoder(settings.model, path, alone=len(settings.checkpoint) < 2)
    except OSError as error:
        raise ValueError(f"--checkpoint {text}: {error}") from error
    if settings.compat == "paper" and settings.model.branch is None and is_dual(encoder):
        set_branch(encoder, "normal")  # the published evaluation attacks "pgd" and scores "normal"
        print(f"{path}: --compat paper scores branch normal; the attacks go through pgd", file=sys.stderr)
    return name, encoder, checkpoint_hash(path)


def loaders(settings: EvaluateWhitebox, cohort: Cohort) -> tuple[object, object]:
    """The bank (clean training patches) and the queries (validation patches), thinned evenly where asked."""
    found, on_gpu = [], device_named(settings.device).type == "cuda"
    for split, wanted in (("train", settings.bank_patches), ("val", settings.query_patches)):
        own_size = getattr(settings, "threat", "") == "raw_srh"  # resized, they are not made of two channels any more
        dataset = PatchDataset(cohort, split, image_size=None if own_size else settings.data.image_size)
        if wanted is not None and wanted < len(dataset):
            dataset.rows = dataset.rows[np.linspace(0, len(dataset) - 1, wanted).round().astype(int)]
        workers = settings.data.workers
        found.append(patch_loader(dataset, batch_size=settings.batch_size, workers=workers, pin_memory=on_gpu))
    return found[0], found[1]


def evaluate(settings: EvaluateWhitebox, cohort: Cohort, ranks: Ranks | None = None) -> dict[str, WhiteboxResult]:
    """Results by the name of the encoder.

    ranks: which of several processes this is; all of them call this, and all get the results of one.
    """
    check_threat(settings.threat, cohort)
    ranks = ranks or Ranks(0, 1, device_named(settings.device))
    device = ranks.device
    bank, queries = loaders(settings, cohort)
    encoders = [load_named(settings, text) for text in settings.checkpoint]
    if settings.untrained:
        spec = {key: value for key, value in encoders[0][1].spec.items() if key != "input_size"}
        encoders.append(("untrained", build_encoder(**spec, seed=settings.seed).eval(), ""))
    titles = [title for title, _, _ in encoders]
    if twice := {title for title in titles if titles.count(title) > 1}:
        raise ValueError(
            f"two encoders are called {', '.join(map(repr, twice))}; name them: --checkpoint a=FILE,b=FILE"
        )
    encoders = [(title, computing_as(encoder, settings.compute), digest) for title, encoder, digest in encoders]
    attacks = attacks_of(settings)
    results = {}
    if ranks.first and not (settings.resume or ranks.again):
        shutil.rmtree(settings.out / STATE, ignore_errors=True)
    ranks.begin()
    surrogates = {title: encoder.to(device) for title, encoder, _ in encoders[: len(settings.checkpoint)]}
    for title, encoder, digest in encoders:
        print(f"evaluating {title} (target {settings.target})", file=sys.stderr)
        if settings.threat == "raw_srh" and encoder.fixed_size is None:
            encoder.input_size = (settings.data.image_size,) * 2  # the encoder resizes what the dataset no longer does
        with precision(settings.compute, device):
            result = evaluate_whitebox(
                encoder.to(device),
                bank,
                queries,
                attacks,
                target=settings.target,
                compat=settings.compat,
                k=settings.k,
                temperature=settings.temperature,
                seed=settings.seed,
                bootstrap=settings.bootstrap,
                noise=settings.noise,
                diagnose=settings.diagnose,
                model=title,
                checkpoint=digest,
                progress=not settings.quiet,
                keep_examples=settings.gallery,
                surrogates={name: other for name, other in surrogates.items() if other is not encoder},
                cache=settings.cache,
                state=settings.out / STATE / folder_name(title),
            )
        results[title] = naming_branch(result, encoder)
    return results


def attacks_of(settings: EvaluateWhitebox) -> dict[str, Any]:
    """The attacks that were asked for; ensembles last, since they take the others into account."""
    stated = settings.threat == "linf" or "step_size" in settings.model_fields_set
    size = settings.step_size if stated else None
    names = [name for name in settings.attacks if name.lower() != STRONGEST]
    found: dict[str, Any] = attacks_under(
        settings.threat, settings.eps, names=names, steps=settings.steps, step_size=size
    )
    if len(names) < len(settings.attacks):
        found |= strongest_under(settings.threat, settings.eps, steps=settings.steps, step_size=size)
    return found


def opened(settings: EvaluateWhitebox, ranks: Ranks) -> Cohort:
    """The cohort, after the first rank has made the folder for the results and found it free."""
    assert_ranks_agree(settings=same_on_all_ranks(settings.plain()))
    with one_after_the_first(ranks):  # which may write the synthetic cohort
        cohort = open_cohort(settings.data, seed=settings.seed)
        if ranks.first:
            print(describe(cohort), file=sys.stderr)
            settings.out.mkdir(parents=True, exist_ok=True)
            if (settings.out / STATE).exists() and not (settings.resume or ranks.again):
                raise ValueError(
                    f"{settings.out} holds an interrupted run; add --resume to go on with it, or delete"
                    f" {settings.out / STATE} to begin anew"
                )
    assert_ranks_agree(cohort=cohort, seed=settings.seed)
    return cohort


def main(argv: list[str]) -> None:
    """Read the options, evaluate, write, print."""
    settings = EvaluateWhitebox.load(argv)
    if not settings.checkpoint:
        raise SystemExit("error: give --checkpoint FILE, or name=FILE; train_hsat.py writes best.safetensors")
    try:
        with joined(settings.device, patience=timedelta(seconds=settings.rank_timeout)) as ranks, one_voice(ranks):
            cohort = opened(settings, ranks)
            results = evaluate(settings, cohort, ranks)
        if not ranks.first:
            return
        table = write_results(settings, cohort, results)
    except (BadPatch, FloatingPointError, OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None
    except RankStoppedError as error:
        raise SystemExit(f"error: {error}; the same command with --resume goes on with the finished batches") from None
    print(table)
    print(f"results are in {settings.out}", file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1:])
