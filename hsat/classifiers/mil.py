"""Multiple-instance learning: any module over bags as a slide classifier, and attention pooling with its training."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hsat.classifiers.bags import SlideBag, bags_of, softmax_scores
from hsat.classifiers.base import check_bank
from hsat.files import write_file
from hsat.fingerprints import fingerprint_state
from hsat.tensor_files import check_safetensors_header
from hsat.types import EmbeddingTable
from hsat.untrusted import open_regular, strict_json

FORMAT = "hsat attention MIL 1"
BagFunction = Callable[[Tensor], Tensor]


class MIL(nn.Module):
    """Any module from a bag of embeddings to logits as a slide classifier.

    Where the module has methods `attention(bag)` -> (n,) and `representation(bag)` -> (e,), attacks can choose patches
    by the one and move the other.  The module is put into evaluation mode and keeps its parameters; it is held and not
    copied.

    Args:
        module: Embeddings (n, d) of one slide's patches, as the encoder gives them -> logits (classes,), or
            (1, classes).
        class_names: The classes, in the order of the logits.

    Attributes:
        module: The module.
        class_names: The classes.

    Raises:
        ValueError: If names are missing or come twice.

    Example:
        >>> class Sum(nn.Module):
        ...     def forward(self, bag):
        ...         return bag.sum(0)
        >>> MIL(Sum(), ("hgg", "normal")).logits(torch.tensor([[1.0, 0.0], [0.5, 2.0]]))
        tensor([1.5000, 2.0000])
    """

    def __init__(self, module: nn.Module, class_names: Sequence[str]) -> None:
        super().__init__()
        if isinstance(class_names, str) or not class_names or len(set(class_names)) < len(class_names):
            raise ValueError(f"class_names must be names that differ, got {class_names!r}")
        self.module = module
        self.class_names = tuple(class_names)
        self.eval()

    def __repr__(self) -> str:
        about = repr(self.module)
        return f"MIL({about if chr(10) not in about else type(self.module).__name__}, classes={len(self.class_names)})"

    @property
    def reads(self) -> Literal["unit", "raw"]:
        """Embeddings as the encoder gives them."""
        return "raw"

    @property
    def attention(self) -> BagFunction | None:
        """The module's function from a bag to the weights of its patches; None where it has none."""
        return getattr(self.module, "attention", None)

    @property
    def representation(self) -> BagFunction | None:
        """The module's function from a bag to what stands for the slide; None where it has none."""
        return getattr(self.module, "representation", None)

    def logits(self, bag: Tensor) -> Tensor:
        """Logits of the module.

        Args:
            bag: (n, d) embeddings of one slide's patches, on the module's device.

        Returns:
            (classes,), float32 or wider.

        Raises:
            ValueError: If the module gives another shape, naming both.
        """
        weight = next((p for p in self.parameters() if p.dtype.is_floating_point), None)
        logits: Any = self.module(bag if weight is None else bag.to(weight.dtype))
        shape, classes = tuple(logits.shape) if isinstance(logits, Tensor) else None, len(self.class_names)
        if shape not in ((classes,), (1, classes)):
            raise ValueError(
                f"the module must give the logits ({classes},) of one slide, one per class {self.class_names};"
                f" got {type(logits).__name__ if shape is None else shape} for a bag {tuple(bag.shape)}"
            )
        flat: Tensor = logits.reshape(classes)
        return flat.to(torch.promote_types(flat.dtype, torch.float32))

    def forward(self, bag: Tensor) -> Tensor:
        """The logits; see `logits`.

        Args:
            bag: (n, d) embeddings of one slide's patches.

        Returns:
            (classes,).
        """
        return self.logits(bag)

    def scores(self, bag: Tensor) -> Tensor:
        """Softmax of the logits.

        Args:
            bag: (n, d) embeddings of one slide's patches.

        Returns:
            (classes,) float64 (float32 on devices without it) that sum to one; the highest is the decision.
        """
        return softmax_scores(self.logits(bag))

    def fingerprint(self) -> str:
        """SHA-256, as hex, of weights, names and structure."""
        return fingerprint_state(self.module, prefix=f"{self.module!r} {self.class_names}")

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write an attention pooling of hsat's as one safetensors file, whole or not at all.

        Args:
            path: The file to write.

        Returns:
            The path.

        Raises:
            TypeError: For a module of your own: save its state_dict, and wrap it again after loading.
        """
        from safetensors.torch import save

        if not isinstance(self.module, GatedAttention):
            raise TypeError(
                f"{type(self.module).__name__} is a module of your own, which load_mil could not build; save its"
                " state_dict with safetensors, and wrap the module in MIL again after loading"
            )
        tensors = {name: value.detach().cpu().contiguous() for name, value in self.module.state_dict().items()}
        about = {"class_names": list(self.class_names), "dropout": self.module.dropout.p}
        text = json.dumps({"format": FORMAT, **about}, sort_keys=True)
        return write_file(path, save(tensors, metadata={"hsat": text}))


class GatedAttention(nn.Module):
    """Attention pooling of a bag, and a linear classifier of the pooled embedding.

    With h_k the standardised embedding of patch k,
        a_k = softmax over k of w . (tanh(V h_k) * sigmoid(U h_k)), z = sum_k a_k h_k, logits = C z + c:
    Ilse et al., arXiv:1802.04712, eq. 9 for the weights (eq. 8, without the sigmoid, for gated=False) and eq. 7 for the
    sum.

    Args:
        width: Width d of the embeddings.
        classes: Number of classes.
        hidden: Rows of V and U.
        gated: Whether there is the gate U.
        dropout: Share of z that is dropped in training.

    Attributes:
        mean: (d,) subtracted from embeddings.
        scale: (d,) embeddings are divided by it.
    """

    mean: Tensor
    scale: Tensor

    def __init__(
        self, width: int, classes: int, *, hidden: int = 128, gated: bool = True, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))
        self.value = nn.Linear(width, hidden, bias=False)
        self.gate = nn.Linear(width, hidden, bias=False) if gated else None
        self.weight = nn.Linear(hidden, 1, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.classify = nn.Linear(width, classes)

    def __repr__(self) -> str:
        width, hidden = self.value.in_features, self.value.out_features
        return f"GatedAttention(width={width}, hidden={hidden}, gated={self.gate is not None})"

    def attention(self, bag: Tensor) -> Tensor:
        """The weights of the patches.

        Args:
            bag: (n, d) embeddings.

        Returns:
            (n,) in (0, 1), summing to one.
        """
        return self._weights(self._standardise(bag))

    def representation(self, bag: Tensor) -> Tensor:
        """The weighted sum of the standardised embeddings.

        Args:
            bag: (n, d) embeddings.

        Returns:
            (d,).
        """
        rows = self._standardise(bag)
        return self._weights(rows) @ rows

    def forward(self, bag: Tensor) -> Tensor:
        """Logits of a slide.

        Args:
            bag: (n, d) embeddings.

        Returns:
            (classes,).
        """
        logits: Tensor = self.classify(self.dropout(self.representation(bag)))
        return logits

    def _standardise(self, bag: Tensor) -> Tensor:
        if bag.ndim != 2 or bag.shape[1] != len(self.mean) or not len(bag):
            raise ValueError(
                f"a bag must be (n, {len(self.mean)}), as those of the training were, with n >= 1; got"
                f" {tuple(bag.shape)}"
            )
        return (bag - self.mean) / self.scale

    def _weights(self, rows: Tensor) -> Tensor:
        hidden = self.value(rows).tanh()
        if self.gate is not None:
            hidden = hidden * self.gate(rows).sigmoid()
        weights: Tensor = self.weight(hidden)[:, 0].softmax(0)
        return weights


@dataclass(frozen=True, kw_only=True)
class ABMIL:
    """Settings of an attention MIL for small cohorts: gated attention over the patches of a slide.

    Embeddings are standardised by the training slides' patches (each slide counts alike).  Training takes one slide
    after another in a seeded order, with AdamW and cross-entropy.  The same table and seed give the same bytes on a
    CPU with the same number of threads.  For an honest accuracy see `hsat.eval.cross_validate_slides`.

    Attributes:
        hidden: Rows of the attention's matrices.
        gated: eq. 9 of arXiv:1802.04712; False is eq. 8.
        epochs: Passes over the slides.
        learning_rate: Of AdamW.
        weight_decay: Of AdamW.
        dropout: Share of the pooled embedding that is dropped in training.
        patches: So many patches of a slide are drawn in each epoch; None takes all.
        balanced: Weigh classes by one over their number of slides.
        seed: Of weights, order, draws and dropout.

    Raises:
        ValueError: For numbers out of range.
    """

    hidden: int = 128
    gated: bool = True
    epochs: int = 50
    learning_rate: float = 1e-3
    weight_decay: float = 1e-2
    dropout: float = 0.25
    patches: int | None = None
    balanced: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("hidden", "epochs", "patches", "seed"):
            value = getattr(self, name)
            if name == "patches" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < (name != "seed"):
                raise ValueError(f"{name} must be a whole number of at least {int(name != 'seed')}, got {value!r}")
        if not 0 < self.learning_rate < float("inf") or not 0 <= self.weight_decay < float("inf"):
            raise ValueError(
                f"learning_rate must be above 0 and weight_decay at least 0,"
                f" got {self.learning_rate!r} and {self.weight_decay!r}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is a share in [0, 1), got {self.dropout!r}")

    def fit(self, bank: EmbeddingTable) -> MIL:
        """Train on the slides of a table.

        Args:
            bank: Embeddings of patches with their lengths, as `embed` gives them; a slide is one bag.

        Returns:
            The slide classifier, on the CPU and in evaluation mode.

        Raises:
            TypeError: For what is no table.
            ValueError: For an empty table, one without lengths, a slide with several classes, and a class without
                slides, naming it.
        """
        check_bank(bank)
        bags = list(bags_of(bank))
        counts = np.bincount([bag.label for bag in bags], minlength=len(bank.class_names))
        if missing := [name for name, count in zip(bank.class_names, counts, strict=True) if not count]:
            raise ValueError(
                f"no slide to train on has the class {missing[0]!r}; leave that class out of class_names, or give a"
                " split in which every class has slides"
            )
        weight = torch.from_numpy(counts.sum() / (len(counts) * counts)).float() if self.balanced else None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            module = GatedAttention(
                bank.z.shape[1], len(counts), hidden=self.hidden, gated=self.gated, dropout=self.dropout
            )
            _set_scale(module, bags)
            with torch.enable_grad():
                self._train(module, bags, weight)
        return MIL(module, bank.class_names)

    def _train(self, module: GatedAttention, bags: Sequence[SlideBag], weight: Tensor | None) -> None:
        optimizer = torch.optim.AdamW(module.parameters(), lr=self.learning_rate, weight_decay=self.weight_decay)
        rows = [torch.from_numpy(bag.rows) for bag in bags]
        labels = [torch.tensor(bag.label) for bag in bags]
        module.train()
        for _ in range(self.epochs):
            for number in torch.randperm(len(bags)).tolist():
                bag = rows[number]
                if self.patches is not None and len(bag) > self.patches:
                    bag = bag[torch.randperm(len(bag))[: self.patches]]
                loss = F.cross_entropy(module(bag), labels[number], weight=None)
                if weight is not None:  # a mean over one slide would divide the class's weight out again
                    loss = loss * weight[labels[number]]
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
        module.eval()
        for parameter in module.parameters():
            parameter.grad = None


def _set_scale(module: GatedAttention, bags: Sequence[SlideBag]) -> None:
    """Mean and standard deviation of the patches' embeddings, every slide counting alike; 1 where nothing varies."""
    means = np.stack([bag.rows.mean(0, dtype=np.float64) for bag in bags])
    squares = np.stack([(bag.rows.astype(np.float64) ** 2).mean(0) for bag in bags])
    mean = means.mean(0)
    deviation = np.sqrt(np.maximum(squares.mean(0) - mean**2, 0.0))
    module.mean.copy_(torch.from_numpy(mean))
    module.scale.copy_(torch.from_numpy(np.where(deviation > 1e-6 * max(deviation.max(), 1e-30), deviation, 1.0)))


