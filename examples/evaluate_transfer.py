"""Attack one encoder and show the images to others.  With options this is `hsat transfer`; without, a small matrix.

    python examples/evaluate_transfer.py                                         # the function below, synthetic patches
    python examples/evaluate_transfer.py --checkpoint a=runs/a/best.safetensors,b=FILE --data.root /data/opensrh
    python examples/evaluate_transfer.py --help

`measure_transfer` is what the command stands for, in library calls.
"""

import sys
from collections.abc import Mapping
from pathlib import Path

from hsat.attacks import MIFGSM, Linf
from hsat.classifiers import KNNClassifier
from hsat.cli.main import main
from hsat.data import PatchDataset, patch_loader, read_opensrh, write_synthetic_cohort
from hsat.eval import RunOptions, Scoring, evaluate_transfer, write_records
from hsat.models import Encoder, build_encoder
from hsat.report import transfer_markdown


def measure_transfer(encoders: Mapping[str, Encoder], root: Path, out: Path, *, image_size: int = 32) -> str:
    """Every encoder attacked, every encoder measured; writes `out`/records.jsonl and returns the table of drops."""
    cohort = read_opensrh(root)
    bank = patch_loader(PatchDataset(cohort, "train", image_size=image_size), batch_size=32)
    queries = patch_loader(PatchDataset(cohort, "val", image_size=image_size), batch_size=32)
    result = evaluate_transfer(
        encoders,
        bank,
        queries,
        {"MIFGSM-8": MIFGSM(Linf(8 / 255), step_size=2 / 255, steps=5)},
        pairs=None,  # or [(surrogate, target), ...]; None is all of them
        classifier=KNNClassifier(k=10),
        target="features",
        scoring=Scoring(bootstrap=200),
        run=RunOptions(seed=0, resume_dir=out / "state"),  # an interrupted call goes on from there
    )
    write_records(out / "records.jsonl", result.records)
    return transfer_markdown(result.records)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(["transfer", *sys.argv[1:]])
    else:
        data = write_synthetic_cohort("runs/example-cohort", patients_per_class=4, patches=3, size=32)
        pair = {name: build_encoder("test_resnet", seed=seed).eval() for seed, name in enumerate(("first", "second"))}
        print(measure_transfer(pair, data, Path("runs/example-transfer")))
