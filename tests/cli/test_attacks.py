"""hsat evaluate --threat and --attacks: which attacks they name, what eps means, and what is refused."""

from __future__ import annotations

import pytest
import torch

from hsat.attacks import (
    APGD,
    BIM,
    DIFGSM,
    FFGSM,
    FGSM,
    L2,
    MIFGSM,
    NIFGSM,
    PGD,
    TIFGSM,
    VMIFGSM,
    AttackEnsemble,
    Linf,
    RandomNoise,
    Reparametrized,
    Square,
    margin,
)
from hsat.data import srh_to_rgb
from hsat.eval import read_records

QUICK = "--steps 2 --bootstrap 0 --gallery 0 --diagnose 0 --quiet --k 5 --attacks pgd --batch_size 16".split()


def evaluate(*words):
    from hsat.cli.evaluate import main

    main([*words, *QUICK])


def settings_of(*words):
    from hsat.cli.evaluate import Evaluate

    return Evaluate.load([*words])


def test_names_and_numbers_of_the_attacks():
    from hsat.cli.attacks import attacks_under

    options = {"names": ["pgd", "mifgsm", "fgsm", "ffgsm"], "steps": 3, "step_size": None}
    assert list(attacks_under("linf", [8 / 255], **options)) == ["PGD-8", "MIFGSM-8", "FGSM-8", "FFGSM-8"]
    l2 = attacks_under("l2", [1.5], **options)
    assert l2["PGD-l2-1.5"] == PGD(L2(1.5), step_size=0.375, steps=3)
    assert list(l2) == ["PGD-l2-1.5", "MIFGSM-l2-1.5", "FGSM-l2-1.5", "FFGSM-l2-1.5"]
    raw = attacks_under("raw_srh", [4 / 255, 8 / 255], **options | {"step_size": 2 / 255})
    assert isinstance(raw["PGD-raw_srh-8"], Reparametrized)
    assert raw["PGD-raw_srh-8"].attack == PGD(Linf(8 / 255), step_size=2 / 255, steps=3)
    stain = attacks_under("stain", [0.1], **options)
    assert stain["PGD-stain-0.1"].attack.threat == Linf(0.1, low=-1, high=1)
    assert stain["PGD-stain-0.1"].space.per_pixel
    assert not attacks_under("stain_image", [0.1], **options)["PGD-stain_image-0.1"].space.per_pixel


def test_every_attack_has_a_name_of_one_word():
    from hsat.cli.attacks import ATTACKS, attacks_under

    made = attacks_under("linf", [8 / 255], names=list(ATTACKS), steps=3, step_size=2 / 255)
    ball, numbers = Linf(8 / 255), {"step_size": 2 / 255, "steps": 3}
    assert list(made)[-1] == "ensemble-8" and isinstance(made.pop("ensemble-8"), AttackEnsemble)
    assert made == {
        "PGD-8": PGD(ball, **numbers),
        "BIM-8": BIM(ball, **numbers, random_start=True),
        "MIFGSM-8": MIFGSM(ball, **numbers, random_start=True),
        "FGSM-8": FGSM(ball),
        "FFGSM-8": FFGSM(ball, step_size=10 / 255),
        "APGD-8": APGD(ball, steps=3),
        "NIFGSM-8": NIFGSM(ball, **numbers),
        "DIFGSM-8": DIFGSM(ball, **numbers),
        "TIFGSM-8": TIFGSM(ball, **numbers),
        "VMIFGSM-8": VMIFGSM(ball, **numbers),
        "Square-8": Square(ball, queries=300, area=0.3),
        "noise-8": RandomNoise(ball),
    }
    again = attacks_under("linf", [8 / 255], names=["PGD", "pgd_r", "bimr_knn"], steps=3, step_size=2 / 255)
    assert list(again) == ["PGD-8", "BIM-8"], "in capitals, and by the names of the paper and its code"


@pytest.mark.parametrize("threat", ["linf", "l2", "raw_srh", "stain", "stain_image"])
def test_every_attack_runs_under_every_threat(threat):
    from hsat.cli.attacks import ATTACKS, EPS, attacks_under

    generator = torch.Generator().manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 3)).eval()
    x = torch.rand(2, 3, 8, 8, generator=generator)
    if threat == "raw_srh":
        x = srh_to_rgb(0.2 + 0.5 * torch.rand(2, 2, 8, 8, generator=generator))
    names = [name for name in ATTACKS if name != "ensemble"]
    attacks = attacks_under(threat, EPS[threat][:1], names=names, steps=2, step_size=None)
    assert len(attacks) == len(names)
    for name, attack in attacks.items():
        x_adv = attack(x, margin(net, torch.zeros(2, dtype=torch.int64)), generator=generator, ids=torch.arange(2))
        assert x_adv.shape == x.shape and (x_adv != x).any(), name


