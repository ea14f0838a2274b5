"""From data options to a cohort: found layouts, splits by any name, messages in options."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from hsat.cli.cohort import open_cohort
from hsat.cli.options import DataSettings, EvaluationDataSettings, SourceSettings


@pytest.fixture
def make(tmp_path):
    def make(*names, side=16):
        for name in names:
            path = tmp_path / "root" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.random.default_rng(len(name)).integers(0, 255, (side, side, 3), np.uint8)).save(path)
        return tmp_path / "root"

    return make


def names(train, val, *more):
    return [f"{split}/{c}/{split}{c}{i}/s/{i}.png" for split in (train, val, *more) for c in "ab" for i in (1, 2)]


@pytest.mark.parametrize(("train", "val"), [("Train", "Val"), ("Training", "Testing"), ("train", "valid")])
def test_splits_by_known_names(make, capsys, train, val):
    cohort = open_cohort(EvaluationDataSettings(root=make(*names(train, val))))
    assert cohort.splits == ("train", "val") or set(cohort.splits) == {"train", "val"}
    assert all(cohort.records[i].path.startswith(f"{val}/") for i in cohort.rows("val"))
    assert f"'{val}' as 'val'" in capsys.readouterr().err


def test_other_names_are_given(make, capsys, stops):
    root = make(*names("0", "1"))
    options = {"root": root, "layout": "folders", "split_folders": True}
    message = stops(lambda argv: open_cohort(EvaluationDataSettings(**options)), [])
    assert "there are '0', '1': name them with --data.splits train=NAME,val=NAME" in message
    cohort = open_cohort(EvaluationDataSettings(**options, splits="train=1,val=0"))
    assert all(cohort.records[i].path.startswith("0/") for i in cohort.rows("val"))
    drawn = open_cohort(EvaluationDataSettings(**options, splits="draw", val_fraction=0.25))
    assert len(drawn.rows("val")) == 2 and len(drawn.rows("train")) == 6, "one patient of four of each class"
    message = stops(lambda argv: open_cohort(EvaluationDataSettings(**options, splits="train=2,val=0")), [])
    assert "no split '2'; it has '0', '1'" in message


def test_what_is_not_attacked_is_said_in_evaluations(make, capsys):
    root = make(*names("train", "val", "test"))
    open_cohort(EvaluationDataSettings(root=root))
    assert "neither in the bank nor attacked: split 'test' (4 patches)" in capsys.readouterr().err
    open_cohort(SourceSettings(root=root))
    assert "nor attacked" not in capsys.readouterr().err


def test_one_split_alone_is_divided_by_patient(make):
    cohort = open_cohort(EvaluationDataSettings(root=make(*names("train", "train"))))
    assert set(cohort.splits) == {"train", "val"}


def test_messages_name_options(make, tmp_path, stops):
    def asked(**options):
        return stops(lambda argv: open_cohort(EvaluationDataSettings(**options)), [])

    root = make("a/p1/s/1.png", "b/p2/s/1.png")
    (root / "b/p9").mkdir()
    assert "pass --data.on_empty skip" in asked(root=root, layout="folders")
    assert len(asked(root=root, layout="opensrh")) < 800 and "--data.layout folders" in asked(
        root=root, layout="opensrh"
    )
    root.rename(tmp_path / "one")
    message = asked(root=make("left/ADI/1.png", "right/ADI/1.png", "right/TUM/1.png"))
    assert "give --data.layout classes --data.split_folders true and --data.splits draw, or rename" in message
    assert "give --data.layout classes --data.patient '^[^/]+/([^/]+)/'" in message
    assert "read_" not in message and "Cohort" not in message and "with_split" not in message
    (tmp_path / "slides").mkdir()
    (tmp_path / "slides/1.svs").write_bytes(b"x")
    message = asked(root=tmp_path / "slides")
    assert "whole slides are cut into patches first" in message and "\n" not in message and "Cohort" not in message


def test_a_table_is_named_with_the_options_to_type(make, tmp_path, stops):
    root = make("patches/s_1/1.png", "patches/s_2/1.png", "patches/s_3/1.png", "patches/s_4/1.png")
    (root / "dataset.csv").write_text("case_id,slide_id,label\np1,s_1,a\np2,s_2,b\np3,s_3,a\np4,s_4,b\n")
    message = stops(lambda argv: open_cohort(EvaluationDataSettings(root=root)), [])
    assert (
        "give --data.layout csv --data.manifest dataset.csv --data.columns class=label,patient=case_id,slide=slide_id"
        " --data.path_template 'patches/{slide_id}/*.png';" in message
    )
    columns, template = "class=label,patient=case_id,slide=slide_id", "patches/{slide_id}/*.png"
    data = EvaluationDataSettings(root=root, manifest="dataset.csv", columns=columns, path_template=template)
    assert open_cohort(data).patient_names == ("p1", "p2", "p3", "p4"), "options of a table alone choose its layout"


def test_a_training_says_that_patches_are_resized(make, capsys):
    root = make("a/p1/s/1.png", "a/p2/s/1.png", "b/p3/s/1.png", "b/p4/s/1.png")
    open_cohort(DataSettings(root=root))
    shown = capsys.readouterr().err
    assert "patches of 16 x 16 pixels are resized to 300 x 300; --data.image_size 16 keeps them" in shown
    open_cohort(DataSettings(root=root, image_size=16))
    assert "resized" not in capsys.readouterr().err


def test_patients_in_several_splits_are_drawn_anew(make, stops):
    shared = [f"{split}/{c}/p{i}/s/{split}.png" for split in ("train", "test") for c in "ab" for i in (1, 2)]
    root = make(*[name.replace("/p", f"/{name[-12]}") for name in shared], *shared)
    message = stops(lambda argv: open_cohort(EvaluationDataSettings(root=root)), [])
    assert "a patient belongs to one split only: draw patients anew with --data.splits draw" in message
    cohort = open_cohort(EvaluationDataSettings(root=root, splits="draw"))
    assert set(cohort.splits) == {"train", "val"} and len({row.path.split("/")[0] for row in cohort.records}) == 2


def test_a_split_that_is_alone_is_said(make, tmp_path, capsys):
    root = make(*names("train", "test"))
    listed = tmp_path / "exclude.csv"
    listed.write_text("path\n" + "".join(f"{name}\n" for name in names("train", "test") if name.startswith("test")))
    open_cohort(EvaluationDataSettings(root=root, exclude=listed))
    shown = " ".join(capsys.readouterr().err.split())
    assert (
        "there is the split 'train' alone once the excluded patches are left out, so that patients to attack" in shown
    )


def test_links_to_folders_are_named_and_followed_when_asked(make, tmp_path, stops):
    root = make("a/p1/s/1.png", "a/p2/s/1.png", "b/p3/s/1.png", "b/p4/s/1.png")
    (tmp_path / "linked").mkdir()
    for name in "ab":
        (tmp_path / "linked" / name).symlink_to(root / name)
    message = stops(lambda argv: open_cohort(EvaluationDataSettings(root=tmp_path / "linked")), [])
    assert "its folders 'a', 'b' are links" in message and "pass --data.allow_links true" in message
    assert len(open_cohort(EvaluationDataSettings(root=tmp_path / "linked", allow_links=True))) == 4
