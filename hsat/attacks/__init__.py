"""Attacks: frozen settings that are called on images and any function of images."""

from hsat.attacks.named import BIM, FFGSM, FGSM, MIFGSM, PGD, RandomNoise
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
    "classification",
    "feature_drift",
    "hierarchical",
    "objective_from",
]
