"""The comparison of two checkouts' results: it sees every planted difference, and none where names only changed."""

from __future__ import annotations

import csv
import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from commands import COMMANDS, LAYOUT, selected
from compare import main
from differences import compare_results, near
from editions import Edition, Ignored, edition_of, ignored_of, read_table
from PIL import Image
from results import read_results
from safetensors.numpy import load_file, save_file

from hsat.cli.options import Settings

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
TABLE = read_table()
IGNORED = ignored_of(TABLE)


def record(**changes):
    values = {
        "model": "hsat",
        "attack": "Strongest(threat=Linf(eps=8/255))",
        "attack_name": "strongest-8",
        "target": "knn",
        "level": "patch",
        "metric": "accuracy",
        "k": 20,
        "seed": 0,
        "value": 0.5,
        "low": None,
        "flags": [],
        "settings": {"members": {"PGD": {"felled": 3, "seen": 18}}, "how": "mean"},
        "versions": {"torch": "2.14.1"},
    }
    return values | changes


RECORDS = [record(), record(attack_name="clean", attack="", value=1.0), record(level="slide", value=2 / 3)]


def write_records(folder, records=RECORDS):
    (folder / "records.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))


def write_csv(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture
def old(tmp_path):
    """A folder with one file of every kind."""
    folder = tmp_path / "old"
    (folder / "cohort").mkdir(parents=True)
    write_records(folder)
    write_csv(folder / "train.csv", [{"step": 0, "loss": "9.25", "lr": "0.001"}, {"step": 1, "loss": "8.5", "lr": "0"}])
    write_csv(folder / "strongest.csv", [{"patch": 54, "felled_by": "PGD", "margin": "1.6"}])
    weights = {"conv.weight": np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4), "step": np.array([7])}
    save_file(
        weights, folder / "final.safetensors", {"hsat": json.dumps({"step": 20, "encoder": {"dual_norm": False}})}
    )
    np.savez(
        folder / "scores.npz", scores=np.array([[0.0, 1.0], [np.nan, 0.5]]), about=json.dumps({"models": ["hsat"]})
    )
    (folder / "table.md").write_text(
        "**Patch level** (n = 18)\n\n| model | target | PGD-8 |\n| --- | --- | --- |\n"
        "| hsat | knn | 50.0 [20.0, 80.0] |\n| hidisc | knn | 40.0 |\n"
    )
    (folder / "run.json").write_text(json.dumps({"cohort": "abc", "command": ["a.py"], "settings": {"out": "x"}}))
    Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3)).save(folder / "cohort" / "patch.png")
    (folder / "accuracy_vs_eps.png").write_bytes(b"a figure")
    (folder / "last.pt").write_bytes(b"to go on with")
    return folder


@pytest.fixture
def new(old, tmp_path):
    return Path(shutil.copytree(old, tmp_path / "new"))


def compared(old, new, edition=None):
    edition = edition or Edition()
    results = read_results(old, Edition(), IGNORED), read_results(new, edition, IGNORED)
    return compare_results("whitebox", *results, ignored=IGNORED, edition=edition)


def the_difference(old, new):
    (difference,) = compared(old, new)
    return difference


def test_equal_folders_are_equal(old, new):
    assert compared(old, new) == []


@pytest.mark.parametrize(("changes", "field"), [
    ({"value": np.nextafter(0.5, 1)}, "value"),
    ({"value": 1}, "value"),
    ({"low": 0.0}, "low"),
    ({"settings": {"members": {"PGD": {"felled": 4, "seen": 18}}, "how": "mean"}}, "settings.members.PGD.felled"),
    ({"settings": {"members": {"PGD": {"felled": 3, "seen": 18}}, "how": "mean", "more": 0}}, "settings.more"),
])  # fmt: skip
def test_a_record_that_differs_in_one_field_is_named(old, new, changes, field):
    write_records(new, [record(**changes), *RECORDS[1:]])
    difference = the_difference(old, new)
    assert difference.file == "records.jsonl"
    assert "attack_name=strongest-8" in difference.entry
    assert "level=patch" in difference.entry
    assert difference.field == field
    assert "->" in str(difference)


def test_a_flag_that_came_is_seen(old, new):
    write_records(new, [record(flags=["a doubt"]), *RECORDS[1:]])
    assert {d.field for d in compared(old, new)} == {"flags", "flags.0"}


