"""hsat evaluate --threat: which attacks it names, what eps means, and what is refused."""

from __future__ import annotations

import pytest

from hsat.attacks import L2, PGD, Linf, Reparametrized
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
    evaluate(*words, "--eps", "8/255", "--out", str(tmp_path / "out"))
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
