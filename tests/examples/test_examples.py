"""The examples: short, importing only hsat, running as they are in a folder of their own, writing nowhere else."""

from __future__ import annotations

import ast
import os
import re
import runpy
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from hsat.classifiers import load_mil
from hsat.eval import read_records
from hsat.models import load_encoder

ROOT = Path(__file__).parents[2]
EXAMPLES = {path.stem: path for path in sorted((ROOT / "examples").glob("*.py"))}
NAMES = {
    "quickstart",
    "train_hsat",
    "evaluate_whitebox",
    "evaluate_transfer",
    "reproduce_paper",
    "own_encoder",
    "own_attack",
    "other_libraries",
    "linear_probe_and_mil",
}
COMMANDS = {
    "train_hsat": "train",
    "evaluate_whitebox": "evaluate",
    "evaluate_transfer": "transfer",
    "reproduce_paper": "reproduce",
}
ALLOWED = {"hsat", "torch", "numpy", "pathlib", "sys", "dataclasses", "collections", "__future__"}
OF_LIBRARIES = (".art", ".cache", ".config")  # what ART, matplotlib and Lightning keep in the home folder
OTHERS = {"other_libraries": {"lightning", "torchattacks", "foolbox", "art", "importlib", "warnings"}}


def run(name: str, folder: Path) -> str:
    """What the example prints, run in `folder`; fails where it writes into the home or temporary folder, or besides."""
    home, temporary, here = (folder / part for part in ("home", "tmp", "here"))
    for path in (home, temporary, here):
        path.mkdir()
    environment = os.environ | {
        "HOME": str(home),
        "TMPDIR": str(temporary),
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
    }
    before = set((ROOT / "examples").iterdir()) | set(ROOT.iterdir())
    command = [sys.executable, "-W", "error::UserWarning", str(EXAMPLES[name])]
    done = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert set((ROOT / "examples").iterdir()) | set(ROOT.iterdir()) == before
    written = [path.name for place in (home, temporary) for path in place.iterdir()]
    ignored = ("torchinductor_", *OF_LIBRARIES) if name in OTHERS else "torchinductor_"  # torch makes that one, empty
    assert not [name for name in written if not name.startswith(ignored)]
    assert [path.name for path in here.iterdir()] == ["runs"]
    return done.stdout


def test_the_examples_are_those_of_the_readme():
    assert set(EXAMPLES) == NAMES
    readme = (ROOT / "README.md").read_text()
    assert set(re.findall(r"\(examples/(\w+)\.py\)", readme)) == NAMES


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_short_and_imports_only_hsat_and_torch(name):
    text, allowed = EXAMPLES[name].read_text(), ALLOWED | OTHERS.get(name, set())
    assert len(text.splitlines()) <= 82
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            assert {alias.name.partition(".")[0] for alias in node.names} <= allowed
        elif isinstance(node, ast.ImportFrom):
            assert (node.module or "").partition(".")[0] in allowed


def test_train_hsat_leaves_an_encoder(tmp_path):
    shown = run("train_hsat", tmp_path)
    out = tmp_path / "here/runs/example-training"
    assert shown == "encoder: runs/example-training/best.safetensors\n"
    assert load_encoder(out / "best.safetensors").embedding_dim == 32
    rows = (out / "train.csv").read_text().splitlines()
    assert len(rows) == 1 + 8 or len([row for row in rows if not row.startswith("#")]) == 1 + 8


@pytest.mark.slow
def test_evaluate_whitebox_measures_at_three_levels(tmp_path):
    shown = run("evaluate_whitebox", tmp_path)
    records = read_records(tmp_path / "here/runs/example-whitebox/records.jsonl")
    attacked = {"PGD-4", "MIFGSM-4", "PGD-8", "MIFGSM-8", "PGD-l2"}
    assert {record.attack_name for record in records} > attacked | {"clean", "noise-8"}
    assert {record.target for record in records} == {"decision"}
    accuracy = {r.attack_name: r.value for r in records if (r.level, r.metric) == ("patch", "accuracy")}
    assert accuracy["PGD-8"] <= accuracy["PGD-4"] < accuracy["clean"]
    assert all(f"**{level} level**" in shown for level in ("Patch", "Slide", "Patient"))


