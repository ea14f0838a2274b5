"""The bytes of a tensor, for digests."""

from __future__ import annotations

import torch
from torch import Tensor


def tensor_bytes(tensor: Tensor) -> bytes:
    """The values of a tensor, row by row, as they lie in memory; any shape, strides, dtype and device.

    The last axis is made for the view as bytes: torch wants a stride of 1 there, which `contiguous` does not promise
    (one number out of a column of a table is contiguous with the stride of its row).
    """
    return tensor.detach().cpu().reshape(-1).unsqueeze(-1).view(torch.uint8).numpy().tobytes()
