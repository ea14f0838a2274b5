"""Command lines and YAML files: what is read, what is refused, and how it is said."""

from __future__ import annotations

from pathlib import Path

import pytest

from hsat.cli.attacks import lengths
from hsat.recipes import read_recipe
from hsat.training.config import parse_pixels


def train_settings(*argv):
    from hsat.cli.train import Train

    return Train.load(list(argv))


def evaluate_settings(*argv):
    from hsat.cli.evaluate import Evaluate

    return Evaluate.load(list(argv))


def test_every_training_option_is_read():
    found = train_settings(
        *"--data.root r --data.layout csv --data.image_size 64 --model.backbone resnet18 --attack.name pgd".split(),
        *"--attack.eps 8/255 --attack.step_size 0.01 --attack.steps 7 --attack.levels s_pt --train.epochs 3".split(),
        *"--train.batch_patients 5 --train.lr 1e-4 --data.slides 3 --data.patches 4 --data.views 6".split(),
        *"--seed 9 --out o --resume".split(),
    )
    assert found.model_dump(exclude_unset=True) == {
        "data": {"root": Path("r"), "layout": "csv", "image_size": 64, "slides": 3, "patches": 4, "views": 6},
        "model": {"backbone": "resnet18"},
        "attack": {"name": "pgd", "eps": 8 / 255, "step_size": 0.01, "steps": 7, "levels": "s_pt"},
        "train": {"epochs": 3, "batch_patients": 5, "lr": 1e-4},
        "seed": 9,
        "out": Path("o"),
        "resume": True,
    }
    assert train_settings("--train.steps", "11").train.steps == 11


def test_every_evaluation_option_is_read():
    found = evaluate_settings(
        *"--checkpoint a=x.pt,b=y.pt --data.root r --attacks pgd,bim,mifgsm --eps 4/255,0.03 --steps 3".split(),
        *"--k 20,200 --target embedding --out o".split(),
    )
    assert found.model_dump(exclude_unset=True) == {
        "checkpoint": ["a=x.pt", "b=y.pt"],
        "data": {"root": Path("r")},
        "attacks": ["pgd", "bim", "mifgsm"],
        "eps": [4 / 255, 0.03],
        "steps": 3,
        "k": [20, 200],
        "target": "embedding",
        "out": Path("o"),
    }


def test_defaults_are_the_papers():
    found = train_settings("--data.root", "r")
    assert (found.attack.eps, found.attack.step_size, found.attack.steps) == (8 / 255, 2 / 255, 5)
    assert (found.data.slides, found.data.patches, found.data.views, found.data.image_size) == (2, 2, 2, 300)
    assert (found.model.backbone, found.attack.levels, found.train.lr) == ("resnet50", "p_s_pt", 1e-3)
    assert (found.train.epochs, found.train.temperature, found.train.warmup) == (40_000, 0.07, 0.1)
    other = evaluate_settings()
    assert (other.classifier, other.C, other.attacks, other.target) == (["knn"], 1.0, ["pgd", "mifgsm"], "decision")
    published = evaluate_settings("--preset", "paper")
    assert (published.k, published.attacks, published.target) == ([200], ["pgd", "bim", "mifgsm"], "embedding")
    assert evaluate_settings("--preset", "paper", "--k", "5", "--attacks", "pgd").k == [5]
    assert (other.k, other.steps, other.eps) == ([], 10, [4 / 255, 8 / 255])


@pytest.mark.parametrize("words", [["--k", "20"], ["--k=20"], ["-k", "20"]])
def test_k_with_one_dash_or_two(words):
    assert evaluate_settings(*words).k == [20]


@pytest.mark.parametrize(
    ("words", "wanted"),
    [(["--resume"], True), (["--resume", "--seed", "1"], True), (["--resume", "false"], False), ([], False)],
)
def test_switches_need_no_value_and_take_one(words, wanted):
    assert train_settings(*words).resume is wanted


def test_switches_inside_a_section():
    found = train_settings("--log.tensorboard", "--data.dynamic=false", "--train.clean", "true")
    assert (found.log.tensorboard, found.data.dynamic, found.train.clean) == (True, False, True)


@pytest.mark.parametrize("text", ["8/255", " 8/255 ", "0.03", "1", "0", "1e-3"])
def test_sizes_as_fractions_and_numbers(text):
    wanted = 8 / 255 if "/" in text else float(text)
    assert train_settings("--attack.eps", text).attack.eps == wanted


@pytest.mark.parametrize("text", ["8", "-1/255", "256/255", "nan", "eight", "8/0", ""])
def test_sizes_outside_the_pixel_range_are_refused(text, stops):
    message = stops(lambda argv: train_settings(*argv), [f"--attack.eps={text}"])
    assert "attack.eps" in message and "8/255" in message and text in message


def test_eps_of_eight_gets_the_hint_in_lists_and_files(stops, tmp_path):
    assert "For 8 grey levels write 8/255" in stops(lambda argv: evaluate_settings(*argv), ["--eps", "4/255,8"])
    (tmp_path / "a.yaml").write_text("attack: {eps: 8}\n")
    message = stops(lambda argv: train_settings(*argv), ["--config", str(tmp_path / "a.yaml")])
    assert "For 8 grey levels write 8/255" in message and "a.yaml" in message


