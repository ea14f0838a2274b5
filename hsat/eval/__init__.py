"""Evaluation: embeddings, nearest neighbours, metrics at three levels, attacks, records and comparisons."""

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
    score_tables,
)
from hsat.eval.confidence import Interval, bootstrap_intervals
from hsat.eval.conventions import CONVENTIONS, Convention, conventions_table, rescore
from hsat.eval.diagnostics import Diagnosis, diagnose
from hsat.eval.drift import evaluate_drift
from hsat.eval.export import ExportOptions, ExportResult, save_adversarial
from hsat.eval.metrics import Metrics, chance_levels, metrics, metrics_by_level
from hsat.eval.options import PAPER, Provenance, RunOptions, Scoring, Target
from hsat.eval.outcomes import EnsembleOutcome
from hsat.eval.paper_attacks import add_noise_baselines, ensemble_attacks, paper_attacks
from hsat.eval.pooling import LevelRows, PooledScores, pool, pool_by_level
from hsat.eval.records import Record, read_records, write_records
from hsat.eval.slide_cross_validation import SlideCrossValidation, cross_validate_slides
from hsat.eval.slides import SlidesResult, evaluate_slides
from hsat.eval.smoothing import Smoothing
from hsat.eval.store import EmbeddingCache
from hsat.eval.tables import Table, TableCell
from hsat.eval.transfer import TransferResult, evaluate_transfer
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
    "score_tables",
    "write_records",
]
