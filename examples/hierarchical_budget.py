r"""How few patches must an attacker alter to change the diagnosis of a patient?  records.jsonl, groups.csv, table.md.

    python examples/hierarchical_budget.py --checkpoint runs/hsat/best.safetensors --data.root /data/opensrh
    python examples/hierarchical_budget.py --checkpoint a=runs/a/final.safetensors,b=runs/b/best.safetensors \
        --level slide

Every validation patch is attacked; then the fewest attacked patches are counted that turn the pooled decision of their
patient or slide (docs/threats.md).  groups.csv has that number for each of them.  --query_patches thins the patches,
and with them the patients' sizes: the fractions stay what they say, of the patches that are left.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator

from cohorts import describe, open_cohort
from evaluate_whitebox import load_named, loaders
from hsat.data import BadPatch, Cohort
from hsat.eval import BudgetResult, Record, evaluate_hierarchical_budget, markdown_table, write_records
from runs import device_named, versions, write_json
from settings import DataSettings, Names, Pixels, Settings, StoredModelSettings, listed
from threats import Lengths, Threat, attacks_under, check_radii, check_threat

Fractions = Annotated[list[float], BeforeValidator(listed)]


class HierarchicalBudget(Settings):
    """The smallest share of a patient's or slide's patches whose alteration changes the decision."""

    checkpoint: Names = Field([], description="file, or name=file, or several with commas between")
    data: DataSettings = DataSettings()
    model: StoredModelSettings = StoredModelSettings()
    level: Literal["slide", "patient"] = Field("patient", description="whose decision is to change")
    fractions: Fractions = Field([0.05, 0.1, 0.25, 0.5, 1.0], description="shares of the patches, for the table")
    order: Literal["worst", "random"] = Field("worst", description="the attacker chooses the patches, or chance does")
    attacks: Names = Field(["pgd"], description="names separated by commas")
    threat: Threat = Field("linf", description="what the attacks may change; see docs/threats.md")
    eps: Lengths = Field([8 / 255], description="radii: 4/255,8/255; in the unit of --threat")
    step_size: Pixels | None = Field(None, description="size of a step; eps / 4 if not given")
    steps: int = Field(10, gt=0, description="gradient steps")
    target: Literal["knn", "features", "embedding"] = Field("knn", description="what the attacks move")
    k: int = Field(200, gt=0, description="neighbours")
    temperature: float = Field(0.07, gt=0, description="of the kNN vote")
    bank_patches: int | None = Field(None, gt=0, description="use this many training patches; all if not given")
    query_patches: int | None = Field(None, gt=0, description="attack this many validation patches; all if not given")
    batch_size: int = Field(64, gt=0, description="patches per batch")
    bootstrap: int = Field(1000, ge=0, description="resamples of patients for the intervals")
    seed: int = Field(0, ge=0, description="of the attacks' random starts, and of --order random")
    device: str = Field("auto", description="cpu, cuda, cuda:1; auto takes a GPU where there is one")
    out: Path = Field(Path("runs/budget"), description="folder for the results")
    quiet: bool = Field(False, description="no progress bars")
    compat: ClassVar[None] = None  # load_named asks; the published evaluation attacks all patches

    @field_validator("eps")
    @classmethod
    def _radii_fit(cls, eps: list[float], info: ValidationInfo) -> list[float]:
        return check_radii(info.data.get("threat", "linf"), eps)


def run(settings: HierarchicalBudget, cohort: Cohort) -> dict[tuple[str, str], BudgetResult]:
    """Results by encoder and attack."""
    check_threat(settings.threat, cohort)
    device, (bank, queries) = device_named(settings.device), loaders(settings, cohort)
    encoders = [load_named(settings, text) for text in settings.checkpoint]
    if len({title for title, _, _ in encoders}) < len(encoders):
        raise ValueError("two encoders have one name; name them: --checkpoint a=FILE,b=FILE")
    attacks = attacks_under(
        settings.threat, settings.eps, names=settings.attacks, steps=settings.steps, step_size=settings.step_size
    )
    found: dict[tuple[str, str], BudgetResult] = {}
    for title, encoder, digest in encoders:
        if settings.threat == "raw_srh" and encoder.fixed_size is None:
            encoder.input_size = (settings.data.image_size,) * 2  # patches come at their own size
        for name, attack in attacks.items():
            print(f"{title}: {name} on {settings.target}", file=sys.stderr)
            result = evaluate_hierarchical_budget(
                encoder.to(device),
                bank,
                queries,
                attack,
                level=settings.level,
                fractions=settings.fractions,
                order=settings.order,
                target=settings.target,
                k=settings.k,
                temperature=settings.temperature,
                seed=settings.seed,
                bootstrap=settings.bootstrap,
                name=name,
                model=title,
                checkpoint=digest,
                progress=not settings.quiet,
            )
            found[title, name] = result
    return found


def records_of(results: dict[tuple[str, str], BudgetResult]) -> list[Record]:
    """All records; the clean ones, which the attacks of an encoder share, once."""
    records: list[Record] = []
    seen: set[str] = set()
    for (title, _), result in results.items():
        records += [record for record in result.records if record.attack_name != "clean" or title not in seen]
        seen.add(title)
    return records


def write_groups(path: Path, results: dict[tuple[str, str], BudgetResult]) -> None:
    """One line per encoder, attack and group; `needed` is empty where no number of patches changes the decision."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("model", "attack", "level", "group", "class", "patches", "needed", "fraction"))
        for (title, name), result in results.items():
            columns = zip(result.groups, result.labels, result.sizes, result.needed, strict=True)
            for group, label, size, needed in columns:
                count = ("", "") if needed == float("inf") else (int(needed), f"{needed / size:.6g}")
                writer.writerow((title, name, result.level, int(group), int(label), int(size), *count))


def main(argv: list[str]) -> None:
    """Read the options, evaluate, write, print."""
    settings = HierarchicalBudget.load(argv)
    if not settings.checkpoint:
        raise SystemExit("error: give --checkpoint FILE, or name=FILE; train_hsat.py writes best.safetensors")
    cohort = open_cohort(settings.data, seed=settings.seed)
    print(describe(cohort), file=sys.stderr)
    try:
        settings.out.mkdir(parents=True, exist_ok=True)
        results = run(settings, cohort)
        records = records_of(results)
        write_records(settings.out / "records.jsonl", records)
        write_groups(settings.out / "groups.csv", results)
        table = markdown_table(records, metrics=("accuracy", "smallest_fraction"), levels=(settings.level,))
        (settings.out / "table.md").write_text(table)
        about = {"settings": settings.plain(), "cohort": cohort.fingerprint(), "versions": versions()}
        write_json(settings.out / "run.json", about | {"command": sys.argv})
    except (BadPatch, FloatingPointError, OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None
    print(table)
    print(f"results are in {settings.out}", file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1:])
