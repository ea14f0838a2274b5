"""Evaluation: embeddings, nearest neighbours, metrics at three levels, attacks, records and comparisons.

Example:
    The image itself is the embedding here; four patches of two classes are the bank, four more the queries:

    >>> import torch
    >>> from hsat import PGD, HierarchicalBatch, KNNClassifier, Linf
    >>> def loader(first):
    ...     images = torch.tensor([[0.8, 0.2], [0.7, 0.3], [0.2, 0.8], [0.3, 0.7]]).reshape(4, 1, 1, 2)
    ...     ids, label = torch.arange(first, first + 4), torch.tensor([0, 0, 1, 1])
    ...     return [HierarchicalBatch(images, patch=ids, slide=ids, patient=ids, label=label)]
    >>> encoder = torch.nn.Flatten()
    >>> bank, queries, attack = loader(0), loader(4), PGD(Linf(0.4), step_size=0.1, steps=10)
    >>> options = {
    ...     "classifier": KNNClassifier(k=1),
    ...     "scoring": Scoring(bootstrap=0),
    ...     "run": RunOptions(noise=False),
    ... }
    >>> names = Provenance(class_names=("dark", "bright"))
    >>> result = evaluate_whitebox(encoder, bank, queries, {"PGD": attack}, **options, provenance=names)
    >>> [(r.attack_name, r.value) for r in result.records if (r.level, r.metric) == ("patient", "accuracy")]
    [('clean', 1.0), ('PGD', 0.0)]

    The share of a patient's patches that has to be altered, each patient with one patch:

    >>> budget = PatchBudget(fractions=(0.5, 1.0))
    >>> evaluate_budget(encoder, bank, queries, attack, budget=budget, **options, provenance=names).needed.tolist()
    [1.0, 1.0, 1.0, 1.0]

    What was made on encoder "a", measured on encoder "b":

    >>> encoders = {"a": encoder, "b": torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Identity())}
    >>> known = dict.fromkeys(encoders, names)
    >>> moved = evaluate_transfer(
    ...     encoders, bank, queries, {"PGD": attack}, pairs=[("a", "b")], target="decision", **options, provenance=known
    ... )
    >>> {r.metric: r.value for r in moved.records if (r.level, r.surrogate) == ("patient", "a")}["accuracy_drop"]
    1.0
"""

from __future__ import annotations

from hsat.eval.budget import BudgetResult, PatchBudget, evaluate_budget
from hsat.eval.certificate_check import CertificateCheck, CheckOptions, check_certificates
from hsat.eval.certificates import Certificates
from hsat.eval.certify import CertificateResult, CertifyOptions, certify
from hsat.eval.classifier import evaluate_classifier
from hsat.eval.comparison import (
    Difference,
    ScoreTable,
    compare_models,
    load_scores,
    paired_difference,
    save_scores,
)
from hsat.eval.confidence import Interval, bootstrap_intervals
from hsat.eval.conventions import CONVENTIONS, Convention, conventions_table, rescore
from hsat.eval.diagnostics import Diagnosis, diagnose
from hsat.eval.drift import evaluate_drift
from hsat.eval.export import ExportOptions, ExportResult, save_adversarial
from hsat.eval.level_scores import LevelScores, score_levels
from hsat.eval.metrics import Metrics, chance_levels, metrics, metrics_by_level
from hsat.eval.options import PAPER, Provenance, RunOptions, Scoring, Target
from hsat.eval.outcomes import EnsembleOutcome
from hsat.eval.paper_attacks import add_noise_baselines, ensemble_attacks, paper_attacks
from hsat.eval.pooling import LevelRows, PooledScores, pool, pool_by_level
from hsat.eval.records import Record, read_records, write_records
from hsat.eval.result_files import score_tables
from hsat.eval.slide_cross_validation import SlideCrossValidation, cross_validate_slides
from hsat.eval.slides import SlidesResult, evaluate_slides
from hsat.eval.smoothing import Smoothing
from hsat.eval.store import EmbeddingCache
from hsat.eval.tables import Table, TableCell
from hsat.eval.transfer import evaluate_transfer
from hsat.eval.transfer_drops import TransferResult
from hsat.eval.whitebox import WhiteboxResult, evaluate_whitebox

__all__ = [
    "CONVENTIONS",
    "PAPER",
    "BudgetResult",
    "CertificateCheck",
    "CertificateResult",
    "Certificates",
    "CertifyOptions",
    "CheckOptions",
    "Convention",
    "Diagnosis",
    "Difference",
    "EmbeddingCache",
    "EnsembleOutcome",
    "ExportOptions",
    "ExportResult",
    "Interval",
    "LevelRows",
    "LevelScores",
    "Metrics",
    "PatchBudget",
    "PooledScores",
    "Provenance",
    "Record",
    "RunOptions",
    "ScoreTable",
    "Scoring",
    "SlideCrossValidation",
    "SlidesResult",
    "Smoothing",
    "Table",
    "TableCell",
    "Target",
    "TransferResult",
    "WhiteboxResult",
    "add_noise_baselines",
    "bootstrap_intervals",
    "certify",
    "chance_levels",
    "check_certificates",
    "compare_models",
    "conventions_table",
    "cross_validate_slides",
    "diagnose",
    "ensemble_attacks",
    "evaluate_budget",
    "evaluate_classifier",
    "evaluate_drift",
    "evaluate_slides",
    "evaluate_transfer",
    "evaluate_whitebox",
    "load_scores",
    "metrics",
    "metrics_by_level",
    "paired_difference",
    "paper_attacks",
    "pool",
    "pool_by_level",
    "read_records",
    "rescore",
    "save_adversarial",
    "save_scores",
    "score_levels",
    "score_tables",
    "write_records",
]
