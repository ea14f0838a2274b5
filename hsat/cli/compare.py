"""What each convention of the published evaluation does to the numbers of one encoder.

    hsat compare --checkpoint runs/hsat/best.safetensors --data.root /data/opensrh

The encoder is evaluated under hsat's conventions, under the published ones (all at once, as with --preset paper), and
under hsat's with one convention switched at a time.  Where only arithmetic changes, nothing is attacked again.
records.jsonl holds every number (settings.convention says which evaluation it belongs to), table.md the differences.
docs/conventions.md explains them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pydantic import Field

from hsat.classifiers import KNNClassifier
from hsat.cli.classifiers import say_default_k
from hsat.cli.cohort import describe, open_cohort
from hsat.cli.encoders import naming_branch, stored_encoder
from hsat.cli.evaluation import OUT, check_folder, open_loaders, remove_results
from hsat.cli.failures import explain_failure
from hsat.cli.folders import choose_folder
from hsat.cli.image_size import settle_image_size
from hsat.cli.options import (
    EvaluationDataSettings,
    Names,
    Pixels,
    PixelsList,
    StoredModelSettings,
    device_of,
    say,
)
from hsat.cli.threads import Threads, computing_threads
from hsat.cli.training_runs import RunSettings, check_synthetic
from hsat.data import Cohort
from hsat.eval import (
    CONVENTIONS,
    PAPER,
    Provenance,
    Record,
    RunOptions,
    Scoring,
    Target,
    WhiteboxResult,
    conventions_table,
    evaluate_whitebox,
    paper_attacks,
    rescore,
    write_records,
)
from hsat.models import active_branch, checkpoint_hash, is_dual, set_branch
from hsat.report.summary import chance_line
from hsat.run_folder import lock_folder, write_run_file
from hsat.training.config import written

OWN, PUBLISHED = "hsat", "the published code"
SCORING = {
    "pooling": Scoring(pooling=PAPER.scoring.pooling),
    "absent classes": Scoring(absent_classes=PAPER.scoring.absent_classes),
    "grouping": Scoring(group_by=PAPER.scoring.group_by),
}
"""The conventions of arithmetic, each switched alone."""
TITLES = {"accuracy": "Acc", "mca": "MCA", "map": "mAP", "top2": "Top-2", "top3": "Top-3"}


class Compare(RunSettings):
    """Evaluate one encoder under hsat's conventions and the paper's, and with one convention switched at a time."""

    checkpoint: Path | None = Field(None, description="file of the encoder")
    data: EvaluationDataSettings = EvaluationDataSettings()
    model: StoredModelSettings = StoredModelSettings()
    attacks: Names = Field(written("pgd,bim,mifgsm"), description="names separated by commas")
    eps: PixelsList = Field(written("8/255"), description="radii: 4/255,8/255")
    step_size: Pixels = Field(written("2/255"), description="size of a step")
    steps: int = Field(10, gt=0, description="gradient steps")
    k: int | None = Field(
        None, gt=0, description="neighbours; 200 for OpenSRH if not given, else by the size of the bank"
    )
    temperature: float = Field(0.07, gt=0, description="of the kNN vote")
    metrics: Names = Field(written("accuracy,mca,map"), description="shown in table.md: accuracy, mca, map, top2, top3")
    bank_patches: int | None = Field(None, gt=0, description="use this many training patches; all if not given")
    query_patches: int | None = Field(None, gt=0, description="attack this many validation patches; all if not given")
    batch_size: int = Field(64, gt=0, description="patches per batch")
    bootstrap: int = Field(1000, ge=0, description="resamples of patients for the intervals")
    seed: int = Field(0, ge=0, description="of the attacks' random starts")
    device: str = Field("auto", description="cpu, cuda, cuda:1; auto takes a GPU where there is one")
    threads: Threads = Field("auto", description="threads of a CPU; auto: torch's own number")
    out: Path = Field(written("runs/conventions-TIME"), description=OUT)
    overwrite: bool = Field(False, description="remove the results of an earlier run in --out first")
    quiet: bool = Field(False, description="no progress bars")


class Evaluation:
    """The encoder and the patches, to be attacked as often as conventions want it."""

    def __init__(self, settings: Compare, cohort: Cohort, file: Path) -> None:
        self.settings, self.name, self.digest = settings, file.stem, checkpoint_hash(file)
        self.encoder = stored_encoder(settings.model, file).to(device_of(settings.device))
        self.dual = is_dual(self.encoder)
        self.bank, self.queries = open_loaders(settings, cohort)
        self.k = settings.k or say_default_k(self.bank)

    def attacked(self, *, switched: Sequence[str], published: bool = False) -> WhiteboxResult:
        """The evaluation with these conventions of stage "attack" as published, the others hsat's.

        published: The published arithmetic as well.
        """
        chosen = self.settings
        attacks = paper_attacks(
            chosen.eps,
            steps=chosen.steps,
            step_size=chosen.step_size,
            names=chosen.attacks,
            random_start=True if "random start" in switched else None,
            ffgsm_step=10 / 255 if "FFGSM step" in switched else None,
        )
        own_branch = "dual BatchNorm" in switched and self.dual
        before = active_branch(self.encoder)
        if own_branch:
            set_branch(self.encoder, "normal")
        say(f"attacking: {', '.join(switched) or 'no convention'} as published")
        target = Target("embedding" if "target" in switched else "decision", branch="pgd" if own_branch else None)
        result = evaluate_whitebox(
            self.encoder,
            self.bank,
            self.queries,
            attacks,
            classifier=KNNClassifier(k=self.k, temperature=chosen.temperature),
            target=PAPER.target if published else target,
            scoring=replace(PAPER.scoring if published else Scoring(), bootstrap=chosen.bootstrap),
            run=RunOptions(seed=chosen.seed, noise=False, progress=not chosen.quiet),
            provenance=Provenance(model=self.name, checkpoint=self.digest),
        )
        result = naming_branch(result, self.encoder)
        if own_branch:
            set_branch(self.encoder, str(before))
        return result

    def applies(self, name: str) -> bool:
        """Whether a convention can change anything here."""
        kinds = set(" ".join(self.settings.attacks).lower().replace("_", " ").replace("-", " ").split())
        momentum_or_bim = any("bim" in kind or "mifgs" in kind for kind in kinds)
        needs = {"random start": momentum_or_bim, "FFGSM step": any("ffgsm" in kind for kind in kinds)}
        return (needs | {"dual BatchNorm": self.dual}).get(name, True)


def evaluate(settings: Compare, cohort: Cohort, file: Path) -> dict[str, tuple[Record, ...]]:
    """Evaluate under hsat's conventions, with one convention switched at a time, and as published.

    Args:
        settings: The options.
        cohort: With the splits "train" and "val".
        file: Of the encoder.

    Returns:
        Records by what was switched: "hsat" (nothing), one convention each, "the published code" (everything).
    """
    evaluation = Evaluation(settings, cohort, file)
    own = evaluation.attacked(switched=())
    results = {OWN: own.records}
    applying = [one for one in CONVENTIONS if one.stage != "training" and evaluation.applies(one.name)]
    for convention in applying:
        if convention.stage == "attack":
            results[convention.name] = evaluation.attacked(switched=(convention.name,)).records
        else:
            results[convention.name] = rescore(own, SCORING[convention.name]).records
    attacks = [convention.name for convention in applying if convention.stage == "attack"]
    results[PUBLISHED] = evaluation.attacked(switched=attacks, published=True).records
    return {
        name: tuple(replace(record, settings={**record.settings, "convention": name}) for record in records)
        for name, records in results.items()
    }


def differences(found: dict[str, tuple[Record, ...]], metrics: Sequence[str]) -> str:
    """One row per convention, condition, level and metric that it changes; a line names those without effect."""
    own = {_place(record): record for record in found[OWN]}
    lines = [
        f"| convention | condition | level | metric | {OWN}, % | switched, % | difference |",
        "|" + " --- |" * 7,
    ]
    without = []
    for name, records in found.items():
        rows = []
        for record in records:
            before = own.get(_place(record))
            if before is None or record.metric not in metrics or abs(record.value - before.value) < 5e-5:
                continue
            numbers = f"{_cell(before)} | {_cell(record)} | {100 * (record.value - before.value):+.2f}"
            rows.append(f"| {name} | {record.attack_name} | {record.level} | {TITLES[record.metric]} | {numbers} |")
        lines += rows
        if not rows and name != OWN:
            without.append(name)
    text = "\n".join(lines) + "\n"
    if chance := chance_line(found[OWN], metrics=metrics):
        text += f"\n{chance}\n"
    if without:
        text += f"\nNothing changed by: {', '.join(without)}.\n"
    left_out = [one.name for one in CONVENTIONS if one.stage != "training" and one.name not in found]
    if left_out:
        text += f"\nNot applicable to this encoder and these attacks: {', '.join(left_out)}.\n"
    return text


def _place(record: Record) -> tuple[str, str, str]:
    return record.attack_name, record.level, record.metric


def _cell(record: Record) -> str:
    if record.low is None or record.high is None:
        return f"{100 * record.value:.2f}"
    return f"{100 * record.value:.2f} [{100 * record.low:.1f}, {100 * record.high:.1f}]"


def write_results(settings: Compare, cohort: Cohort, found: dict[str, tuple[Record, ...]]) -> str:
    """Write records, table and the account of the run.

    Args:
        settings: The options.
        cohort: What was evaluated.
        found: Records by what was switched.

    Returns:
        The table, as Markdown.
    """
    settings.out.mkdir(parents=True, exist_ok=True)
    write_records(settings.out / "records.jsonl", [record for records in found.values() for record in records])
    table = differences(found, settings.metrics)
    explained = f"{table}\nWhat the conventions are (those of training are for hsat train --preset paper):\n\n"
    working = settings.out / ".table.md.partial"
    working.write_text(explained + conventions_table().to_markdown())
    working.replace(settings.out / "table.md")
    write_run_file(settings.out, settings.plain(), cohort=cohort.fingerprint(), command=sys.argv)
    return table


def main(argv: list[str]) -> None:
    """Read the options, evaluate, write, print."""
    settings = Compare.load(argv)
    if (file := settings.checkpoint) is None:
        raise SystemExit("error: give --run FOLDER or --checkpoint FILE; hsat train writes best.safetensors")
    if unknown := [name for name in settings.metrics if name not in TITLES]:
        raise SystemExit(f"error: unknown metrics {unknown}; choose from {', '.join(TITLES)}")
    try:
        settings = settings.model_copy(update={"out": choose_folder(settings.out)})
        with lock_folder(settings.out), computing_threads(settings.threads):
            check_folder(settings.out, overwrite=settings.overwrite)
            if settings.data.root is None:
                check_synthetic([file])
            cohort = open_cohort(settings.data, seed=settings.seed)
            say(describe(cohort))
            data = settle_image_size(settings.data, cohort, [file], settings.model)
            settings = settings.model_copy(update={"data": data})
            results = evaluate(settings, cohort, file)
            if settings.overwrite:
                remove_results(settings.out)
            table = write_results(settings, cohort, results)
    except Exception as error:
        message = explain_failure(error, workers=settings.data.workers, resumable=False)
        if message is None:
            raise
        raise SystemExit(f"error: {message}") from None
    print(table)
    say(f"results are in {settings.out}")
