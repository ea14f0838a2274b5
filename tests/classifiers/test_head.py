"""A trained head as a classifier: it reads embeddings as the encoder gives them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from hsat.classifiers import Head
from hsat.types import Classifier, FittedClassifier


def linear(d=4, classes=3):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Linear(d, classes)


def test_a_head_is_a_classifier_of_raw_rows(table):
    head, rng = Head(linear(), ("a", "b", "c")), np.random.default_rng(0)
    z = 3 * rng.standard_normal((20, 4))
    raw = table(z, classes=3)
    assert isinstance(head, Classifier) and isinstance(head, FittedClassifier)
    assert head.fit(raw) is head and head.reads == "raw" and head.classes_with_rows == 3
    expected = torch.softmax(head.module(torch.from_numpy(z).float()).double(), 1).detach().numpy()
    np.testing.assert_allclose(head.predict_proba(z), expected, atol=1e-6)
    np.testing.assert_allclose(head.predict_proba(raw), expected, atol=1e-5)
    np.testing.assert_array_equal(head.predict(z), expected.argmax(1))
    unit = table(z / np.linalg.norm(z, axis=1, keepdims=True), classes=3)
    with pytest.raises(ValueError, match="does not know their lengths"):
        head.predict_proba(unit)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_logits_take_any_dtype(dtype):
    head, z = Head(linear(), ("a", "b", "c")), torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    logits = head.logits(z.requires_grad_())
    assert logits.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.autograd.grad(logits.sum(), z)[0].dtype == dtype
    assert torch.equal(logits.argmax(1), head.scores(z).argmax(1))
    assert torch.equal(head(z), logits)


def test_scores_that_round_to_a_tie_keep_the_winner():
    class Near(nn.Module):
        def forward(self, z):
            return torch.tensor([[1e-30, 2e-30, 0.0]]).expand(len(z), 3)

    head = Head(Near(), ("a", "b", "c"))
    assert head.predict(np.zeros((2, 4))).tolist() == [1, 1]
    assert head.logits(torch.zeros(2, 4)).argmax(1).tolist() == [1, 1]


def test_the_module_is_in_evaluation_mode_and_shared():
    module = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5))
    head = Head(module, ("a", "b", "c"))
    assert (
        not module.training
        and head.module is module
        and list(head.state_dict()) == ["module.0.weight", "module.0.bias"]
    )
    head.train()
    assert module.training


def test_what_is_no_head_is_refused(table):
    with pytest.raises(ValueError, match=r"logits \(2, 2\), one per class; got \(2, 3\)"):
        Head(linear(), ("a", "b")).logits(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="got tuple"):
        Head(type("Pair", (nn.Module,), {"forward": lambda self, z: (z, z)})(), ("a", "b")).logits(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="class_names must be names that differ"):
        Head(linear(), ("a", "a", "b"))
    with pytest.raises(ValueError, match=r"the head has classes \('a', 'b', 'c'\), the bank \('a', 'b'\)"):
        Head(linear(), ("a", "b", "c")).fit(table(np.eye(4), classes=2))
