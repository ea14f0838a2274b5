"""An attack of your own: a frozen dataclass, checked against the laws of attacks, then used in an evaluation.

Run it as it is: `python examples/own_attack.py` takes seconds, on synthetic patches in runs/example-cohort.
"""

from dataclasses import dataclass, replace

from torch import Tensor

from hsat.attacks import PGD, Linf
from hsat.classifiers import KNNClassifier
from hsat.data import PatchDataset, patch_loader, read_opensrh, write_synthetic_cohort
from hsat.eval import Provenance, RunOptions, Scoring, evaluate_whitebox
from hsat.models import build_encoder
from hsat.report import markdown_table
from hsat.testing import check_attack
from hsat.types import AttackResult, Objective


@dataclass(frozen=True)
class CoarseToFine:
    """PGD in rounds; each begins where the last one ended, with steps half as long.

    The threat model is the one place where eps stands.  The options start, generator, ids and success are passed on,
    so that all that hsat promises of its attacks holds for this one.
    """

    threat: Linf
    step_size: float
    steps: int = 4
    rounds: int = 3

    def run(self, x: Tensor, objective: Objective, **options: object) -> AttackResult:
        """Adversarial images, with counts of passes; evaluations call this."""
        forwards = backwards = 0
        for number in range(self.rounds):
            attack = PGD(self.threat, step_size=self.step_size / 2**number, steps=self.steps)
            result = attack.run(x, objective, **options)
            options["start"] = result.x_adv
            forwards, backwards = forwards + result.forwards, backwards + result.backwards
        return replace(result, forwards=forwards, backwards=backwards)

    def __call__(self, x: Tensor, objective: Objective, **options: object) -> Tensor:
        """Adversarial images (n, c, h, w) for images (n, c, h, w) in [0, 1] and any function of images."""
        return self.run(x, objective, **options).x_adv


own = CoarseToFine(Linf(8 / 255), step_size=4 / 255)
laws = check_attack(own)  # an AssertionError would name the law that is broken, and what to change
print(f"{own} keeps {len(laws)} laws")

cohort = read_opensrh(write_synthetic_cohort("runs/example-cohort", patients_per_class=4, patches=3, size=32))
bank, queries = (patch_loader(PatchDataset(cohort, split, image_size=32), batch_size=32) for split in ("train", "val"))
result = evaluate_whitebox(
    build_encoder("test_resnet", embedding_dim=32, seed=0).eval(),
    bank,
    queries,
    {"CoarseToFine-8": own, "PGD-8": PGD(Linf(8 / 255), step_size=2 / 255, steps=12)},
    classifier=KNNClassifier(k=10),
    scoring=Scoring(bootstrap=200),
    run=RunOptions(seed=0),
    provenance=Provenance(model="untrained"),
)
print(markdown_table(result.records))
