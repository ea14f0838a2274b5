"""The shape of the package: which room may import which, file sizes, public names, keyword-only options."""

from __future__ import annotations

import ast
import importlib
import inspect
from pathlib import Path

import pytest

import hsat

ROOT = Path(hsat.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
LOWER = {"attacks", "losses", "classifiers", "data", "models"}
GROUND = {"files", "untrusted", "tensor_files", "types", "distributed", "fingerprints", "stains"}
MAY_IMPORT = {room: GROUND for room in LOWER} | {
    "files": {"untrusted"},
    "embedding": LOWER | GROUND,
    "untrusted": set(),
    "tensor_files": {"untrusted"},
    "types": {"files"},
    "distributed": {"types", "files"},
    "fingerprints": {"types", "files"},
    "stains": set(),
    "run_folder": {"files"},
    "training": LOWER | GROUND | {"embedding"},
    "eval": LOWER | GROUND | {"embedding"},
    "report": LOWER | GROUND | {"embedding", "eval"},
    "testing": {"types"},
}
PUBLIC = {
    "hsat.attacks": "BIM FFGSM FGSM L2 MIFGSM PGD Linf RandomNoise"
    " classification feature_drift hierarchical objective_from"
    " choose_guide_images match_features aggregate_margin worst_case"
    " APGD DIFGSM NIFGSM Square TIFGSM VMIFGSM dlr margin",
    "hsat.losses": "HiDiscLoss HiDiscTerms supcon_loss",
    "hsat.classifiers": "DecisionModel Head KNNClassifier NearestCentroid",
    "hsat.data": "AugmentationPolicy BadPatch Cohort HierarchicalBatch HierarchicalDataset PatchDataset PatchStore"
    " PatientBatchSampler build_transform collate hierarchical_loader patch_loader read_csv read_folders read_opensrh"
    " read_patch srh_to_rgb write_patch_store write_synthetic_cohort",
    "hsat.models": "build_encoder frozen load_checkpoint wrap_encoder",
    "hsat.training": "adversarial_step augmentation_strength cosine_with_warmup epsilon_schedule paper_clean_weight",
    "hsat.eval": "embed evaluate_transfer evaluate_whitebox metrics pool",
    "hsat.types": "Attack AttackResult EmbeddingTable EmbeddingFunction HierarchicalBatch Levels Objective ThreatModel",
}


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").parts[0]


def imported(tree: ast.AST) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names.add(node.module or "")
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_arrows_point_one_way(path):
    room = room_of(path)
    if room == "__init__":
        return
    for name in imported(ast.parse(path.read_text())):
        parts = name.split(".")
        if parts[0] == "hsat" and len(parts) > 1 and parts[1] != room and parts[1] in MAY_IMPORT:
            assert parts[1] in MAY_IMPORT[room], f"hsat.{room} must not import {name}"
        assert parts[0] not in ("argparse", "examples", "benchmarks"), f"hsat/ reads no command line: {name}"


def test_a_wrong_arrow_would_be_seen():
    assert "hsat.models" in imported(ast.parse("def f():\n    from hsat.models import frozen"))
    assert "models" not in MAY_IMPORT["attacks"]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_have_at_most_400_lines_and_bodies_at_most_60(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 400, "split this file"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            body = [n for n in node.body if not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant))]
            if body:
                length = (body[-1].end_lineno or 0) - body[0].lineno + 1
                assert length <= 60, f"{node.name} has {length} lines"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "print", "the library does not print"
    assert path.stem not in ("utils", "helpers", "misc", "common")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_environment_and_no_argv_inside_the_library(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            assert (ast.unparse(node)) not in ("os.environ", "sys.argv"), "configuration stays in the examples"


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names_are_there_and_documented(module):
    room = importlib.import_module(module)
    for name in PUBLIC[module].split():
        thing = getattr(room, name)
        if inspect.isclass(thing) or inspect.isfunction(thing):
            assert thing.__doc__ and len(thing.__doc__) > 40, f"{name} needs a docstring"
        assert getattr(hsat, name) is thing
        assert name in hsat.__all__


def test_options_of_public_functions_are_keyword_only():
    """At most four positional parameters, and none of them optional but for a short list."""
    allowed = {
        "distance",
        "group",
        "head",
        "how",
        "labels",
        "lam",
        "plateau",
        "x",
        "layout",
        "attacks",
        "name",
        "manifest",
    }
    for names in PUBLIC.values():
        for name in names.split():
            thing = getattr(hsat, name, None)
            if inspect.isfunction(thing):
                for parameter in inspect.signature(thing).parameters.values():
                    if parameter.kind is parameter.POSITIONAL_OR_KEYWORD and parameter.default is not parameter.empty:
                        assert parameter.name in allowed, f"{name}({parameter.name}=...) should be keyword-only"


def test_hsat_has_no_name_it_does_not_define():
    with pytest.raises(AttributeError, match="no attribute 'PDG'"):
        _ = hsat.PDG
    assert set(hsat.__all__) <= set(dir(hsat))