def test_the_attacks_are_listed_with_a_line_each(capsys):
    from hsat.cli.attacks import ATTACKS

    with pytest.raises(SystemExit) as ended:
        settings_of("--attacks", "list")
    lines = capsys.readouterr().out.splitlines()
    assert ended.value.code == 0 and [line.split()[0] for line in lines] == list(ATTACKS)
    assert all(len(line) <= 100 and len(line.split()) > 3 for line in lines)


@pytest.mark.parametrize("command", ["evaluate", "transfer", "budget", "export"])
def test_a_typo_is_answered_with_the_nearest_name_and_with_all(command, capsys):
    from hsat.cli.attacks import ATTACKS
    from hsat.cli.main import main

    with pytest.raises(SystemExit) as ended:
        main([command, "--attacks", "pgd,difgms"])
    said = str(ended.value.code)
    assert "unknown attack 'difgms'; did you mean 'difgsm'?" in said
    assert [line.split()[0] for line in said.splitlines()[-len(ATTACKS) :]] == list(ATTACKS)
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert "--attacks list" in " ".join(capsys.readouterr().out.split())


def test_bim_runs_beside_pgd_only_where_it_is_asked_for():
    from hsat.cli.transfer import Transfer

    for read in (settings_of, lambda *words: Transfer.load([*words])):
        assert read().attacks == ["pgd", "mifgsm"]
        assert read("--preset", "paper").attacks == ["pgd", "bim", "mifgsm"]
        assert read("--preset", "paper", "--attacks", "apgd").attacks == ["apgd"]
        assert read("--attacks", "pgd,bim").attacks == ["pgd", "bim"]


def test_every_threat_has_radii_of_its_own():
    assert settings_of().eps == [4 / 255, 8 / 255]
    assert settings_of("--threat", "stain").eps == [0.05, 0.1]
    assert settings_of("--threat", "stain", "--eps", "0.2").eps == [0.2]
    assert settings_of("--threat", "l2", "--eps", "3,1/2").eps == [3.0, 0.5]
    for words in (("--eps", "8"), ("--threat", "raw_srh", "--eps", "8")):
        with pytest.raises(SystemExit, match="8/255"):
            settings_of(*words)
    for words in (("--eps", "-1"), ("--eps", "x"), ("--threat", "l3")):
        with pytest.raises(SystemExit, match=f"option {words[0][2:]}"):
            settings_of(*words)


def test_raw_srh_from_the_command_line_at_the_files_own_size(trained, root, tmp_path, capsys):
    """Patches of 32 pixels, an encoder that was told 24: it resizes inside, the attack stays on the files' numbers."""
    file = str(trained / "best.safetensors")
    words = ["--checkpoint", file, "--data.root", str(root), "--data.image_size", "24", "--threat", "raw_srh"]
    evaluate(*words, "--natural_shift", "false", "--eps", "8/255", "--out", str(tmp_path / "out"))
    records = read_records(tmp_path / "out" / "records.jsonl")
    assert list(dict.fromkeys(r.attack_name for r in records)) == ["clean", "noise-8", "PGD-raw_srh-8"]
    attacked = next(r for r in records if r.attack_name == "PGD-raw_srh-8")
    assert (attacked.eps, attacked.settings["never_moved_share"]) == ("8/255", 0.0)
    assert "RawChannels(srh_to_rgb)" in attacked.attack and "step_size=2/255" in attacked.attack


def test_stains_and_l2_on_colour_images(trained, colour_root, tmp_path, capsys):
    file = str(trained / "best.safetensors")
    words = [
        "--checkpoint",
        file,
        "--data.root",
        str(colour_root),
        "--data.layout",
        "folders",
        "--data.image_size",
        "32",
    ]
    for threat, name in (("stain_image", "PGD-stain_image-0.1"), ("l2", "PGD-l2-2")):
        eps = name.rpartition("-")[2]
        evaluate(*words, "--threat", threat, "--eps", eps, "--out", str(tmp_path / threat))
        found = {r.attack_name: r for r in read_records(tmp_path / threat / "records.jsonl")}
        assert found[name].eps_value == float(eps)
        assert found[name].settings["never_moved_share"] == 0.0


def test_threats_that_mean_nothing_for_the_images_are_refused(trained, root, colour_root, tmp_path, capsys):
    file = str(trained / "best.safetensors")
    with pytest.raises(SystemExit, match="raw_srh is for SRH"):
        evaluate(
            *"--threat raw_srh --data.layout folders".split(),
            "--checkpoint",
            file,
            "--data.root",
            str(colour_root),
            "--out",
            str(tmp_path / "a"),
        )
    with pytest.raises(SystemExit, match="no stains"):
        evaluate("--threat", "stain", "--checkpoint", file, "--data.root", str(root), "--out", str(tmp_path / "b"))
