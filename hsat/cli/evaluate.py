"""White-box robustness of one or several encoders: a page, tables, records, curves; on screen at most 10 lines.

    hsat evaluate --run runs/hsat
    hsat evaluate --checkpoint runs/hsat/best.safetensors --data.root /data/opensrh
    hsat evaluate --checkpoint hidisc=runs/a/final.safetensors,hsat=runs/b/best.safetensors
    hsat evaluate --checkpoint runs/hsat/best.safetensors --classifier linear,knn

A checkpoint written by hsat train says how to build its encoder.  For any other file (published, plain) give
--model.backbone; the projection head is read from the file.  An encoder with dual BatchNorm is attacked and scored in
one branch, --model.branch.  Attacks move what --target says: "decision" (that of the first --classifier,
such as the kNN vote of the first --k), "features" (what it reads) or "embedding" (as in the paper); pgd, bim and mifgsm
start at random points, as in the published evaluation, which makes BIM the same algorithm as PGD: it runs under
--preset paper or where --attacks names it.  --attacks list shows all attacks with a line each.
--threat says what they may change, and in which unit eps is: linf, l2, raw_srh, stain or stain_image (docs/threats.md).
--attacks ensemble runs several attacks in turn and counts a patch as robust only if all of them fail on it
(docs/ensemble.md); with several checkpoints it transfers between them.
--cache keeps embeddings for the next run, --resume goes on after an interruption, --overwrite true begins anew in a
folder that holds results, --compute trades last bits for speed.
--preset paper repeats the published evaluation.  With two checkpoints or more, table.md ends with the differences from
the first, on the same patients; scores.npz keeps what they rest on.  Several GPUs or processes share the work, with the
same results (docs/devices.md):

    torchrun --nproc_per_node=4 -m hsat evaluate --checkpoint runs/hsat/best.safetensors
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from hsat.attacks import NaturalShift
from hsat.cli.attacks import (
    EPS,
    PUBLISHED,
    AttackNames,
    Lengths,
    Threat,
    attacks_under,
    check_radii,
    check_threat,
)
from hsat.cli.classifiers import ClassifierOptions, choose_classifiers, describe_classifiers
from hsat.cli.encoders import NamedEncoder, check_titles, naming_branch, open_encoders, untrained_encoder
from hsat.cli.evaluation import OUT, Loader, PatchSettings, begin_run, open_loaders, remove_state, run_evaluation
from hsat.cli.options import Pixels, StoredModelSettings, say, split_commas
from hsat.cli.ranks import Ranks
from hsat.cli.threads import name_threads
from hsat.data import Cohort
from hsat.eval import (
    PAPER,
    Provenance,
    RunOptions,
    Scoring,
    Target,
    WhiteboxResult,
    evaluate_whitebox,
)
from hsat.eval.default_neighbours import PAPER_K
from hsat.eval.inputs import describe_logits
from hsat.eval.options import TargetName
from hsat.eval.passes import affordable_diagnosis
from hsat.eval.result_files import RunAccount
from hsat.models import Encoder, fold_batchnorm
from hsat.report import short_summary
from hsat.report.evaluation_files import PAGE, write_evaluation
from hsat.training.config import written
from hsat.types import Attack, Classifier

Compute = Literal["channels_last", "bfloat16", "fold_batchnorm"]
"""Ways to compute that are faster on some machines and move the last bits."""


class Evaluate(ClassifierOptions, PatchSettings):
    """Measure the white-box robustness of encoders by classifiers of their embeddings, of patches, slides, patients."""

    attacks: AttackNames = Field(
        written("pgd,mifgsm"), description="names separated by commas; --attacks list shows all of them"
    )
    threat: Threat = Field("linf", description="what the attacks may change; see docs/threats.md")
    eps: Lengths = Field(
        written("4/255,8/255"), description="radii: 4/255,8/255; in the unit of --threat, with its own defaults"
    )
    step_size: Pixels = Field(
        written("2/255"), description="size of a step; eps / 4 where --threat is given and this is not"
    )
    steps: int = Field(10, gt=0, description="gradient steps")
    target: Literal["decision", "features", "embedding"] = Field("decision", description="what the attacks move")
    preset: Literal["paper"] | None = Field(
        None, description="paper: the published evaluation throughout (docs/conventions.md); single options win over it"
    )
    noise: bool = Field(True, description="measure random noise of each eps, too")
    natural_shift: bool = Field(
        True, description="measure stain, blur, JPEG, brightness and sampling shifts, too: 15 passes per patch"
    )
    diagnose: int | None = Field(
        None,
        ge=0,
        description="look for masked gradients on this many patches per attack; if not given, on 8 to 32, as a quarter"
        " of the time allows; 0: none",
    )
    untrained: bool = Field(False, description="measure an untrained encoder of the same kind, too")
    bootstrap: int = Field(1000, ge=0, description="resamples of patients for the intervals")
    gallery: int = Field(6, ge=0, description="most patches in the pictures of perturbations, of each class alike")
    compute: Annotated[list[Compute], BeforeValidator(split_commas)] = Field(
        [], description="channels_last, bfloat16, fold_batchnorm: faster on some machines, other last bits"
    )
    out: Path = Field(written("runs/evaluation-TIME"), description=OUT)
    cache: Path | None = Field(None, description="folder that keeps clean embeddings for later runs")

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
    def _published_evaluation(cls, values: Any) -> Any:
        options = published_options(values)
        return options if options is values else {"natural_shift": False, **options}


def published_options(values: Any) -> Any:
    """Options before they are read: under --preset paper those of the paper, where nobody says otherwise.

    PGD, BIM and MI-FGSM then move the embedding, and 200 neighbours vote.
    """
    published = isinstance(values, dict) and values.get("preset") == "paper"
    return {"target": "embedding", "attacks": PUBLISHED, "k": [PAPER_K], **values} if published else values


def target_and_scoring(target: TargetName, preset: str | None, *, bootstrap: int) -> tuple[Target, Scoring]:
    """What the attacks maximise and how embeddings become numbers.

    Args:
        target: A target that was named wins over the preset.
        preset: None or "paper".
        bootstrap: Resamples of patients.

    Returns:
        Target and scoring of an evaluation.
    """
    if preset != "paper":
        return Target.of(target), Scoring(bootstrap=bootstrap)
    return replace(PAPER.target, objective=target), replace(PAPER.scoring, bootstrap=bootstrap)


def evaluate(settings: Evaluate, cohort: Cohort, ranks: Ranks | None = None) -> dict[str, WhiteboxResult]:
    """Attack and measure every encoder.

    Args:
        settings: The options.
        cohort: With the splits "train" and "val".
        ranks: The place of this process; all ranks call this and get the result of one.

    Returns:
        Results by the name of the encoder.

    Raises:
        ValueError: For options that do not fit the cohort or the encoders.
    """
    check_threat(settings.threat, cohort)
    ranks = ranks or Ranks.alone(settings.device)
    encoders = open_encoders(settings.checkpoint, settings.model, paper=settings.preset == "paper")
    say_logits(settings.model, encoders)
    if settings.untrained:
        encoders.append(NamedEncoder("untrained", untrained_encoder(encoders[0].encoder, seed=settings.seed), ""))
    check_titles(one.title for one in encoders)
    encoders = [one._replace(encoder=convert_encoder(one.encoder, settings.compute)) for one in encoders]
    attacks = attacks_of(settings) | natural_shifts(settings, cohort)
    loaders = open_loaders(settings, cohort, own_size=settings.threat == "raw_srh")
    classifiers = choose_classifiers(settings, loaders[0])
    threads = begin_run(settings, ranks, encoders[0].encoder)
    results = {}
    surrogates = {title: encoder.to(ranks.device) for title, encoder, _ in encoders[: len(settings.checkpoint)]}
    for one in encoders:
        say(f"evaluating {one.title} (target {settings.target})")
        if settings.threat == "raw_srh" and one.encoder.fixed_size is None:
            size = settings.data.image_size
            one.encoder.input_size = (size, size)  # the encoder resizes what the dataset no longer does
        others = {title: encoder for title, encoder in surrogates.items() if encoder is not one.encoder}
        with use_precision(settings.compute, ranks.device):
            result = evaluate_encoder(
                settings, loaders, one, attacks, classifiers=classifiers, surrogates=others, ranks=ranks
            )
        results[one.title] = replace(result, records=name_threads(result.records, threads))
    return results


def evaluate_encoder(
    settings: Evaluate,
    loaders: tuple[Loader, Loader],
    one: NamedEncoder,
    attacks: Mapping[str, Attack],
    *,
    classifiers: Sequence[Classifier],
    surrogates: Mapping[str, Encoder],
    ranks: Ranks,
) -> WhiteboxResult:
    """Attack and measure one encoder.

    Args:
        settings: The options.
        loaders: Of the bank and of the queries.
        one: The encoder, with its name and the digest of its file.
        attacks: By name.
        classifiers: Of its embeddings; the first is attacked.
        surrogates: Other encoders, from which ensembles transfer.
        ranks: The place of this process.

    Returns:
        The result; its records say which branch of a dual BatchNorm was measured.
    """
    bank, queries = loaders
    target, scoring = target_and_scoring(settings.target, settings.preset, bootstrap=settings.bootstrap)
    result = evaluate_whitebox(
        one.encoder.to(ranks.device),
        bank,
        queries,
        attacks,
        classifier=classifiers,
        target=target,
        scoring=scoring,
        run=RunOptions(
            seed=settings.seed,
            cache_dir=settings.cache,
            resume_dir=settings.state_of(one.title),
            noise=settings.noise,
            diagnose=affordable_diagnosis(len(queries.dataset), attacks)  # type: ignore[arg-type]
            if settings.diagnose is None
            else settings.diagnose,
            keep_examples=settings.gallery,
            progress=not settings.quiet,
        ),
        provenance=Provenance(model=one.title, checkpoint=one.digest),
        surrogates=surrogates,
    )
    return naming_branch(result, one.encoder)


def attacks_of(settings: Evaluate) -> dict[str, Any]:
    """The attacks that were asked for; ensembles last, since they take the others into account."""
    stated = settings.threat == "linf" or "step_size" in settings.model_fields_set
    size = settings.step_size if stated else None
    return dict(
        attacks_under(settings.threat, settings.eps, names=settings.attacks, steps=settings.steps, step_size=size)
    )


def natural_shifts(settings: Evaluate, cohort: Cohort) -> dict[str, Attack]:
    """The shifts without an adversary that were asked for; SRH patches have no stains that could change."""
    if not settings.natural_shift:
        return {}
    if cohort.kind == "srh":
        say("natural shift without stain: SRH patches are not stained")
    return dict(NaturalShift.standard(stained=cohort.kind != "srh"))


def write_results(settings: Evaluate, cohort: Cohort, results: dict[str, WhiteboxResult]) -> str:
    """Write records, tables, figures, the page and the account of the run.

    Args:
        settings: The options.
        cohort: What was evaluated.
        results: By the name of the encoder.

    Returns:
        What is printed: at most 10 lines, the last of which says where the page is.
    """
    out, scoring = settings.out, PAPER.scoring if settings.preset == "paper" else Scoring()
    records = [record for result in results.values() for record in result.records]
    about = {"classifiers": describe_classifiers(records)}
    account = RunAccount(settings=settings.plain(), cohort=cohort.fingerprint(), command=sys.argv, about=about)
    scoring = replace(scoring, bootstrap=settings.bootstrap)
    differences = write_evaluation(
        out, results, scoring=scoring, seed=settings.seed, pictures=settings.gallery > 0, account=account
    )
    remove_state(settings)
    lines = short_summary(records, differences=differences)
    return "\n".join((*lines, f"page: {out / PAGE}"))


def main(argv: list[str]) -> None:
    """Read the options, evaluate, write, print."""
    with plain_warnings():
        run_evaluation(Evaluate.load(argv), evaluate, write_results)


@contextmanager
def plain_warnings() -> Iterator[None]:
    """A block whose warnings for users are lines for people, each once: without path, number of line and code."""
    said: set[str] = set()

    def show(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
    ) -> None:
        if not issubclass(category, UserWarning):
            before(message, category, filename, lineno, file, line)
        elif str(message) not in said:
            said.add(str(message))
            say(f"note: {message}")

    with warnings.catch_warnings():
        warnings.filterwarnings("always", category=UserWarning)
        before, warnings.showwarning = warnings.showwarning, show
        yield


def say_logits(model: StoredModelSettings, encoders: Sequence[NamedEncoder]) -> None:
    """Say of which encoders the output are a classifier's logits, where no --model.features picks another one.

    Args:
        model: The options.
        encoders: With their names.
    """
    for one in encoders if model.features is None else ():
        if note := describe_logits(one.encoder):
            say(f"{one.title}: {note}")


def convert_encoder(encoder: Encoder, ways: Sequence[Compute]) -> Encoder:
    """The encoder, or a copy of it with BatchNorm folded, its weights laid out as asked for."""
    if "fold_batchnorm" in ways:
        encoder = fold_batchnorm(encoder)
    return encoder.to(memory_format=torch.channels_last) if "channels_last" in ways else encoder


def use_precision(ways: Sequence[Compute], device: torch.device) -> AbstractContextManager[object]:
    """The block in which to evaluate: autocast to bfloat16, or nothing."""
    return torch.autocast(device.type, torch.bfloat16) if "bfloat16" in ways else nullcontext()
