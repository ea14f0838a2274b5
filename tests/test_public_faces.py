"""Tests reach hsat by its public names and mirror its modules one to one."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TESTS = sorted((ROOT / "tests").rglob("*.py"))
MODULES = {
    path.relative_to(ROOT / "hsat").with_suffix("").as_posix(): path
    for path in (ROOT / "hsat").rglob("*.py")
    if not path.stem.startswith("__")
}
OF_TUPLES = {"_replace", "_asdict", "_fields", "_repr_html_"}  # public, whatever they are called: of tuples, notebooks
SETTERS = ("setattr", "delattr", "setitem", "object", "getattr", "hasattr", "attrgetter")
IN_TEXT = re.compile(r"^hsat(?:\.\w+)*\._(?!_)\w+$")

ABOUT_SEVERAL = {  # test files that belong to no single module, and what they are about
    "attacks/aggregate_margin": "the margin of a mean of scores, made of objectives, margins and classifiers",
    "attacks/attacks_page": "the numbers of docs/attacks.md",
    "attacks/contract": "what every attack promises",
    "attacks/exact_answers": "attacks on functions whose maximum is known",
    "attacks/golden_attacks": "numbers of the published code, of several attacks",
    "attacks/objectives_page": "the numbers of docs/objectives.md",
    "attacks/one_image": "every attack on a batch of one image",
    "attacks/order_free": "an image's result depends on no other image, for every attack",
    "attacks/threats_page": "the numbers of docs/threats.md",
    "attacks/torchattacks": "several attacks against another library",
    "attacks/torchattacks_searches": "attacks that draw against another library",
    "benchmarks/ablation_levels": "a script under benchmarks/",
    "benchmarks/benchmarks_start": "every script under benchmarks/",
    "benchmarks/colour_shares": "a script under benchmarks/",
    "benchmarks/feature_shares": "a script under benchmarks/",
    "benchmarks/gpu_step": "a script under benchmarks/",
    "benchmarks/recipes": "the scripts of the study of recipes under benchmarks/",
    "browser/report_in_chromium": "the page as a browser shows it",
    "classifiers/knn_decision": "the decision's margin through knn, knn_vote and search",
    "cli/evaluate_ensemble": "one option of hsat evaluate, by itself",
    "cli/evaluation_ranks": "hsat evaluate on several ranks",
    "cli/gpu": "commands on a GPU",
    "cli/smallest_cohort": "every command on the smallest cohort",
    "cli/train_interrupts": "hsat train under signals",
    "cli/train_non_finite": "hsat train with numbers that are not finite",
    "cli/train_packed": "hsat train on packed patches",
    "cli/train_ranks": "hsat train on several ranks",
    "cli/train_resume": "hsat train that goes on",
    "data/imports": "what importing the room imports",
    "data/paper_draws": "draws of the published code, through cohort, sampler and datasets",
    "eval/evaluations": "what every evaluation promises",
    "eval/large_banks": "evaluations whose bank is a file",
    "eval/smallest_inputs": "evaluations of the smallest inputs",
    "examples/examples": "every script under examples/",
    "examples/quickstart": "the README's first lines",
    "gpu/gpu": "what must hold on a GPU, room by room",
    "models/foreign_files": "checkpoints of other programs, through checkpoints, state_dicts and metadata",
    "models/hostile_files": "files that mean harm, through checkpoints and untrusted",
    "models/load_encoder": "load_encoder, from a file to an encoder",
    "models/published_models": "names of published models, through zoo and factory",
    "packaging/constraints": "the committed versions",
    "packaging/wheel": "what pip installs",
    "regression/committed_numbers": "numbers of whole runs",
    "regression/comparison": "the comparison of two revisions",
    "training/cheaper_inner_page": "the numbers of a docs page",
    "training/device_reads": "reads of the device in a step, through step, free, fast and gradients",
    "training/host_reads": "the count of such reads",
    "training/hsat_plus": "the options of HSAT+ and its guard, in whole trainings",
    "training/one_image": "a step of one image",
    "training/ranks": "a step on several ranks",
    "training/trainer_attacks": "the trainer's inner attacks",
    "training/trainer_devices": "the trainer on devices and in precisions",
    "training/trainer_preset": "the trainer under the paper's preset",
    "architecture": "the shape of the package",
    "docs": "the pages under docs/",
    "doctests": "the examples in docstrings",
    "files_document": "docs/files.md against the files that are written",
    "private_names": "private names of torch",
    "public_faces": "this file",
    "attacks/not_tensors": "what is no tensor, given to every attack and objective",
    "attacks/other_libraries_page": "the numbers of docs/other_libraries.md",
    "benchmarks/ensemble_strength": "a script under benchmarks/",
    "classifiers/classifiers_page": "the numbers of docs/classifiers.md",
    "docstrings": "the sections of public docstrings",
    "eval/natural_shift": "natural shifts through an evaluation",
    "eval/training_flags": "what records say of an encoder's training, from its file to the flags",
    "eval/slides_page": "the numbers of docs/slides.md",
    "data/labels_per_patch": "patients whose patches bear different labels, from reader to records",
}
PACKAGES = {"recipes", "report/page", "types"}  # tested as a whole, through what the package offers
REPORT_PAGE = {"report/page_figures"}  # of the package report/page
TESTED_BY = {  # modules without a test file of their name, and the one that tests what they are for
    "attacks/base": "attacks/contract",
    "attacks/ensemble_pass": "attacks/ensemble",
    "attacks/initialization": "attacks/contract",
    "attacks/objectives": "attacks/loop",
    "attacks/srh_space": "attacks/reparametrized",
    "attacks/stain_space": "attacks/reparametrized",
    "classifiers/base": "classifiers/knn",
    "classifiers/knn_folder": "classifiers/knn",
    "data/image_operations": "data/augment_batch",
    "data/opensrh": "data/layouts",
    "data/records": "data/cohort",
    "data/splits": "data/cohort",
    "data/textures": "data/synthetic",
    "eval/adversarial_files": "eval/export",
    "eval/passes": "eval/cost",
    "eval/artifact_files": "report/artifacts",
    "eval/default_neighbours": "cli/classifiers",
    "eval/inputs": "robustness",
    "eval/loader_inputs": "robustness",
    "eval/result_text": "robustness",
    "report/evaluation_files": "cli/evaluate",
    "training/encoder_files": "eval/training_flags",
    "training/reporting": "training/trainer",
    "eval/store_folder": "eval/store",
    "eval/transfer_drops": "eval/transfer",
    "models/dual_norm": "models/factory",
    "models/heads": "models/factory",
    "models/metadata": "files_document",
    "models/state_dicts": "models/load_encoder",
    "models/zoo": "models/factory",
    "report/line_labels": "report/accuracy_plot",
    "report/page/drawing": "report/page",
    "report/page/figures": "report/page_figures",
    "report/page/sections": "report/page",
    "tensor_files": "models/hostile_files",
    "testing/probes": "testing/laws",
    "testing/snapshot": "testing/laws",
    "training/config": "training/trainer",
    "training/folder": "training/trainer",
    "training/inner_attack": "training/trainer_attacks",
    "training/optimization": "training/trainer",
    "training/views": "training/trainer",
    "types/batch": "types",
    "types/precision": "classifiers/search",
    "types/protocols": "types",
    "types/row_checks": "types",
    "types/table": "types",
    "attacks/library_attack": "attacks/other_libraries",
    "eval/slide_attacks": "eval/slides",
    "eval/slide_records": "eval/slides",
    "models/pixel_check": "models/pixel_normalisation",
    "models/wrapper": "models/encoder",
    "quantities": "training/resources",
    "report/page/tables": "report/page",
    "types/slides": "classifiers/mil",
    "data/assembly": "data/readers",
    "types/names": "data/tables",
    "types/plain_batches": "embedding",
    "data/patch_store_writer": "data/patch_store",
}
TESTED = {
    (path.relative_to(ROOT / "tests").parent / path.stem.removeprefix("test_")).as_posix()
    for path in TESTS
    if path.stem.startswith("test_")
}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in OF_TUPLES and name != "_"


def names_given_in(tree: ast.AST) -> set[str]:
    """Private names that a file defines: functions, classes, variables, attributes that it sets."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return {name for name in names if is_private(name)}