@pytest.mark.slow
def test_evaluate_transfer_gives_drops_of_all_pairs(tmp_path):
    shown = run("evaluate_transfer", tmp_path)
    records = read_records(tmp_path / "here/runs/example-transfer/records.jsonl")
    pairs = {(record.surrogate, record.model) for record in records if record.metric == "accuracy_drop"}
    assert {(a, b) for a in ("first", "second") for b in ("first", "second")} <= pairs
    assert "Acc-D / MCA-D" in shown


@pytest.mark.slow
def test_reproduce_paper_sets_our_numbers_beside_the_printed_ones(tmp_path):
    shown = run("reproduce_paper", tmp_path)
    (printed,) = re.findall(r"^\| HiDisc \| paper \| (.*)$", shown.partition("**Slide level**")[0], re.MULTILINE)
    assert printed.startswith("83.1")
    ours = re.findall(r"^\| (\w+) \| ours \| (\d+\.\d)", shown, re.MULTILINE)
    assert {name for name, _ in ours} == {"HiDisc", "HSAT"}


@pytest.mark.slow
def test_linear_probe_and_mil_are_attacked(tmp_path):
    shown = run("linear_probe_and_mil", tmp_path)
    out = tmp_path / "here/runs/example-slides"
    left = [float(value) for value in re.findall(r"^PGD-4 through [\d.]+ %: ([\d.]+)$", shown, re.MULTILINE)]
    (clean,) = re.findall(r"^clean: ([\d.]+)$", shown, re.MULTILINE)
    assert [float(clean), *left] == sorted([float(clean), *left], reverse=True) and left[-1] < float(clean)
    (honest,) = re.findall(r"^cross-validated accuracy of slides: ([\d.]+)$", shown, re.MULTILINE)
    assert float(honest) > 0.5
    records = read_records(out / "records.jsonl")
    assert {record.level for record in records} == {"slide", "patient"}
    assert {record.settings.get("order") for record in records if record.attack} == {"attention"}
    assert load_mil(out / "mil.safetensors").class_names == ("hgg", "lgg", "mening", "metast", "normal")
    assert "**Patch level**" in shown


@pytest.mark.slow
def test_own_encoder_trains_and_is_measured(tmp_path):
    shown = run("own_encoder", tmp_path)
    losses = [float(loss) for loss in re.findall(r"^step \d+: loss ([\d.]+)$", shown, re.MULTILINE)]
    assert len(losses) == 12 and sum(losses[-3:]) < sum(losses[:3])
    assert "| SmallNetwork | decision |" in shown


@pytest.mark.slow
def test_own_attack_keeps_all_laws_and_is_measured(tmp_path):
    from hsat.testing import LAWS

    shown = run("own_attack", tmp_path)
    assert f" keeps {len(LAWS)} laws\n" in shown
    assert "| CoarseToFine-8 |" in shown


@pytest.mark.slow
def test_other_libraries_says_what_is_missing_and_uses_the_rest(tmp_path):
    shown = run("other_libraries", tmp_path)
    names = {"torchattacks": "torchattacks PGD", "foolbox": "foolbox PGD", "art": "ART FGSM"}
    for library in ("lightning", *names):
        there = find_spec(library) is not None
        assert (f"{library} is missing: pip install " in shown) != there
        assert (f"| {names.get(library, 'PGD-8')} |" in shown) == (there or library == "lightning")
    assert shown.count("% of a batch") == sum(find_spec(library) is not None for library in names)


@pytest.fixture
def start(monkeypatch, capsys):
    """Start an example with options in this process; returns how it ended and what it printed."""
    before = signal.getsignal(signal.SIGTERM)

    def begin(name: str, *options: str) -> tuple[object, str]:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *options])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(EXAMPLES[name]), run_name="__main__")
        return ended.value.code, capsys.readouterr().out

    yield begin
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("name", COMMANDS)
def test_with_options_an_example_is_the_command(name, start):
    code, shown = start(name, "--help")
    assert code == 0
    assert shown.startswith(f"usage: hsat {COMMANDS[name]} ")
    code, _ = start(name, "--no_such_option", "1")
    assert code


def test_an_example_says_what_the_command_misses(start):
    code, _ = start("evaluate_whitebox", "--attacks", "pgd")
    assert "--checkpoint FILE" in str(code)
