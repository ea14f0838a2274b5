"""Attacks: frozen settings that are called on images and any function of images."""

from hsat.attacks.apgd import APGD
from hsat.attacks.bags import slide_objective
from hsat.attacks.ensemble import AttackEnsemble
from hsat.attacks.ensemble_pass import EnsembleMember
from hsat.attacks.feature_matching import choose_guide_images, match_features
from hsat.attacks.margins import aggregate_margin, dlr, margin
from hsat.attacks.masked import Masked
from hsat.attacks.momentum import DIFGSM, NIFGSM, TIFGSM, VMIFGSM
from hsat.attacks.natural_shift import NaturalShift
from hsat.attacks.objectives import classification, feature_drift, hierarchical, objective_from
from hsat.attacks.other_libraries import from_art, from_foolbox, from_torchattacks
from hsat.attacks.pgd import BIM, FFGSM, FGSM, MIFGSM, NFGSM, PGD, RandomNoise
from hsat.attacks.reparametrized import Parametrization, Reparametrized, compose_objective
from hsat.attacks.square import Square
from hsat.attacks.srh_space import RawChannels
from hsat.attacks.stain_space import Stains
from hsat.attacks.threat import L2, Linf
from hsat.attacks.universal import FittedUniversal, UniversalPerturbation
from hsat.attacks.worst_case import worst_case

__all__ = [
    "APGD",
    "BIM",
    "DIFGSM",
    "FFGSM",
    "FGSM",
    "L2",
    "MIFGSM",
    "NFGSM",
    "NIFGSM",
    "PGD",
    "TIFGSM",
    "VMIFGSM",
    "AttackEnsemble",
    "EnsembleMember",
    "FittedUniversal",
    "Linf",
    "Masked",
    "NaturalShift",
    "Parametrization",
    "RandomNoise",
    "RawChannels",
    "Reparametrized",
    "Square",
    "Stains",
    "UniversalPerturbation",
    "aggregate_margin",
    "choose_guide_images",
    "classification",
    "compose_objective",
    "dlr",
    "feature_drift",
    "from_art",
    "from_foolbox",
    "from_torchattacks",
    "hierarchical",
    "margin",
    "match_features",
    "objective_from",
    "slide_objective",
    "worst_case",
]
