"""From nothing to a robustness table; `make demo` installs hsat and runs this.

Writes a synthetic cohort and trains three encoders on it: the HiDisc baseline, HSAT as published, and HSAT+, which
takes as many passes as HSAT (docs/recipes.md).  The ensemble of attacks at 4/255 and 8/255 then goes for the kNN vote
("decision"), which is what decides; a table has the encoders clean, under random noise of the same size, and attacked.
With --targets decision,features a second table, with an untrained encoder beside them, shows what PGD and MI-FGSM leave
if they only move the features away from their clean values.  Records, figures, report.md and report.html go to --out.

    hsat demo --out runs/demo --seed 0 --targets decision,features
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import BeforeValidator, Field

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
TRAININGS = {
    "HiDisc": ["--recipe", "demo", "--attack.name", "none"],
    "HSAT": ["--recipe", "demo"],
    "HSAT+": ["--recipe", "hsat-plus", "--scale", "demo"],
}
STRONGEST = {"decision": "ensemble-8", "features": "PGD-8", "embedding": "PGD-8"}


class Demo(Settings):
    """Train and attack a HiDisc baseline, HSAT and HSAT+ on a synthetic cohort."""

    out: Path = Field(written("runs/demo"), description="folder for everything")
    seed: int = Field(0, ge=0, description="of the cohort, the weights, the draws and the attacks")
    targets: Annotated[list[Literal["features", "embedding", "decision"]], BeforeValidator(split_commas)] = Field(
        written("decision"),
        description="what the attacks move: features, embedding, the kNN vote; commas between",
    )
    steps: int = Field(
        120, gt=0, description="training steps of HiDisc and HSAT, half of the recipe's; HSAT+ makes as many passes"
    )
    query_patches: int = Field(84, gt=0, description="attack this many validation patches, at most all 224")
    quiet: bool = Field(False, description="no progress bars")


def train_all(demo: Demo) -> dict[str, Path]:
    """The trainings, each resumed where an earlier demo in this folder was interrupted."""
    recipe, plus = (read_recipe(name, scale="demo")["train"]["steps"] for name in ("hsat", "hsat-plus"))
    encoders = {}
    for name, options in TRAININGS.items():
        out = demo.out / name.lower().replace("+", "-plus")
        steps = round(demo.steps * plus / recipe) if name == "HSAT+" else demo.steps
        argv = [*options, "--out", str(out), "--seed", str(demo.seed), "--resume", "true", "--quiet", str(demo.quiet)]
        say(f"training {name}")
        train(load_settings([*argv, "--train.steps", str(steps), "--train.channels_last", "true"]))
        encoders[name] = out / "final.safetensors"
    return encoders


def evaluate_all(demo: Demo, encoders: dict[str, Path], target: str) -> tuple[str, Cohort]:
    """Attack the encoders; where their features or embeddings are moved, an untrained one too.

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
    argv += ["--query_patches", str(demo.query_patches)]
    if target == "decision":  # one vote is attacked
        argv += ["--k", str(K), "--attacks", "ensemble", "--diagnose", "0"]
    else:
        argv += ["--attacks", "pgd,mifgsm", "--k", f"{K},200", "--untrained", "true", "--diagnose", "8"]
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
    """One sentence: what each encoder keeps under the strongest setting of the demo."""
    target = records[0].target
    attack = STRONGEST[target]
    kept = [
        f"{name} {' / '.join(f'{100 * value(records, name, attack, metric):.1f}' for metric in ('accuracy', 'mca'))}"
        for name in TRAININGS
    ]
    return (
        f"Under {attack.split('-')[0]} at 8/255 on {NAMED[target]} (k = {K}) this much is left, % of patches"
        f" (accuracy / MCA): {', '.join(kept)}."
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
        "A HiDisc baseline, HSAT and HSAT+ on a synthetic cohort, same seed; HSAT+ made as many passes as HSAT.",
        "",
    ]
    for target, table in tables.items():
        records = list(read_records(demo.out / target / "records.jsonl"))
        lines += [f"## Attacks on {NAMED[target]}", "", verdict(records), "", chance_line(records), "", table]
        caption = "the strongest attack at each eps, random noise and the chance level in grey"
        lines += [f"![accuracy against eps: {caption}]({target}/accuracy_vs_eps.png)", ""]
        gallery = sorted((demo.out / target).glob("patches_HSAT_*.png"))
        lines += [f"![patches]({target}/{path.name})" for path in gallery]
    recipes = {
        name: ", ".join(f"{key} {item}" for key, item in flatten(read_recipe(name, scale="demo")).items())
        for name in ("hsat", "hsat-plus")
    }
    lines += ["", "## How it was made", "", f"- Cohort (synthetic, seed {demo.seed}): `{cohort.fingerprint()}`"]
    lines += [f"- {line}" for line in describe(cohort).splitlines()]
    lines += [f"- Recipe {name}, but for the steps: {text}" for name, text in recipes.items()]
    lines += [
        f"- Steps: {demo.steps} of HiDisc and HSAT",
        f"- {seconds:.0f} seconds on {torch.get_num_threads()} threads",
    ]
    lines += [f"- {name} {version}" for name, version in installed_versions().items()]
    lines.append("")
    return "\n".join(lines)


def run(demo: Demo) -> None:
    """Train, evaluate, print, write."""
    begin = time.monotonic()
    encoders = train_all(demo)
    tables: dict[str, str] = {}
    for target in demo.targets:
        tables[target], cohort = evaluate_all(demo, encoders, target)
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
