"""The shape of the package: arrows between its rooms, circles, lengths, parameters, hops, public names."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import hsat
from hsat.attacks import PGD, Linf, feature_drift
from hsat.classifiers import KNNClassifier
from hsat.eval import RunOptions, Scoring, evaluate_whitebox

ROOT = Path(hsat.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
TREES = {path: ast.parse(path.read_text()) for path in FILES}
MODULES = {".".join(path.relative_to(ROOT.parent).with_suffix("").parts): path for path in FILES}
FLOORS = (  # a room imports lower floors only, never a room of its own floor
    {"quantities", "untrusted"},
    {"files", "tensor_pickles"},
    {"tensor_files"},
    {"types"},
    {"distributed", "fingerprints", "progress", "recipes", "rendezvous", "run_folder", "stains"},
    {"attacks", "losses", "classifiers", "data", "models", "testing"},
    {"embedding"},
    {"eval", "training"},
    {"report"},
    {"robustness"},
    {"cli"},
    {"__main__"},
)
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
MOST_LINES, LONGEST_BODY, MOST_PARAMETERS, MOST_NAMES = 400, 60, 10, 90
WIDER = {
    "embed": 12,
    "build_encoder": 12,
}  # embed keeps the parameters that it always had; each station of an encoder is stated
MOST_HOPS = {"PGD": 6, "evaluate_whitebox": 35}


def short(path: Path) -> str:
    return str(path.relative_to(ROOT))


each_file = pytest.mark.parametrize("path", FILES, ids=short)


def room_of(module: str) -> str:
    """The room of a module's full name: "attacks" of "hsat.attacks.pgd", "" of "hsat" itself."""
    return [*module.split("."), ""][1]


def imports_of(tree: ast.AST) -> set[str]:
    """Full names of the modules that are imported anywhere in a tree, in functions as well."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            base = node.module or ""
            names |= {f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base for alias in node.names}
    return names


def functions_of(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def parameters_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    arguments = function.args
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    return len([one for one in every if one.arg not in ("self", "cls")])


def body_length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from the first statement after the docstring to the last one."""
    body = [n for n in function.body if not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant))]
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


def circles_of(graph: dict[str, set[str]]) -> list[str]:
    """The circles that a walk through the arrows finds, as "a -> b -> a"."""
    circles: list[str] = []
    finished: set[str] = set()

    def visit(module: str, path: list[str]) -> None:
        if module in path:
            circles.append(" -> ".join([*path[path.index(module) :], module]))
        elif module not in finished:
            for other in sorted(graph.get(module, ())):
                visit(other, [*path, module])
            finished.add(module)

    for module in sorted(graph):
        visit(module, [])
    return circles


@each_file
def test_arrows_point_to_lower_floors(path):
    module = ".".join(path.relative_to(ROOT.parent).with_suffix("").parts)
    room = room_of(module).removesuffix("__init__")
    for name in imports_of(TREES[path]):
        assert name.split(".")[0] not in ("examples", "benchmarks"), f"{module} imports {name}"
        assert name != "argparse" or module == "hsat.cli.options", f"{module} reads a command line"
        other = room_of(name) if name.split(".")[0] == "hsat" else ""
        if room and other and other != room:
            assert other in FLOOR_OF, f"{other} stands on no floor; add it to FLOORS"
            assert FLOOR_OF[other] < FLOOR_OF[room], f"{module} imports {name}, which is on no lower floor"


def test_modules_import_each_other_in_no_circle():
    """Imports in functions count; a room's __init__ stands for the names it offers and is left out."""
    graph = {
        module: {name for name in imports_of(TREES[path]) if name in MODULES and not name.endswith("__init__")}
        for module, path in MODULES.items()
        if path.name != "__init__.py"
    }
    assert circles_of(graph) == []


def test_folders_import_each_other_in_no_circle():
    """Every folder of the package, however deep, is one node here."""
    graph: dict[str, set[str]] = {}
    for module, path in MODULES.items():
        if path.name != "__init__.py":
            folder = module.rpartition(".")[0]
            known = imports_of(TREES[path]) & MODULES.keys()
            targets = {MODULES[name].relative_to(ROOT.parent).parent for name in known}
            graph.setdefault(folder, set()).update({".".join(one.parts) for one in targets} - {folder, "hsat"})
    graph.pop("hsat", None)  # single files on several floors, which the first test orders
    assert circles_of(graph) == []


