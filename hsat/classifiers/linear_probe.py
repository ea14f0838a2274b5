"""The linear probe: standardised unit rows and a logistic regression, as scikit-learn fits it."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor

from hsat.classifiers.base import LogitClassifier, check_bank, logits_dtype, raise_winner, unit_tensor
from hsat.files import atomic_path
from hsat.tensor_files import check_safetensors_header, refuse_text
from hsat.types import EmbeddingTable
from hsat.types.precision import widest_dtype
from hsat.untrusted import open_regular, shown, strict_json

_KIND = "linear probe"
_METADATA_KEY = "hsat"
_MOST_BYTES = 1 << 30
_MOST_CLASSES, _LONGEST_CLASS = 10_000, 256
_TENSORS = ("mean", "scale", "weight", "bias")
_KEYS = {"classifier", "C", "max_iter", "class_names", "iterations", "converged"}


@dataclass(frozen=True, kw_only=True)
class LinearProbe:
    """Settings of a linear probe: multinomial logistic regression on standardised unit rows.

    What is fitted is scikit-learn's `make_pipeline(StandardScaler(), LogisticRegression(C=C, max_iter=max_iter))` on
    the unit rows of the bank in float64, and `predict_proba` gives its probabilities.  A feature that is constant in
    the bank is centred and not scaled.  The number of threads does not change the fit.

    Attributes:
        C: Inverse of the strength of the L2 penalty, above 0: less is smoother.
        max_iter: Steps of L-BFGS at most.  scikit-learn stops after 100 and warns; a fit that needs fewer is the same.

    Raises:
        ValueError: For a C or max_iter outside its range.

    Example:
        >>> import numpy as np
        >>> ids = np.arange(4)
        >>> z = np.array([[1.0, 0.1], [1.0, -0.1], [-0.1, 1.0], [0.1, 1.0]])
        >>> bank = EmbeddingTable(z, [0, 0, 1, 1], ids, ids, ids, class_names=("hgg", "normal"))
        >>> probe = LinearProbe(C=1.0).fit(bank)
        >>> probe.predict_proba(z[:1]).round(2)
        array([[0.79, 0.21]])
    """

    C: float = 1.0
    max_iter: int = 1000

    def __post_init__(self) -> None:
        if isinstance(self.C, bool) or not isinstance(self.C, int | float | np.number) or not 0 < self.C < math.inf:
            raise ValueError(f"C must be above 0 and finite, got {self.C!r}; scikit-learn's default is 1.0")
        steps = self.max_iter
        if isinstance(steps, bool) or not isinstance(steps, int | np.integer) or steps < 1:
            raise ValueError(f"max_iter must be a whole number of at least 1, got {steps!r}")

    def fit(self, bank: EmbeddingTable) -> FittedLinearProbe:
        """A probe that was trained on this table; a UserWarning says where L-BFGS did not converge.

        Args:
            bank: Labelled rows of every class.

        Returns:
            The probe, on the CPU.

        Raises:
            ValueError: For an empty table, fewer than two classes, and a class without rows, which is named: a
                regression cannot know where it is.
            TypeError: For what is no table.
        """
        check_bank(bank)
        _check_classes(bank)
        scaler, regression, converged = _fit_regression(self, np.array(bank.z, dtype=np.float64), bank.label)
        weight, bias = regression.coef_, regression.intercept_
        if len(weight) == 1:  # two classes: scikit-learn gives the difference of their logits
            weight, bias = np.concatenate((-weight, weight)) / 2, np.concatenate((-bias, bias)) / 2
        fitted = FittedLinearProbe(
            settings=self,
            class_names=bank.class_names,
            mean=torch.from_numpy(scaler.mean_),
            scale=torch.from_numpy(scaler.scale_),
            weight=torch.from_numpy(np.ascontiguousarray(weight)),
            bias=torch.from_numpy(np.ascontiguousarray(bias)),
            iterations=int(regression.n_iter_.max()),
            converged=converged,
        )
        if not converged:
            warnings.warn(
                f"{self!r} did not converge in {fitted.iterations} steps on {len(bank)} rows; its decisions may still"
                f" move. Raise max_iter, or give a smaller C",
                stacklevel=2,
            )
        return fitted


@dataclass(frozen=True, eq=False)
class FittedLinearProbe(LogitClassifier):
    """A linear probe that answers queries.

    Attributes:
        settings: The settings that were fitted.
        class_names: The classes, in the order of the columns of logits and scores.
        mean: (d,) float64, the means of the features.
        scale: (d,) float64, their standard deviations; 1 for a constant feature.
        weight: (classes, d) float64, of the standardised features.
        bias: (classes,) float64.
        iterations: Steps that the fit took.
        converged: Whether it ended because it had converged.
    """

    settings: LinearProbe
    class_names: tuple[str, ...]
    mean: Tensor
    scale: Tensor
    weight: Tensor
    bias: Tensor
    iterations: int = 0
    converged: bool = True

    @property
    def reads(self) -> Literal["unit", "raw"]:
        """Unit rows: embeddings of any length are normalised first."""
        return "unit"

    @property
    def classes_with_rows(self) -> int:
        """Number of classes; each had rows."""
        return len(self.class_names)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.weight.device

    def logits(self, z: Tensor) -> Tensor:
        """weight @ ((z / |z|) - mean) / scale + bias.

        Args:
            z: (n, d) embeddings of any length, on the weights' device.

        Returns:
            (n, classes), float32 (float64 for float64 z).  The highest is the decision, ties go to the lower class.
            Two classes have the logits -s/2 and s/2, where s is what scikit-learn's `decision_function` gives.

        Raises:
            ValueError: For embeddings of another shape or width, and for rows that are not finite.
        """
        if z.ndim != 2 or z.shape[1] != len(self.mean):
            raise ValueError(f"embeddings must be (n, {len(self.mean)}) as the bank's are, got {tuple(z.shape)}")
        with torch.autocast(z.device.type, enabled=False):
            standard = (unit_tensor(z) - self.mean) / self.scale
            columns = [(standard * weight).sum(1) for weight in self.weight]  # a product's digits depend on the batch
            value = torch.stack(columns, 1) + self.bias
            return raise_winner(value.to(logits_dtype(z)), value.detach().argmax(1))

    def to(self, device: torch.device | str) -> Self:
        """The same classifier with its tensors on a device.

        Args:
            device: Where they go; float64, float32 where the device has no float64.

        Returns:
            A new object; this one stays where it is.
        """
        dtype = widest_dtype(torch.device(device))
        moved: dict[str, Any] = {name: tensor.to(device, dtype) for name, tensor in self.tensors().items()}
        return dataclasses.replace(self, **moved)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that `logits` computes with, by name."""
        return {name: getattr(self, name) for name in _TENSORS}

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the probe as one safetensors file, which appears whole or not at all; `load_linear_probe` reads it.

        Args:
            path: The file to write; missing folders are made.

        Returns:
            The path.
        """
        from safetensors.torch import save_file

        about = {
            "classifier": "LinearProbe",
            "C": float(self.settings.C),
            "max_iter": int(self.settings.max_iter),
            "class_names": list(self.class_names),
            "iterations": self.iterations,
            "converged": self.converged,
        }
        state = {name: tensor.detach().cpu().double().contiguous() for name, tensor in self.tensors().items()}
        with atomic_path(path) as working:
            save_file(state, working, metadata={_METADATA_KEY: json.dumps(about)})
        return Path(path)


def load_linear_probe(path: str | os.PathLike[str]) -> FittedLinearProbe:
    """The probe that `FittedLinearProbe.save` wrote, on the CPU; nothing is unpickled.

    Args:
        path: The file.

    Returns:
        The probe; its logits are those of the one that was saved.

    Raises:
        FileNotFoundError: If there is no file.
        ValueError: Naming the file and what is wrong: no regular file, not safetensors, of something else, unknown or
            missing entries, values outside their limits, shapes that do not belong together.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    path = Path(path)
    with open_regular(path, kind=_KIND) as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(512)
        refuse_text(path, size, start, kind=_KIND)
        if size > _MOST_BYTES:
            raise ValueError(f"{path} has {size} bytes; a {_KIND} of at most {_MOST_BYTES} is read")
        content = start + file.read(_MOST_BYTES)
    texts = check_safetensors_header(path, io.BytesIO(content), len(content))
    if _METADATA_KEY not in texts:
        raise ValueError(f"{path} is a safetensors file that hsat did not write; fit LinearProbe() and save it")
    settings, about = _read_settings(path, texts[_METADATA_KEY])
    try:
        state = load(content)
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is truncated or damaged: {error}; fetch it again") from error
    _check_tensors(path, state, classes=len(about["class_names"]))
    return FittedLinearProbe(
        settings=settings,
        class_names=tuple(about["class_names"]),
        **state,
        iterations=about["iterations"],
        converged=about["converged"],
    )


