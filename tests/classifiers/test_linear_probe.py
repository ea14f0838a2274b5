"""The linear probe, against scikit-learn; its files, also those that nobody should trust."""

from __future__ import annotations

import dataclasses
import json
import pickle
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from hsat.classifiers import DecisionModel, LinearProbe, fit_classifiers, load_linear_probe
from hsat.types import Classifier, EmbeddingTable, FittedClassifier


def problem(table, seed=0, *, n=60, d=6, classes=3, constant=0, dominant=0.0):
    """A bank and queries of any length; `constant` columns of zeros, `dominant` share of the rows in class 0."""
    rng = np.random.default_rng(seed)
    label = np.concatenate((np.arange(classes), rng.integers(0, classes, n - classes)))
    label[classes:][rng.random(n - classes) < dominant] = 0
    z = rng.standard_normal((classes, d))[label] + rng.standard_normal((n, d))
    queries = 5 * rng.standard_normal((20, d))
    z[:, :constant] = queries[:, :constant] = 0
    return table(z, label, classes=classes), torch.from_numpy(queries)


def peer(bank, C):
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(C=C, max_iter=1000))
    return pipeline.fit(bank.z.astype(np.float64), bank.label)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31 - 1),
    classes=st.sampled_from([2, 3, 7]),
    C=st.sampled_from([0.01, 1.0, 100.0]),
    constant=st.integers(0, 2),
    dominant=st.sampled_from([0.0, 0.8]),
    d=st.integers(3, 40),
)
def test_probabilities_are_those_of_scikit_learn(table, seed, classes, C, constant, dominant, d):
    bank, z = problem(table, seed, d=d, classes=classes, constant=constant, dominant=dominant)
    fitted, expected = LinearProbe(C=C).fit(bank), peer(bank, C)
    unit = torch.nn.functional.normalize(z, dim=1).numpy()
    np.testing.assert_allclose(fitted.predict_proba(z), expected.predict_proba(unit), atol=1e-6)
    np.testing.assert_allclose(fitted.predict_proba(bank), expected.predict_proba(bank.z.astype(float)), atol=1e-6)
    np.testing.assert_array_equal(fitted.predict(z), expected.predict(unit))
    logits = fitted.logits(z)
    assert logits.shape == (20, classes) and fitted.converged and fitted.iterations == expected[-1].n_iter_.max()
    function = expected.decision_function(unit)
    if classes == 2:
        np.testing.assert_allclose(logits[:, 1] - logits[:, 0], function, atol=1e-9)
    else:
        np.testing.assert_allclose(logits, function, atol=1e-9)


def test_the_default_is_scikit_learns_own(table):
    bank, z = problem(table, 3, n=200, d=32, classes=7)
    rows = bank.raw().astype(np.float64)  # normalised in float64, as a user would, and not rounded to float32 after it
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    expected = make_pipeline(StandardScaler(), LogisticRegression(C=1.0)).fit(rows, bank.label)
    unit = torch.nn.functional.normalize(z, dim=1).numpy()
    np.testing.assert_allclose(LinearProbe().fit(bank).predict_proba(z), expected.predict_proba(unit), atol=1e-6)


def test_it_is_a_classifier_of_unit_rows(table):
    bank, z = problem(table, classes=2)
    fitted = LinearProbe().fit(bank)
    assert isinstance(LinearProbe(), Classifier) and isinstance(fitted, FittedClassifier)
    assert fitted.reads == "unit" and fitted.classes_with_rows == 2 and fitted.class_names == ("a", "b")
    np.testing.assert_allclose(fitted.logits(7 * z), fitted.logits(z), atol=1e-12)
    np.testing.assert_allclose(fitted.predict_proba(z), torch.softmax(fitted.logits(z), 1), atol=1e-12)
    many = torch.cat([z] * 200)  # several blocks
    assert (fitted.predict_proba(many)[::20] == fitted.predict_proba(z[:1])).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("classes", [2, 3])
def test_logits_and_scores_decide_alike(table, dtype, classes):
    bank, z = problem(table, 1, classes=classes)
    fitted = LinearProbe().fit(bank)
    z = torch.cat((z, torch.zeros(2, 6))).to(dtype).requires_grad_()
    logits, scores = fitted.logits(z), fitted.scores(z)
    assert logits.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert logits.argmax(1).tolist() == scores.argmax(1).tolist() == fitted.predict(z).tolist()
    (grad,) = torch.autograd.grad(logits[:, 0].sum(), z)
    assert grad.dtype == dtype and grad.isfinite().all() and (grad[:-2] != 0).any(1).all()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(fitted.logits(z), logits)


def test_ties_go_to_the_lower_class(table):
    bank, z = problem(table, classes=2)
    fitted = LinearProbe().fit(bank)
    tied = dataclasses.replace(fitted, weight=torch.zeros(2, 6).double(), bias=torch.zeros(2).double())
    assert not tied.logits(z).argmax(1).any() and not tied.predict(z).any() and not tied.scores(z).argmax(1).any()


