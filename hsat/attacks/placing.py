"""Small tensors brought to where the images are, without a wait on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor


def beside(t: Tensor, images: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """`t` on the device of the images, in `dtype` (None: its own).

    From the CPU to CUDA it goes through page-locked memory, so that neither the host nor the queued work waits.
    """
    if dtype is not None and t.device.type == "cpu":
        t = t.to(dtype)  # here, since a copy that converts on its way would leave page-locked memory
    if images.is_cuda and t.device.type == "cpu":
        t = t.pin_memory()
    return t.to(images.device, dtype, non_blocking=images.is_cuda)
