"""The size at which an evaluation sees patches, and the line that says it."""

from __future__ import annotations

import pytest
from PIL import Image

from hsat import build_encoder, save_encoder
from hsat.cli.image_size import say_image_size, settle_image_size
from hsat.cli.options import EvaluationDataSettings, StoredModelSettings
from hsat.data import read_folders, write_synthetic_cohort
from hsat.data.opensrh import read_opensrh

MODEL = StoredModelSettings()


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("encoder") / "free.safetensors"
    save_encoder(build_encoder("test_resnet", norm="none", seed=0), path)
    return path


@pytest.fixture
def make(tmp_path):
    def make(*sizes):
        for i, size in enumerate(sizes):
            path = tmp_path / f"root/{'ab'[i % 2]}/p{i}/s/1.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", size).save(path)
        return read_folders(tmp_path / "root")

    return make


def settle(cohort, file, model=MODEL, **options):
    data = EvaluationDataSettings(root=cohort.root, **options)
    return settle_image_size(data, cohort, [file], model).image_size


def test_patches_keep_their_size_where_nobody_says_another(make, file, capsys):
    cohort = make((40, 40), (40, 40))
    assert settle(cohort, file) == 40
    assert "patches at their own size, 40 x 40; --data.image_size sets another" in capsys.readouterr().err
    assert settle(cohort, file, image_size=300) == 300
    shown = capsys.readouterr().err
    assert shown == "note: patches of 40 x 40 pixels are resized to 300 x 300; --data.image_size 40 keeps them\n"
    assert settle(cohort, file, StoredModelSettings(input_size=64)) == 300
    assert settle(cohort, file, StoredModelSettings(image_size=64)) == 64


def test_the_size_of_training_and_that_of_a_fixed_encoder_go_first(make, file, tmp_path):
    cohort = make((40, 40), (40, 40))
    encoder = build_encoder("test_resnet", norm="none", seed=0)
    training = {"kind": "rgb", "image_size": 32, "patients": []}
    save_encoder(encoder, tmp_path / "trained.safetensors", metadata={"training": training})
    assert settle(cohort, tmp_path / "trained.safetensors") == 32
    save_encoder(build_encoder("test_vit", norm="none", seed=0), tmp_path / "vit.safetensors")
    assert settle(cohort, tmp_path / "vit.safetensors") == 160


def test_several_sizes_are_counted(make, file, capsys):
    cohort = make((40, 40), (40, 30), (40, 40), (300, 300))
    assert settle(cohort, file) == 300
    shown = capsys.readouterr().err
    assert "patches have 3 sizes (2 of 40 x 40, 1 of 30 x 40, 1 of 300 x 300); 3 of 4 are resized to 300 x 300" in shown


def test_oblong_patches_are_squeezed_and_srh_keeps_the_size_of_the_paper(make, file, tmp_path, capsys):
    assert settle(make((40, 30), (40, 30)), file) == 300
    assert "patches of 30 x 40 pixels are resized to 300 x 300; they are squeezed to squares" in capsys.readouterr().err
    srh = read_opensrh(write_synthetic_cohort(tmp_path / "srh", patients_per_class=2, patches=1))
    assert settle(srh, file) == 300


def test_nothing_is_said_where_nothing_is_resized(make, capsys):
    say_image_size(make((40, 40), (40, 40)), 40)
    assert capsys.readouterr().err == ""
