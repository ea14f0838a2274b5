"""Recipes: the paper's experiments as they were published, their sizes, and trainings of them; docs/experiments.md."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from hsat.data import write_synthetic_cohort
from hsat.fingerprints import fingerprint_weights
from hsat.models import load_encoder
from hsat.recipes import EXPERIMENTS, NAMES, SCALES, read_paper_numbers, read_recipe
from hsat.training import TrainConfig

PAGE = Path(__file__).parents[1] / "docs" / "experiments.md"
HSAT = {
    "slides": 2,
    "patches": 2,
    "augmentation": "v0",
    "head": "linear",
    "embedding_dim": 128,
    "attack": "pgd",
    "levels": "p_s_pt",
    "epochs": 40_000,
    "clean": False,
}
WANTED = {  # what an experiment changes, and in which option
    1: {"attack": "none", "augmentation": "static"},
    2: {},
    3: {"clean": True, "epochs": 80_000},
    4: {"embedding_dim": 256},
    5: {"embedding_dim": 128},
    6: {"embedding_dim": 512},
    7: {"embedding_dim": 768},
    8: {"embedding_dim": 1024},
    9: {"head": "mlp3_bn", "embedding_dim": None},
    10: {"head": "mlp", "embedding_dim": 2048},
    11: {"levels": "pt"},
    12: {"levels": "s_pt"},
    13: {"slides": 1, "patches": 1},
    14: {"patches": 1},
}


def settings_of(*argv):
    from hsat.cli.train import load_settings

    return load_settings([*argv])


def test_there_are_fourteen_experiments_and_two_of_them_have_names():
    assert EXPERIMENTS == tuple(f"experiment-{n}" for n in range(1, 15))
    assert {*NAMES} == {*EXPERIMENTS, "hsat", "hidisc", "hsat-plus", "demo"}
    assert read_recipe("hidisc") == read_recipe("experiment-1") and read_recipe("hsat") == read_recipe("experiment-2")
    assert read_recipe("demo") == read_recipe("demo", scale="paper") == read_recipe("hsat", scale="demo")


@pytest.mark.parametrize("n", WANTED)
def test_an_experiment_is_what_the_paper_says(n):
    found = settings_of("--recipe", f"experiment-{n}", "--data.root", "r")
    data, model, attack, run = found.data, found.model, found.attack, found.train
    values = {
        "slides": data.slides,
        "patches": data.patches,
        "augmentation": data.augmentation,
        "head": model.head,
        "embedding_dim": model.embedding_dim,
        "attack": attack.name,
        "levels": attack.levels,
        "epochs": run.epochs,
        "clean": run.clean,
    }
    assert values == HSAT | WANTED[n]
    assert data.slides * data.patches * data.views * run.batch_patients == 128
    assert (data.image_size, data.views, data.tune_fraction, model.backbone) == (300, 2, 0, "resnet50")
    assert (run.lr, run.warmup, run.loss, run.temperature, run.steps) == (1e-3, 0.1, "p_s_pt", 0.07, None)
    assert model.head_hidden == ([2048, 2048] if n == 10 else [])
    assert not model.dual_norm and model.weights is None and not model.pretrained
    if n > 1:
        assert (attack.eps, attack.step_size, attack.steps) == (8 / 255, 2 / 255, 5)
        assert (attack.warmup_epochs, run.plateau, data.dynamic) == (5000, 50, True)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_at_every_scale_is_accepted(name, scale):
    found = settings_of("--recipe", name, "--scale", scale)
    assert found.data.root is None
    attack = {"hidisc": "none", "experiment-1": "none", "hsat-plus": "free"}.get(name, "pgd")
    assert found.train_config().attack.name == attack


@pytest.mark.parametrize("scale", SCALES)
def test_hsat_plus_is_the_same_in_yaml_and_in_python(scale):
    """At every scale: the options of `TrainConfig.hsat_plus`, no head, and as many passes as HSAT takes."""
    found, hsat = (settings_of("--recipe", name, "--scale", scale) for name in ("hsat-plus", "hsat"))
    train, paper = found.train_config(), hsat.train_config()
    same = TrainConfig.hsat_plus()
    assert train.attack == same.attack and train.attack.eps == 8 / 255
    assert (train.layer, train.temperature, train.loss) == (same.layer, same.temperature, same.loss)
    assert (found.model.head, found.model.backbone) == ("none", hsat.model.backbone)
    assert (train.batch_patients, train.lr, train.views.image_size) == (
        paper.batch_patients,
        paper.lr,
        paper.views.image_size,
    )
    length = train.epochs / paper.epochs if scale == "paper" else train.steps / paper.steps
    checks = (5 + 3 + 1) / train.attack.check_every  # PGD's steps, free training's, and three forwards
    assert 0.95 <= length * (train.attack.replays + checks) / (paper.attack.steps + 1) <= 1


@pytest.mark.parametrize(("name", "kind"), [("hsat", "pgd"), ("hidisc", "none"), ("hsat-plus", "free")])
def test_a_recipe_without_data_trains_at_the_size_of_the_demo(name, kind):
    found = settings_of("--recipe", name)
    assert (found.data.root, found.data.image_size, found.model.backbone) == (None, 48, "test_resnet")
    assert found.train_config().attack.name == kind and found.train.steps == (336 if kind == "free" else 240)


@pytest.mark.parametrize("scale", ["demo", "cpu"])
@pytest.mark.parametrize("n", WANTED)
def test_a_smaller_scale_keeps_what_makes_the_experiment(n, scale):
    paper, small = (read_recipe(f"experiment-{n}", scale=size) for size in ("paper", scale))
    for section, names in {
        "data": ("slides", "patches", "views", "augmentation", "dynamic"),
        "model": ("head", "embedding_dim", "head_hidden"),
        "attack": ("name", "levels"),
        "train": ("loss", "clean"),
    }.items():
        assert {k: small[section].get(k) for k in names} == {k: paper[section].get(k) for k in names}, section
    images = [
        r["data"]["slides"] * r["data"]["patches"] * r["data"]["views"] * r["train"]["batch_patients"]
        for r in (paper, small)
    ]
    assert images == [128, 64]
    assert small["data"]["image_size"] < 100 and small["train"]["steps"] <= 2000 and "epochs" not in small["train"]


def test_unknown_names_and_scales_are_refused(stops):
    with pytest.raises(ValueError, match=r"no recipe is called 'hsta'; there are hsat, hidisc, .*experiment-14"):
        read_recipe("hsta")
    with pytest.raises(ValueError, match="no scale is called 'huge'; there are demo, cpu, paper"):
        read_recipe("hsat", scale="huge")
    assert "no recipe is called 'experiment-15'" in stops(
        lambda argv: settings_of(*argv), ["--recipe", "experiment-15"]
    )
    assert "no scale is called 'large'" in stops(lambda argv: settings_of(*argv), ["--scale", "large"])


def test_the_scale_follows_the_data_and_is_printed(capsys):
    assert settings_of("--recipe", "experiment-3").data.image_size == 48
    assert "recipe experiment-3 at scale demo" in capsys.readouterr().err
    assert settings_of("--recipe", "experiment-3", "--data.root", "r").data.image_size == 300
    assert "recipe experiment-3 at scale paper" in capsys.readouterr().err
    assert settings_of("--recipe", "hsat", "--data.root=r", "--scale=cpu").data.image_size == 96
    assert "recipe hsat at scale cpu" in capsys.readouterr().err


def test_options_and_files_win_over_a_recipe(tmp_path):
    (tmp_path / "mine.yaml").write_text("train: {lr: 0.1, temperature: 0.2}\nattack: {name: none}\n")
    argv = ["--recipe", "experiment-3", "--config", str(tmp_path / "mine.yaml"), "--train.lr", "0.5"]
    found = settings_of(*argv)
    assert (found.train.lr, found.train.temperature, found.attack.name, found.train.clean) == (0.5, 0.2, "none", True)
    by_epochs = settings_of("--recipe", "experiment-3", "--train.epochs", "7").train
    assert (by_epochs.epochs, by_epochs.steps) == (7, None)
    by_steps = settings_of("--recipe", "experiment-3", "--data.root", "r", "--train.steps", "7").train
    assert by_steps.steps == 7


def test_the_papers_numbers_are_package_data():
    numbers = read_paper_numbers()
    assert sorted(map(str, numbers)) == ["1", "2", "3", "4"]


@pytest.fixture(scope="module")
def small(train, one_thread, tmp_path_factory):
    """small(n): the run folder of three steps of experiment n at the scale of the demo, run once."""
    folder = tmp_path_factory.mktemp("experiments")
    root = write_synthetic_cohort(folder / "srh", patients_per_class=4, patches=3, size=32)
    done: dict[int, Path] = {}

    def run(n: int) -> Path:
        if n not in done:
            patients = {13: 8, 14: 4}.get(n, 2)
            argv = ["--recipe", f"experiment-{n}", "--scale", "demo", "--data.root", root, "--data.image_size", 32]
            argv += ["--train.steps", 3, "--train.batch_patients", patients, "--quiet", "--out", folder / f"{n}"]
            train(argv)
            done[n] = folder / f"{n}"
        return done[n]

    return run


@pytest.mark.parametrize("n", [1, 2, 3, 9, 11, 13, 14])
def test_the_loss_of_an_experiment_has_its_terms(n, small, rows_of):
    rows = rows_of(small(n))
    assert [int(row["step"]) for row in rows] == [0, 1, 2]
    clean, adversarial = ([k for k in rows[0] if k.startswith(kind)] for kind in ("clean_", "adversarial_"))
    assert (len(clean), len(adversarial)) == {1: (3, 0), 3: (3, 3)}.get(n, (0, 3))
    encoder = load_encoder(small(n) / "final.safetensors")
    features = encoder.features(torch.rand(2, 3, 32, 32)).shape[1]
    assert encoder(torch.rand(2, 3, 32, 32)).shape == (2, features if n == 9 else 128)
    assert encoder.spec["head"] == ("mlp3_bn" if n == 9 else "linear")
    for row in rows:
        kinds = [kind for kind in ("clean", "adversarial") if f"{kind}_patch" in row]
        terms = [{level: float(row[f"{kind}_{level}"]) for level in ("patch", "slide", "patient")} for kind in kinds]
        shares = [1 / 2, 1 / 2] if n == 3 else [1.0]
        if n == 3:  # weight of the clean loss: (1 - 0.66 (1 - strength)) / 2
            shares[0] = (1 - 0.66 * (1 - float(row["strength"]))) / 2
            shares[1] = 1 - shares[0]
        total = sum(share * sum(term.values()) for share, term in zip(shares, terms, strict=True))
        assert float(row["loss"]) == pytest.approx(total, rel=1e-5)
        if n in (13, 14):  # one patch of a slide: its positives at slide level are its views
            assert terms[0]["slide"] == pytest.approx(terms[0]["patch"], rel=1e-5)
            assert (terms[0]["patient"] == pytest.approx(terms[0]["patch"], rel=1e-5)) == (n == 13)


def test_what_the_attack_maximises_changes_the_training(small, rows_of):
    """Experiments 2 and 11 see the same patches and begin with the same weights; the attack alone differs."""
    two, eleven = (fingerprint_weights(load_encoder(small(n) / "final.safetensors")) for n in (2, 11))
    assert two != eleven
    assert rows_of(small(2))[0]["loss"] != rows_of(small(11))[0]["loss"]


def python_blocks():
    """The page's Python as one program, every line where it stands in the page."""
    inside, lines = False, []
    for line in PAGE.read_text().splitlines():
        if line.startswith("```"):
            inside = line == "```python"
        lines.append(line if inside and not line.startswith("```") else "")
    return "\n".join(lines)


