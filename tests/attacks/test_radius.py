"""The size of a ball as text and as a number."""

from __future__ import annotations

import pytest
import torch

from hsat.attacks.radius import eps_text, eps_value


@pytest.mark.parametrize(
    ("eps", "text"),
    [
        (8 / 255, "8/255"),
        (4 / 255, "4/255"),
        (1.0, "1"),
        (0.0, "0"),
        (0.5, "0.5"),
        (0.01, "0.01"),
        (0.0123456, "0.0123456"),
        (torch.tensor([8 / 255]), "8/255"),
        (torch.tensor([4 / 255, 8 / 255]), "4/255..8/255"),
    ],
)
def test_eps_as_text(eps, text):
    assert eps_text(eps) == text


def test_eps_as_a_number():
    assert eps_value(torch.tensor([0.1, 0.25])) == 0.25
    assert eps_value(0.5) == 0.5


def test_eps_of_a_float32_tensor_reads_as_the_float_does():
    for eps in (0.1, 0.2, 0.4, 8 / 255, 51 / 255, 0.05):
        assert eps_text(torch.tensor([eps])) == eps_text(eps)
    assert eps_text(torch.tensor([0.1, 0.2])) == "0.1..0.2"
