"""Attacks of torchattacks, foolbox and the Adversarial Robustness Toolbox (ART) as attacks of hsat.

They stand beside hsat's own in every evaluation of decisions: same records, same seeds, same resuming.  What they
return is checked against the threat model, exactly, and put back where it left it.  None of the libraries is imported
here before it is needed: attacks are read by their public attributes.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from functools import partial
from importlib import metadata
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hsat.attacks.library_attack import LibraryAttack, LogitModel, seeded
from hsat.attacks.threat import L2, Linf, check_threat, settings_number
from hsat.fingerprints import fingerprint_attack
from hsat.types import ThreatModel

PACKAGES = {"torchattacks": "torchattacks", "foolbox": "foolbox", "art": "adversarial-robustness-toolbox"}
"""What to install, by the name that is imported."""

_NO_SETTINGS = ("model", "model_name", "device", "attack", "supported_mode", "normalization_used")
_BY_FUNCTION = "from_art(lambda classifier: ...)"


def from_torchattacks(attack: Any, *, threat: ThreatModel | None = None) -> LibraryAttack:
    """An attack of torchattacks, to be measured beside hsat's own.

    Args:
        attack: The attack, made with any model, which is replaced by the decision that is measured; or a function that
            makes it of a model, `lambda model: torchattacks.PGD(model, eps=8 / 255)`.  It is copied: what is changed in
            it afterwards has no effect.
        threat: What its images are held to; without it the ball of its `eps` (L2 where its norm or its name says so).

    Returns:
        The attack; its repr has every setting and the version of torchattacks.

    Raises:
        TypeError: For something else.
        ValueError: For an attack without eps and no threat model, for one that aims at the labels it is given, and for
            one that expects normalised images.

    Example:
        >>> from hsat.attacks import from_torchattacks
        >>> attack = from_torchattacks(torchattacks.PGD(model, eps=8 / 255))  # doctest: +SKIP
    """
    model = LogitModel()
    if callable(getattr(attack, "set_model", None)) and not isinstance(attack, type):
        own = copy.deepcopy(attack, {id(attack.model): model})  # the user's model is not copied
        own.set_model(model)
    elif callable(attack):
        own = _make_shown(attack, model, model)
    else:
        own = None
    if not callable(getattr(own, "set_model", None)):
        raise TypeError(f"from_torchattacks needs an attack of torchattacks, or a function that makes one; got {own!r}")
    name = type(own).__name__
    if getattr(own, "attack_mode", "default") == "targeted(label)":
        raise ValueError(f"{name} aims at the labels it is given, but evaluations give the true ones")
    if getattr(own, "normalization_used", None) is not None:
        raise ValueError(f"{name} expects normalised images; evaluations give [0, 1], so leave set_normalization_used")
    settings = settings_of(own, leave_out=_NO_SETTINGS, private=False)
    norm = getattr(own, "norm", "L2" if "L2" in name else "Linf")
    return LibraryAttack(
        "torchattacks",
        f"{name}({settings})",
        threat or _ball(name, getattr(own, "eps", None), norm),
        version=_version("torchattacks"),
        random_start=_as_flag(getattr(own, "random_start", None)),
        perturb=partial(_call_torchattacks, own),
        model=model,
    )


def _call_torchattacks(attack: Any, model: LogitModel, x: Tensor, labels: Tensor, threat: ThreatModel) -> Tensor:
    attack.set_device(x.device)
    return torch.as_tensor(attack(x, labels))


def from_foolbox(attack: Any, threat: ThreatModel) -> LibraryAttack:
    """An attack of foolbox, to be measured beside hsat's own.

    It is called as `attack(model, images, labels, epsilons=eps)`, and its clipped images are taken.

    Args:
        attack: Such as `foolbox.attacks.LinfPGD(steps=10)`; foolbox's attacks know neither model nor eps.
        threat: The ball; its eps is given to foolbox, per image where it is a tensor (n,).

    Returns:
        The attack; its repr has every setting and the version of foolbox.

    Raises:
        TypeError: For something else.
        ValueError: For a ball of another norm than the attack's.
        ModuleNotFoundError: When it is called without foolbox, saying what to install.

    Example:
        >>> from hsat.attacks import Linf, from_foolbox
        >>> attack = from_foolbox(foolbox.attacks.LinfPGD(steps=10), Linf(8 / 255))  # doctest: +SKIP
    """
    if not callable(attack) or isinstance(attack, type) or not hasattr(attack, "distance"):
        raise TypeError(f"from_foolbox needs an attack of foolbox, such as foolbox.attacks.LinfPGD(); got {attack!r}")
    check_threat(threat)
    name, norm = type(attack).__name__, getattr(attack.distance, "p", None)
    expected = Linf if norm == np.inf else L2 if norm == 2 else None
    if expected is not None and type(threat) in (Linf, L2) and not isinstance(threat, expected):
        raise ValueError(f"{name} measures eps in {expected.__name__}, but the threat model is {threat!r}")
    return LibraryAttack(
        "foolbox",
        f"{name}({settings_of(attack)})",
        threat,
        version=_version("foolbox"),
        random_start=_as_flag(getattr(attack, "random_start", None)),
        perturb=partial(_call_foolbox, copy.deepcopy(attack)),
    )


def _call_foolbox(attack: Any, model: LogitModel, x: Tensor, labels: Tensor, threat: ThreatModel) -> Tensor:
    foolbox = _import("foolbox")
    wrapped = foolbox.PyTorchModel(model, bounds=(threat.low, threat.high), device=x.device)
    if not isinstance(threat.eps, Tensor):
        return torch.as_tensor(attack(wrapped, x, labels, epsilons=float(threat.eps))[1])
    if threat.eps.numel() not in (1, len(x)):
        raise ValueError(f"foolbox takes one eps per image; got a tensor of shape {tuple(threat.eps.shape)}")
    sizes, result = threat.eps.flatten().to(x.device).expand(len(x)), x.clone()
    for eps in sorted(set(sizes.tolist())):
        rows = (sizes == eps).nonzero().flatten()
        result[rows] = attack(wrapped, x[rows], labels[rows], epsilons=eps)[1]
    return result


def from_art(attack: Any, *, threat: ThreatModel | None = None) -> LibraryAttack:
    """An evasion attack of the Adversarial Robustness Toolbox, to be measured beside hsat's own.

    Args:
        attack: A function that makes the attack of a classifier,
            `lambda classifier: FastGradientMethod(classifier, eps=8 / 255)`; or an attack, which is made anew, by its
            `attack_params`, for the decision that is measured.
        threat: What its images are held to; without it the ball of its `eps` and `norm`.

    Returns:
        The attack; its repr has every setting and the version of ART.

    Raises:
        TypeError: For something else.
        ValueError: For an attack without eps and no threat model, for a targeted one, and for one that cannot be made
            anew from its settings.
        ModuleNotFoundError: Without ART, saying what to install.

    Example:
        >>> from hsat.attacks import from_art
        >>> attack = from_art(lambda classifier: FastGradientMethod(classifier, eps=8 / 255))  # doctest: +SKIP
    """
    is_attack = callable(getattr(attack, "generate", None)) and not isinstance(attack, type)
    if not is_attack and not callable(attack):
        raise TypeError(f"from_art needs an evasion attack of ART, or a function that makes one; got {attack!r}")
    model = LogitModel()
    make = _maker(attack) if is_attack else attack
    shown = _make_shown(make, model, _art_classifier(model, (3, 8, 8), 10, 0.0, 1.0))
    if not callable(getattr(shown, "generate", None)):
        raise TypeError(f"from_art needs an evasion attack of ART, or a function that makes one; got {shown!r}")
    name = type(shown).__name__
    settings = _settings_of_art(shown)
    if is_attack and settings != _settings_of_art(attack):
        raise ValueError(
            f"{name} cannot be made anew from its attack_params; give a function that makes it: {_BY_FUNCTION}"
        )
    if getattr(shown, "targeted", False):
        raise ValueError(f"{name} aims at the labels it is given, but evaluations give the true ones")
    starts = getattr(shown, "num_random_init", None)
    return LibraryAttack(
        "art",
        f"{name}({settings})",
        threat or _ball(name, getattr(shown, "eps", None), getattr(shown, "norm", np.inf)),
        version=_version("art"),
        random_start=None if starts is None else bool(starts),
        perturb=partial(_call_art, make),
        model=model,
    )


def _maker(attack: Any) -> Callable[[Any], Any]:
    """Makes the same attack for another classifier, by its public settings."""
    accepted = inspect.signature(type(attack)).parameters
    names = [key for key in attack.attack_params if key in accepted and hasattr(attack, key)]
    options = {key: copy.deepcopy(getattr(attack, key)) for key in names if not _holds_attack(getattr(attack, key))}
    if len(options) < len(set(names)):
        raise ValueError(
            f"{type(attack).__name__} holds attacks on a model of their own; give a function: {_BY_FUNCTION}"
        )
    options.pop("summary_writer", None)
    return lambda classifier: type(attack)(classifier, **options)


def _settings_of_art(attack: Any) -> str:
    """The `attack_params` of an attack; where it keeps some of them elsewhere, with what it says of itself."""
    names = [key for key in dict.fromkeys(attack.attack_params) if key != "summary_writer"]
    known = [f"{key}={describe(getattr(attack, key), name=key)}" for key in names if hasattr(attack, key)]
    return ", ".join([*known, *([f"repr={fingerprint_attack(attack)!r}"] if len(known) < len(names) else [])])


def _make_shown(make: Callable[[Any], Any], model: LogitModel, argument: Any) -> Any:
    """The attack that a function makes, for its settings alone: some ask the model for logits as they are made."""
    with seeded(0, torch.device("cpu")), model.attached(lambda v: v.new_zeros(len(v), 10), torch.zeros(1, 3, 8, 8)):
        return make(argument)


def _holds_attack(value: Any) -> bool:
    several = value if isinstance(value, list | tuple) else (value,)
    return any(hasattr(one, "generate") for one in several)


def _art_classifier(model: LogitModel, shape: tuple[int, ...], classes: int, low: float, high: float) -> Any:
    estimators = _import("art", ".estimators.classification")
    gpu = model.place.is_cuda
    return estimators.PyTorchClassifier(
        model=model,
        loss=nn.CrossEntropyLoss(),
        input_shape=shape,
        nb_classes=classes,
        clip_values=(low, high),
        device_type="gpu" if gpu else "cpu",
    )


def _call_art(make: Callable[[Any], Any], model: LogitModel, x: Tensor, labels: Tensor, threat: ThreatModel) -> Tensor:
    with torch.no_grad():
        classes = model(x).shape[1]
    attack = make(_art_classifier(model, tuple(x.shape[1:]), classes, threat.low, threat.high))
    truth = nn.functional.one_hot(labels, classes).float().cpu().numpy()
    return torch.as_tensor(attack.generate(x=x.float().cpu().numpy(), y=truth))


def _ball(name: str, eps: Any, norm: Any) -> ThreatModel:
    """The ball that an attack says it stays in; ValueError where it does not say."""
    kinds: dict[str, type[Linf] | type[L2]] = {"linf": Linf, "inf": Linf, "l2": L2, "2": L2, "2.0": L2}
    kind = kinds.get(str(norm).lower())
    if isinstance(eps, int | float | np.number) and not isinstance(eps, bool) and kind is not None:
        return kind(float(eps))
    raise ValueError(
        f"{name} does not say which ball of Linf or L2 it stays in (eps={eps!r}, norm={norm!r}): give one,"
        " threat=hsat.Linf(8/255)"
    )


def _as_flag(value: Any) -> bool | None:
    return value if isinstance(value, bool) else None


def _version(library: str) -> str:
    try:
        return metadata.version(PACKAGES[library])
    except metadata.PackageNotFoundError:
        return str(getattr(sys.modules.get(library), "__version__", "unknown"))


def _import(library: str, module: str = "") -> Any:
    try:
        return importlib.import_module(library + module)
    except ModuleNotFoundError as error:
        missing = "" if (error.name or "").partition(".")[0] == library else f", and {error.name}"
        raise ModuleNotFoundError(
            f"this attack needs {library}{missing}: pip install {PACKAGES[library]}", name=error.name
        ) from error


def settings_of(attack: Any, *, leave_out: Sequence[str] = (), private: bool = True) -> str:
    """The attributes of an object as text; private: those whose names begin with an underscore as well."""
    chosen = {key: value for key, value in vars(attack).items() if key not in leave_out}
    chosen = {key: value for key, value in chosen.items() if private or not key.startswith("_")}
    return ", ".join(f"{key.strip('_')}={describe(value, name=key)}" for key, value in chosen.items())


def describe(value: Any, *, name: str = "") -> str:
    """A setting as text that is the same in every process: no addresses, arrays by their digest."""
    if isinstance(value, float) and any(part in name for part in ("eps", "alpha", "step")):
        return repr(value) if len(repr(value)) <= 6 else settings_number(value)
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{describe(key)}: {describe(one)}' for key, one in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(describe(one, name=name) for one in value)}]"
    if isinstance(value, Tensor | np.ndarray) and np.size(value):
        return settings_number(torch.as_tensor(value))
    is_plain = value is None or isinstance(value, bool | int | float | str | Enum | np.generic)
    if is_plain or isinstance(value, Tensor | np.ndarray | torch.device | torch.dtype):
        return repr(value)
    return _describe_object(value)


def _describe_object(value: Any) -> str:
    if callable(value) and hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    inner = settings_of(value) if hasattr(value, "__dict__") and not isinstance(value, nn.Module) else ""
    if callable(getattr(value, "set_model", None)):  # an attack of torchattacks inside another one
        inner = settings_of(value, leave_out=_NO_SETTINGS, private=False)
    return f"{type(value).__name__}({inner})"
