"""Attacks: frozen settings that are called on images and any function of images."""

from hsat.attacks.apgd import APGD
from hsat.attacks.composing import InSpace, Space, through
from hsat.attacks.composite import worst_of
from hsat.attacks.ensemble import AttackEnsemble
from hsat.attacks.ensemble_pass import EnsembleMember
from hsat.attacks.feature_guide import choose_guides, guide
from hsat.attacks.level_scores import level_margin
from hsat.attacks.margins import dlr, margin
from hsat.attacks.masked import Masked
from hsat.attacks.named import BIM, FFGSM, FGSM, MIFGSM, PGD, RandomNoise
from hsat.attacks.nearest_vote import soft_knn
from hsat.attacks.objectives import classification, feature_drift, hierarchical, objective_from
from hsat.attacks.one_for_all import FittedUniversal
from hsat.attacks.raw_channels import RawChannels
from hsat.attacks.square import Square
from hsat.attacks.staining import Stains, estimate_stains, from_stains, to_stains
from hsat.attacks.threat import L2, Linf
from hsat.attacks.transfer_boosting import DIFGSM, NIFGSM, TIFGSM, VMIFGSM
from hsat.attacks.universal import UniversalPerturbation

__all__ = [
    "APGD",
    "BIM",
    "DIFGSM",
    "FFGSM",
    "FGSM",
    "L2",
    "MIFGSM",
    "NIFGSM",
    "PGD",
    "TIFGSM",
    "VMIFGSM",
    "AttackEnsemble",
    "EnsembleMember",
    "FittedUniversal",
    "InSpace",
    "Linf",
    "Masked",
    "RandomNoise",
    "RawChannels",
    "Space",
    "Square",
    "Stains",
    "UniversalPerturbation",
    "choose_guides",
    "classification",
    "dlr",
    "estimate_stains",
    "feature_drift",
    "from_stains",
    "guide",
    "hierarchical",
    "level_margin",
    "margin",
    "objective_from",
    "soft_knn",
    "through",
    "to_stains",
    "worst_of",
]