def test_the_python_of_the_page_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(python_blocks(), str(PAGE), "exec", dont_inherit=True), names)
    assert capsys.readouterr().out == "pgd ()\nlinear 128 published, prefix module.model.\n"
    assert names["backbone"].head is None


def commands():
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("hsat ")]
    assert len(lines) >= 10
    return [line.split()[1:] for line in lines]


@pytest.mark.parametrize("words", commands(), ids=lambda words: words[words.index("--out") + 1])
def test_the_commands_of_the_page_parse(words):
    from hsat.cli.evaluate import Evaluate
    from hsat.cli.options import collect_words
    from hsat.cli.report import Report
    from hsat.cli.train import load_settings
    from hsat.cli.transfer import Transfer

    def read_report(argv):
        return Report.load(collect_words(argv, "runs"))

    read = {"train": load_settings, "evaluate": Evaluate.load, "transfer": Transfer.load, "report": read_report}
    command, *argv = words
    assert str(read[command](argv).out) == argv[argv.index("--out") + 1]


def test_the_page_lists_every_experiment():
    text = re.sub(
        r"`experiment-4` \.\.\. `experiment-8`", " ".join(f"`experiment-{n}`" for n in range(4, 9)), PAGE.read_text()
    )
    assert not [name for name in NAMES if f"`{name}`" not in text]
