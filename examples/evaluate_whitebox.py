"""Attack an encoder and measure what is left.  With options this is `hsat evaluate`; without, a small evaluation.

    python examples/evaluate_whitebox.py                                         # the function below, synthetic patches
    python examples/evaluate_whitebox.py --checkpoint runs/hsat/best.safetensors --data.root /data/opensrh
    python examples/evaluate_whitebox.py --help

`evaluate_encoder` is what the command stands for, in library calls.
"""

import sys
from pathlib import Path

from hsat.attacks import L2, PGD
from hsat.classifiers import KNNClassifier
from hsat.cli.main import main
from hsat.data import PatchDataset, patch_loader, read_opensrh, write_synthetic_cohort
from hsat.eval import Provenance, RunOptions, Scoring, evaluate_whitebox, paper_attacks, write_records
from hsat.models import Encoder, build_encoder
from hsat.report import markdown_table


def evaluate_encoder(encoder: Encoder, root: Path, out: Path, *, image_size: int = 32) -> str:
    """Attack the validation patches of the cohort in `root`; writes `out`/records.jsonl and returns the table."""
    cohort = read_opensrh(root)
    bank = patch_loader(PatchDataset(cohort, "train", image_size=image_size), batch_size=32)  # clean, labelled
    queries = patch_loader(PatchDataset(cohort, "val", image_size=image_size), batch_size=32)
    attacks = paper_attacks((4 / 255, 8 / 255), steps=5, names=("pgd", "mifgsm"))  # {"PGD-4": PGD(...), ...}
    attacks["PGD-l2"] = PGD(L2(0.5), step_size=0.125, steps=5)  # any attack of hsat's or yours, by any name
    result = evaluate_whitebox(
        encoder,
        bank,
        queries,
        attacks,
        classifier=KNNClassifier(k=10),
        target="decision",  # the vote itself; "features" or "embedding" move them away from their clean values
        scoring=Scoring(bootstrap=200),
        run=RunOptions(seed=0, noise=True),
        provenance=Provenance(model="untrained"),
    )
    out.mkdir(parents=True, exist_ok=True)
    write_records(out / "records.jsonl", result.records)
    return markdown_table(result.records)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(["evaluate", *sys.argv[1:]])
    else:
        data = write_synthetic_cohort("runs/example-cohort", patients_per_class=4, patches=3, size=32)
        encoder = build_encoder("test_resnet", embedding_dim=32, seed=0).eval()  # or load_encoder(FILE)
        print(evaluate_encoder(encoder, data, Path("runs/example-whitebox")))
