"""The front door: evaluate_robustness on folders, cohorts, loaders, encoders of any kind, and what its result says."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import hsat
from hsat import robustness
from hsat.attacks import PGD, AttackEnsemble, Linf
from hsat.data import PatchDataset, find_cohort, patch_loader, read_folders
from hsat.eval import RunOptions, read_records
from hsat.report import open_runs
from hsat.types import EmbeddingTable

EPS = (2 / 255, 8 / 255)


class Colours(nn.Module):
    """The mean colour of each quarter, dark ones negative."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.scale * nn.functional.adaptive_avg_pool2d(x - 0.5, 2).flatten(1)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """The standard ensemble is for strength; these tests are about everything around it."""

    def attacks(eps, *, labelled=True):
        real = real_attacks(eps, labelled=labelled)
        return {
            name: dataclasses.replace(one, steps=2, decision_steps=3, restarts=1, targets=1, queries=5)
            if isinstance(one, AttackEnsemble)
            else dataclasses.replace(one, steps=2)
            for name, one in real.items()
        }

    real_attacks = robustness.standard_attacks
    monkeypatch.setattr(robustness, "standard_attacks", attacks)


def write(path, *, bright, seed, side=16):
    path.parent.mkdir(parents=True, exist_ok=True)
    low, high = (130, 255) if bright else (0, 125)
    pixels = np.random.default_rng(seed).integers(low, high, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def write_patches(root, template, *, patients=3, patches=2):
    seed = 0
    for name, bright in (("dark", False), ("light", True)):
        for patient in range(patients):
            for patch in range(patches):
                write(root / template.format(c=name, p=f"{name}{patient}", i=patch), bright=bright, seed=seed)
                seed += 1
    return root


@pytest.fixture
def folder(tmp_path):
    return write_patches(tmp_path / "data", "{c}/{p}/s/{i}.png")


def lines_of(text):
    lines = str(text).splitlines()
    assert len(lines) <= 10 and all(len(line) <= 100 for line in lines), text
    return lines


def test_a_folder_becomes_six_lines(folder, caplog):
    result = hsat.evaluate_robustness(Colours(), folder, eps=EPS, norm="none")
    lines = lines_of(result.summary())
    assert [line.split()[0] for line in lines[:5]] == ["model", "clean", "noise", "ensemble", "chance"]
    assert lines[0].startswith("model       Colours on 4 patches, kNN, k = 1") and "2/255: " in lines[3]
    assert lines[1].startswith("clean       100.0 % [") and lines[4] == "chance      50.0 %"
    assert repr(result) == str(result.summary()) == repr(result.summary())
    assert {record.attack_name for record in result.records} == {
        "clean",
        "noise-2",
        "noise-8",
        "ensemble-2",
        "ensemble-8",
    }
    said = " ".join(result.notes)
    assert "read as folders class/patient/slide/patch" in said and "no split, so patients were drawn (seed 0)" in said
    assert "own size, 16 x 16" in said and "pixels in [0, 1] as they are (stated by the caller)" in said
    assert all(f"note: {note}" in caplog.messages for note in result.notes)
    assert len(result.table().rows) == 3 and "50.0" in result.to_csv() + str(result.table())
    assert "<table" in result._repr_html_() and "\\toprule" in result.to_latex()


def test_the_same_seed_gives_the_same_records_and_files_open_as_a_run(folder, tmp_path):
    one, two = (hsat.evaluate_robustness(Colours(), folder, eps=8 / 255, norm="none") for _ in range(2))
    assert one.records == two.records
    out = one.save(tmp_path / "out")
    names = {path.name for path in out.iterdir()}
    assert names >= {"records.jsonl", "scores.npz", "table.md", "run.json", "evidence", "report.html", "ensemble.csv"}
    assert read_records(out / "records.jsonl") == one.records
    (run,) = open_runs([out])
    assert run.artifacts and run.about["settings"]["eps"] == [8 / 255]
    assert "ensemble-8" in one.report(tmp_path / "page.html").read_text()
    assert one.plot(tmp_path / "figure.pdf").exists()
    assert one.to_csv(tmp_path / "n.csv") == (tmp_path / "n.csv").read_text()
    assert len(one.to_frame()) == len(one.records)


def test_one_model_saved_over_two_leaves_one(folder, tmp_path):
    out = tmp_path / "out"
    for encoder in ({"a": Colours(), "b": Colours()}, {"a": Colours()}):
        result = hsat.evaluate_robustness(encoder, folder, eps=8 / 255, norm="none")
        result.save(out)
    assert not (out / "differences.json").exists() and [path.name for path in (out / "evidence").iterdir()] == ["a"]
    page = (out / "report.html").read_text()
    assert str(out) in page and ".saving-" not in page
    result.save(out)
    assert read_records(out / "records.jsonl") == result.records


def test_several_encoders_have_a_column_each_and_a_difference(folder):
    result = hsat.evaluate_robustness({"a": Colours(), "b": Colours()}, folder, eps=EPS, norm="none")
    lines = lines_of(result.summary())
    assert lines[0].split() == ["model,", "%", "a", "b"]
    assert any(line.startswith("difference") and "+0.0" in line for line in lines)
    assert any(line.startswith("doubt") for line in lines) and lines[-1].startswith(("doubt", "note", " "))
    assert set(result.evaluations) == {"a", "b"} and result.differences


def test_a_bare_module_or_function_is_refused_and_told_what_to_type(folder):
    for encoder in (Colours(), lambda x: x.flatten(1)):
        with pytest.raises(
            ValueError, match=r"evaluate_robustness\(\.\.\., norm=\.\.\.\) with norm='imagenet', 'timm'"
        ):
            hsat.evaluate_robustness(encoder, folder)
    with pytest.raises(TypeError, match="or the path of a file of hsat; got int"):
        hsat.evaluate_robustness(3, folder)
    with pytest.raises(ValueError, match="differs; leave norm out"):
        hsat.evaluate_robustness(hsat.wrap_encoder(Colours(), norm="none"), folder, norm="imagenet")
    with pytest.raises(TypeError, match="data must be a Cohort, a folder, a pair"):
        hsat.evaluate_robustness(Colours(), 3, norm="none")
    with pytest.raises(ValueError, match="eps is empty"):
        hsat.evaluate_robustness(Colours(), folder, norm="none", eps=())


def test_files_encoders_and_functions_agree(folder, tmp_path):
    encoder = hsat.build_encoder("resnet10t", norm="imagenet", seed=0)
    hsat.save_encoder(encoder, tmp_path / "ours.safetensors")
    cohort = read_folders(folder).with_split(val_fraction=0.4, seed=0)
    file = hsat.evaluate_robustness(tmp_path / "ours.safetensors", cohort, eps=8 / 255, image_size=32)
    assert file.records[0].model == "ours" and len(file.records[0].checkpoint) == 64
    assert file.records[0].settings["pixel_normalisation"]["stated_by"]
    own = hsat.evaluate_robustness(encoder, cohort, eps=8 / 255, image_size=32)
    bare = hsat.evaluate_robustness(encoder.backbone, cohort, eps=8 / 255, image_size=32, norm="imagenet")
    values = [[record.value for record in one.records] for one in (file, own, bare)]
    assert values[0] == values[1] and values[0][:2] == values[2][:2]


def test_patches_of_several_sizes_are_refused_until_a_side_is_given(folder):
    write(folder / "dark/dark9/s/0.png", bright=False, seed=99, side=20)
    with pytest.raises(ValueError, match=r"2 sizes \(16 x 16, 20 x 20\).*image_size=224"):
        hsat.evaluate_robustness(Colours(), folder, norm="none")
    result = hsat.evaluate_robustness(Colours(), folder, norm="none", image_size=16, eps=8 / 255)
    assert "patches resized to 16 x 16, as asked for" in result.notes


def test_an_encoder_of_one_size_decides_the_size(folder):
    encoder = hsat.wrap_encoder(Colours(), norm="none", input_size=8)
    result = hsat.evaluate_robustness(encoder, folder, eps=8 / 255)
    assert "patches resized to 8 x 8, the size that the encoder takes" in result.notes


def test_folders_without_patients_are_flagged(tmp_path):
    root = write_patches(tmp_path / "nct", "{c}/{p}-{i}.png")
    result = hsat.evaluate_robustness(Colours(), root, norm="none", eps=8 / 255)
    assert all(any("no patients are known" in flag for flag in record.flags) for record in result.records)
    assert any(line.startswith("doubt") for line in lines_of(result.summary()))


@pytest.mark.parametrize("template", ["{i}{p}.png", "all/{i}{p}.png"])
def test_without_labels_there_is_drift_only(tmp_path, template):
    root = write_patches(tmp_path / "plain", template)
    result = hsat.evaluate_robustness(Colours(), root, norm="none", eps=EPS)
    assert {record.metric for record in result.records} == {"drift"} and result.metric == "drift"
    lines = lines_of(result.summary())
    assert "without labels" in lines[0] and lines[1].startswith("noise") and lines[2].startswith("PGD")
    assert any("only how far attacks move the features" in note for note in result.notes)
    found = {record.attack_name: record for record in result.records}
    assert found["PGD-8"].value > found["noise-8"].value and found["PGD-8"].low <= found["PGD-8"].value
    assert (result.save(tmp_path / "out") / "report.html").exists() and len(result.table().rows) == 1
    assert result.plot(tmp_path / "drift.png").exists()


def test_drift_of_a_loader_of_bare_images():
    images = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    tensors = hsat.evaluate_robustness(Colours(), [images[:3], images[3:]], norm="none", eps=8 / 255)
    tuples = hsat.evaluate_robustness(Colours(), [(images[:3],), (images[3:],)], norm="none", eps=8 / 255)
    assert [record.value for record in tensors.records] == [record.value for record in tuples.records]
    moved = tensors.evaluations["Colours"].tables
    expected = 1 - (moved["clean"].z.astype(np.float64) * moved["PGD-8"].z).sum(1).mean()
    assert tensors.records[-1].value == pytest.approx(expected)
    with pytest.raises(TypeError, match="batches of images"):
        hsat.evaluate_robustness(Colours(), [{"image": images}], norm="none", eps=8 / 255)


def test_pairs_of_loaders_tables_and_plain_batches(folder):
    cohort = read_folders(folder).with_split(val_fraction=0.4, seed=0)
    bank, queries = (patch_loader(PatchDataset(cohort, split), batch_size=4) for split in ("train", "val"))
    whole = hsat.evaluate_robustness(Colours(), cohort, norm="none", eps=8 / 255)
    pair = hsat.evaluate_robustness(Colours(), (bank, queries), norm="none", eps=8 / 255)
    assert [record.value for record in pair.records] == [record.value for record in whole.records]
    table = hsat.embed(hsat.wrap_encoder(Colours(), norm="none"), bank)
    assert isinstance(table, EmbeddingTable)
    given = hsat.evaluate_robustness(Colours(), (table, queries), norm="none", eps=8 / 255)
    assert [record.value for record in given.records] == [record.value for record in whole.records]
    plain = tuple([(batch.images, batch.label) for batch in loader] for loader in (bank, queries))
    result = hsat.evaluate_robustness(Colours(), plain, norm="none", eps=8 / 255)
    assert {record.level for record in result.records} == {"patch"}
    assert all(any("without slides and patients" in flag for flag in record.flags) for record in result.records)


def test_progress_says_how_long_it_will_take(folder, capsys, monkeypatch):
    monkeypatch.setattr(logging.getLogger("hsat"), "hasHandlers", lambda: False)
    hsat.evaluate_robustness(Colours(), folder, norm="none", eps=8 / 255, run=RunOptions(progress=True))
    shown = capsys.readouterr().err
    assert "forward and" in shown and "note: Colours: pixels" in shown


@pytest.mark.parametrize(
    "template, words",
    [
        ("{c}/{p}/s/{i}.png", "class/patient/slide/patch"),
        ("{c}/{p}/{i}.png", "class/patient/patch"),
        ("{c}/{p}{i}.png", "class/patch"),
        ("train/{c}/{p}/s/{i}.png", "split/class/patient/slide/patch"),
        ("val/{c}/{p}{i}.png", "split/class/patch"),
    ],
)
def test_layouts_are_found(tmp_path, template, words):
    cohort = find_cohort(write_patches(tmp_path / "root", template))
    assert cohort.notes[0].endswith(f"read as folders {words}") or f"folders {words}," in cohort.notes[0]
    assert cohort.class_names == ("dark", "light")
    assert len(cohort.patient_names) == (6 if "/{p}/" in template else 12)


@pytest.mark.parametrize("names", [("train", "val", "test"), ("Train", "Val"), ("Training", "Testing"), ("0", "1")])
def test_splits_of_known_names_are_bank_and_queries(tmp_path, names):
    lines = ["path,class,patient,slide,split"]
    for name, bright in (("dark", False), ("light", True)):
        for i, split in enumerate((*names, names[0], "")):
            write(tmp_path / f"{name}{i}.png", bright=bright, seed=i)
            lines.append(f"{name}{i}.png,{name},{name}{i},s,{split}")
    (tmp_path / "manifest.csv").write_text("\n".join(lines))
    if names == ("0", "1"):
        with pytest.raises(ValueError, match=r"'0', '1' do not say which one .*rename_splits.* cohort.with_split"):
            hsat.evaluate_robustness(Colours(), tmp_path, norm="none")
        return
    result = hsat.evaluate_robustness(Colours(), tmp_path, norm="none", eps=8 / 255)
    said = " ".join(result.notes)
    assert {record.n for record in result.records if record.level == "patch"} == {2} and "drawn" not in said
    assert f"left out: 2 of {2 * len(names) + 4} patches, which are in no split" in said
    assert ("split 'test' (2 patches)" in said) == ("test" in names)
    assert (f"the queries are split {names[1]!r}" in said) == (names[1] != "val")


def test_a_bad_file_says_how_to_find_them_all(folder):
    file = folder / "dark/dark0/s/0.png"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(hsat.data.BadPatch, match="not a readable PNG") as caught:
        hsat.evaluate_robustness(Colours(), folder, norm="none", eps=8 / 255)
    assert "cohort.check_files() lists all bad files, as `hsat check DATA` does" in caught.value.__notes__


def test_a_single_split_is_divided_by_patient(tmp_path):
    root = write_patches(tmp_path / "root", "train/{c}/{p}/s/{i}.png")
    result = hsat.evaluate_robustness(Colours(), root, norm="none", eps=8 / 255)
    assert any("it has the split 'train' only, so patients were drawn" in note for note in result.notes)


def test_tables_and_folders_in_no_layout(tmp_path):
    root = write_patches(tmp_path / "root", "images/x/{p}{i}.png")
    rows = [
        f"images/x/{name}{p}{i}.png,{name},{name}{p},s" for name in ("dark", "light") for p in range(3) for i in (0, 1)
    ]
    (root / "manifest.csv").write_text("\n".join(["path,class,patient,slide", *rows]) + "\n")
    assert len(find_cohort(root).patient_names) == 6 and "manifest.csv" in find_cohort(root).notes[0]
    (root / "manifest.csv").rename(root / "other.csv")
    assert find_cohort(root / "other.csv").class_names == ("dark", "light")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no image .* lies in it.*Give the Cohort that a reader of hsat.data returns"):
        find_cohort(tmp_path / "empty")


def test_the_attacks_are_the_standard_ensemble(monkeypatch):
    monkeypatch.undo()
    assert robustness.standard_attacks((8 / 255,)) == {"ensemble-8": AttackEnsemble.standard(Linf(8 / 255))}
    drift = robustness.standard_attacks((8 / 255,), labelled=False)["PGD-8"]
    assert isinstance(drift, PGD) and drift.steps == robustness.DRIFT_STEPS


def test_the_quickstart_runs(tmp_path, monkeypatch, capsys):
    page = Path(__file__).parents[1] / "docs" / "quickstart.md"
    code = page.read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    exec(compile(code, str(page), "exec"), {})
    assert len(lines_of(capsys.readouterr().out)) >= 5 and Path("runs/quickstart/report.html").exists()


def test_few_queries_are_spread_over_all_and_said(folder):
    result = hsat.evaluate_robustness(Colours(), folder, eps=8 / 255, norm="none", query_patches=3)
    assert {record.n for record in result.records if record.level == "patch"} == {3}
    assert any("3 of 4 queries are attacked" in note for note in result.notes)
    assert result.settings["query_patches"] == 3
    with pytest.raises(ValueError, match="query_patches is for cohorts"):
        hsat.evaluate_robustness(Colours(), [torch.rand(2, 3, 8, 8)], norm="none", query_patches=3)
    with pytest.raises(ValueError, match="at least 1"):
        hsat.evaluate_robustness(Colours(), folder, norm="none", query_patches=0)


def test_several_encoders_are_attacked_by_way_of_each_other(folder):
    result = hsat.evaluate_robustness({"a": Colours(), "b": Colours()}, folder, eps=8 / 255, norm="none")
    for outcome in (one.outcomes["ensemble-8"] for one in result.evaluations.values()):
        assert any("transfer" in member.name.lower() for member in outcome.members)


def pixels(count, *, seed=0, side=16):
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def pairs(count, *, seed=0, side=16):
    images = pixels(count, seed=seed, side=side)
    return [(images[start : start + 4], torch.arange(start, start + 4) % 2) for start in range(0, count, 4)]


class Linear(nn.Module):
    def __init__(self, seed):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(12, 6, generator=torch.Generator().manual_seed(seed)))

    def forward(self, x):
        return nn.functional.adaptive_avg_pool2d(x, 2).flatten(1) @ self.weight


def test_each_encoder_embeds_a_bank_of_plain_batches_itself():
    data = (pairs(24), pairs(8, seed=1))
    both = hsat.evaluate_robustness({"a": Linear(0), "b": Linear(1)}, data, norm="none", eps=8 / 255)
    alone = hsat.evaluate_robustness({"b": Linear(1)}, data, norm="none", eps=8 / 255)
    clean = [
        next(one.value for one in result.evaluations["b"].records if one.metric == "map") for result in (both, alone)
    ]
    assert clean[0] == clean[1]
    table = hsat.embed(hsat.wrap_encoder(Linear(0), norm="none"), data[0], class_names=("0", "1"))
    with pytest.raises(ValueError, match="the bank is a table, which one encoder made, and there are 2 encoders"):
        hsat.evaluate_robustness({"a": Linear(0), "b": Linear(1)}, (table, data[1]), norm="none")


def test_a_loader_with_labels_alone_is_told_that_the_bank_is_missing():
    result = hsat.evaluate_robustness(Linear(0), pairs(8), norm="none", eps=8 / 255)
    assert any("there is no bank" in note and "(bank, queries)" in note for note in result.notes)
    assert result.metric == "drift" and not any("have no labels" in note for note in result.notes)
    bare = hsat.evaluate_robustness(Linear(0), [pixels(4)], norm="none", eps=8 / 255)
    assert any("have no labels" in note for note in bare.notes)


def test_the_bank_is_the_queries(folder):
    data = pairs(8)
    result = hsat.evaluate_robustness(Linear(0), (data, data), norm="none", eps=8 / 255)
    assert "8 of 8 queries are also in the bank, with the same embedding" in result.doubts()
    assert any("8 of 8 queries are also in the bank" in line for line in lines_of(result.summary()))
    assert result.doubts()[-1].startswith("the loader gives images and labels without slides and patients")


def test_a_function_around_a_module_in_training_mode_is_the_first_doubt():
    norm = nn.Sequential(nn.BatchNorm2d(3), Linear(0)).train()
    with pytest.warns(UserWarning, match=r"function: the embedding of an image depends on .*call \.eval\(\)"):
        result = hsat.evaluate_robustness(
            {"function": norm.forward}, (pairs(24), pairs(8, seed=1)), norm="none", eps=8 / 255
        )
    assert "others of its batch" in result.doubts()[0]
    assert "others of its batch" in next(line for line in lines_of(result.summary()) if line.startswith("doubt"))


def test_images_of_several_sizes_are_flagged():
    data = (pairs(8), pairs(8, seed=1, side=24))
    result = hsat.evaluate_robustness(Linear(0), data, norm="none", eps=8 / 255)
    assert all("images of several sizes: 16 x 16, 24 x 24; resize them alike" in one.flags for one in result.records)


def test_a_broken_pixel_names_the_image():
    data = pairs(8, seed=1)
    data[1][0][2, 0, 3, 3] = float("nan")
    with pytest.raises(ValueError, match=r"images hold NaN or infinity before any attack: patch ids 6 \(1 values\)"):
        hsat.evaluate_robustness(Linear(0), (pairs(8), data), norm="none", eps=8 / 255)


class Counted:
    def __init__(self, batches):
        self.batches, self.items = batches, 0

    def __iter__(self):
        for batch in self.batches:
            self.items += 1
            yield batch


def test_the_bank_is_read_once_and_wrong_eps_before_anything():
    bank = Counted(pairs(24))
    hsat.evaluate_robustness(Linear(0), (bank, pairs(8, seed=1)), norm="none", eps="4/255")
    assert bank.items == 6
    for eps, words in ((8, r"eps: it must lie in \[0, 1\].*8/255"), ("x/255", "eps: write a fraction such as 8/255")):
        with pytest.raises(ValueError, match=words):
            hsat.evaluate_robustness(Linear(0), (bank, pairs(8, seed=1)), norm="none", eps=eps)
    assert bank.items == 6
    texts = hsat.evaluate_robustness(Linear(0), [pixels(4)], norm="none", eps="2/255, 4/255")
    assert texts.settings["eps"] == [2 / 255, 4 / 255]


def test_latex_levels_and_panels_can_be_chosen(folder, tmp_path):
    result = hsat.evaluate_robustness(Colours(), folder, eps=8 / 255, norm="none")
    text = result.to_latex(tmp_path / "t.tex", levels=("patch",), metrics=("accuracy",))
    assert (tmp_path / "t.tex").read_text() == text
    assert "Patch level (Acc, " in text.replace("\\", "") and "Slide level" not in text and "MCA" not in text
    figure = result.plot(levels=("patch",))
    assert [axes.get_title() for axes in figure.axes] == ["patch level"]
    axes = figure.axes[0]
    assert result.plot(axes=axes, levels=("patch",)) is figure
    html = next(iter(result.evaluations.values()))._repr_html_()
    assert "<table" in html and "ensemble-8" in html and result.table()._repr_html_() == result.table().to_html()


def test_logits_as_features_are_said():
    import timm

    whole = timm.create_model("resnet10t", num_classes=7)
    assert "the 7 logits of a classifier" in hsat.eval.inputs.open_encoder(whole, norm="none").note
    assert "logits" not in hsat.eval.inputs.open_encoder(whole.reset_classifier(0) or whole, norm="none").note
