"""Attacks: frozen settings that are called on images and any function of images."""

from hsat.attacks.composite import worst_of
from hsat.attacks.feature_guide import choose_guides, guide
from hsat.attacks.level_scores import level_margin
from hsat.attacks.named import BIM, FFGSM, FGSM, MIFGSM, PGD, RandomNoise
from hsat.attacks.nearest_vote import soft_knn
from hsat.attacks.objectives import classification, feature_drift, hierarchical, objective_from
from hsat.attacks.threat import L2, Linf

__all__ = [
    "BIM",
    "FFGSM",
    "FGSM",
    "L2",
    "MIFGSM",
    "PGD",
    "Linf",
    "RandomNoise",
    "choose_guides",
    "classification",
    "feature_drift",
    "guide",
    "hierarchical",
    "level_margin",
    "objective_from",
    "soft_knn",
    "worst_of",
]
