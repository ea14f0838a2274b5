"""Attack what decides: a linear probe of patches, and an attention MIL of slides that may be altered in part.

    python examples/linear_probe_and_mil.py

`attack_slides` is what you would do with your own encoder and cohort.
"""

import sys
from pathlib import Path

import hsat
from hsat.eval import cross_validate_slides, write_records
from hsat.models import Encoder
from hsat.report import markdown_table

ATTACKS = {"PGD-4": hsat.PGD(hsat.Linf(4 / 255), step_size=1 / 255, steps=10)}
SCORING = hsat.Scoring(bootstrap=200)
RUN = hsat.RunOptions(seed=0, noise=False)


def attack_patches(encoder: Encoder, bank: hsat.EmbeddingTable, cohort: hsat.Cohort) -> str:
    """The table of a linear probe's accuracy on attacked patches; slides and patients are the mean of their scores."""
    queries = hsat.patch_loader(hsat.PatchDataset(cohort, "val"), batch_size=32)
    result = hsat.evaluate_whitebox(
        encoder,
        bank,
        queries,
        ATTACKS,
        classifier=hsat.LinearProbe(C=0.1),  # the decision that the attacks move
        scoring=SCORING,
        run=RUN,
        provenance=hsat.Provenance(model="encoder"),
    )
    return markdown_table(result.records, metrics=("accuracy",))


def attack_slides(encoder: Encoder, bank: hsat.EmbeddingTable, cohort: hsat.Cohort, out: Path) -> str:
    """Train an attention MIL, cross-validate it by patients, and attack slides through a fraction of their patches."""
    settings = hsat.ABMIL(hidden=32, epochs=30, learning_rate=2e-3)
    honest = cross_validate_slides(settings, bank, folds=3, scoring=SCORING)  # no patient is trained on and decided
    classifier = settings.fit(bank)
    classifier.save(out / "mil.safetensors")  # hsat.classifiers.load_mil reads it
    result = hsat.evaluate_slides(
        encoder,
        hsat.slide_loader(hsat.PatchDataset(cohort, "val"), batch_size=32),  # 32 patches go through at a time
        classifier,
        ATTACKS,
        fractions=(0.125, 0.25, 0.5, 1.0),  # of a slide's patches, at least one; those of the highest attention
        order="attention",
        target="decision",  # "own_decision" and "representation" need no labels
        scoring=SCORING,
        run=RUN,
        provenance=hsat.Provenance(model="encoder"),
    )
    write_records(out / "records.jsonl", result.records)  # hsat.report.plot_accuracy_vs_fraction draws them
    lines = [f"cross-validated accuracy of slides: {honest.accuracy:.2f}"]
    lines += [f"clean: {result.accuracy('clean', 1.0):.2f}"]
    lines += [f"PGD-4 through {100 * f:g} %: {result.accuracy('PGD-4', f):.2f}" for f in result.fractions.tolist()]
    lines += [f"slides by the smallest fraction that flips them: {result.distribution('PGD-4')}"]
    return "\n".join(lines)


if __name__ == "__main__":
    if "--help" in sys.argv:
        raise SystemExit(print(__doc__))
    folder = Path("runs/example-slides")
    root = hsat.write_synthetic_cohort(folder / "cohort", patients_per_class=6, patches=8, size=32)
    data = hsat.read_opensrh(root)
    network = hsat.build_encoder("test_resnet", embedding_dim=32, seed=0).eval()  # or hsat.load_encoder(FILE)
    train = hsat.embed(network, hsat.patch_loader(hsat.PatchDataset(data, "train"), batch_size=32))
    print(attack_patches(network, train, data))
    print(attack_slides(network, train, data, folder))
