"""hsat transfer: a 3x3 matrix, what it writes, kill -9 and --resume, and how it refuses."""

from __future__ import annotations

import json
import shutil
import time

import pytest
from PIL import Image

from hsat.data import read_opensrh
from hsat.eval import read_records
from hsat.models import build_encoder, checkpoint_hash, save_encoder

QUICK = "--data.image_size 32 --steps 2 --bootstrap 20 --k 5 --eps 8/255 --attacks pgd,mifgsm --quiet".split()
WRITTEN = {"records.jsonl", "table.md", "run.json", "state", "transfer_acc_d.png", "transfer_mca_d.png"}


def transfer(argv):
    from hsat.cli.transfer import main

    main([*argv])


@pytest.fixture(scope="module")
def files(trained, tmp_path_factory):
    """Three encoders: the trained one, an untrained one of its kind, and another network for larger images."""
    folder = tmp_path_factory.mktemp("encoders")
    shutil.copy(trained / "final.safetensors", folder / "a.safetensors")
    save_encoder(build_encoder("test_byobnet", embedding_dim=16, seed=1), folder / "b.safetensors")
    save_encoder(build_encoder("test_resnet", embedding_dim=8, input_size=40, seed=2), folder / "c.safetensors")
    return {name: folder / f"{name}.safetensors" for name in "abc"}


@pytest.fixture(scope="module")
def argv(files, root):
    """All but --out."""
    given = ",".join(f"{name}={path}" for name, path in files.items())
    return ["--checkpoint", given, "--data.root", str(root), *QUICK]


@pytest.fixture(scope="module")
def whole(argv, tmp_path_factory):
    """The folder of a run that nobody interrupted.  Read only."""
    out = tmp_path_factory.mktemp("transfer") / "out"
    transfer([*argv, "--out", str(out)])
    return out


@pytest.fixture
def copied(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "copy")


def test_writes_the_matrix(whole, files, root):
    records = read_records(whole / "records.jsonl")
    drops = [record for record in records if record.metric in ("accuracy_drop", "mca_drop")]
    assert {(r.surrogate, r.model) for r in drops} == {(s, t) for s in ("a", "b", "c", "others") for t in "abc"}
    assert {r.level for r in drops} == {"patch", "slide", "patient"}
    assert {r.attack_name for r in drops} == {"PGD-8", "MIFGSM-8"}
    assert {(r.model, r.checkpoint) for r in records} == {(name, checkpoint_hash(path)) for name, path in files.items()}
    assert {r.cohort for r in records} == {read_opensrh(root).fingerprint()}
    assert all(r.backwards >= 2 for r in drops)
    assert {path.name for path in whole.iterdir()} == WRITTEN
    table = (whole / "table.md").read_text()
    assert table.count("| mean of the others |") == table.count("| surrogate ↓ target → | a | b | c |") == 2 * 3
    for name in ("acc_d", "mca_d"):
        with Image.open(whole / f"transfer_{name}.png") as picture:
            assert min(picture.size) > 300
    about = json.loads((whole / "run.json").read_text())
    assert about["attacked_in_this_run"] == [[s, a] for s in "abc" for a in ("PGD-8", "MIFGSM-8")]


