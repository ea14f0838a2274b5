"""hsat compare: its columns are those of hsat evaluate, and each convention is switched alone."""

from __future__ import annotations

import importlib
import json

import pytest

from hsat.eval import read_records
from hsat.models import build_encoder, save_encoder

QUICK = "--data.image_size 32 --steps 2 --bootstrap 10 --k 5 --eps 8/255 --quiet".split()
SCORING = ("pooling", "absent classes", "grouping")


def run(command, argv):
    importlib.import_module(f"hsat.cli.{command}").main([*argv])


@pytest.fixture(scope="module")
def compared(trained, root, tmp_path_factory):
    out = tmp_path_factory.mktemp("conventions")
    argv = ["--checkpoint", str(trained / "final.safetensors"), "--data.root", str(root), *QUICK]
    run("compare", [*argv, "--attacks", "pgd,bim,ffgsm", "--out", str(out)])
    return out


def by_convention(out):
    found = {}
    for record in read_records(out / "records.jsonl"):
        key = (record.attack_name, record.level, record.metric)
        found.setdefault(record.settings["convention"], {})[key] = record
    return found


def test_every_applicable_convention_is_there(compared):
    names = ["hsat", "target", "random start", "FFGSM step", *SCORING, "the published code"]
    assert list(by_convention(compared)) == names
    assert json.loads((compared / "run.json").read_text())["settings"]["k"] == 5


def test_the_two_columns_are_those_of_the_evaluation(compared, trained, root, tmp_path):
    argv = ["--checkpoint", str(trained / "final.safetensors"), "--data.root", str(root), *QUICK, "--gallery", "0"]
    run(
        "evaluate",
        [*argv, "--attacks", "pgd,bim", "--preset", "paper", "--noise", "false", "--out", str(tmp_path)],
    )
    published, found = read_records(tmp_path / "records.jsonl"), by_convention(compared)
    assert published
    for record in published:
        ours = found["the published code"][record.attack_name, record.level, record.metric]
        assert (ours.value, ours.low, ours.high, ours.target) == (record.value, record.low, record.high, "embedding")
        assert ours.settings["compat"] == "paper"


def test_one_thing_is_switched_at_a_time(compared):
    found = by_convention(compared)
    own = found["hsat"]
    for name, option in zip(SCORING, ("how", "absent", "keys"), strict=True):
        for key, record in found[name].items():
            changed = [o for o in ("how", "absent", "keys") if record.settings[o] != own[key].settings[o]]
            assert changed == [option] and record.target == own[key].target and record.attack == own[key].attack
    for key, record in found["target"].items():
        assert (record.target, own[key].target) == ("embedding", "decision")
        assert record.attack == own[key].attack and record.settings["how"] == "mean"
    for key, record in found["random start"].items():
        assert (record.attack != own[key].attack) == (key[0] == "BIM-8"), key
    for key, record in found["FFGSM step"].items():
        assert (record.attack != own[key].attack) == (key[0] == "FFGSM-8"), key


def test_the_table_lists_what_changed_and_nothing_else(compared):
    table, found = (compared / "table.md").read_text(), by_convention(compared)
    rows = [
        line.split(" | ")
        for line in table.splitlines()
        if line.startswith("| ") and line.count("|") == 8 and "---" not in line
    ]
    shown = {(row[0].removeprefix("| "), row[1], row[2], row[3]): row for row in rows[1:]}
    titles = {"accuracy": "Acc", "mca": "MCA", "map": "mAP"}
    expected = {}
    for name, records in found.items():
        for (condition, level, metric), record in records.items():
            difference = 100 * (record.value - found["hsat"][condition, level, metric].value)
            if metric in titles and abs(difference) >= 5e-3:
                expected[name, condition, level, titles[metric]] = f"{difference:+.2f} |"
    assert expected and {key: row[-1] for key, row in shown.items()} == expected
    assert "Chance level: patch accuracy" in table
    assert "Nothing changed by:" in table and "grouping" in table.split("Nothing changed by:")[1].splitlines()[0]
    assert "Not applicable to this encoder and these attacks: dual BatchNorm" in table
    assert "slot ids" in table, "the list of conventions is printed below"


def test_an_encoder_with_dual_batchnorm(root, tmp_path):
    encoder = build_encoder("test_byobnet", dual_norm=True, embedding_dim=8, seed=0)
    save_encoder(encoder, tmp_path / "dual.safetensors")
    argv = ["--checkpoint", str(tmp_path / "dual.safetensors"), "--data.root", str(root), *QUICK, "--attacks", "pgd"]
    run("compare", [*argv, "--bootstrap", "0", "--query_patches", "6", "--out", str(tmp_path / "out")])
    found = by_convention(tmp_path / "out")
    assert "dual BatchNorm" in found and "random start" not in found
    branches = {
        name: {(r.settings["branch"], r.settings.get("attack_branch")) for r in records.values()}
        for name, records in found.items()
    }
    assert branches["hsat"] == branches["target"] == {("pgd", None)}
    assert branches["dual BatchNorm"] == branches["the published code"] == {("normal", "pgd")}
    assert {r.settings["no_interval"] for r in found["hsat"].values()} == {"no resamples"}


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        ([], "--checkpoint FILE"),
        (["--checkpoint", "x.pt", "--metrics", "recall"], "unknown metrics ['recall']; choose from accuracy, mca"),
        (["--checkpoint", "nowhere.pt"], "nowhere.pt"),
    ],
)
def test_mistakes_end_the_program(argv, named, root, tmp_path, stops):
    from hsat.cli.compare import main

    assert named in stops(main, [*argv, "--data.root", str(root), *QUICK, "--out", str(tmp_path / "out")])