def test_minus_zero_and_an_integer_are_other_values(old, new):
    write_records(old, [record(value=0.0)])
    for value in (-0.0, 0):
        write_records(new, [record(value=value)])
        assert the_difference(old, new).field == "value"


def test_a_missing_an_additional_and_a_moved_record_are_seen(old, new):
    write_records(new, RECORDS[:2])
    assert the_difference(old, new).new == "(missing)"
    write_records(new, [*RECORDS, record(k=200)])
    assert "k=200" in the_difference(old, new).entry
    write_records(new, [RECORDS[1], RECORDS[0], RECORDS[2]])
    assert "order" in the_difference(old, new).entry


def test_a_record_that_comes_twice_is_seen(old, new):
    write_records(new, [*RECORDS, RECORDS[0]])
    assert "(2)" in the_difference(old, new).entry


@pytest.mark.parametrize("bit", [0, 31])
def test_one_bit_of_one_weight_is_seen(old, new, bit):
    weights = load_file(new / "final.safetensors")
    weights["conv.weight"].view(np.uint32)[1, 2] ^= np.uint32(1 << bit)
    save_file(weights, new / "final.safetensors", {"hsat": json.dumps({"step": 20, "encoder": {"dual_norm": False}})})
    difference = the_difference(old, new)
    assert (difference.file, difference.field) == ("final.safetensors", "conv.weight")
    assert "[1, 2]" in difference.old
    assert "1 of 12" in difference.new


@pytest.mark.parametrize("changed", [
    np.array([[0.0, 1.0], [np.nan, 0.5]], dtype=np.float32),
    np.array([[0.0, 1.0, 0.0], [np.nan, 0.5, 0.0]]),
    np.array([[-0.0, 1.0], [np.nan, 0.5]]),
    np.array([[0.0, 1.0], [0.0, 0.5]]),
])  # fmt: skip
def test_arrays_of_another_type_shape_or_sign_of_zero_are_seen(old, new, changed):
    np.savez(new / "scores.npz", scores=changed, about=json.dumps({"models": ["hsat"]}))
    assert the_difference(old, new).field == "scores"


def test_text_inside_arrays_and_metadata_is_compared(old, new):
    arrays = dict(np.load(old / "scores.npz"))
    np.savez(new / "scores.npz", **arrays | {"about": json.dumps({"models": ["other"]})})
    assert the_difference(old, new).field == "about.models.0"
    shutil.copy(old / "scores.npz", new / "scores.npz")
    weights = load_file(new / "final.safetensors")
    save_file(weights, new / "final.safetensors", {"hsat": json.dumps({"step": 21, "encoder": {"dual_norm": False}})})
    assert the_difference(old, new).field == "metadata.hsat.step"


@pytest.mark.parametrize("name", ["train.csv", "records.jsonl", "final.safetensors", "cohort/patch.png"])
def test_missing_and_additional_files_are_seen(old, new, name):
    (new / name).unlink()
    assert (the_difference(old, new).file, the_difference(old, new).new) == (name, "(missing)")
    assert (the_difference(new, old).file, the_difference(new, old).old) == (name, "(missing)")


def test_a_missing_column_and_a_changed_number_of_train_csv_are_seen(old, new):
    write_csv(new / "train.csv", [{"step": 0, "loss": "9.25"}, {"step": 1, "loss": "8.500001"}])
    assert [(d.entry, d.field, d.new) for d in compared(old, new)] == [
        ("row 1", "lr", "(missing)"),
        ("row 2", "loss", "'8.500001'"),
        ("row 2", "lr", "(missing)"),
    ]


def test_a_pixel_of_a_written_image_is_seen(old, new):
    pixels = np.asarray(Image.open(new / "cohort" / "patch.png")).copy()
    pixels[3, 2, 1] += 1
    Image.fromarray(pixels).save(new / "cohort" / "patch.png")
    difference = next(d for d in compared(old, new) if d.field == "pixels")
    assert "[3, 2, 1]" in difference.old
    assert "1 of 48" in difference.new


