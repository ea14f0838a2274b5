from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hsat.data import srh_to_rgb

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "data.npz")


@pytest.mark.parametrize("name", ["image", "image_lo"])
def test_equals_the_published_transform_bit_for_bit(name: str) -> None:
    raw = torch.from_numpy(GOLDEN[f"{name}_u16"].astype(np.float32)) / 65536
    assert srh_to_rgb(raw).numpy().tobytes() == GOLDEN[f"{name}/base"].tobytes()


@settings(max_examples=50, deadline=None)
@given(ch2=st.integers(0, 65535), ch3=st.integers(0, 65535))
def test_one_pixel_by_integer_arithmetic(ch2: int, ch3: int) -> None:
    raw = torch.tensor([ch2, ch3], dtype=torch.float64).reshape(2, 1, 1) / 65536
    wanted = [min(max(ch3 - ch2 + 5000, 0), 65536) / 65536, ch2 / 65536, ch3 / 65536]
    assert srh_to_rgb(raw).flatten().tolist() == wanted


def test_any_leading_dimensions_and_dtype() -> None:
    raw = torch.rand(3, 4, 2, 5, 6, dtype=torch.float64)
    rgb = srh_to_rgb(raw)
    assert rgb.shape == (3, 4, 3, 5, 6) and rgb.dtype == torch.float64
    assert torch.equal(rgb[1, 2], srh_to_rgb(raw[1, 2]))


def test_gradient_carries_the_derived_channel_to_both_raw_channels() -> None:
    raw = torch.full((2, 1, 1), 0.3, requires_grad=True)
    weights = torch.tensor([5.0, 7.0, 11.0]).reshape(3, 1, 1)
    (grad,) = torch.autograd.grad((srh_to_rgb(raw) * weights).sum(), raw)
    assert grad.flatten().tolist() == [7.0 - 5.0, 11.0 + 5.0]


def test_gradcheck() -> None:
    raw = (torch.rand(2, 3, 3, generator=torch.Generator().manual_seed(0)) * 0.05 + 0.4).double().requires_grad_()
    assert torch.autograd.gradcheck(srh_to_rgb, (raw,))


def test_integers_are_refused() -> None:
    with pytest.raises(TypeError, match=r"floats in \[0, 1\), got torch\.int32; divide 16-bit counts by 65536"):
        srh_to_rgb(torch.zeros(2, 4, 4, dtype=torch.int32))


def test_arrays_are_refused() -> None:
    with pytest.raises(TypeError, match=r"must be a tensor, got ndarray.*torch\.from_numpy"):
        srh_to_rgb(np.zeros((2, 4, 4), np.float32))  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(3, 4, 4), (4, 4, 2), (2, 4)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"must be \(\.\.\., 2, h, w\)"):
        srh_to_rgb(torch.zeros(shape))
