"""The paper's experiments as configurations, dual BatchNorm from training to evaluation, and published checkpoints."""

from __future__ import annotations

import csv
import importlib
import json
from pathlib import Path

import pytest
import torch
import yaml

from hsat.data import read_opensrh, write_synthetic_cohort
from hsat.eval import read_records
from hsat.fingerprints import fingerprint_weights
from hsat.models import build_encoder, load_encoder, save_encoder, unused_branches

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "examples" / "configs"
PAGE = ROOT / "docs" / "experiments.md"
EXPERIMENTS = sorted((CONFIGS / "experiments").glob("*.yaml"))
SMOKE = sorted((CONFIGS / "smoke").glob("*.yaml"))
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
SIZES = {"root", "image_size", "backbone", "warmup_epochs", "epochs", "steps", "batch_patients", "plateau"}
QUICK = "--data.image_size 32 --steps 1 --bootstrap 0 --gallery 0 --attacks pgd --eps 8/255 --k 5 --noise false --quiet"
DUAL = "--model.dual_norm --model.backbone test_byobnet --data.tune_fraction 0.15 --train.eval_every 2"
DUAL += " --train.save_every 1 --train.eval_patches 20 --attack.steps 2 --quiet"


def number(path):
    return int(path.name[:2])


def train(argv):
    from train_hsat import main

    main([str(word) for word in argv])


def evaluate(argv):
    from evaluate_whitebox import main

    main([str(word) for word in argv])