@pytest.mark.parametrize("classes", [2, 4])
def test_gradients(table, classes):
    bank, z = problem(table, 2, classes=classes)
    fitted = LinearProbe(C=0.1).fit(bank)
    assert torch.autograd.gradcheck(fitted.logits, (z[:4].requires_grad_(),))
    assert torch.autograd.gradcheck(fitted.scores, (z[:4].requires_grad_(),))


def test_to_a_device_and_into_a_module(table):
    bank, z = problem(table)
    fitted = LinearProbe().fit(bank)
    assert fitted.device.type == "cpu" and torch.equal(fitted.to("cpu").logits(z), fitted.logits(z))
    meta = fitted.to("meta")
    assert {tensor.device.type for tensor in meta.tensors().values()} == {"meta"} and meta.device.type == "meta"
    encoder = torch.nn.Flatten()
    model = DecisionModel(encoder, fitted)
    assert {name for name, _ in model.named_buffers()} >= {"bank_mean", "bank_scale", "bank_weight", "bank_bias"}
    assert model.half().fitted.weight.dtype == torch.float64
    assert torch.equal(model(z.view(20, 6, 1, 1)), fitted.logits(z))


def test_a_bank_on_disk_and_several_classifiers(table, tmp_path):
    bank, z = problem(table)
    fitted = LinearProbe().fit(bank)
    mapped = EmbeddingTable.load(bank.save(tmp_path / "bank"), memory_map=True)
    assert torch.equal(LinearProbe().fit(mapped).logits(z), fitted.logits(z))
    soft, hard = fit_classifiers([LinearProbe(C=0.01), LinearProbe()], bank)
    assert torch.equal(hard.logits(z), fitted.logits(z)) and not torch.equal(soft.logits(z), fitted.logits(z))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_queries_that_are_not_finite_are_refused_as_knn_does(table, value):
    fitted = LinearProbe().fit(problem(table)[0])
    queries = np.ones((1200, fitted.tensors()["weight"].shape[-1]))
    queries[1100, 2] = value
    for ask in (fitted.predict, fitted.predict_proba, lambda rows: fitted.logits(torch.from_numpy(rows))):
        with pytest.raises(ValueError, match="queries are not finite, first in row 1100"):
            ask(queries)


def test_what_cannot_be_fitted_is_refused(table):
    bank, z = problem(table)
    with pytest.raises(ValueError, match=r"no row of \['too'\].*never seen"):
        LinearProbe().fit(table(bank.z, bank.label, class_names=(*bank.class_names, "too")))
    with pytest.raises(ValueError, match=r"tells classes apart, and the bank has only \['a'\]"):
        LinearProbe().fit(table(bank.z))
    with pytest.raises(ValueError, match="the bank is empty"):
        LinearProbe().fit(table(np.zeros((0, 4)), classes=2))
    with pytest.raises(TypeError, match="must be an EmbeddingTable"):
        LinearProbe().fit(bank.z)
    with pytest.raises(ValueError, match=r"embeddings must be \(n, 6\) as the bank's are, got \(20, 5\)"):
        LinearProbe().fit(bank).logits(z[:, :5])
    with pytest.raises(ValueError, match=r"\['never seen'\] that the bank does not know"):
        LinearProbe().fit(bank).predict(table(z, class_names=("never seen",)))
    for wrong in (0, -1, float("inf"), float("nan"), True, "1"):
        with pytest.raises(ValueError, match="C must be above 0 and finite"):
            LinearProbe(C=wrong)
    for wrong in (0, 1.5, True):
        with pytest.raises(ValueError, match="max_iter must be a whole number"):
            LinearProbe(max_iter=wrong)


def test_a_fit_that_did_not_converge_says_so(table):
    bank, _ = problem(table)
    with pytest.warns(UserWarning, match=r"LinearProbe\(C=1.0, max_iter=2\) did not converge in 2 steps on 60 rows"):
        fitted = LinearProbe(max_iter=2).fit(bank)
    assert not fitted.converged and fitted.iterations == 2


def test_import_hsat_does_not_load_scikit_learn():
    code = "import sys, hsat; hsat.LinearProbe(C=2.0); print('sklearn' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.slow