def test_at_most_ten_lines_are_printed_and_the_tables_say_what_a_drop_is(argv, whole, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(whole / "state", out / "state")
    transfer([*argv, "--out", str(out), "--resume"])
    lines = capsys.readouterr().out.splitlines()
    assert 5 <= len(lines) <= 10 and all(len(line) <= 100 for line in lines[:-1])
    assert "clean minus attacked, in points of %" in lines[0] and lines[1].split() == ["attacked", "on", "a", "b", "c"]
    assert [line.split()[0] for line in lines[2:6]] == ["(clean,", "a", "b", "c"]
    records = read_records(out / "records.jsonl")
    attack = next(name for name in ("PGD-8", "MIFGSM-8") if name in lines[0])
    drops = [one for one in records if (one.level, one.metric, one.attack_name) == ("patch", "accuracy_drop", attack)]
    shown = [float(cell) for cell in lines[3].split()[1:]]
    assert shown == [
        round(100 * one.value, 1) for name in "abc" for one in drops if (one.surrogate, one.model) == ("a", name)
    ]
    assert lines[-1] == f"all levels and attacks: {out / 'table.md'}"
    assert (out / "table.md").read_text().count("Acc-D and MCA-D are drops") == 1


@pytest.mark.slow
def test_killed_and_resumed(argv, whole, launch, kill, tmp_path):
    out = tmp_path / "out"
    process = launch("transfer", *argv, "--out", str(out), cwd=tmp_path)
    state = out / "state"
    while process.poll() is None and not list(state.glob("attacked-a-PGD-8-*")):
        time.sleep(0.002)
    kill(process)
    done = len(list(state.glob("attacked-*")))  # a pair has one batch
    assert 1 <= done < 6 and not (out / "records.jsonl").exists()
    transfer([*argv, "--out", str(out), "--resume"])
    made = json.loads((out / "run.json").read_text())["attacked_in_this_run"]
    assert len(made) == 6 - done and made[-1] == ["c", "MIFGSM-8"]
    assert (out / "records.jsonl").read_bytes() == (whole / "records.jsonl").read_bytes()
    assert not list(out.rglob(".*"))


def test_a_finished_run_resumes_to_itself_and_may_be_extended(copied, whole, argv):
    transfer([*argv, "--out", str(copied), "--resume"])
    assert json.loads((copied / "run.json").read_text())["attacked_in_this_run"] == []
    assert (copied / "records.jsonl").read_bytes() == (whole / "records.jsonl").read_bytes()
    transfer([*argv, "--out", str(copied), "--resume", "--attacks", "fgsm", "--surrogates", "b", "--targets", "a,b"])
    assert json.loads((copied / "run.json").read_text())["attacked_in_this_run"] == [["b", "FGSM-8"]]
    found = {(r.surrogate, r.model) for r in read_records(copied / "records.jsonl") if r.metric == "mca_drop"}
    assert found == {("b", "a"), ("b", "b"), ("others", "a")}


def test_a_run_is_not_overwritten_and_others_are_refused(copied, argv, files, stops):
    before = {path: path.stat().st_mtime_ns for path in copied.rglob("*")}
    assert "--resume" in stops(transfer, [*argv, "--out", str(copied)])
    again = [*argv, "--out", str(copied), "--resume"]
    message = stops(transfer, [*again, "--steps", "3", "--target", "embedding", "--query_patches", "4"])
    for text in ("attack.PGD-8 was PGD(", "target was decision, now embedding", "queries.images was 12, now 4"):
        assert text in message, message
    swapped = f"a={files['b']},b={files['a']},c={files['c']}"
    message = stops(transfer, ["--checkpoint", swapped, *again[2:]])
    assert "encoder.a.weights was" in message and "encoder.b.weights was" in message and "encoder.c" not in message
    assert {path: path.stat().st_mtime_ns for path in copied.rglob("*")} == before


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (["--surrogates", "a,d"], ["unknown surrogates ['d']", "['a', 'b', 'c']"]),
        (["--attacks", "pgd,autoattack"], ["'autoattack'"]),
        (["--device", "cuda:99"], ["cuda:99"]),
        (["--checkpoint", "a=/no/such/file"], ["/no/such/file"]),
        (["--data.root", "/no/such/folder"], ["/no/such/folder"]),
    ],
)
def test_mistakes_end_the_program_with_their_name(change, named, argv, tmp_path, stops):
    message = stops(transfer, [*argv, "--out", str(tmp_path / "out"), *change])
    assert all(part in message for part in named), message
    assert not (tmp_path / "out" / "records.jsonl").exists()


def test_two_encoders_of_one_name_and_none_at_all(argv, files, root, tmp_path, stops):
    twice = f"a={files['a']},a={files['b']}"
    assert "two encoders are called 'a'" in stops(transfer, [*argv, "--checkpoint", twice, "--out", str(tmp_path)])
    assert "--checkpoint a=FILE" in stops(transfer, ["--data.root", str(root)])


def test_it_says_what_it_will_cost(argv, tmp_path, caplog):
    caplog.set_level("INFO", logger="hsat")
    short = [word for word in argv if word != "--quiet"]
    transfer([*short, "--surrogates", "a", "--targets", "b", "--out", str(tmp_path / "out")])
    assert any(
        message.startswith("12 patches: at most 9 forward and 4 backward passes each, about ")
        for message in caplog.messages
    )