@pytest.mark.parametrize(
    ("words", "near"),
    [
        (["--data.rooot", "x"], "--data.root"),
        (["--seeds=3"], "--seed"),
        (["--data.image", "32"], "--data.image_size"),
        (["--zzz", "3"], "--help"),
    ],
)
@pytest.mark.parametrize("load", [train_settings, evaluate_settings])
def test_mistyped_options_are_errors_that_name_them_and_the_nearest(load, words, near, capsys):
    with pytest.raises(SystemExit) as stop:
        load(*words)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words[0].partition("=")[0] in line and near in line.partition(";")[2]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--attack.name", "fgsm"], "'free' or 'warm'"),
        (["--data.layout", "folder"], "folders"),
        (["--train.lr", "fast"], "train.lr"),
        (["--train.batch_patients", "0"], "train.batch_patients"),
        (["--data", "/some/where"], '"data"'),
        (["--train.steps", "5", "--train.epochs", "5"], "give epochs or steps, not both"),
    ],
)
def test_values_that_cannot_be_are_named(words, named, stops):
    assert named in stops(lambda argv: train_settings(*argv), words)


def test_yaml_lies_under_the_command_line(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("data: {image_size: 64, slides: 1}\nattack: {eps: 4/255, name: none}\nseed: 3\nresume: true\n")
    found = train_settings("--config", str(path), "--data.slides", "3", "--attack.eps", "2/255")
    assert (found.data.image_size, found.data.slides, found.seed, found.resume) == (64, 3, 3, True)
    assert (found.attack.eps, found.attack.name, found.attack.steps) == (2 / 255, "none", 5)
    lists = tmp_path / "b.yaml"
    lists.write_text("eps: [4/255, 0.02]\nattacks: pgd,bim\nk: [20, 200]\ncheckpoint: [a.pt]\n")
    other = evaluate_settings(f"--config={lists}")
    assert (other.eps, other.attacks, other.k) == ([4 / 255, 0.02], ["pgd", "bim"], [20, 200])


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("data: {rooot: x}", ["data.rooot", "did you mean 'data.root'"]),
        ("trian: {steps: 3}", ["'trian'", "did you mean 'train'"]),
        ("data.root: x", ["'data.root'", "nested", "data: {root: ...}"]),
        ("data: {rooot: x}\nattack: {eps: 8}", ["data.rooot", "attack.eps"]),
        ("data: 5", ["option data"]),
        ("- 5", ["mapping", "list"]),
        ("a: [", ["cannot read"]),
    ],
)
def test_yaml_with_mistakes_is_refused_by_name(text, named, tmp_path, stops):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    message = stops(lambda argv: train_settings(*argv), ["--config", str(path)])
    assert all(part in message for part in [*named, "bad.yaml"])


@pytest.mark.parametrize("text", ["1e999999999", "1e1_000_000_000", "1/1e99999999", "9" * 50, "1/0", 10**400])
def test_numbers_that_fill_the_memory_are_refused(text):
    with pytest.raises(ValueError, match="write a fraction such as 8/255"):
        parse_pixels(text)
    with pytest.raises(ValueError, match="write fractions such as 8/255"):
        lengths([text])


def test_mistakes_are_shown_short(tmp_path, stops):
    path = tmp_path / "bad.yaml"
    path.write_text(
        f"seed: [{', '.join(['x' * 50] * 999)}]\n{'b' * 999}: 1\n" + "".join(f"c{i}: 1\n" for i in range(99))
    )
    message = stops(lambda argv: train_settings(*argv), ["--config", str(path)])
    assert "option seed: Input should be a valid integer (got a list of 999)" in message
    assert len(message) < 4000


def test_missing_yaml_is_named(tmp_path, stops):
    assert "nothing.yaml" in stops(lambda argv: train_settings(*argv), ["--config", str(tmp_path / "nothing.yaml")])


def test_without_a_root_the_demo_recipe_lies_beneath():
    from hsat.cli.train import load_settings

    recipe = read_recipe("demo")
    found = load_settings(["--train.lr", "0.5"])
    assert found.model.backbone == recipe["model"]["backbone"]
    assert (found.train.steps, found.train.lr) == (recipe["train"]["steps"], 0.5)
    assert load_settings(["--train.steps", "3"]).train.steps == 3
    asked = load_settings(["--train.epochs", "7"]).train
    assert (asked.epochs, asked.steps) == (7, None)
    assert load_settings(["--data.root", "r"]).model.backbone == "resnet50"


def test_nothing_is_read_from_the_environment(monkeypatch):
    for name in ("SEED", "seed", "DATA", "ATTACK__EPS", "attack.eps"):
        monkeypatch.setenv(name, "5")
    assert train_settings().model_fields_set == set()


def test_a_real_process_ends_with_one_line_and_no_traceback(launch, tmp_path):
    process = launch("train", "--attack.eps", "8", cwd=tmp_path)
    shown = process.communicate()[0]
    assert process.returncode == 1
    assert "attack.eps" in shown and "8/255" in shown and "Traceback" not in shown
