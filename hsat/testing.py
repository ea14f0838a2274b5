"""The contract every attack of hsat keeps, as one list of laws that you can hold your own attack against."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hsat.types import Attack, Objective, ThreatModel

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
Law = Callable[[Any, ThreatModel], None]


class _Saboteur(RuntimeError):
    """Raised by an objective on purpose."""


def _images(n: int = 4, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Images (n, 3, 5, 4) in [0, 1] with many pixels at the ends of the range."""
    x = torch.rand(n, 3, 5, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 1.4 - 0.2
    return x.clamp(0, 1).to(dtype)


def _slopes(seed: int = 1) -> Tensor:
    """Weights (1, 3, 5, 4) of a linear objective, none of them near zero."""
    w = torch.randn(1, 3, 5, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return w + w.sign() * 0.1


def _linear(w: Tensor) -> Objective:
    return lambda v: (v * w.to(v.dtype)).sum((1, 2, 3))


def _generator(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _expect(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)


def check_feasible(x_adv: Tensor, x: Tensor, threat: ThreatModel) -> None:
    """Raise AssertionError unless x_adv has the form of x and is, without tolerance, where the threat model allows."""
    _expect(x_adv.shape == x.shape, f"shape {tuple(x_adv.shape)} from images of shape {tuple(x.shape)}")
    _expect(x_adv.dtype == x.dtype, f"dtype {x_adv.dtype} from images of {x.dtype}")
    _expect(x_adv.device == x.device, f"device {x_adv.device} from images on {x.device}")
    _expect(not x_adv.requires_grad, "the result is still part of a graph")
    _expect(bool(x_adv.isfinite().all()), "the result holds NaN or infinity")
    _expect(
        torch.equal(threat.project(x_adv, x), x_adv), f"the result is not feasible: projection onto {threat} moves it"
    )
    name, eps = type(threat).__name__, threat.eps
    gap = x_adv.double() - x.double()
    eps = eps[:, None, None, None] if isinstance(eps, Tensor) and eps.ndim == 1 else eps
    if name == "Linf":
        _expect(bool((gap.abs() <= eps).all()), f"a pixel moved by {float(gap.abs().max())}, more than {threat} allows")
    if name == "L2":
        norm = gap.flatten(1).norm(dim=1)[:, None, None, None]
        _expect(bool((norm <= eps).all()), f"an image moved by {float(norm.max())}, more than {threat} allows")


def _feasible_in_every_dtype(attack: Attack, threat: ThreatModel) -> None:
    for dtype in DTYPES:
        x = _images(dtype=dtype)
        check_feasible(attack(x, _linear(_slopes()), generator=_generator()), x, threat)


def _climbs(attack: Attack, threat: ThreatModel) -> None:
    x, objective = _images(dtype=torch.float64), _linear(_slopes())
    gain = objective(attack(x, objective, generator=_generator())) - objective(x)
    _expect(bool((gain > 0).all()), f"the objective did not grow for every image; gains {gain.tolist()}")


def _zero_eps_is_identity(attack: Attack, threat: ThreatModel) -> None:
    still = _with_eps(attack, threat, 0.0)
    if still is not None:
        for dtype in DTYPES:
            x = _images(dtype=dtype)
            _expect(
                torch.equal(still(x, _linear(_slopes()), generator=_generator()), x), f"eps=0 changed {dtype} images"
            )


def _eps_per_image(attack: Attack, threat: ThreatModel) -> None:
    x = _images(dtype=torch.float32)
    eps = torch.linspace(0, 1, len(x), dtype=torch.float64) * torch.as_tensor(threat.eps).max()
    own = _with_eps(attack, threat, eps)
    if own is not None:
        x_adv = own(x, _linear(_slopes()), generator=_generator())
        check_feasible(x_adv, x, own.threat)  # type: ignore[attr-defined]
        _expect(torch.equal(x_adv[0], x[0]), "the image with eps=0 moved")
        _expect(not torch.equal(x_adv[-1], x[-1]), "the image with the largest eps did not move")


def _same_seed_same_bytes(attack: Attack, threat: ThreatModel) -> None:
    x, objective = _images(), _linear(_slopes())
    first, second = (attack(x, objective, generator=_generator()) for _ in range(2))
    _expect(torch.equal(first, second), "two runs from one seed differ")


def _order_free_with_ids(attack: Attack, threat: ThreatModel) -> None:
    x, ids = _images(8), torch.arange(100, 108)
    curve = _slopes()

    def objective(v: Tensor) -> Tensor:  # elementwise, so that no kernel rounds differently for other batch sizes
        return ((v * curve.to(v.dtype)).sin() + v).flatten(1).cumsum(1)[:, -1]

    whole = attack(x, objective, generator=_generator(), ids=ids)
    order = torch.tensor([5, 2, 7, 0, 1, 6, 3, 4])
    shuffled = attack(x[order], objective, generator=_generator(), ids=ids[order])
    _expect(torch.equal(whole[order], shuffled), "with ids, another order of the images gives another perturbation")
    for size in (1, 3):
        parts = [
            attack(x[i : i + size], objective, generator=_generator(), ids=ids[i : i + size])
            for i in range(0, len(x), size)
        ]
        _expect(torch.equal(whole, torch.cat(parts)), f"with ids, batches of {size} give other perturbations")


def _zero_gradient_is_no_nan(attack: Attack, threat: ThreatModel) -> None:
    for dtype in DTYPES:
        x = _images(dtype=dtype)
        check_feasible(attack(x, lambda v: (v * 0.0).sum((1, 2, 3)), generator=_generator()), x, threat)


def _refuses_non_finite_gradients(attack: Attack, threat: ThreatModel) -> None:
    try:
        attack(_images(), lambda v: (v * torch.inf).sum((1, 2, 3)), generator=_generator())
    except (FloatingPointError, ValueError, RuntimeError):
        return
    raise AssertionError("non-finite gradients went unnoticed")


def _refuses_images_out_of_range(attack: Attack, threat: ThreatModel) -> None:
    try:
        attack(_images() * 255, _linear(_slopes()), generator=_generator())
    except ValueError:
        return
    raise AssertionError("images far outside the pixel range were accepted")


def _changes_nothing_else(attack: Attack, threat: ThreatModel) -> None:
    for fails_at in (None, 1):
        _check_untouched(attack, fails_at)


def _check_untouched(attack: Attack, fails_at: int | None) -> None:
    convolution, dropout = nn.Conv2d(3, 2, 3), nn.Dropout(0.0)  # p=0 draws nothing, so the global RNG must not move
    model = nn.Sequential(convolution, nn.BatchNorm2d(2), nn.ReLU(), dropout, nn.Flatten()).eval()
    dropout.train()
    convolution.weight.requires_grad_(False)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    x, calls = _images().requires_grad_(), 0
    before = _snapshot(model, x)

    def objective(v: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if fails_at is not None and calls >= fails_at:
            raise _Saboteur
        z: Tensor = model(v)
        return z.square().sum(1)

    try:
        attack(x, objective, generator=_generator())
    except _Saboteur:
        _expect(fails_at is not None, "an objective that does not fail failed")
    after = _snapshot(model, x)
    for name, value in before.items():
        same = torch.equal(value, after[name]) if isinstance(value, Tensor) else value == after[name]
        _expect(same, f"the attack changed {name}{'' if fails_at is None else ' when its objective raised'}")


def _snapshot(model: nn.Module, x: Tensor) -> dict[str, Any]:
    state: dict[str, Any] = {f"buffer or parameter {k}": v.clone() for k, v in model.state_dict().items()}
    state |= {f"gradient of {k}": p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
    state |= {f"requires_grad of {k}": p.requires_grad for k, p in model.named_parameters()}
    state |= {f"mode of module {k!r}": m.training for k, m in model.named_modules()}
    state |= {"x": x.detach().clone(), "x.grad": x.grad, "x.requires_grad": x.requires_grad}
    return state | {"the global RNG": torch.get_rng_state(), "the grad mode": torch.is_grad_enabled()}


def _with_eps(attack: Any, threat: Any, eps: float | Tensor) -> Attack | None:
    """The attack with another eps, where attack and threat model are dataclasses that allow it."""
    if not (dataclasses.is_dataclass(attack) and dataclasses.is_dataclass(threat) and hasattr(attack, "threat")):
        return None
    return dataclasses.replace(attack, threat=_resized(threat, eps))  # type: ignore[type-var, return-value]


def _resized(threat: Any, eps: float | Tensor) -> Any:
    """The threat model with another eps; one that confines another (Masked) passes it on."""
    if any(option.name == "eps" for option in dataclasses.fields(threat)):
        return dataclasses.replace(threat, eps=eps)
    return dataclasses.replace(threat, threat=_resized(threat.threat, eps))


LAWS: dict[str, Law] = {
    "feasible in float16, bfloat16, float32 and float64": _feasible_in_every_dtype,
    "the objective grows for every image": _climbs,
    "eps=0 is the identity": _zero_eps_is_identity,
    "one eps per image": _eps_per_image,
    "same seed, same bytes": _same_seed_same_bytes,
    "with ids, batch size and order do not matter": _order_free_with_ids,
    "a zero gradient gives no NaN": _zero_gradient_is_no_nan,
    "non-finite gradients are refused": _refuses_non_finite_gradients,
    "images outside the pixel range are refused": _refuses_images_out_of_range,
    "nothing but the result changes, also when the objective raises": _changes_nothing_else,
}


def check_attack(attack: Any, *, threat: ThreatModel | None = None, skip: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Hold an attack against every law of LAWS; raises AssertionError naming the first law it breaks.

    attack: an hsat attack or your own with the same call, attack(x, objective, *, start, generator, ids, success).
    threat: its threat model, when it has no `.threat`; its eps must be above zero and its range [0, 1].
    skip: names of laws that do not apply.  The two laws about eps need an attack and a threat model that are
    dataclasses.  Returns the names of the laws that were checked.
    """
    threat = attack.threat if threat is None else threat
    unknown = set(skip) - set(LAWS)
    if unknown:
        raise ValueError(f"unknown laws {sorted(unknown)}; choose from {tuple(LAWS)}")
    names = tuple(name for name in LAWS if name not in skip)
    for name in names:
        try:
            LAWS[name](attack, threat)
        except AssertionError as error:
            raise AssertionError(f"{attack!r} breaks the law «{name}»: {error}") from error
    return names
