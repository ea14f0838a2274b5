"""From nothing to a robustness table; `make demo` installs hsat and runs this.

Writes a synthetic cohort and trains a HiDisc baseline and an HSAT encoder on it with the same recipe (`demo`).  PGD at
4/255 and 8/255 then attacks the kNN vote ("decision"), which is what decides; a table has both encoders clean, under
random noise of the same size, and attacked.  A second table, with an untrained encoder beside them, shows what PGD and
MI-FGSM leave if they only move the features away from their clean values.  Records, figures, report.md and
report.html go to --out.

    hsat demo --out runs/demo --seed 0 --targets decision,embedding
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import BeforeValidator, Field

from hsat.cli.attacks import PUBLISHED
from hsat.cli.cohort import describe, open_cohort
from hsat.cli.evaluate import Evaluate, evaluate, write_results
from hsat.cli.failures import explain_failure
from hsat.cli.options import Settings, say, split_commas
from hsat.cli.threads import computing_threads
from hsat.cli.train import load_settings, train
from hsat.data import Cohort
from hsat.eval import Record, read_records
from hsat.recipes import read_recipe
from hsat.report import markdown_table, write_report
from hsat.report.summary import chance_line
from hsat.run_folder import installed_versions, write_json
from hsat.training.config import written
from hsat.training.folder import flatten
from hsat.training.interrupts import TrainingInterrupted

NAMED = {"features": "the features", "embedding": "the embedding", "decision": "the kNN vote itself"}
K = 20  # neighbours in the short table; the small bank makes the paper's 200 blur, the full tables have both


class Demo(Settings):
    """Train and attack a HiDisc baseline and an HSAT encoder on a synthetic cohort."""

    out: Path = Field(written("runs/demo"), description="folder for everything")
    seed: int = Field(0, ge=0, description="of the cohort, the weights, the draws and the attacks")
    targets: Annotated[list[Literal["features", "embedding", "decision"]], BeforeValidator(split_commas)] = Field(
        written("decision,features"),
        description="what the attacks move: features, embedding, the kNN vote; commas between",
    )
    steps: int | None = Field(None, gt=0, description="training steps, if not the recipe's")
    query_patches: int | None = Field(None, gt=0, description="attack this many validation patches; all if not given")
    quiet: bool = Field(False, description="no progress bars")


def train_both(demo: Demo) -> dict[str, Path]:
    """The two trainings, each resumed where an earlier demo in this folder was interrupted."""
    encoders = {}
    for name, attack in (("HiDisc", "none"), ("HSAT", "pgd")):
        out = demo.out / name.lower()
        argv = ["--attack.name", attack, "--out", str(out), "--seed", str(demo.seed), "--resume", "true"]
        argv += ["--quiet", str(demo.quiet)] + (["--train.steps", str(demo.steps)] if demo.steps else [])
        say(f"training {name}")
        train(load_settings(["--recipe", "demo", *argv]))
        encoders[name] = out / "final.safetensors"
    return encoders


def evaluate_both(demo: Demo, encoders: dict[str, Path], target: str) -> tuple[str, Cohort]:
    """Attack both encoders and an untrained one.

    Args:
        demo: The options.
        encoders: Files by name.
        target: What the attacks move.

    Returns:
        The table, and the cohort.
    """
    recipe = {"data": {"image_size": read_recipe("demo")["data"]["image_size"]}}
    argv = ["--checkpoint", ",".join(f"{name}={path}" for name, path in encoders.items()), "--target", target]
    argv += ["--out", str(demo.out / target), "--seed", str(demo.seed), "--quiet", str(demo.quiet)]
    argv += ["--steps", "10", "--eps", "4/255,8/255", "--natural_shift", "false"]
    if target == "decision":  # one vote is attacked, and PGD is enough to show how much the drift leaves undone
        argv += ["--k", str(K), "--attacks", "pgd", "--diagnose", "0"]
    else:
        argv += ["--attacks", PUBLISHED, "--k", f"{K},200", "--untrained", "true", "--diagnose", "8"]
    argv += ["--query_patches", str(demo.query_patches)] if demo.query_patches else []
    settings = Evaluate.load(argv, recipe=recipe)
    cohort = open_cohort(settings.data, seed=demo.seed)
    with computing_threads(settings.threads):
        write_results(settings, cohort, evaluate(settings, cohort))
        return (settings.out / "table.md").read_text(), cohort


def chance(records: list[Record]) -> dict[str, float | None]:
    """What knowing nothing gives on the attacked patches: the share of the largest class, and one over the classes."""
    patches = [record for record in records if record.level == "patch"]
    return {name: next(r.chance for r in patches if r.metric == name) for name in ("accuracy", "mca")}


def value(records: list[Record], model: str, attack: str, metric: str) -> float:
    """One number at patch level, with the demo's k.

    Args:
        records: Of one target.
        model: Name of the encoder.
        attack: Name of the attack.
        metric: "accuracy" or "mca".

    Returns:
        The value.
    """
    fitting = (model, attack, metric, "patch", K)
    (found,) = [r.value for r in records if (r.model, r.attack_name, r.metric, r.level, r.k) == fitting]
    return found


def verdict(records: list[Record]) -> str:
    """One sentence: what HSAT keeps under the strongest setting of the demo, and what the baseline keeps."""
    numbers = {
        (model, metric): 100 * value(records, model, "PGD-8", metric)
        for model in ("HiDisc", "HSAT")
        for metric in ("accuracy", "mca")
    }
    kept, left = ({metric: numbers[model, metric] for metric in ("accuracy", "mca")} for model in ("HSAT", "HiDisc"))
    return (
        f"Under PGD at 8/255 on {NAMED[records[0].target]} (k = {K}) HSAT keeps {kept['accuracy']:.1f} % of patches"
        f" (MCA {kept['mca']:.1f} %), the baseline {left['accuracy']:.1f} % (MCA {left['mca']:.1f} %)."
    )


def report(demo: Demo, tables: Mapping[str, str], cohort: Cohort, seconds: float) -> str:
    """The report in Markdown: what was done, every table, the figures, how it was made.

    Args:
        demo: The options.
        tables: By target.
        cohort: What was evaluated.
        seconds: How long it took.

    Returns:
        The text.
    """
    lines = [
        "# hsat demo",
        "",
        "A HiDisc baseline and an HSAT encoder on a synthetic cohort, same recipe, same seed.",
        "",
    ]
    for target, table in tables.items():
        records = list(read_records(demo.out / target / "records.jsonl"))
        lines += [f"## Attacks on {NAMED[target]}", "", verdict(records), "", chance_line(records), "", table]
        caption = "the strongest attack at each eps, random noise and the chance level in grey"
        lines += [f"![accuracy against eps: {caption}]({target}/accuracy_vs_eps.png)", ""]
        gallery = sorted((demo.out / target).glob("patches_HSAT_*.png"))
        lines += [f"![patches]({target}/{path.name})" for path in gallery]
    recipe = ", ".join(f"{key} {item}" for key, item in flatten(read_recipe("demo")).items())
    lines += ["", "## How it was made", "", f"- Cohort (synthetic, seed {demo.seed}): `{cohort.fingerprint()}`"]
    lines += [f"- {line}" for line in describe(cohort).splitlines()]
    lines += [f"- Recipe: {recipe}", f"- {seconds:.0f} seconds on {torch.get_num_threads()} threads"]
    lines += [f"- {name} {version}" for name, version in installed_versions().items()]
    lines.append("")
    return "\n".join(lines)


def run(demo: Demo) -> None:
    """Train, evaluate, print, write."""
    begin = time.monotonic()
    encoders = train_both(demo)
    tables: dict[str, str] = {}
    for target in demo.targets:
        tables[target], cohort = evaluate_both(demo, encoders, target)
        records = list(read_records(demo.out / target / "records.jsonl"))
        short = [record for record in records if record.k == K]
        print(f"\n# Attacks on {NAMED[target]}, k = {K}\n\n{markdown_table(short, intervals=False)}")
        print(verdict(records))
        print(chance_line(records))
    (demo.out / "report.md").write_text(report(demo, tables, cohort, time.monotonic() - begin))
    write_json(demo.out / "chance.json", chance(records))
    page = write_report([demo.out], demo.out / "report.html", title="hsat demo", k=K)
    say(f"\nreport: {demo.out / 'report.md'} and, with all figures, {page}")


def main(argv: list[str]) -> None:
    """Read the options and run; what the user can mend ends the program with the reason."""
    demo = Demo.load(argv)
    try:
        run(demo)
    except TrainingInterrupted as stop:
        say(f"{stop}; to go on: {shlex.join(['hsat', 'demo', *argv])}")
        raise SystemExit(128 + stop.signal) from None
    except Exception as error:
        message = explain_failure(error, resumable=False)
        if message is None:
            raise
        raise SystemExit(f"error: {message}") from None