def _check_classes(bank: EmbeddingTable) -> None:
    """Raise ValueError unless there are two classes or more, each with rows."""
    if len(bank.class_names) < 2:
        raise ValueError(f"a linear probe tells classes apart, and the bank has only {list(bank.class_names)}")
    count = np.bincount(bank.label, minlength=len(bank.class_names))
    if absent := [name for name, rows in zip(bank.class_names, count, strict=True) if not rows]:
        raise ValueError(
            f"the bank has no row of {absent}, and a linear probe cannot decide for a class that it has never seen;"
            " embed images of it, leave the class out of class_names, or use KNNClassifier() or NearestCentroid()"
        )


def _fit_regression(settings: LinearProbe, rows: np.ndarray, label: np.ndarray) -> tuple[Any, Any, bool]:
    """Scaler, regression, and whether it converged; rows (n, d) float64 are overwritten."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler
    from threadpoolctl import threadpool_limits

    if not np.isfinite(rows).all():
        raise ValueError("the memory-mapped bank holds values that are not finite")
    with threadpool_limits(1), warnings.catch_warnings(record=True) as caught:  # sums differ with the threads
        warnings.simplefilter("always")
        scaler = StandardScaler(copy=False).fit(rows)
        regression = LogisticRegression(C=settings.C, max_iter=settings.max_iter)
        regression.fit(scaler.transform(rows), label)
    for other in (one for one in caught if not issubclass(one.category, ConvergenceWarning)):
        warnings.warn_explicit(other.message, other.category, other.filename, other.lineno)
    return scaler, regression, not any(issubclass(one.category, ConvergenceWarning) for one in caught)


def _read_settings(path: Path, text: str) -> tuple[LinearProbe, dict[str, Any]]:
    """The settings and the rest of what `FittedLinearProbe.save` wrote, of the kinds that it writes."""
    where = f"{path}: {_METADATA_KEY}"
    about = strict_json(text, where=where, depth=3, containers=16)
    if not isinstance(about, dict) or about.get("classifier") != "LinearProbe":
        raise ValueError(f"{path} holds no linear probe; load_encoder reads encoders, load_knn reads a kNN's folder")
    if unknown := sorted(map(shown, about.keys() - _KEYS)):
        raise ValueError(f"{where}: unknown entries {', '.join(unknown[:8])}")
    if missing := sorted(_KEYS - about.keys()):
        raise ValueError(f"{where}: entries {missing} are missing")
    names, count = about["class_names"], about["iterations"]
    fits = isinstance(names, list) and 2 <= len(names) <= _MOST_CLASSES
    if not fits or not all(isinstance(name, str) and len(name) <= _LONGEST_CLASS for name in names):
        raise ValueError(f"{where}: class_names is {shown(names)}; a list of 2 to {_MOST_CLASSES} names was wanted")
    if len(set(names)) < len(names):
        raise ValueError(f"{where}: class_names come twice")
    if type(count) is not int or count < 0 or type(about["converged"]) is not bool:
        raise ValueError(f"{where}: iterations is {shown(count)} and converged {shown(about['converged'])}")
    if type(about["C"]) not in (int, float) or type(about["max_iter"]) is not int:
        raise ValueError(f"{where}: C is {shown(about['C'])} and max_iter {shown(about['max_iter'])}")
    try:
        return LinearProbe(C=about["C"], max_iter=about["max_iter"]), about
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _check_tensors(path: Path, state: Mapping[str, Tensor], *, classes: int) -> None:
    """Raise ValueError unless these are the tensors of a probe of that many classes."""
    if state.keys() != set(_TENSORS):
        names = ", ".join(map(shown, sorted(state)[:8]))
        raise ValueError(f"{path} holds the tensors {names or 'none'}; {', '.join(_TENSORS)} were wanted")
    width = len(state["mean"]) if state["mean"].ndim == 1 else 0
    shapes = {"mean": (width,), "scale": (width,), "weight": (classes, width), "bias": (classes,)}
    for name, shape in shapes.items():
        tensor = state[name]
        if tuple(tensor.shape) != shape or tensor.dtype != torch.float64 or not width:
            raise ValueError(f"{path}: {name} is {tensor.dtype} {tuple(tensor.shape)}; float64 {shape} was wanted")
        if not tensor.isfinite().all():
            raise ValueError(f"{path}: {name} holds values that are not finite")
    if not (state["scale"] > 0).all():
        raise ValueError(f"{path}: scale holds values that are not above 0")
