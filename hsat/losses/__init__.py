"""Contrastive losses on embeddings and ids: SupCon, and HiDisc's three levels from one similarity matrix."""

from __future__ import annotations

from hsat.losses.gather import gather_with_grad
from hsat.losses.hidisc import HiDiscLoss, HiDiscTerms
from hsat.losses.supcon import supcon_loss

__all__ = ["HiDiscLoss", "HiDiscTerms", "gather_with_grad", "supcon_loss"]
