"""What changes over a run: the attack's radius, the strength of augmentation, the learning rate, the share of clean."""

from __future__ import annotations

import math

FIRST_EPS = 1 / 255


def epsilon_schedule(
    epoch: int, *, warmup: int, eps: float, start: float = FIRST_EPS, epochs: int | None = None
) -> float:
    """Radius of the training attack in this epoch (0, 1, ...), in fractions of the pixel range.

    Linear from `start` in epoch 0 to `eps` in epoch warmup - 1, `eps` from then on; warmup=1 is one epoch at `start`,
    warmup=0 is `eps` throughout.  The paper: eps 8/255, warmup 5000 of 40,000 epochs.  An eps below `start` is reached
    from above, as in the published code, except that eps=0 is 0 throughout.

    Args:
        epoch: The epoch.
        warmup: Length of the warm-up in epochs.
        eps: Radius after it, in [0, 1].
        start: Radius in epoch 0, in [0, 1].
        epochs: Length of the run; with it a warm-up that is longer is refused.

    Raises:
        ValueError: For a negative epoch or warmup, a warmup above `epochs`, or radii outside [0, 1].
    """
    _check_at_least(0, epoch=epoch, warmup=warmup)
    for name, radius in (("eps", eps), ("start", start)):
        if not 0 <= radius <= 1:
            raise ValueError(f"{name} must lie in [0, 1], the pixel range; got {radius}. For 8 grey levels write 8/255")
    if epochs is not None and warmup > epochs:
        raise ValueError(f"warmup={warmup} is longer than the run of epochs={epochs}; use at most {epochs}")
    if eps == 0 or epoch >= warmup:
        return float(eps)
    if warmup == 1:
        return float(start)
    # Interpolated from both ends so that the last epoch of the warm-up has eps itself, not eps up to rounding.
    done = epoch / (warmup - 1)
    return (1 - done) * start + done * eps


def augmentation_strength(epoch: int, epochs: int, plateau: int = 50) -> float:
    """Strength of the augmentation in this epoch: 1 - plateau * floor(epoch / plateau) / epochs, in (0, 1].

    It falls from 1 in steps of plateau / epochs; section 3 of arXiv:2503.10629, there with plateau 50.

    Raises:
        ValueError: Unless 0 <= epoch < epochs and plateau >= 1.
    """
    _check_at_least(1, epochs=epochs, plateau=plateau)
    _check_at_least(0, epoch=epoch)
    if epoch >= epochs:
        raise ValueError(f"epoch={epoch} lies behind the run of epochs={epochs}; the last one is {epochs - 1}")
    return 1.0 - (epoch // plateau) * plateau / epochs


def cosine_with_warmup(step: int, *, steps: int, warmup: int) -> float:
    """Multiplier of the learning rate at optimiser step 0, 1, ..., steps; in [0, 1].

    step / warmup during the warm-up, then half a cosine from 1 at `warmup` to 0 at `steps`.  The paper warms up for a
    tenth of the steps.  A step behind the end gives 0; the published formula would rise again there.  As a scheduler:

        LambdaLR(optimizer, lambda step: cosine_with_warmup(step, steps=steps, warmup=steps // 10))

    Raises:
        ValueError: For negative numbers, steps < 1, or a warmup above `steps`, naming both.
    """
    _check_at_least(0, step=step, warmup=warmup)
    _check_at_least(1, steps=steps)
    if warmup > steps:
        raise ValueError(f"warmup={warmup} is longer than the run of steps={steps}; use at most {steps}")
    if step <= warmup:
        return step / warmup if warmup else 1.0
    if step >= steps:
        return 0.0
    return 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def paper_clean_weight(strength: float, lam: float = 0.66) -> float:
    """Share of the clean loss in the mixed loss, (1 - lam * (1 - strength)) / 2; the adversarial loss has the rest.

    At full strength the two are equal; as the augmentation weakens, the adversarial loss gains.

    Args:
        strength: That of the augmentation, in [0, 1].
        lam: How much the share falls with it, in [0, 1].

    Raises:
        ValueError: For a strength or lam outside [0, 1].
    """
    for name, value in (("strength", strength), ("lam", lam)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must lie in [0, 1], got {value}")
    return (1.0 - lam * (1.0 - strength)) / 2.0


def _check_at_least(least: int, **numbers: int) -> None:
    for name, number in numbers.items():
        if number < least:
            raise ValueError(f"{name} must be at least {least}, got {number}")