def load_mil(path: str | os.PathLike[str]) -> MIL:
    """The slide classifier that `MIL.save` wrote; nothing is unpickled.

    Args:
        path: The file.

    Returns:
        The classifier, on the CPU and in evaluation mode.

    Raises:
        FileNotFoundError: If there is no file.
        ValueError: Naming the file, for anything else than what `MIL.save` writes.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with open_regular(path, kind="slide classifier") as file:
            texts = check_safetensors_header(Path(path), file, os.fstat(file.fileno()).st_size)
        about: Any = strict_json(texts["hsat"], where="metadata", depth=3, containers=10)
        with safe_open(path, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name).float() for name in opened.keys()}
        if about["format"] != FORMAT:
            raise ValueError(f"its format is {about['format']!r}, wanted {FORMAT!r}")
        if bad := [name for name, tensor in tensors.items() if not tensor.numel() or not bool(tensor.isfinite().all())]:
            raise ValueError(f"{bad[0]} is empty or not finite")
        names = about["class_names"]
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError("class_names is no list of texts")
        hidden, width = tensors["value.weight"].shape
        gated = "gate.weight" in tensors
        with torch.device("meta"):  # nothing is allocated but what the file holds
            module = GatedAttention(width, len(names), hidden=hidden, gated=gated, dropout=about["dropout"])
        module.load_state_dict(tensors, assign=True)
        return MIL(module, names)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path} is not a slide classifier that hsat saved: {error}") from error
