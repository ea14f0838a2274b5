"""What an evaluation leaves behind, and the map of it."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hsat.eval import Provenance
from hsat.eval.artifact_files import ArtifactSource, explained_displacement, fit_plane, write_artifacts
from hsat.report import artifacts, read_artifacts
from hsat.report.artifacts import missing_pictures, picture_number


@pytest.fixture
def parts(table):
    rng = np.random.default_rng(0)
    label = np.arange(10) % 2
    z = rng.standard_normal((10, 5))
    ids = {"slide": np.arange(10) // 2 * 2 + label, "patient": label}
    tables = {
        "clean": table(z, label, **ids),
        "PGD-8": table(z + 0.3 * rng.standard_normal((10, 5)), label, **ids),
    }
    right, wrong = np.eye(2)[label], np.eye(2)[1 - label]
    scores = {"clean": {5: right, 3: right}, "PGD-8": {5: wrong, 3: right}}
    images = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 0.5 + 0.25
    moved = images.clone()
    moved[0, 0, 1, 2] += 8 / 255
    examples = {"clean": images, "PGD-8": moved}
    return {"tables": tables, "scores": scores, "class_names": ("a", "b"), "examples": examples}


def write(folder, parts, model="mine", **options):
    provenance = Provenance(model=model, checkpoint=options.pop("checkpoint", ""))
    return write_artifacts(folder, ArtifactSource(**parts), provenance=provenance, **options)


def test_everything_comes_back(tmp_path, parts):
    place = write(tmp_path, parts, target="features", checkpoint="abc", map_rows=4)
    (found,) = read_artifacts(tmp_path)
    assert place == tmp_path / "mine"
    assert (found.model, found.target, found.checkpoint, found.class_names) == ("mine", "features", "abc", ("a", "b"))
    clean, attacked = found.conditions["clean"], found.conditions["PGD-8"]
    label = parts["tables"]["clean"].label
    assert np.array_equal(attacked.label["patch"], label)
    assert np.array_equal(attacked.prediction["patch", 5], 1 - label)
    assert np.array_equal(attacked.prediction["patch", 3], label)
    assert len(attacked.prediction["slide", 5]) == len(np.unique(parts["tables"]["clean"].slide))
    assert np.array_equal(attacked.prediction["patient", 5], [1, 0])
    rows = [0, 3, 6, 9]
    assert np.array_equal(clean.place_label, label[rows])
    plane = fit_plane(parts["tables"]["clean"].z)
    np.testing.assert_allclose(attacked.places, plane.project(parts["tables"]["PGD-8"].z)[rows], atol=1e-6)
    assert found.variance == pytest.approx(tuple(plane.variance))
    assert clean.movement is None and 0 < attacked.movement < 1
    assert len(clean.patches) == len(attacked.patches) == len(attacked.perturbations) == 2
    assert clean.perturbations == ()


def test_pictures_hold_the_images_and_what_was_added(tmp_path, parts):
    write(tmp_path, parts)
    attacked = read_artifacts(tmp_path)[0].conditions["PGD-8"]
    assert attacked.scale == pytest.approx(0.5 / (8 / 255), rel=1e-5)
    shown = np.asarray(Image.open(attacked.patches[1]), dtype=float)
    expected = (parts["examples"]["PGD-8"][1] * 255).round().permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(shown, expected)
    added = np.asarray(Image.open(attacked.perturbations[0]), dtype=int)
    assert added[1, 2, 0] == 255
    added[1, 2, 0] = 128
    assert set(np.unique(added)) == {128}


def test_pictures_know_their_rows(tmp_path, parts):
    write(tmp_path, parts | {"example_rows": (1, 8)})
    assert read_artifacts(tmp_path)[0].conditions["PGD-8"].patch_rows == (1, 8)
    write(tmp_path, parts)
    assert read_artifacts(tmp_path)[0].conditions["clean"].patch_rows == (0, 1)
    with pytest.raises(ValueError, match=r"example_rows \[3, 10\] do not name 2 rows of a table of 10"):
        write(tmp_path, parts | {"example_rows": (3, 10)})


def test_two_channel_images_are_shown_by_their_mean(tmp_path, parts):
    parts["examples"] = {name: images[:, :2] for name, images in parts["examples"].items()}
    write(tmp_path, parts)
    shown = np.asarray(Image.open(read_artifacts(tmp_path)[0].conditions["clean"].patches[0]), dtype=float)
    np.testing.assert_allclose(shown[..., 0], parts["examples"]["clean"][0].mean(0) * 255, atol=0.51)


def test_same_bytes_and_replaced_as_a_whole(tmp_path, parts):
    write(tmp_path / "a", parts)
    write(tmp_path / "b", parts)
    files = sorted(path.name for path in (tmp_path / "a" / "mine").iterdir())
    for name in files:
        assert (tmp_path / "a" / "mine" / name).read_bytes() == (tmp_path / "b" / "mine" / name).read_bytes()
    write(tmp_path / "a", parts | {"examples": {}})
    assert not list((tmp_path / "a").rglob("*.png"))
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["mine"]


def test_a_failure_leaves_the_old_artifacts(tmp_path, parts):
    write(tmp_path, parts)
    with pytest.raises(KeyError):
        write(tmp_path, parts | {"scores": {"clean": parts["scores"]["clean"]}})
    assert set(read_artifacts(tmp_path)[0].conditions) == {"clean", "PGD-8"}
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_any_name_of_a_model_stays_inside(tmp_path, parts):
    names = ["../out", "/etc/x", "..", "", "a/b", "a_b", "a b", "<script>", "x" * 200, "über"]
    for name in names:
        write(tmp_path / "evidence", parts, name)
    assert sorted(each.model for each in read_artifacts(tmp_path / "evidence")) == sorted(names)
    assert [path.name for path in tmp_path.iterdir()] == ["evidence"]


def test_conditions_of_any_name(tmp_path, parts):
    for mapping in ("tables", "scores", "examples"):
        parts[mapping]["L2: 0.5/../x"] = parts[mapping].pop("PGD-8")
    write(tmp_path, parts)
    (found,) = read_artifacts(tmp_path)
    assert len(found.conditions["L2: 0.5/../x"].patches) == 2


def test_what_does_not_fit_is_refused(tmp_path, parts, table):
    with pytest.raises(ValueError, match="do not hold 'clean'"):
        write(tmp_path, parts | {"tables": {"PGD-8": parts["tables"]["PGD-8"]}}, "m")
    shorter = {"clean": parts["tables"]["clean"], "PGD-8": table(np.eye(3), [0, 1, 0])}
    with pytest.raises(ValueError, match="'PGD-8' holds other patches"):
        write(tmp_path, parts | {"tables": shorter}, "m")
    assert not list(tmp_path.glob("m"))


def test_no_folder_is_nothing(tmp_path):
    assert read_artifacts(tmp_path / "none") == ()


def spoilt_json(folder: Path) -> None:
    (folder / "about.json").write_text("{")


def without_variance(folder: Path) -> None:
    (folder / "about.json").write_text('{"model": "m"}')


def half_a_file(folder: Path) -> None:
    path = folder / "PGD-8.npz"
    path.write_bytes(path.read_bytes()[:300])


def pickled(folder: Path) -> None:
    np.savez(folder / "PGD-8.npz", name=np.array([{"a": 1}], dtype=object))


def link_out(folder: Path) -> None:
    (folder / "PGD-8.npz").unlink()
    outside = folder.parents[1] / "outside.npz"
    np.savez(outside, name=np.str_("x"))
    os.symlink(outside, folder / "PGD-8.npz")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoilt_json, "about.json: not JSON"),
        (without_variance, "about.json: .* Field required"),
        (half_a_file, r"PGD-8.npz: damaged"),
        (pickled, r"PGD-8.npz: damaged"),
        (link_out, "leads out of"),
    ],
)
def test_damaged_artifacts_is_named(tmp_path, parts, spoil, message):
    spoil(write(tmp_path / "run" / "evidence", parts, "m"))
    with pytest.raises(ValueError, match=message):
        read_artifacts(tmp_path / "run" / "evidence")


@settings(max_examples=15, deadline=None)
@given(n=st.integers(1, 9), d=st.integers(1, 9), seed=st.integers(0, 99))
def test_axes_are_those_of_the_singular_value_decomposition(n, d, seed):
    z = np.random.default_rng(seed).standard_normal((n, d))
    plane = fit_plane(z)
    value, axes = np.linalg.svd(z - z.mean(0), full_matrices=False)[1:]
    total = float((value**2).sum())
    for i in range(2):
        share = value[i] ** 2 / total if i < len(value) and total > 1e-18 else 0.0
        assert plane.variance[i] == pytest.approx(share, abs=1e-9)
        if plane.variance[i] > 1e-6:
            assert abs(plane.axes[i] @ axes[i]) == pytest.approx(1, abs=1e-5)
            assert plane.axes[i][np.abs(plane.axes[i]).argmax()] > 0
    np.testing.assert_allclose(plane.project(z).sum(0), 0, atol=1e-9)


def test_explained_displacement_by_hand():
    plane = fit_plane(np.array([[2.0, 0, 0], [-2, 0, 0], [0, 1, 0], [0, -1, 0]]))
    np.testing.assert_allclose(plane.axes, [[1, 0, 0], [0, 1, 0]], atol=1e-12)
    np.testing.assert_allclose(plane.variance, [0.8, 0.2])
    before = np.zeros((2, 3))
    assert explained_displacement(plane, before, np.array([[3.0, 0, 4], [0, 0, 0]])) == pytest.approx(9 / 25)
    assert np.isnan(explained_displacement(plane, before, before))


def test_no_rows_have_no_map():
    with pytest.raises(ValueError, match=r"got shape \(0, 3\)"):
        fit_plane(np.zeros((0, 3)))


def test_pictures_are_told_by_their_numbers(tmp_path, parts):
    write(tmp_path, parts)
    (found,) = read_artifacts(tmp_path)
    assert missing_pictures(found) == []
    for name in ("clean-000.png", "PGD-8-001-perturbation.png"):
        (tmp_path / "mine" / name).unlink()
    (found,) = read_artifacts(tmp_path)
    assert missing_pictures(found) == ["PGD-8-001-perturbation.png", "clean-000.png"]
    assert found.conditions["clean"].patch_rows == (0, 1)
    assert list(map(picture_number, found.conditions["clean"].patches)) == [1]


def test_the_arrays_of_a_folder_are_bounded_together(tmp_path, parts, monkeypatch):
    for model in ("a", "b"):
        write(tmp_path, parts, model)
    monkeypatch.setattr(artifacts, "MOST_BYTES", 1000)
    with pytest.raises(ValueError, match=r"b.PGD-8\.npz: with it, the arrays of evidence have more than 1000 bytes"):
        read_artifacts(tmp_path)