def test_wrong_arrows_and_circles_are_seen():
    assert room_of(next(iter(imports_of(ast.parse("def f():\n    from hsat.models import frozen"))))) == "models"
    assert FLOOR_OF["models"] == FLOOR_OF["attacks"]
    assert circles_of({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == ["a -> b -> c -> a"]


@each_file
def test_lengths_parameters_and_names_of_files(path):
    assert len(path.read_text().splitlines()) <= MOST_LINES, "split this file"
    for function in functions_of(TREES[path]):
        assert body_length(function) <= LONGEST_BODY, f"{function.name} has a body of {body_length(function)} lines"
        most = WIDER.get(function.name, MOST_PARAMETERS)
        assert parameters_of(function) <= most, f"{function.name} takes {parameters_of(function)} parameters"
    assert path.stem not in ("utils", "helpers", "misc", "common")


@each_file
def test_the_library_neither_prints_nor_reads_environment_and_command_line(path):
    if path.parent.name == "cli" or path.name == "__main__.py":
        return
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "print", "the library does not print"
        if isinstance(node, ast.Attribute):
            assert ast.unparse(node) not in ("os.environ", "sys.argv"), "configuration stays outside"


def files_entered(call: Callable[[], object]) -> set[str]:
    """The files of hsat in which a function runs during a call."""
    entered: set[str] = set()

    def profile(frame, event, _):
        if event == "call" and frame.f_code.co_filename.startswith(str(ROOT)):
            entered.add(os.path.relpath(frame.f_code.co_filename, ROOT))

    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
    return entered


def test_a_pgd_call_enters_few_files():
    x = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    attack = PGD(Linf(8 / 255), step_size=2 / 255, steps=2)
    objective = feature_drift(lambda images: images.flatten(1), x)
    entered = files_entered(lambda: attack(x, objective, generator=torch.Generator().manual_seed(0)))
    entered -= {os.path.relpath(inspect.getsourcefile(feature_drift) or "", ROOT)}
    assert len(entered) <= MOST_HOPS["PGD"], sorted(entered)


def test_a_whitebox_evaluation_enters_few_files(toy_encoder, toy_batches):
    def evaluate() -> object:
        return evaluate_whitebox(
            toy_encoder,
            toy_batches(seed=0, sizes=(24,)),
            toy_batches(seed=1, sizes=(12,), first_id=1000),
            {"PGD-8": PGD(Linf(8 / 255), step_size=4 / 255, steps=2)},
            classifier=KNNClassifier(k=3),
            scoring=Scoring(bootstrap=20),
            run=RunOptions(noise=False),
        )

    evaluate()  # modules that are imported when first used do not count
    entered = files_entered(evaluate)
    assert len(entered) <= MOST_HOPS["evaluate_whitebox"], sorted(entered)


def test_few_public_names_all_of_them_documented():
    assert len(hsat.__all__) <= MOST_NAMES
    assert set(hsat.__all__) <= set(dir(hsat))
    for name in hsat.__all__:
        value = getattr(hsat, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert value.__doc__ and len(value.__doc__) > 40, f"{name} needs a docstring"


def test_every_exported_name_is_listed_with_a_reason():
    """tests/public_names.txt: a line "room.name: what a user needs it for" for every name that a room exports."""
    listed: dict[str, str] = {}
    for line in (Path(__file__).parent / "public_names.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, _, reason = line.partition(": ")
            assert name not in listed, f"{name} is listed twice"
            assert len(reason.split()) >= 3, f"{name} needs one line why it is exported"
            listed[name] = reason
    rooms = {"": hsat} | {
        path.parent.name: importlib.import_module(f"hsat.{path.parent.name}") for path in ROOT.glob("*/__init__.py")
    }
    exported = {
        f"{room}.{name}".lstrip(".") for room, module in rooms.items() for name in getattr(module, "__all__", ())
    }
    exported -= {name for name in hsat.__all__ if any(f"{room}.{name}" in exported for room in rooms if room)}
    assert exported - listed.keys() == set(), "add these to tests/public_names.txt, or do not export them"
    assert listed.keys() - exported == set(), "nobody exports these any more"


def test_options_of_public_functions_are_keyword_only():
    """At most four positional parameters, and none of them optional but for a short list."""
    allowed = set("attacks backbone distance group head how labels lam layout manifest name plateau x".split())
    for name in hsat.__all__:
        function = getattr(hsat, name)
        if inspect.isfunction(function):
            for parameter in inspect.signature(function).parameters.values():
                if parameter.kind is parameter.POSITIONAL_OR_KEYWORD and parameter.default is not parameter.empty:
                    assert parameter.name in allowed, f"{name}({parameter.name}=...) should be keyword-only"


def test_hsat_has_no_name_it_does_not_define():
    with pytest.raises(AttributeError, match="no attribute 'PDG'"):
        _ = hsat.PDG
