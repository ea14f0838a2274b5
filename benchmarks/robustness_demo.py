"""The demo over several seeds and both targets: does HSAT keep what the baseline loses?

Runs `hsat demo` once per seed (each with its own synthetic cohort, weights, draws and attack starts), reads the
records, holds them against the project's aims and writes everything down, met or not.

    python benchmarks/robustness_demo.py --seeds 0 1 2 --out benchmarks/results/robustness_demo
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from hsat.eval import Record, read_records
from hsat.report import markdown_table

ROOT = Path(__file__).resolve().parents[1]
TARGETS = ("features", "embedding")
MARGIN, CLEAN = 0.20, 0.85
PREFACE = """# The demo over seeds

`python benchmarks/robustness_demo.py --seeds {seeds}`: each seed has its own synthetic cohort, weights, draws and
attack starts.  Versions and settings are in the JSON file beside this one.

Read it with this in mind.  The generator of the cohort went through four versions while looking at seed 0, the last
after seeing seeds 0 to 2, so that a baseline finds a fragile cue beside the coarse ones; these seeds are tuning seeds,
and the gain is partly by construction.  It shows that the method and its measurement work, not how much it gains on
tissue.  Columns BIM and PGD agree because BIM with a random start is PGD.

"""


def patch_value(records: list[Record], model: str, attack: str, metric: str, k: int) -> float:
    """One number at patch level."""
    fitting = (model, attack, metric, "patch", k)
    (found,) = [r.value for r in records if (r.model, r.attack_name, r.metric, r.level, r.k) == fitting]
    return found


def judge(records: list[Record], chance: dict[str, float], k: int) -> dict[str, object]:
    """The aims of one seed and target, with the numbers behind them."""
    found: dict[str, object] = {"k": k}
    met = True
    for metric in ("accuracy", "mca"):
        ours, theirs = (patch_value(records, model, "PGD-8", metric, k) for model in ("HSAT", "HiDisc"))
        found[metric] = {
            "HSAT PGD-8": ours,
            "HiDisc PGD-8": theirs,
            "HSAT clean": patch_value(records, "HSAT", "clean", metric, k),
            "HiDisc clean": patch_value(records, "HiDisc", "clean", metric, k),
            "untrained clean": patch_value(records, "untrained", "clean", metric, k),
            "untrained PGD-8": patch_value(records, "untrained", "PGD-8", metric, k),
            "HSAT noise-8": patch_value(records, "HSAT", "noise-8", metric, k),
            "HiDisc noise-8": patch_value(records, "HiDisc", "noise-8", metric, k),
            "knowing nothing": chance[metric],
        }
        met &= ours - theirs >= MARGIN and ours > chance[metric]
    met &= patch_value(records, "HiDisc", "clean", "accuracy", k) >= CLEAN
    return found | {"aims met": met}


def main() -> None:
    """Run the seeds, judge, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/robustness_demo"))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/robustness_demo")
    options = parser.parse_args()
    verdicts: dict[str, object] = {}
    all_records: list[Record] = []
    for seed in options.seeds:
        run = options.runs / f"seed-{seed}"
        command = [sys.executable, "-m", "hsat", "demo", "--out", str(run), "--seed", str(seed)]
        command += ["--targets", ",".join(TARGETS), "--quiet", "true"]
        command += ["--steps", "240", "--query_patches", "224"]  # the recipe's steps, and all patches
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        for target in TARGETS:
            records = list(read_records(run / target / "records.jsonl"))
            all_records += records
            for k in sorted({record.k for record in records}):
                verdicts[f"seed {seed}, {target}, k {k}"] = judge(
                    records, json.loads((run / "chance.json").read_text()), k
                )
    table = markdown_table([r for r in all_records if r.level == "patch"], levels=("patch",))
    lines = [table]
    for name, found in verdicts.items():
        accuracy, mca = found["accuracy"], found["mca"]
        lines.append(
            f"- {name}: PGD-8 accuracy {accuracy['HSAT PGD-8']:.3f} against {accuracy['HiDisc PGD-8']:.3f}"
            f" (knowing nothing {accuracy['knowing nothing']:.3f}), MCA {mca['HSAT PGD-8']:.3f} against"
            f" {mca['HiDisc PGD-8']:.3f} ({mca['knowing nothing']:.3f}); baseline clean {accuracy['HiDisc clean']:.3f}:"
            f" aims {'met' if found['aims met'] else 'NOT met'}"
        )
    gains = [found["accuracy"]["HSAT PGD-8"] - found["accuracy"]["HiDisc PGD-8"] for found in verdicts.values()]
    lines.append(
        f"- gain in PGD-8 accuracy over all rows: median {statistics.median(gains):.3f}, least {min(gains):.3f}"
    )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    preface = PREFACE.format(seeds=" ".join(map(str, options.seeds)))
    options.out.with_suffix(".md").write_text(preface + "\n".join(lines) + "\n")
    about = {"versions": all_records[0].versions, "settings": all_records[0].settings}
    options.out.with_suffix(".json").write_text(json.dumps({"about": about, "results": verdicts}, indent=1) + "\n")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