PRIVATE = set[str]().union(*(names_given_in(ast.parse(path.read_text())) for path in MODULES.values()))


def private_uses(source: str) -> Iterator[str]:
    """One text per private name of hsat that a test imports, asks an object for, or puts something else in place of."""
    tree = ast.parse(source)
    own = names_given_in(ast.Module([node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)], []))
    for node in ast.walk(tree):
        where = f"line {getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "hsat":
            yield from (f"{where}: import of {alias.name}" for alias in node.names if is_private(alias.name))
        if isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr in PRIVATE:
            of_itself = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls") and node.attr in own
            if not of_itself:
                yield f"{where}: {ast.unparse(node)}"
        if isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            texts = [one.value for one in node.args if isinstance(one, ast.Constant) and isinstance(one.value, str)]
            for text in texts if called in SETTERS else []:
                if text in PRIVATE or IN_TEXT.match(text):
                    yield f"{where}: {text} by its name"


@pytest.mark.parametrize("path", TESTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_tests_reach_public_faces_only(path):
    assert not list(private_uses(path.read_text()))


@pytest.mark.parametrize(
    "source",
    [
        "from hsat.cli.ranks import Ranks, _another_spoke",
        "def f():\n    from hsat.classifiers.search import _EQUAL",
        "import hsat.data.synthetic as room\nroom._patients(chosen)",
        "PGD(threat, step_size=1, steps=1)._config()",
        "monkeypatch.setattr(synthetic, '_paint_patient', f)",
        "monkeypatch.setattr('hsat.cli.ranks._another_spoke', f)",
        "class A:\n    def f(self):\n        return self._config()",
    ],
)
def test_a_private_name_would_be_seen(source):
    assert list(private_uses(source))


@pytest.mark.parametrize(
    "source",
    [
        "records[0]._replace(split='')",
        "os._exit(0)",
        "class A(GradientAttack):\n    def _config(self):\n        return self._config()",
        "monkeypatch.setattr(search, 'BLOCK_BYTES', 1)",
    ],
)
def test_a_public_name_passes(source):
    assert not list(private_uses(source))


def test_every_test_file_is_of_one_module_or_says_what_it_is_about():
    others = TESTED - MODULES.keys() - PACKAGES - REPORT_PAGE
    assert others == ABOUT_SEVERAL.keys(), "name the file after its module, or say in ABOUT_SEVERAL what it is about"
    assert all(len(reason.split()) >= 2 for reason in ABOUT_SEVERAL.values())


def test_every_module_has_its_test_file_or_names_it():
    assert MODULES.keys() - TESTED == TESTED_BY.keys(), "add tests/<room>/test_<module>.py, or an entry in TESTED_BY"
    assert set(TESTED_BY.values()) <= TESTED
