"""MIL around any module, gated attention by its equations, and the training of it."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from hsat.classifiers import ABMIL, MIL, GatedAttention, load_mil, predict_slides
from hsat.types import EmbeddingTable, SlideClassifier

FAST = ABMIL(hidden=16, epochs=15, learning_rate=3e-3)


class Mean(nn.Module):
    def __init__(self, shape=(3,)):
        super().__init__()
        self.linear, self.shape = nn.Linear(4, 3), shape

    def forward(self, bag):
        return self.linear(bag).mean(0).reshape(self.shape)


def slides(seed=0, *, patients=12, patches=6, signal=1, per_patient=2, width=5):
    """Slides in which `signal` patches carry the class and the others are noise."""
    rng = np.random.default_rng(seed)
    rows, label, slide, patient = [], [], [], []
    for number in range(patients * per_patient):
        own = (number // per_patient) % 2
        z = rng.normal(size=(patches, width)) + 3
        z[rng.permutation(patches)[:signal], 0] += 8 * (1 if own else -1)
        rows.append(z)
        label += [own] * patches
        slide += [100 - number] * patches
        patient += [number // per_patient] * patches
    index = np.arange(len(label))
    return EmbeddingTable(np.concatenate(rows), label, index, slide, patient, ("benign", "tumour"))


@pytest.mark.parametrize("shape", [(3,), (1, 3)])
def test_any_module_over_bags(shape):
    torch.manual_seed(0)
    mil = MIL(Mean(shape), ("a", "b", "c"))
    assert isinstance(mil, SlideClassifier) and mil.reads == "raw" and not mil.training
    assert mil.attention is None and mil.representation is None
    bag = torch.randn(6, 4, dtype=torch.float64)
    assert mil.logits(bag).shape == (3,) and mil.logits(bag).dtype == torch.float32
    torch.testing.assert_close(mil(bag.float()), mil.module.linear(bag.float()).mean(0))
    torch.testing.assert_close(mil.scores(bag).sum(), torch.ones((), dtype=torch.float64))
    assert "Mean" in repr(mil) and "\n" not in repr(mil)


def test_wrong_outputs_and_names_are_refused():
    with pytest.raises(ValueError, match=r"logits \(2,\) of one slide.*got \(3,\) for a bag \(6, 4\)"):
        MIL(Mean(), ("a", "b")).logits(torch.randn(6, 4))
    with pytest.raises(ValueError, match="got tuple"):
        MIL(nn.LSTM(4, 3), ("a", "b", "c")).logits(torch.randn(6, 4))
    for names in ((), "ab", ("a", "a")):
        with pytest.raises(ValueError, match="names that differ"):
            MIL(Mean(), names)


@pytest.mark.parametrize("gated", [True, False])
def test_attention_follows_its_equations(gated):
    torch.manual_seed(0)
    module = GatedAttention(4, 3, hidden=5, gated=gated).double().eval()
    module.mean.fill_(0.5)
    module.scale.fill_(2.0)
    bag = torch.randn(7, 4, dtype=torch.float64)
    h = (bag - 0.5) / 2
    energies = []
    for row in h:
        hidden = torch.tanh(module.value.weight @ row)
        if gated:
            hidden = hidden / (1 + torch.exp(-(module.gate.weight @ row)))
        energies.append((module.weight.weight[0] * hidden).sum())
    weights = torch.stack(energies).exp() / torch.stack(energies).exp().sum()
    torch.testing.assert_close(module.attention(bag), weights)
    pooled = (weights[:, None] * h).sum(0)
    torch.testing.assert_close(module.representation(bag), pooled)
    torch.testing.assert_close(module(bag), module.classify.weight @ pooled + module.classify.bias)
    order = torch.randperm(7)
    torch.testing.assert_close(module(bag[order]), module(bag))
    with pytest.raises(ValueError, match=r"bag must be \(n, 4\).*got \(7, 3\)"):
        module(bag[:, :3])


def test_training_finds_the_patches_that_tell():
    """One patch in six carries the class; the mean of all would drown in noise, attention does not."""
    fitted = FAST.fit(slides(0))
    fresh = slides(1)
    assert (predict_slides(fitted, fresh).argmax(1)[::-1] == [(n // 2) % 2 for n in range(24)]).mean() >= 0.95
    raw = fresh.raw()[:6]
    told = np.abs(raw[:, 0] - 3).argmax()
    assert int(fitted.attention(torch.from_numpy(raw)).argmax()) == told


def test_a_seed_gives_the_same_bytes_and_leaves_the_generator_alone(one_thread):
    table = slides(0, patients=4)
    before = torch.get_rng_state()
    first, again = FAST.fit(table), FAST.fit(table)
    assert torch.equal(torch.get_rng_state(), before)
    assert first.fingerprint() == again.fingerprint()
    assert first.fingerprint() != ABMIL(hidden=16, epochs=15, learning_rate=3e-3, seed=1).fit(table).fingerprint()
    with torch.no_grad():
        assert FAST.fit(table).fingerprint() == first.fingerprint()


def test_features_of_any_scale_and_a_few_patches_of_a_slide():
    table = slides(0)
    large = EmbeddingTable(1e4 * table.raw(), table.label, table.patch, table.slide, table.patient, table.class_names)
    np.testing.assert_allclose(
        predict_slides(FAST.fit(large), large), predict_slides(FAST.fit(table), table), atol=0.05
    )
    drawn = ABMIL(hidden=8, epochs=2, patches=3).fit(table)
    assert np.isfinite(predict_slides(drawn, table)).all()


def test_it_is_saved_and_loaded_without_pickle(tmp_path):
    table = slides(0, patients=4)
    for gated in (True, False):
        fitted = ABMIL(hidden=8, epochs=2, gated=gated).fit(table)
        path = fitted.save(tmp_path / "deep" / "mil.safetensors")
        loaded = load_mil(path)
        assert loaded.class_names == table.class_names and loaded.fingerprint() == fitted.fingerprint()
        np.testing.assert_array_equal(predict_slides(loaded, table), predict_slides(fitted, table))
    with pytest.raises(TypeError, match="Mean is a module of your own"):
        MIL(Mean(), ("a", "b", "c")).save(tmp_path / "no")
    (tmp_path / "text").write_text("no tensors")
    with pytest.raises(ValueError, match="text is not a slide classifier that hsat saved"):
        load_mil(tmp_path / "text")
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match="not a slide classifier"):
        load_mil(path)
    with pytest.raises(FileNotFoundError):
        load_mil(tmp_path / "absent")


@pytest.mark.parametrize(
    ("shape", "changes", "named"),
    [
        ((0, 10**6), {}, r"value\.weight is empty"),
        ((10**6, 0), {}, r"value\.weight is empty"),
        ((0, 10**12), {}, r"value\.weight is empty"),
        ((4, 5), {}, r"Error\(s\) in loading"),
        ((4,), {}, "not enough values"),
        ((2, 2), {"class_names": 5}, "class_names is no list of texts"),
        ((2, 2), {"class_names": "a" * 40_000}, "class_names is no list of texts"),
        ((2, 2), {"dropout": "x"}, "not supported between"),
    ],
)
def test_a_file_allocates_only_what_it_holds(tmp_path, shape, changes, named):
    about = {"format": "hsat attention MIL 1", "class_names": ["a", "b"], "dropout": 0.0, **changes}
    save_file({"value.weight": torch.zeros(shape)}, tmp_path / "mil", metadata={"hsat": json.dumps(about)})
    with pytest.raises(ValueError, match=f"mil is not a slide classifier that hsat saved: .*{named}"):
        load_mil(tmp_path / "mil")


@pytest.mark.parametrize(
    "options", [{"hidden": 0}, {"epochs": 1.5}, {"patches": 0}, {"learning_rate": 0}, {"dropout": 1.0}, {"seed": -1}]
)
def test_settings_out_of_range(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        ABMIL(**options)


def test_a_class_without_slides_is_named():
    table = slides(0, patients=2)
    wider = EmbeddingTable(table.raw(), table.label, table.patch, table.slide, table.patient, ("a", "b", "c"))
    with pytest.raises(ValueError, match="no slide to train on has the class 'c'"):
        FAST.fit(wider)