def test_a_cell_of_a_table_is_named(old, new):
    text = (new / "table.md").read_text()
    (new / "table.md").write_text(text.replace("| 40.0 |", "| 40.1 |"))
    difference = the_difference(old, new)
    assert "hidisc knn" in difference.entry
    assert (difference.field, difference.old, difference.new) == ("PGD-8", "'40.0'", "'40.1'")


def test_what_rightly_differs_is_left_out(old, new):
    write_records(new, [each | {"versions": {"torch": "9.9", "timm": "1"}} for each in RECORDS])
    (new / "run.json").write_text(json.dumps({"cohort": "abc", "command": ["b.py", "-x"], "settings": {"out": "y"}}))
    (new / "accuracy_vs_eps.png").write_bytes(b"another figure")
    (new / "last.pt").unlink()
    assert compared(old, new) == []
    (new / "run.json").write_text(json.dumps({"cohort": "abd", "command": [], "settings": {}}))
    assert the_difference(old, new).field == "cohort"


def test_numbers_that_a_library_computes_now_may_differ_by_little():
    ignored = Ignored(({"files": "records.jsonl", "field": "low", "within": 1e-12, "why": "a test"},))
    assert not ignored.field("low", "records.jsonl")
    distance = ignored.distance("low", "records.jsonl")
    assert near(0.5, 0.5 + 1e-13, distance) and near(np.array([0.5]), np.array([0.5 + 1e-13]), distance)
    assert not near(0.5, 0.5 + 1e-11, distance) and not near(0.5, float("nan"), distance) and not near(0.5, 1, distance)
    assert not near(0.5, 0.5 + 1e-13, ignored.distance("value", "records.jsonl"))


def test_a_file_that_cannot_be_read_is_named(new):
    (new / "records.jsonl").write_text("{")
    with pytest.raises(ValueError, match=r"records\.jsonl"):
        read_results(new, Edition(), IGNORED)


# The table of renamed things.


