"""hsat check, and --data.exclude of the other commands."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from hsat.cli.cohort import open_cohort
from hsat.cli.main import main
from hsat.cli.options import EvaluationDataSettings


@pytest.fixture
def root(tmp_path):
    for i in range(8):
        path = tmp_path / f"data/{'ab'[i % 2]}/p{i}/s/1.png"
        path.parent.mkdir(parents=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (16, 16, 3), np.uint8)).save(path)
    return tmp_path / "data"


def test_sound_files(root, tmp_path, capsys):
    main(["check", str(root), "--data.layout", "folders", "--out", str(tmp_path / "check")])
    shown = capsys.readouterr().out
    assert (
        "8 files: nothing is wrong" in shown
        and (tmp_path / "check/files.csv").read_text() == "path,problem,detail,exclude\n"
    )


def test_bad_files_are_listed_and_left_out(root, tmp_path, capsys):
    (root / "a/p0/s/2.png").write_text("no image")
    (root / "b/p1/s/2.png").write_bytes(b"")
    words = ["--data.layout", "folders"]
    with pytest.raises(SystemExit) as stop:
        main(["check", str(root), *words, "--out", str(tmp_path / "check")])
    assert stop.value.code == 1
    shown = capsys.readouterr().out
    assert "unreadable: a/p0/s/2.png (not a readable PNG" in shown and "b/p1/s/2.png (the file is empty)" in shown
    listed = tmp_path / "check/files.csv"
    assert f"--data.exclude {listed}" in shown
    data = EvaluationDataSettings(root=root, layout="folders", exclude=listed)
    assert len(open_cohort(data)) == 8
    with pytest.raises(SystemExit, match="empty files in the cohort"):
        open_cohort(data.model_copy(update={"exclude": None}))
    with pytest.raises(SystemExit, match=r"is the list that --data.exclude reads; choose another --out"):
        main(["check", str(root), *words, "--out", str(tmp_path / "check"), "--data.exclude", str(listed)])
    main(["check", str(root), *words, "--out", str(tmp_path / "again"), "--data.exclude", str(listed)])


def test_an_edited_list_is_not_overwritten_unasked(root, tmp_path, capsys):
    (root / "a/p0/s/2.png").write_text("no image")
    words = ["check", str(root), "--out", str(tmp_path / "check")]
    with pytest.raises(SystemExit):
        main(words)
    listed = tmp_path / "check/files.csv"
    listed.write_text(edited := listed.read_text().replace(",yes", ",no"))
    with pytest.raises(
        SystemExit, match=r"may have been edited; choose another --out, or replace it: --overwrite true"
    ):
        main(words)
    assert listed.read_text() == edited
    with pytest.raises(SystemExit) as stop:
        main([*words, "--overwrite", "true"])
    assert stop.value.code == 1 and ",yes" in listed.read_text()


def test_without_a_layout_it_is_found_and_said(root, tmp_path, capsys):
    main(["check", str(root), "--out", str(tmp_path / "check")])
    assert f"note: {root}: read as folders class/patient/slide/patch" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give the folder of the cohort"),
        (["nowhere"], "cohort root .*nowhere does not exist"),
        (["DATA", "--exclude", "odd"], "option exclude"),
        (
            ["DATA", "--data.layout", "folders", "--data.columns", "path=file"],
            "layout 'folders' has no option columns; .* csv",
        ),
        (["DATA", "--data.layout", "csv", "--data.columns", "file"], "such as class=label,patient=case_id"),
    ],
)
def test_what_cannot_be_done(root, words, message):
    with pytest.raises(SystemExit, match=message):
        main(["check", *(str(root) if word == "DATA" else word for word in words)])


def test_layouts_by_command(root, tmp_path):
    data = EvaluationDataSettings(root=root, layout="classes", patient=r"/(p\d)/", val_fraction=0.5)
    cohort = open_cohort(data)
    assert cohort.patient_names == ("p0", "p2", "p4", "p6", "p1", "p3", "p5", "p7")