def test_threads_do_not_change_the_fit(tmp_path):
    code = (
        "import sys, numpy as np; from hsat import EmbeddingTable, LinearProbe\n"
        "r = np.random.default_rng(0); n = np.arange(500); y = n % 7\n"
        "t = EmbeddingTable(r.standard_normal((500, 512)), y, n, n, n, class_names=tuple('abcdefg'))\n"
        "LinearProbe().fit(t).save(sys.argv[1])"
    )
    files = [tmp_path / "1", tmp_path / "2"]
    for file in files:
        subprocess.run(
            [sys.executable, "-c", code, file],
            check=True,
            env={"OMP_NUM_THREADS": file.name, "OPENBLAS_NUM_THREADS": file.name, "PYTHONPATH": ":".join(sys.path)},
        )
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.fixture
def saved(table, tmp_path):
    fitted = LinearProbe(C=0.5, max_iter=300).fit(problem(table)[0])
    return fitted, fitted.save(tmp_path / "folder" / "probe.safetensors")


def test_save_and_load(saved, table):
    fitted, path = saved
    again, (bank, z) = load_linear_probe(path), problem(table)
    assert again.settings == fitted.settings and again.class_names == fitted.class_names
    assert again.iterations == fitted.iterations and again.converged
    assert torch.equal(again.logits(z), fitted.logits(z))
    assert np.array_equal(again.predict_proba(bank), fitted.predict_proba(bank))
    content = path.read_bytes()
    assert again.save(path).read_bytes() == content


def about(path) -> dict:
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["hsat"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shell": "rm"}, "unknown entries 'shell'"),
        ({"C": None}, "entries .'C'. are missing"),
        ({"C": 0}, "C must be above 0"),
        ({"C": True}, "C is True"),
        ({"C": "1"}, "C is '1'"),
        ({"max_iter": 2.0}, "max_iter 2.0"),
        ({"max_iter": 0}, "max_iter must be a whole number"),
        ({"iterations": -1}, "iterations is -1"),
        ({"converged": 1}, "converged 1"),
        ({"class_names": "abc"}, "class_names is 'abc'"),
        ({"class_names": ["a"]}, "class_names is a list of 1"),
        ({"class_names": ["a", "b", 3]}, "class_names is a list of 3"),
        ({"class_names": ["a", "b", "b"]}, "class_names come twice"),
        ({"class_names": ["a", "b", "c" * 300]}, "class_names is a list of 3"),
        ({"class_names": ["a", "b"]}, r"weight is torch.float64 \(3, 6\); float64 \(2, 6\) was wanted"),
        ({"classifier": "Head"}, "holds no linear probe"),
    ],
)
def test_settings_of_hostile_files_are_refused(saved, change, message):
    _, path = saved
    content = {key: value for key, value in (about(path) | change).items() if value is not None}
    save_file(load_file(path), path, metadata={"hsat": json.dumps(content)})
    with pytest.raises(ValueError, match=message) as caught:
        load_linear_probe(path)
    assert path.name in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("mean", torch.zeros(5, dtype=torch.float64), "float64 .5,. was wanted"),
        ("mean", torch.zeros(6), "mean is torch.float32"),
        ("mean", torch.zeros(6, 1, dtype=torch.float64), "was wanted"),
        ("scale", torch.zeros(6, dtype=torch.float64), "not above 0"),
        ("scale", torch.full((6,), torch.nan, dtype=torch.float64), "scale holds values that are not finite"),
        ("bias", torch.full((3,), torch.inf, dtype=torch.float64), "bias holds values that are not finite"),
        ("weight", torch.zeros(3, 7, dtype=torch.float64), "weight is"),
        ("more", torch.zeros(3), "holds the tensors 'bias', 'mean', 'more', 'scale', 'weight'"),
        ("bias", None, "holds the tensors 'mean', 'scale', 'weight'"),
    ],
)
def test_tensors_of_hostile_files_are_refused(saved, name, value, message):
    _, path = saved
    state, text = load_file(path) | {name: value}, json.dumps(about(path))
    save_file({key: tensor for key, tensor in state.items() if tensor is not None}, path, metadata={"hsat": text})
    with pytest.raises(ValueError, match=message):
        load_linear_probe(path)


def test_other_files_are_refused(saved, tmp_path):
    _, path = saved
    content, other = path.read_bytes(), tmp_path / "other"
    with pytest.raises(FileNotFoundError, match="there is no linear probe at"):
        load_linear_probe(other)
    with pytest.raises(ValueError, match="is a folder; give the linear probe in it"):
        load_linear_probe(tmp_path)
    save_file(load_file(path), other)
    with pytest.raises(ValueError, match="hsat did not write"):
        load_linear_probe(other)
    cases = [b"", b"<html>", content[:20], content[:-8], content + b"0" * 8, pickle.dumps({"mean": 1})]
    for case in (*cases, struct.pack("<Q", 1 << 60) + content[8:]):
        other.write_bytes(case)
        with pytest.raises(ValueError, match="other"):
            load_linear_probe(other)
    for position in range(8, 120):  # a byte of the header changed: refused, or read as what it says
        damaged = bytearray(content)
        damaged[position] ^= 0x21
        other.write_bytes(bytes(damaged))
        try:
            load_linear_probe(other)
        except ValueError as error:
            assert str(other) in str(error)
