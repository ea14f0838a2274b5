"""hsat universal: one perturbation for every encoder, in a file that can be read again, and how it refuses."""

from __future__ import annotations

import json

from hsat.attacks import FittedUniversal
from hsat.eval import read_records


def universal(argv):
    from hsat.cli.universal import main

    main([*argv])


def test_one_perturbation_is_fitted_once_and_measured_on_all(trained, root, tmp_path, stops):
    file = trained / "final.safetensors"
    start = ["--checkpoint", f"a={file},b={file}", "--data.root", str(root), "--data.image_size", "32"]
    start += "--k 5 --epochs 2 --batch_size 12 --bootstrap 0 --quiet".split()
    universal([*start, "--eps", "8/255", "--out", str(tmp_path)])
    delta = FittedUniversal.load(tmp_path / "universal.safetensors")
    assert 0 < float(delta.delta.abs().max()) <= 8 / 255 + 1e-9 and "on a" in delta.note
    assert json.loads((tmp_path / "run.json").read_text())["history"] == list(delta.history)
    records = [r for r in read_records(tmp_path / "records.jsonl") if (r.level, r.metric) == ("patch", "accuracy")]
    assert [(r.model, r.attack_name) for r in records] == [
        (model, attack) for model in "ab" for attack in ("clean", "universal-8", "noise-8")
    ]
    assert [r.value for r in records[:3]] == [r.value for r in records[3:]], "the same file under two names"
    assert records[1].attack == repr(delta)
    assert "--fit_on c is none of the encoders a, b" in stops(
        universal, [*start, "--fit_on", "c", "--out", str(tmp_path / "other")]
    )
    assert "--eps has 2" in stops(universal, [*start, "--eps", "4/255,8/255", "--out", str(tmp_path / "other")])


def test_it_says_what_fitting_will_cost(trained, root, tmp_path, caplog):
    caplog.set_level("INFO", logger="hsat")
    argv = ["--checkpoint", str(trained / "final.safetensors"), "--data.root", str(root), "--data.image_size", "32"]
    universal([*argv, *"--k 5 --epochs 2 --batch_size 12 --bootstrap 0".split(), "--out", str(tmp_path / "out")])
    passes = [message.partition(",")[0] for message in caplog.messages if "passes each" in message]
    assert passes[0].endswith("patches: at most 4 forward and 2 backward passes each")
