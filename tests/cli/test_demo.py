"""The demo, shortened: everything it promises is there and says what the records say."""

from __future__ import annotations

import json

import pytest


def test_the_demo_refuses_unknown_targets(capsys):
    import hsat.cli.demo as demo

    with pytest.raises(SystemExit) as stop:
        demo.main(["--targets", "features,logits"])
    assert "targets" in str(stop.value) and "'embedding' or 'decision'" in str(stop.value)


def test_an_interrupted_demo_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    import hsat.cli.demo as demo
    from hsat.training.interrupts import TrainingInterrupted

    def stop(settings):
        raise TrainingInterrupted(step=3, total=9, signal=2)

    monkeypatch.setattr(demo, "train", stop)
    with pytest.raises(SystemExit) as ended:
        demo.main(["--out", str(tmp_path), "--quiet"])
    assert ended.value.code == 130
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == f"stopped after step 3 of 9, which is saved; to go on: hsat demo --out {tmp_path} --quiet"


@pytest.mark.slow
def test_a_short_demo_writes_table_report_and_figures(tmp_path, monkeypatch, capsys, rows_of):
    import hsat.cli.demo as demo
    from hsat.eval import read_records

    monkeypatch.chdir(tmp_path)
    options = [
        "--steps",
        "2",
        "--query_patches",
        "30",
        "--targets",
        "features,embedding,decision",
        "--quiet",
        "--out",
        "run",
    ]
    demo.main(options)
    printed = capsys.readouterr().out
    out = tmp_path / "run"
    report = (out / "report.md").read_text()
    for target in ("features", "embedding"):
        records = read_records(out / target / "records.jsonl")
        assert {record.model for record in records} == {"HiDisc", "HSAT", "HSAT+", "untrained"}
        names = {f"{kind}-{eps}" for kind in ("PGD", "MIFGSM", "noise") for eps in (4, 8)}
        assert {record.attack_name for record in records} == names | {"clean"}
        assert {record.k for record in records} == {20, 200} and {record.target for record in records} == {target}
        assert (out / target / "accuracy_vs_eps.png").stat().st_size > 5000
        assert list((out / target).glob("patches_HSAT_*.png"))
        sentence = demo.verdict(list(records))
        kept = [100 * demo.value(list(records), "HSAT", "PGD-8", metric) for metric in ("accuracy", "mca")]
        assert sentence in report and sentence in printed and f"HSAT {kept[0]:.1f} / {kept[1]:.1f}," in sentence
        assert f"]({target}/accuracy_vs_eps.png)" in report
    voted = [r for r in read_records(out / "decision" / "records.jsonl") if r.attack_name == "ensemble-8"]
    assert {r.model for r in voted} == {"HiDisc", "HSAT", "HSAT+"} and {r.target for r in voted} == {"decision"}
    assert {r.n for r in voted if r.level == "patch"} == {30} and "on the kNN vote itself" in report
    assert demo.verdict(voted) in report
    steps = {name: len(rows_of(out / name)) for name in ("hidisc", "hsat", "hsat-plus")}
    assert steps == {"hidisc": 2, "hsat": 2, "hsat-plus": 3}, "as many passes"
    page = (out / "report.html").read_text()
    assert "hsat demo" in page and "HSAT" in page
    assert json.loads((out / "chance.json").read_text())["mca"] == pytest.approx(0.2)
    first = (out / "hsat" / "final.safetensors").read_bytes()
    demo.main([*options[:-3], "--out", "run"])  # finished trainings are not repeated
    assert (out / "hsat" / "final.safetensors").read_bytes() == first