@pytest.fixture
def redesigned(tmp_path):
    """A checkout that shows the sign of every edition of the table."""
    for sign in TABLE["editions"].values():
        path = tmp_path / "checkout" / sign["path"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(sign.get("text", ""))
    return tmp_path / "checkout"


def test_renamed_fields_values_columns_and_files_are_equal(old, new, redesigned):
    def renamed(values):
        text = json.dumps(values).replace("Strongest(", "AttackEnsemble(").replace("strongest-", "ensemble-")
        return json.loads(text.replace('"knn"', '"decision"').replace('"felled"', '"newly_broken"')) | {"chance": 1 / 3}

    write_records(new, [renamed(each) for each in RECORDS])
    write_csv(new / "ensemble.csv", [{"patch": 54, "broken_by": "PGD", "margin": "1.6"}])
    (new / "strongest.csv").unlink()
    (new / "table.md").write_text((new / "table.md").read_text().replace("| knn |", "| decision |"))
    assert compared(old, new, edition_of(redesigned, TABLE)) == []
    assert compared(old, new)  # and without the table it is seen
    write_records(new, [renamed(each) for each in (record(value=0.4), *RECORDS[1:])])
    (difference,) = compared(old, new, edition_of(redesigned, TABLE))
    assert (difference.field, difference.old, difference.new) == ("value", "0.5", "0.4")
    assert "attack_name=strongest-8" in difference.entry


def test_an_added_field_may_come_and_not_go(old, new, redesigned):
    write_records(new, [each | {"classifier": "KNN(k=20)"} for each in RECORDS])
    edition = edition_of(redesigned, TABLE)
    assert compared(old, new, edition) == []
    assert compared(new, old, edition)


def test_commands_are_spelled_as_the_edition_wants_them(redesigned):
    command = next(command for command in COMMANDS if command.name == "whitebox-strongest")
    options = {"target": "knn", "attacks": "pgd,strongest", "compat": "paper", "hold": "all", "k": "5"}
    places = {"checkout": "C", "here": "H"}
    first, later = edition_of(redesigned.parent, TABLE), edition_of(redesigned, TABLE)
    assert first.words(command, places) == ["C/examples/evaluate_whitebox.py"]
    assert later.words(command, places) == ["-m", "hsat", "evaluate"]
    assert first.spelled(options) == [word for name, text in options.items() for word in (f"--{name}", text)]
    changed = ["--target", "decision", "--attacks", "pgd,ensemble", "--preset", "paper", "--k", "5"]
    assert later.spelled(options) == changed


@pytest.mark.parametrize(("section", "entry", "named"), [
    ("options", {"old": "a", "new": "b", "sinc": "command"}, "sinc"),
    ("options", {"old": "a", "new": "b", "since": "command-line"}, "command-line"),
    ("valuse", [], "valuse"),
])  # fmt: skip
def test_a_mistyped_table_is_refused(tmp_path, section, entry, named):
    path = tmp_path / "renames.yaml"
    path.write_text(yaml.safe_dump(TABLE | {section: [entry]}))
    with pytest.raises(ValueError, match=named):
        read_table(path)


def test_every_field_of_the_table_that_is_ignored_has_a_reason():
    assert all(entry["why"] for entries in TABLE["ignored"].values() for entry in entries)
    assert not Ignored().file("records.jsonl")
    assert not IGNORED.file("cohort/studies/a/patches/b.png")
    assert not IGNORED.file("evidence/hsat/clean-000.png")


def test_the_plan_has_what_the_redesign_may_not_change():
    options = {command.name: command.options for command in COMMANDS}
    targets = {command.options.get("target") for command in COMMANDS if command.program == "whitebox"}
    assert targets >= {"features", "embedding", "knn", None}
    assert {command.program for command in COMMANDS} == set(TABLE["programs"])
    assert any(command.ranks == 2 and command.program == "train" for command in COMMANDS)
    assert any(command.ranks == 2 and command.program == "whitebox" for command in COMMANDS)
    assert "strongest" in options["whitebox-strongest"]["attacks"]
    assert options["whitebox-paper"]["compat"] == options["transfer-paper"]["compat"] == "paper"
    kinds = {command.options["attack.name"] for command in COMMANDS if command.program == "train"}
    assert kinds >= {"none", "pgd", "free", "warm"}
    assert all(command.options["seed"] == "0" for command in COMMANDS if command.options)
    assert [command.name for command in COMMANDS if not command.options] == ["cohort", "small-runs"]
    assert all(command.options["train.steps"] == "20" for command in COMMANDS if command.program == "train")


PLANNED = [command for command in COMMANDS if command.options]


@pytest.mark.parametrize("command", PLANNED, ids=lambda command: command.name)
def test_the_commands_of_the_plan_are_accepted_by_this_checkout(command):
    edition = edition_of(ROOT, TABLE)
    dash, package, name = edition.words(command, {"checkout": str(ROOT), "here": str(HERE)})
    assert (dash, package) == ("-m", "hsat")
    module = importlib.import_module(f"hsat.cli.{name}")
    words = edition.spelled(command.options | LAYOUT[command.cohort] | {"data.root": "somewhere"})
    if name == "train":
        settings = module.load_settings(words)
        assert settings.train.steps == 20
    else:
        words += edition.spelled({"checkpoint": "a=b.safetensors"})
        kinds = [each for each in vars(module).values() if isinstance(each, type) and issubclass(each, Settings)]
        (settings,) = [kind.load(words) for kind in kinds if kind.__module__ == module.__name__]
        assert settings.checkpoint == ["a=b.safetensors"]
    assert settings.seed == 0


def test_only_takes_names_and_their_beginnings():
    assert [command.name for command in selected(["cohort"])] == ["cohort"]
    assert [command.name for command in selected(["budget"])] == ["budget-patient", "budget-slide"]
    assert [command.name for command in selected(["transfer"])] == ["transfer"]
    with pytest.raises(ValueError, match="budgets"):
        selected(["budgets"])


# Real folders, a real Python, a program of a few lines in place of hsat's commands.

PROGRAM = """
import json, os, sys
from pathlib import Path
import hsat
out = Path("out")
for name in ("srh", "colour"):
    (out / name).mkdir(parents=True, exist_ok=True)
    (out / name / "patch.json").write_text("{}")
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
if options:
    assert json.loads((Path(options["--data.root"]) / "patch.json").read_text()) == {}
    assert os.environ["OMP_NUM_THREADS"] == "1"
if hsat.FAILS:
    sys.exit("error: planted")
(out / "records.jsonl").write_text(json.dumps({"model": "m", "value": hsat.VALUE}) + "\\n")
"""


def git(folder, *words):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", folder, *identity, *words], check=True, capture_output=True)


@pytest.fixture
def checkouts(tmp_path):
    """Two small checkouts under git that are equal, and the options of a comparison of them."""
    for side in ("a", "b"):
        (tmp_path / side / "hsat").mkdir(parents=True)
        (tmp_path / side / "hsat" / "__init__.py").write_text("VALUE = 0.5\nFAILS = False\n")
        (tmp_path / side / "program.py").write_text(PROGRAM)
        (tmp_path / side / ".gitignore").write_text("__pycache__/\n")
        git(tmp_path / side, "init", "-q")
        git(tmp_path / side, "add", ".")
        git(tmp_path / side, "commit", "-q", "-m", "first")
    table = TABLE | {"programs": {name: [{"words": ["{checkout}/program.py"]}] for name in TABLE["programs"]}}
    (tmp_path / "table.yaml").write_text(yaml.safe_dump(table))
    words = [str(tmp_path / "a"), str(tmp_path / "b"), "--python-old", sys.executable, "--python-new", sys.executable]
    words += ["--work", str(tmp_path / "work"), "--renames", str(tmp_path / "table.yaml")]
    return tmp_path, [*words, "--only", "cohort", "train-warm"]


def set_value(folder, value, *, commit=True, fails=False):
    (folder / "hsat" / "__init__.py").write_text(f"VALUE = {value}\nFAILS = {fails}\n")
    if commit:
        git(folder, "commit", "-q", "-a", "-m", "changed")


def test_two_checkouts_are_compared_in_their_own_processes(checkouts, capsys):
    folder, words = checkouts
    assert main(words) == 0
    set_value(folder / "b", 0.25)
    assert main(words) == 1
    shown = capsys.readouterr().out
    assert "train-warm: records.jsonl: model=m: value: 0.5 -> 0.25" in shown
    assert "0.5 -> 0.25" in (folder / "work" / "differences.txt").read_text()


def test_results_are_reused_until_the_committed_sources_change(checkouts, capsys):
    folder, words = checkouts
    assert main(words) == 0
    results = folder / "work" / "results"

    def written():
        return {path.parent.name: path.stat().st_mtime_ns for path in results.glob("*/run.json")}

    first = written()
    assert main(words) == 0
    assert written() == first
    (folder / "b" / "notes.txt").write_text("no source")
    assert main(words) == 0
    assert written() == first
    set_value(folder / "b", 0.25)
    assert main(words) == 1
    assert first.items() < written().items()  # OLD's are still there, and as they were
    set_value(folder / "b", 0.125, commit=False)
    assert main(words) == 1
    set_value(folder / "b", 0.5, commit=False)
    assert main(words) == 0, "a changed tree is never taken from an earlier comparison"
    assert main([*words, "--fresh"]) == 0
    assert all(written()[name] > first[name] for name in first if "-old-" in name)
    capsys.readouterr()


def test_a_command_that_fails_is_no_success(checkouts, capsys):
    folder, words = checkouts
    set_value(folder / "b", 0.5, fails=True)
    assert main(words) == 1
    shown = capsys.readouterr().out
    assert "error: planted" in shown
    assert "2 failed" in shown
    set_value(folder / "a", 0.5, fails=True)
    assert main(words) == 1, "two failures are not equal results"
    assert "because cohort failed" in capsys.readouterr().out


def test_a_folder_without_hsat_and_a_python_that_is_not_there_are_refused(checkouts, capsys):
    folder, words = checkouts
    assert main([str(folder), *words[1:]]) == 2
    assert str(folder) in capsys.readouterr().err
    assert main([*words[:2], "--only", "cohort"]) == 2
    assert "--python-old" in capsys.readouterr().err


def test_a_python_with_another_hsat_is_refused(checkouts, capsys):
    folder, words = checkouts
    shutil.rmtree(folder / "b" / "hsat")
    (folder / "b" / "hsat").symlink_to(folder / "a" / "hsat")
    assert main(words) == 2
    assert "another hsat" in capsys.readouterr().err


def test_the_shell_script_lists_the_commands():
    done = subprocess.run(
        [HERE / "compare.sh", "--list"], env={"PYTHON": sys.executable, "PATH": "/usr/bin:/bin"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == [command.name for command in COMMANDS]
