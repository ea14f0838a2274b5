"""The page as text: what is on it, what is not, and what is refused."""

from __future__ import annotations

import json
import os
import re
from base64 import b64encode
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from hsat.eval import write_records
from hsat.report import open_runs, write_report
from hsat.report.page.sections import flatten_settings

FETCHING = ("src", "href", "srcset", "action", "data", "poster")


class Reader(HTMLParser):
    """Text by element, attributes that could fetch something, and whether all elements are closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.text, self.tags, self.fetched, self.open = "", [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.fetched += [value for name, value in attrs if name in FETCHING]
        if tag not in ("meta", "img", "br", "path", "circle", "rect", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def read(path) -> Reader:
    reader = Reader(path.read_text(encoding="utf-8"))
    reader.text = " ".join(reader.text.split())
    return reader


@pytest.fixture
def run(made_run, tmp_path):
    return made_run(tmp_path / "run")


def only_records(folder, records):
    write_records(folder / "records.jsonl", records)
    return folder


def test_everything_is_on_the_page(run, tmp_path):
    path = write_report([run], tmp_path / "new" / "report.html", title="My report")
    page = read(path)
    assert page.open == []
    for text in (
        "My report",
        "HiDisc keeps 40.0 % [30.0, 50.0] of the patches right under the strongest of 2 attacks at eps 8/255",
        "Attacks on the features, cohort c0ffeec0ffee (val)",
        "No record carries a flag",
        "Patch level, % (n = 36)",
        "Patient level, % (n = 6)",
        "HSAT, PGD-8",
        "of the variance of the clean queries",
        "A projection",
        "Training loss of run.",
        "digest of HSAT",
        "examples/evaluate_whitebox.py --k 20",
        "data.image_size",
        "hsat 0.1.0",
        "PGD(Linf(eps=8/255), steps=10)",
    ):
        assert text in page.text, text
    assert page.tags.count("svg") >= 3 + 4 + 2 and page.tags.count("img") == 2 * 3 * 3
    assert "Absent" not in page.text


def test_nothing_is_fetched_and_scripts_are_forbidden(run, tmp_path):
    path = write_report([run], tmp_path / "report.html")
    page = read(path)
    assert not {"script", "link", "iframe", "object", "base", "form"} & set(page.tags)
    assert page.fetched and all(value.startswith(("data:image/png;base64,", "#")) for value in page.fetched)
    text = path.read_text()
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in text
    assert not re.search(r"url\(|@import|https?://", text)


def test_same_runs_same_bytes(run, tmp_path):
    first = write_report([run], tmp_path / "a.html").read_bytes()
    assert write_report([run, run], tmp_path / "b.html").read_bytes() == first
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["a.html", "b.html", "run"]


NASTY = "<script>alert(1)</script>\"'&{{ 7*7 }}"


def test_names_cannot_do_anything(made_run, tmp_path):
    run = made_run(tmp_path / "run", models=(NASTY, "b"))
    about = json.loads((run / "run.json").read_text())
    about["command"], about["settings"][NASTY] = [NASTY], NASTY
    (run / "run.json").write_text(json.dumps(about))
    page = read(write_report([run], tmp_path / "report.html", title=NASTY))
    assert "script" not in page.tags and page.open == []
    assert page.text.count(NASTY) > 10


def test_different_cohorts_stand_apart(made_records, tmp_path):
    folders = [
        only_records(tmp_path / name, made_records(name, value, cohort=name * 20))
        for name, value in (("aa", 0.5), ("bb", 0.7))
    ]
    page = read(write_report(folders, tmp_path / "report.html"))
    assert "Numbers 1" in page.text and "Numbers 2" in page.text
    assert page.text.count("cohort aaaaaaaaaaaa (val)") == page.text.count("cohort bbbbbbbbbbbb (val)") == 2
    assert not re.search(r"aa keeps [^.]*; bb", page.text)


def test_banks_of_different_sizes_stand_apart_and_say_so(made_records, tmp_path):
    smaller = [replace(r, settings=r.settings | {"bank_rows": 10}) for r in made_records("b")]
    page = read(write_report([only_records(tmp_path / "run", made_records("a") + smaller)], tmp_path / "r.html"))
    assert "bank of 90 patches" in page.text and "bank of 10 patches" in page.text


def test_seeds_are_averaged(made_records, tmp_path):
    folders = [
        only_records(tmp_path / str(seed), made_records("HSAT", value, seed=seed, checkpoint=str(seed)))
        for seed, value in enumerate((0.6, 0.8))
    ]
    page = read(write_report(folders, tmp_path / "report.html"))
    assert "HSAT keeps 35.0 ± 7.1 % (2 runs) of the patches right" in page.text
    assert "± 14.1, 2 runs" in page.text


def test_the_chance_level_is_beside_every_number(made_records, tmp_path):
    """In the sentence, on the cards, in figures with their legend, in tables; of older records nowhere."""
    path = write_report([only_records(tmp_path / "run", made_records())], tmp_path / "report.html")
    page = read(path)
    assert "Chance is 40.0 %." in page.text and "chance 40.0 %" in page.text and "chance level" in page.text
    assert path.read_text().count("; chance: 40 %") == 3, "each figure is described so"
    assert re.search(r'<th scope="row">chance</th><td>40.0</td><td>33.3</td>', path.read_text())
    older = write_report([only_records(tmp_path / "older", made_records(chance=None))], tmp_path / "older.html")
    for text in ("Chance is", "chance level", "; chance: ", ">chance<"):
        assert text in path.read_text() and text not in older.read_text()


def test_flags_are_in_the_summary(made_records, tmp_path):
    records = made_records("a", flags=("10% of the images never moved",))
    page = read(write_report([only_records(tmp_path / "run", records)], tmp_path / "report.html"))
    summary = page.text.partition("Numbers")[2].partition("Accuracy against eps")[0]
    assert "1 reason for doubt. a, clean, noise-8, PGD-4, PGD-8, BIM-8: 10% of the images never moved." in summary
    assert "No record carries a flag" not in page.text


def test_signs_of_masking_are_in_the_summary(made_records, tmp_path):
    records = [replace(r, value=0.79) if r.attack_name in ("PGD-8", "BIM-8") else r for r in made_records()]
    page = read(write_report([only_records(tmp_path / "run", records)], tmp_path / "report.html"))
    assert "2 reasons for doubt" in page.text and "no less than random noise" in page.text


@pytest.mark.parametrize(("target", "noted"), [("embedding", True), ("features", False), ("decision", False)])
def test_only_a_drift_of_another_layer_is_noted(made_records, tmp_path, target, noted):
    records = made_records(target=target)
    page = read(write_report([only_records(tmp_path / "run", records)], tmp_path / "report.html"))
    assert ("an attack on the features may leave less" in page.text) == noted
    sentence = "Attacks on the embedding are measured by a classifier that reads the features"
    assert (sentence in page.text) == noted


def test_classifiers_without_neighbours_are_not_runs_of_each_other(made_records, tmp_path):
    records = [r for name in ("Head()", "NearestCentroid()") for r in made_records(k=0, classifier=name)]
    page = read(write_report([only_records(tmp_path / "run", records)], tmp_path / "report.html"))
    assert "2 runs" not in page.text and "classifier: Head()" in page.text


def test_k_and_metric_are_chosen(made_records, tmp_path):
    records = made_records() + made_records(k=200, value=0.9)
    folder = only_records(tmp_path / "run", records)
    assert "HSAT keeps 40.0 %" in read(write_report([folder], tmp_path / "a.html")).text
    other = read(write_report([folder], tmp_path / "b.html", k=200, metric="mca")).text
    assert "HSAT keeps 43.0 % [33.0, 53.0] MCA" in other and "k = 20: Patch level" in other
    with pytest.raises(ValueError, match=r"no record has k=7; the runs hold k = \[20, 200\]"):
        write_report([folder], tmp_path / "c.html", k=7)
    with pytest.raises(ValueError, match="metric must be 'accuracy' or 'mca', got 'map'"):
        write_report([folder], tmp_path / "c.html", metric="map")
    assert not (tmp_path / "c.html").exists()


def test_what_is_absent_is_listed(made_records, tmp_path):
    page = read(write_report([only_records(tmp_path / "run", made_records())], tmp_path / "report.html"))
    assert "Absent: run.json, which says how the run was made" in page.text
    assert "evidence/ (confusion, embedding map, patches): evaluate again" in page.text


def test_a_training_alone(run, tmp_path):
    (run / "records.jsonl").unlink()
    page = read(write_report([run], tmp_path / "report.html"))
    assert "These runs hold no measurements yet" in page.text and page.tags.count("svg") >= 2
    assert "artifacts of 'HSAT', which are of another evaluation" in page.text


def test_artifacts_of_other_weights_is_not_shown(run, made_artifacts, tmp_path):
    made_artifacts(run / "evidence", "HSAT", checkpoint="older weights")
    page = read(write_report([run], tmp_path / "report.html"))
    assert "records for the artifacts of 'HSAT', which are of another evaluation and not shown" in page.text
    assert page.tags.count("img") == 3 * 3


def test_a_transfer_is_a_matrix(made_records, tmp_path):
    clean = [r for r in made_records("b", 0.9) if r.attack_name == "clean"]
    drops = [
        replace(r, surrogate=surrogate, metric=f"{r.metric}_drop", value=0.25)
        for r in made_records("b")
        for surrogate in ("a", "others")
        if r.attack_name == "PGD-8" and r.metric != "map"
    ]
    page = read(write_report([only_records(tmp_path / "run", [*clean, *drops])], tmp_path / "report.html"))
    assert "PGD-8, patch level, points of % (n = 36)" in page.text and "mean of the others" in page.text
    assert "take, on average over these, 25.0 [30.0, 50.0] points from b (PGD-8)" in page.text
    assert "Numbers" not in page.text


def test_a_folder_of_runs_stands_for_them(made_run, tmp_path):
    for name in ("x", "y"):
        made_run(tmp_path / "demo" / name)
    (tmp_path / "demo" / "notes").mkdir()
    assert [run.path.name for run in open_runs([tmp_path / "demo", tmp_path / "demo" / "x"])] == ["x", "y"]


def test_a_row_that_a_running_training_has_not_finished(run):
    with (run / "train.csv").open("a") as file:
        file.write("500,1.0")
    (found,) = open_runs([run])
    assert len(found.training["step"]) == 500


def spoil_records(run):
    (run / "records.jsonl").write_text('{"model": 1}\n')


def spoil_about(run):
    (run / "run.json").write_text("[1]")


def spoil_training(run):
    (run / "train.csv").write_text("step,loss\n0,abc\n")


def spoil_picture(run):
    (run / "evidence" / "HSAT" / "PGD-8-001.png").write_text("<svg>")


def pipe_picture(run):
    picture = run / "evidence" / "HSAT" / "PGD-8-001.png"
    picture.unlink()
    os.mkfifo(picture)


def swell_picture(run):
    os.truncate(run / "evidence" / "HSAT" / "PGD-8-001.png", 200 << 20)


def link_records(run):
    (run / "records.jsonl").rename(run.parent / "outside.jsonl")
    os.symlink(run.parent / "outside.jsonl", run / "records.jsonl")


def link_evidence(run):
    (run / "evidence").rename(run.parent / "outside")
    os.symlink(run.parent / "outside", run / "evidence")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_records, r"records.jsonl, line 1: fields"),
        (spoil_about, "run.json holds a JSON list, not an object"),
        (spoil_training, r"train.csv, line 2: 'abc' is not a number"),
        (spoil_picture, "is no PNG file"),
        (pipe_picture, r"PGD-8-001\.png is a named pipe"),
        (swell_picture, r"PGD-8-001\.png has more than 33554432 bytes, which is no picture"),
        (link_records, "leads out of the run folder"),
        (link_evidence, "leads out of the run folder"),
    ],
)
def test_damaged_runs_are_named_and_leave_no_page(run, tmp_path, spoil, message):
    spoil(run)
    with pytest.raises(ValueError, match=message):
        write_report([run], tmp_path / "report.html")
    assert not list(tmp_path.glob("*.html"))


def test_a_missing_picture_moves_no_other_one(run, tmp_path):
    folder = run / "evidence" / "HSAT"
    before = write_report([run], tmp_path / "whole.html").read_text()
    text = {path.name: b64encode(path.read_bytes()).decode() for path in folder.glob("*.png")}
    (folder / "clean-000.png").unlink()
    after = write_report([run], tmp_path / "report.html").read_text()
    assert "pictures of &#39;HSAT&#39;: clean-000.png; their patches are not shown" in after
    for name in text.keys() - {"clean-000.png", "PGD-8-000.png", "PGD-8-000-perturbation.png"}:
        assert after.count(text[name]) == before.count(text[name]), name
    assert text["PGD-8-000.png"] in before and text["PGD-8-000.png"] not in after


def test_what_is_no_run(tmp_path):
    with pytest.raises(ValueError, match=r"holds none of records\.jsonl, run\.json, train\.csv"):
        write_report([tmp_path], tmp_path / "report.html")
    with pytest.raises(ValueError, match="is not a folder"):
        write_report([tmp_path / "no"], tmp_path / "report.html")
    with pytest.raises(ValueError, match="give at least one"):
        write_report([], tmp_path / "report.html")


def test_artifacts_stand_beside_the_records_of_its_own_cohort(made_records, made_artifacts, tmp_path):
    only_records(tmp_path / "a", made_records("HSAT", 0.8))
    made_artifacts(tmp_path / "a" / "evidence", "HSAT")
    only_records(tmp_path / "b", made_records("HSAT", 0.6, cohort="beef" * 10))
    page = write_report([tmp_path / "a", tmp_path / "b"], tmp_path / "x.html").read_text()
    assert page.count("Confusion of classes") == 1
    assert page.index("Confusion of classes") < page.index("cohort beefbeefbeef (val); k")


def test_branches_of_one_model_are_told_apart(made_records, made_artifacts, tmp_path):
    for name, value in (("pgd", 0.8), ("normal", 0.6)):
        records = [replace(r, settings=r.settings | {"branch": name}) for r in made_records("HSAT", value)]
        only_records(tmp_path / name, [*records, *made_records("other", 0.5)])
        made_artifacts(tmp_path / name / "evidence", "HSAT")
    through = [replace(r, settings=r.settings | {"attack_branch": "pgd"}) for r in records]
    only_records(tmp_path / "paper", through)
    runs = [tmp_path / name for name in ("pgd", "normal", "paper")]
    page = read(write_report(runs, tmp_path / "x.html")).text
    assert "HSAT (branch pgd) keeps 40.0 % [30.0, 50.0] of" in page
    assert "HSAT (branch normal) keeps 30.0 % [20.0, 40.0]" in page
    assert "HSAT (branch normal, attacked through pgd) keeps" in page
    assert "HSAT (branch normal), PGD-8" in page and "other keeps" in page and " runs)" not in page
    (alone,) = open_runs([tmp_path / "pgd"])
    assert "(branch" not in read(write_report([alone.path], tmp_path / "y.html")).text


def rewrite_record(folder, **values):
    path = folder / "records.jsonl"
    first, *rest = path.read_text().splitlines()
    path.write_text("\n".join([json.dumps(json.loads(first) | values), *rest]))


def rewrite_arrays(folder, **arrays):
    path = folder / "evidence" / "HSAT" / "PGD-8.npz"
    with np.load(path) as file:
        kept = {name: file[name] for name in file.files}
    np.savez(path, **(kept | arrays))


DEEP = "[" * 100_000
HOSTILE = {
    "a value that is a text": lambda run: rewrite_record(run, value="<b>"),
    "NaN": lambda run: rewrite_record(run, value=float("nan")),
    "no eps": lambda run: rewrite_record(run, eps_value=None),
    "no settings": lambda run: rewrite_record(run, settings=None),
    "a share that is none": lambda run: rewrite_record(run, settings={"zero_gradient_share": None}),
    "bytes for records": lambda run: (run / "records.jsonl").write_bytes(b"\xff\xfe"),
    "records nested too deeply": lambda run: (run / "records.jsonl").write_text(DEEP),
    "run.json nested too deeply": lambda run: (run / "run.json").write_text(DEEP),
    "half of differences.json": lambda run: (run / "differences.json").write_text('[{"model": "a"'),
    "differences of other fields": lambda run: (run / "differences.json").write_text('[{"model": "a"}]'),
    "no list of differences": lambda run: (run / "differences.json").write_text('{"model": "a"}'),
    "a difference that is a text": lambda run: (run / "differences.json").write_text('[{"difference": "x"}]'),
    "a difference without a number": lambda run: (run / "differences.json").write_text('[{"difference": NaN}]'),
    "bytes for differences": lambda run: (run / "differences.json").write_bytes(b"\xff"),
    "training without steps": lambda run: (run / "train.csv").write_text("loss\n1\n"),
    "a cell without end": lambda run: (run / "train.csv").write_text('step,loss\n"' + "x" * 200_000 + '",1\n'),
    "a class that is none": lambda run: rewrite_arrays(run, patch_prediction_k20=np.full(36, 99)),
    "half a class": lambda run: rewrite_arrays(run, patch_label=np.full(36, 0.5)),
    "predictions of other patches": lambda run: rewrite_arrays(run, patch_prediction_k20=np.zeros(2, int)),
    "places in space": lambda run: rewrite_arrays(run, places=np.zeros((36, 3))),
    "places nowhere": lambda run: rewrite_arrays(run, places=np.full((36, 2), np.inf)),
    "two movements": lambda run: rewrite_arrays(run, movement=np.zeros(2)),
    "no scale": lambda run: rewrite_arrays(run, scale=np.float64("nan")),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_by_name(name, run, tmp_path):
    HOSTILE[name](run)
    with pytest.raises(ValueError, match=re.escape(str(run))):
        write_report([run], tmp_path / "x.html")
    assert not (tmp_path / "x.html").exists()


def test_a_training_that_diverged_is_drawn_as_far_as_it_goes(tmp_path):
    (tmp_path / "train.csv").write_text("step,loss\n1,3\n2,4\n3,1e308\n4,inf\n5,-1e308\n")
    assert "4" in read(write_report([tmp_path], tmp_path / "x.html")).text


def test_certificates_have_a_sentence_and_tables_of_their_own(made_records, tmp_path):
    first = replace(made_records("HSAT")[0], target="any", attack="certificate: Smoothing(sigma=0.25)")
    curve = [
        replace(first, attack_name=f"certified-{r}", eps=str(r), eps_value=r, metric="certified_accuracy", value=v)
        for r, v in ((0.0, 0.75), (0.25, 0.5), (1.0, 0.0))
    ]
    page = read(write_report([only_records(tmp_path / "run", curve)], tmp_path / "x.html"))
    assert "Certificates, which hold for any attack, cohort" in page.text
    assert (
        "Certified against every change of L2 norm below 0.25, patch level: HSAT keeps 50.0 % [70.0, 90.0]."
        in page.text
    )
    assert "certified Acc" in page.text and "Other metrics" not in page.text and "Accuracy against eps" not in page.text
    slides = [replace(record, level="slide", metric="accuracy") for record in curve]
    text = read(write_report([only_records(tmp_path / "run", slides)], tmp_path / "x.html")).text
    assert "No accuracy of patches was measured; the tables show what was." in text


def test_nested_settings_become_flat():
    assert flatten_settings({"a": {"b": 1, "c": "x"}, "d": None}) == {"a.b": "1", "a.c": "x", "d": "null"}
