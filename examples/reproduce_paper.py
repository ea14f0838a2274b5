"""The paper's Table 1 with numbers of ours beside the printed ones.  With options this is `hsat reproduce`.

    python examples/reproduce_paper.py                                           # the function below, synthetic patches
    python examples/reproduce_paper.py --table 1 --runs HiDisc=runs/a HSAT=runs/b
    python examples/reproduce_paper.py --help

`fill_table` is what the command stands for, in library calls.  The evaluation is the published one: attacks on the
embedding, the published pooling and averages.  On OpenSRH, with encoders trained by `hsat train --recipe hidisc` and
`--recipe hsat`, the rows can be compared; on the synthetic patches below they only show the form.
"""

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from hsat.classifiers import KNNClassifier
from hsat.cli.main import main
from hsat.cli.reproduce import read_tables
from hsat.data import PatchDataset, patch_loader, read_opensrh, write_synthetic_cohort
from hsat.eval import PAPER, Provenance, evaluate_whitebox, paper_attacks, paper_lines, paper_markdown
from hsat.models import Encoder, build_encoder


def fill_table(encoders: Mapping[str, Encoder], root: Path, *, image_size: int = 32, steps: int = 10) -> str:
    """Table 1 as Markdown; `encoders` are named like its rows, HiDisc and HSAT."""
    cohort = read_opensrh(root)
    bank, queries = (
        patch_loader(PatchDataset(cohort, split, image_size=image_size), batch_size=32) for split in ("train", "val")
    )
    records = {}
    for row, encoder in encoders.items():
        result = evaluate_whitebox(
            encoder,
            bank,
            queries,
            paper_attacks((4 / 255, 8 / 255), steps=steps),
            classifier=KNNClassifier(k=10, temperature=0.07),  # the paper's k is 200
            target=PAPER.target,
            scoring=replace(PAPER.scoring, bootstrap=200),
            provenance=Provenance(model=row),
        )
        records[row] = result.records
    table = read_tables()["1"]
    return paper_markdown(table, paper_lines(table, records), ["Ours: untrained encoders on synthetic patches."])


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(["reproduce", *sys.argv[1:]])
    else:
        data = write_synthetic_cohort("runs/example-cohort", patients_per_class=4, patches=3, size=32)
        rows = {name: build_encoder("test_resnet", seed=seed).eval() for seed, name in enumerate(("HiDisc", "HSAT"))}
        print(fill_table(rows, data, steps=3))
