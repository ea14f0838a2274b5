"""What the published code does otherwise, one by one, and an evaluation's numbers under the other arithmetic."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from hsat.eval.evaluation import arithmetic_settings
from hsat.eval.metrics import METRICS
from hsat.eval.options import Scoring
from hsat.eval.records import Record, measure_levels
from hsat.eval.tables import Table
from hsat.eval.whitebox import WhiteboxResult

Stage = Literal["training", "attack", "scoring"]


@dataclass(frozen=True, kw_only=True)
class Convention:
    """One choice in which the published code and hsat differ.

    Attributes:
        name: What the difference is called.
        stage: "training"; "attack" (other adversarial images, so the queries have to be attacked again); "scoring"
            (other arithmetic on the same scores).
        hsat, paper: What each does.
        where: The function that takes `option`.
        option: The option that chooses.
        hsat_value, paper_value: What it is in the two cases, as it would be typed.
    """

    name: str
    stage: Stage
    hsat: str
    paper: str
    where: str
    option: str
    hsat_value: str
    paper_value: str


CONVENTIONS: tuple[Convention, ...] = (
    Convention(
        name="slot ids",
        stage="training",
        hsat="views, patches and slides with one id are positives, however often they were drawn",
        paper="every place in the batch has an id of its own: what is drawn twice is its own negative",
        where="hsat.data.hierarchical_loader",
        option="ids",
        hsat_value="'true'",
        paper_value="'slots'",
    ),
    Convention(
        name="repeats in a batch",
        stage="training",
        hsat="a patient comes twice in a batch only when the others are used up",
        paper="the balanced list is shuffled plainly: repeats meet, and with slot ids count as negatives",
        where="hsat.data.PatientBatchSampler",
        option="order",
        hsat_value="'spread'",
        paper_value="'plain'",
    ),
    Convention(
        name="static first epochs",
        stage="training",
        hsat="v0 and v1 are used from the first epoch on",
        paper="with v0 and v1, epochs 0 to 49 (the first plateau) still use the static list",
        where="hsat.data.AugmentationPolicy",
        option="static_epochs",
        hsat_value="0",
        paper_value="50",
    ),
    Convention(
        name="uncropped patches",
        stage="training",
        hsat="every patch is resized to image_size",
        paper="a patch that was not cropped keeps its size, so patches have to come with the crop's size (300)",
        where="hsat.data.AugmentationPolicy",
        option="uncropped",
        hsat_value="'resize'",
        paper_value="'keep'",
    ),
    Convention(
        name="target",
        stage="attack",
        hsat="the attack is against the decision of the classifier",
        paper="the attack moves the projected embedding, which kNN does not read",
        where="hsat.eval.evaluate_whitebox",
        option="target",
        hsat_value="'decision'",
        paper_value="'embedding'",
    ),
    Convention(
        name="random start",
        stage="attack",
        hsat="BIM and MI-FGSM begin at the images, as their papers say",
        paper="PGD, BIM and MI-FGSM all begin at a random point, which makes BIM the same as PGD",
        where="hsat.eval.paper_attacks",
        option="random_start",
        hsat_value="None",
        paper_value="True",
    ),
    Convention(
        name="FFGSM step",
        stage="attack",
        hsat="FFGSM steps by 1.25 eps, as its paper says",
        paper="FFGSM steps by 10/255 whatever eps is",
        where="hsat.eval.paper_attacks",
        option="ffgsm_step",
        hsat_value="None",
        paper_value="10 / 255",
    ),
    Convention(
        name="dual BatchNorm",
        stage="attack",
        hsat="the attack goes through the branch that is scored",
        paper='the attack goes through "pgd" and "normal" is scored (encoders with dual BatchNorm only)',
        where="hsat.eval.Target",
        option="branch",
        hsat_value="None",
        paper_value="'paper'",
    ),
    Convention(
        name="pooling",
        stage="scoring",
        hsat="a slide or patient gets the mean of its patches' scores",
        paper="a softmax of scores that sum to one already, then the sum; it moves the patch-level mAP as well",
        where="hsat.eval.Scoring",
        option="pooling",
        hsat_value="'mean'",
        paper_value="'paper'",
    ),
    Convention(
        name="absent classes",
        stage="scoring",
        hsat="the mean class accuracy is taken over the classes that occur",
        paper="a class that is predicted but never occurs counts as 0",
        where="hsat.eval.Scoring",
        option="absent_classes",
        hsat_value="'skip'",
        paper_value="'zero'",
    ),
    Convention(
        name="grouping",
        stage="scoring",
        hsat="a group is an id; labels that disagree in it are an error",
        paper="a group is an id together with a true label: a patient with two labels counts twice",
        where="hsat.eval.Scoring",
        option="group_by",
        hsat_value="'id'",
        paper_value="'id_and_label'",
    ),
)


def conventions_table() -> Table:
    """The list as a table."""
    rows = [
        (
            entry.name,
            entry.stage,
            entry.hsat,
            entry.paper,
            f"`{entry.where.rpartition('.')[2]}({entry.option}={entry.paper_value})`",
        )
        for entry in CONVENTIONS
    ]
    return Table(head=("convention", "stage", "hsat", "the published code", "option"), rows=rows)


def rescore(result: WhiteboxResult, scoring: Scoring) -> WhiteboxResult:
    """The result with records of another arithmetic; embeddings, scores and examples are the same.

    Values, intervals (same seed, same resamples) and n are computed anew, and the settings of each record name the
    arithmetic.  Records of other metrics than those of `metrics` are left out.

    Args:
        result: What `evaluate_whitebox` gave.
        scoring: The arithmetic; its layer and bootstrap do not apply.

    Returns:
        A new result.
    """
    arithmetic = arithmetic_settings(scoring)
    records: list[Record] = []
    heads: dict[tuple[str, str, int], dict[str, Record]] = {}
    for record in result.records:
        if record.metric in METRICS:
            heads.setdefault((record.attack_name, record.classifier, record.k), {})[record.level] = record
    for (name, classifier, k), by_level in heads.items():
        first = next(iter(by_level.values()))
        scores = result.scores[name]
        levels = measure_levels(
            scores[k] if k in scores else scores[classifier],
            result.tables[name],
            class_names=result.class_names,
            scoring=dataclasses.replace(scoring, bootstrap=int(first.settings["bootstrap"])),
            seed=first.seed,
        )
        for level, (measured, intervals) in levels.items():
            head = by_level.get(level, dataclasses.replace(first, level=level))
            rest = {key: value for key, value in head.settings.items() if key not in ("interval", "no_interval")}
            for metric in METRICS:
                interval = intervals[metric]
                word = "no_interval" if interval.low is None else "interval"
                settings = rest | arithmetic | ({word: interval.reason} if interval.reason else {})
                records.append(
                    dataclasses.replace(
                        head,
                        metric=metric,
                        value=getattr(measured, metric),
                        low=interval.low,
                        high=interval.high,
                        chance=measured.chance[metric],
                        n=measured.n,
                        settings=settings,
                    )
                )
    return dataclasses.replace(result, records=tuple(records))