def rows_of(out):
    with (out / "train.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_there_are_fourteen_and_each_has_its_smoke_run():
    assert [number(path) for path in EXPERIMENTS] == list(range(1, 15))
    assert [path.name for path in SMOKE] == [path.name for path in EXPERIMENTS]


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_experiment_is_what_the_paper_says(path):
    from train_hsat import load_settings

    found = load_settings(["--config", str(path)])
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
    assert values == HSAT | WANTED[number(path)]
    assert data.slides * data.patches * data.views * run.batch_patients == 128
    assert (data.image_size, data.views, data.tune_fraction, model.backbone) == (300, 2, 0, "resnet50")
    assert (run.lr, run.warmup, run.loss, run.temperature, run.steps) == (1e-3, 0.1, "p_s_pt", 0.07, None)
    assert model.head_hidden == ([2048, 2048] if number(path) == 10 else [])
    assert not model.dual_norm and model.weights is None and not model.pretrained
    if number(path) > 1:
        assert (attack.eps, attack.step_size, attack.steps) == (8 / 255, 2 / 255, 5)
        assert (attack.warmup_epochs, run.plateau, data.dynamic) == (5000, 50, True)


@pytest.mark.parametrize("path", SMOKE, ids=lambda path: path.stem)
def test_smoke_run_differs_in_size_only(path):
    paper = yaml.safe_load((CONFIGS / "experiments" / path.name).read_text())
    small = yaml.safe_load(path.read_text())
    assert paper.keys() == small.keys()
    for section in paper:
        rest = [{k: v for k, v in content[section].items() if k not in SIZES} for content in (paper, small)]
        assert rest[0] == rest[1], section
    data, run = small["data"], small["train"]
    assert data["slides"] * data["patches"] * data["views"] * run["batch_patients"] == 16
    assert "root" not in data and run["steps"] <= 5 and "epochs" not in run


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder to work in, where the synthetic cohort lies; a smaller one than is written there by default."""
    import cohorts

    folder = tmp_path_factory.mktemp("experiments")
    write_synthetic_cohort(folder / "runs" / "synthetic-0", patients_per_class=4, patches=3, size=32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cohorts, "write_synthetic_cohort", lambda path, seed: path)
        yield folder


@pytest.fixture(scope="module")
def smoke(place):
    """smoke(n): the run folder of experiment n's smoke run, run once."""
    done: dict[int, Path] = {}

    def run(n: int) -> Path:
        if n not in done:
            out = place / f"experiment{n}"
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(place)
                train(["--config", SMOKE[n - 1], "--out", out, "--quiet"])
            done[n] = out
        return done[n]

    return run


@pytest.mark.parametrize("n", [1, 2, 3, 9, 11, 13, 14])
def test_smoke_run(n, smoke):
    rows = rows_of(smoke(n))
    assert [int(row["step"]) for row in rows] == [0, 1, 2]
    clean, adversarial = ([k for k in rows[0] if k.startswith(kind)] for kind in ("clean_", "adversarial_"))
    assert (len(clean), len(adversarial)) == {1: (3, 0), 3: (3, 3)}.get(n, (0, 3))
    encoder = load_encoder(smoke(n) / "final.safetensors")
    width = 96 if n == 9 else 128
    assert encoder(torch.rand(2, 3, 32, 32)).shape == (2, width)
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


def test_what_the_attack_maximises_changes_the_training(smoke):
    """Experiments 2 and 11 see the same patches and begin with the same weights; the attack alone differs."""
    two, eleven = (fingerprint_weights(load_encoder(smoke(n) / "final.safetensors")) for n in (2, 11))
    assert two != eleven
    assert rows_of(smoke(2))[0]["loss"] != rows_of(smoke(11))[0]["loss"]


def test_a_paper_scale_run_asks_for_its_data(stops, tmp_path):
    message = stops(train, ["--config", EXPERIMENTS[1], "--out", tmp_path / "run"])
    assert "/data/opensrh" in message and not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def dual(place):
    """The folder of a training on clean and adversarial images with two BatchNorm branches, interrupted and resumed."""
    argv = ["--config", SMOKE[2], *DUAL.split()]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        train([*argv, "--out", place / "whole"])
        import train_hsat

        class Killed(Exception):
            pass

        class Dying(train_hsat.Trainer):
            def train_step(self, batch, epoch):
                if self.step == 2:
                    raise Killed
                return super().train_step(batch, epoch)

        patch.setattr(train_hsat, "Trainer", Dying)
        with pytest.raises(Killed):
            train([*argv, "--out", place / "dual"])
        patch.undo()
        patch.chdir(place)
        train([*argv, "--out", place / "dual", "--resume"])
    return place / "dual"


def test_dual_norm_resumes_bit_for_bit(dual, place):
    for name in ("final.safetensors", "best.safetensors", "train.csv"):
        assert (dual / name).read_bytes() == (place / "whole" / name).read_bytes(), name
    encoder = load_encoder(dual / "last.pt")
    assert encoder.spec["dual_norm"] and unused_branches(encoder) == ()
    normal, pgd = encoder.backbone.stem.bn.bn_list
    assert int(normal.num_batches_tracked) == int(pgd.num_batches_tracked) == 3
    assert not torch.equal(normal.running_mean, pgd.running_mean)


def test_the_held_out_score_is_that_of_the_trained_branch(dual, place, monkeypatch):
    import held_out
    from train_hsat import hold_out, load_settings

    settings = load_settings(["--config", str(SMOKE[2]), *DUAL.split()])
    cohort = hold_out(read_opensrh(place / "runs" / "synthetic-0"), settings)
    seen = []
    honest = held_out.embed

    def watched(encoder, *args, **options):
        seen.append({part.active for part in encoder.modules() if hasattr(part, "bn_list")})
        return honest(encoder, *args, **options)

    monkeypatch.setattr(held_out, "embed", watched)
    encoder = load_encoder(dual / "final.safetensors")
    found = held_out.held_out_accuracy(encoder, cohort, settings)
    assert seen == [{"pgd"}] * 3
    last = rows_of(dual)[-1]
    assert found == {key: float(value) for key, value in last.items() if key.startswith("tune_")}


def measured(out):
    records = read_records(out / "records.jsonl")
    (name,) = {record.settings.get("branch") for record in records}
    return name, {(r.attack_name, r.level, r.metric): r.value for r in records}


def test_evaluation_picks_the_branch_and_says_so(dual, place, tmp_path, capsys):
    root = place / "runs" / "synthetic-0"
    few = ["--bank_patches", "40", "--query_patches", "20"]
    encoder = load_encoder(dual / "final.safetensors")
    for part in encoder.modules():
        if hasattr(part, "bn_list"):  # three steps leave the branches too alike for the votes of neighbours
            torch.nn.init.normal_(part.bn_list[0].bias, generator=torch.Generator().manual_seed(0))
    path = save_encoder(encoder, tmp_path / "apart.safetensors")
    argv = ["--checkpoint", path, "--data.root", root, *QUICK.split(), *few]
    found = {}
    for wanted in ("normal", "pgd", None):
        out = tmp_path / str(wanted)
        evaluate([*argv, "--out", out, *(["--model.branch", wanted] if wanted else [])])
        said = "using branch pgd; --model.branch chooses" in capsys.readouterr().err
        assert said == (wanted is None)
        found[wanted] = measured(out)
        assert json.loads((out / "run.json").read_text())["settings"]["model"]["branch"] == wanted
    assert [found[wanted][0] for wanted in found] == ["normal", "pgd", "pgd"]
    assert found["pgd"][1] == found[None][1] != found["normal"][1]


def test_branches_that_nobody_trained_are_pointed_at(tmp_path, root, capsys, stops, trained):
    encoder = build_encoder("test_byobnet", embedding_dim=8, dual_norm=True, seed=0)
    for part in encoder.modules():
        if hasattr(part, "bn_list"):
            part.bn_list[0].num_batches_tracked += 5  # as a baseline without an attack leaves it
    path = save_encoder(encoder, tmp_path / "baseline.safetensors")
    argv = ["--data.root", root, *QUICK.split(), "--out", tmp_path / "out"]
    evaluate(["--checkpoint", path, *argv])
    shown = capsys.readouterr().err
    assert "using branch normal" in shown and "never trained" not in shown
    evaluate(["--checkpoint", path, *argv, "--model.branch", "pgd"])
    assert f"note: branch pgd of {path} was never trained" in capsys.readouterr().err
    message = stops(
        evaluate, ["--checkpoint", str(trained / "final.safetensors"), *map(str, argv), "--model.branch", "pgd"]
    )
    assert "holds no dual BatchNorm" in message and "--model.branch pgd" in message


def published(encoder, inner):
    parts = [(key.partition("."), value) for key, value in encoder.state_dict().items()]
    new = {"backbone": f"module.model.{inner}", "head": "module.model.proj"}
    return {"epoch": 1, "loss": 0.5, "model": {f"{new[first]}.{rest}": value for (first, _, rest), value in parts}}


def test_a_published_checkpoint_needs_its_backbones_name_only(root, tmp_path, capsys):
    encoder = build_encoder("test_byobnet", head="mlp3_bn", seed=3)
    torch.save(published(encoder, "bb"), tmp_path / "official.pth")
    argv = ["--data.root", root, *QUICK.split(), "--target", "embedding"]
    named = ["--checkpoint", tmp_path / "official.pth", "--model.backbone", "test_byobnet"]
    evaluate([*named, *argv, "--out", tmp_path / "theirs"])
    said = "head mlp3_bn, embedding_dim 256, hidden [256, 256] (inferred from the file)"
    assert said in capsys.readouterr().err
    path = save_encoder(encoder, tmp_path / "own.safetensors")
    evaluate(["--checkpoint", path, *argv, "--out", tmp_path / "own"])
    assert measured(tmp_path / "theirs") == measured(tmp_path / "own")


@pytest.mark.slow
def test_a_backbone_of_the_paper(root, tmp_path, capsys):
    torch.save(published(build_encoder("resnet50_at", embedding_dim=64, seed=3), "bb.model"), tmp_path / "official.pth")
    argv = ["--checkpoint", tmp_path / "official.pth", "--model.backbone", "resnet50_at", "--data.root", root]
    evaluate([*argv, *QUICK.split(), "--bank_patches", "10", "--query_patches", "4", "--out", tmp_path / "out"])
    shown = capsys.readouterr().err
    assert "320 tensors (published zoo, prefix module.model.); head linear, embedding_dim 64 (inferred" in shown
    assert {record.model for record in read_records(tmp_path / "out" / "records.jsonl")} == {"official"}


def test_own_and_published_files_in_one_table(trained, root, tmp_path, capsys):
    torch.save(published(build_encoder("test_resnet", embedding_dim=6, seed=3), "bb"), tmp_path / "official.pth")
    both = f"own={trained / 'final.safetensors'},official={tmp_path / 'official.pth'}"
    argv = ["--checkpoint", both, "--data.root", root, *QUICK.split(), "--out", tmp_path / "out"]
    evaluate([*argv, "--model.backbone", "test_resnet"])
    assert {record.model for record in read_records(tmp_path / "out" / "records.jsonl")} == {"own", "official"}


def test_a_head_that_cannot_be_told_names_the_option(root, tmp_path, stops):
    state = published(build_encoder("test_byobnet", embedding_dim=6, seed=3), "bb")
    state["model"]["module.model.proj.layers.1.weight"] = torch.zeros(6, 6)
    torch.save(state, tmp_path / "official.pth")
    argv = ["--checkpoint", tmp_path / "official.pth", "--data.root", root, *QUICK.split(), "--out", tmp_path / "out"]
    message = stops(evaluate, [*argv, "--model.backbone", "test_byobnet"])
    assert "no known projection head" in message and "--model.head none" in message
    assert "--model.backbone NAME" in stops(evaluate, argv)
    evaluate([*argv, "--model.backbone", "test_byobnet", "--model.head", "none"])
    assert (tmp_path / "out" / "records.jsonl").exists()


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
    return [line.split()[1:] for line in PAGE.read_text().splitlines() if line.startswith("python examples/")]


@pytest.mark.parametrize("words", commands(), ids=lambda words: words[words.index("--out") + 1])
def test_the_commands_of_the_page_parse(words, monkeypatch):
    script = importlib.import_module(Path(words[0]).stem)
    monkeypatch.chdir(ROOT)
    if script.__name__ == "report":
        assert str(script.Report.load(script.gathered(words[1:], "runs")).out) == "report.html"
        return
    kind = {"train_hsat": "TrainHSAT", "evaluate_whitebox": "EvaluateWhitebox", "evaluate_transfer": "EvaluateTransfer"}
    found = getattr(script, kind[script.__name__]).load(words[1:])
    assert str(found.out) == words[words.index("--out") + 1]
    assert ("smoke" in str(found.out)) == (found.data.root is None)


def test_the_page_lists_every_experiment():
    text = PAGE.read_text()
    middle = {"05_embedding_128", "06_embedding_512", "07_embedding_768"}  # between the first and the last of a row
    assert {path.stem for path in EXPERIMENTS if f"`{path.stem}`" not in text} == middle
