"""Train an encoder with HSAT.  With options this is the command `hsat train`; without, a small training in seconds.

    python examples/train_hsat.py                                                # the function below, synthetic patches
    python examples/train_hsat.py --recipe hsat --out runs/hsat                  # the command: the demo's recipe
    python examples/train_hsat.py --data.root /data/opensrh --out runs/hsat      # the command: the paper's recipe
    python examples/train_hsat.py --help

`train_encoder` is what the command stands for, in library calls.
"""

import sys
from pathlib import Path

from hsat.cli.main import main
from hsat.data import read_opensrh, write_synthetic_cohort
from hsat.models import build_encoder
from hsat.training import TrainConfig, Trainer, ViewConfig


def train_encoder(root: Path, out: Path, *, steps: int = 8, image_size: int = 32) -> Path:
    """Train on the cohort in `root`, keep everything in the run folder `out`, return the file of the best encoder."""
    cohort = read_opensrh(root).with_split(val_fraction=0.3, names=("train", "tune"), of="train")
    encoder = build_encoder("test_resnet", embedding_dim=32, seed=0)  # any timm name, or a name of the paper
    config = TrainConfig.hsat(
        steps=steps,
        batch_patients=2,
        views=ViewConfig(image_size=image_size, slides=2, patches=2, views=2),
        attack={"name": "pgd", "eps": "8/255", "step_size": "2/255", "steps": 5},  # name="none" trains HiDisc
    )
    trainer = Trainer(encoder, cohort, config, out=out, resume=True)  # goes on with a run in `out`
    return trainer.fit()  # own_encoder.py shows a loop of one's own


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(["train", *sys.argv[1:]])
    else:
        data = write_synthetic_cohort("runs/example-cohort", patients_per_class=4, patches=3, size=32)
        print(f"encoder: {train_encoder(data, Path('runs/example-training'))}")
