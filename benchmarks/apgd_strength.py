"""How strong the searches are: PGD, APGD and Square next to torchattacks, at equal budgets, over seeds.

Two small classifiers are trained on synthetic images, one on clean and one on adversarial images.  Every attack gets
the same images and the same number of gradient steps (or queries); what is printed is the accuracy that is left, in
per cent, mean and range over the seeds of the random starts.  Lower is stronger.

    python benchmarks/apgd_strength.py --out benchmarks/results/apgd_strength.md
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hsat
from hsat.attacks import APGD, L2, PGD, Linf, Square, classification, dlr, margin
from hsat.types import Attack, Objective, ThreatModel

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torchattacks

SIDE, CLASSES = 10, 6
Run = Callable[[int], Tensor]


def images_and_labels(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noisy copies of one blurred pattern per class."""
    patterns = torch.randn(CLASSES, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(99))
    patterns = 0.25 * F.avg_pool2d(patterns, 3, 1, 1)
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES, (n,), generator=generator)
    noise = 0.15 * torch.randn(n, 3, SIDE, SIDE, generator=generator)
    return (0.5 + patterns[labels] + noise).clamp(0, 1), labels


def trained(*, adversarial: bool) -> nn.Module:
    """A small network after six passes; the adversarial one sees PGD images from the second pass on."""
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 24, 3, stride=2, padding=1), nn.ReLU()
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(24 * 25, 32), nn.ReLU(), nn.Linear(32, CLASSES))
    x, labels = images_and_labels(1500, 1)
    optimiser, generator = torch.optim.Adam(model.parameters(), 2e-3), torch.Generator().manual_seed(0)
    for epoch in range(6):
        for rows in torch.randperm(len(x), generator=generator).split(100):
            shown, wanted = x[rows], labels[rows]
            if adversarial and epoch > 0:
                attack = PGD(Linf(6 / 255), step_size=3 / 255, steps=3)
                shown = attack(shown, classification(model, wanted), generator=generator)
            optimiser.zero_grad()
            F.cross_entropy(model(shown), wanted).backward()
            optimiser.step()
    return model.eval()


def ours(attack: Attack, objective: Objective, x: Tensor, broken: Callable[[Tensor], Tensor]) -> Run:
    """hsat's attack as a function of the seed, stopping images when they break, as torchattacks' APGD does."""
    return lambda seed: attack(x, objective, generator=torch.Generator().manual_seed(seed), success=broken)


def theirs(attack: Callable[[int], object], x: Tensor, labels: Tensor) -> Run:
    """torchattacks' attack as a function of the seed."""

    def run(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return attack(seed)(x, labels)  # type: ignore[operator]

    return run


def contestants(model: nn.Module, threat: ThreatModel, x: Tensor, labels: Tensor, steps: int) -> dict[str, Run]:
    """Every attack at `steps` gradient steps, by name."""
    norm, eps = type(threat).__name__, float(threat.eps)
    broken = lambda v: model(v).argmax(1) != labels
    ce, ratio, gap = classification(model, labels), dlr(model, labels), margin(model, labels)
    pgd, apgd = PGD(threat, step_size=eps / 4, steps=steps), APGD(threat, steps=steps)
    numbers = {"norm": norm, "eps": eps, "steps": steps}
    plain = (
        (lambda seed: torchattacks.PGD(model, eps=eps, alpha=eps / 4, steps=steps))
        if norm == "Linf"
        else (lambda seed: torchattacks.PGDL2(model, eps=eps, alpha=eps / 4, steps=steps))
    )
    return {
        "PGD, cross-entropy": ours(pgd, ce, x, broken),
        "torchattacks PGD": theirs(plain, x, labels),
        "APGD, cross-entropy": ours(apgd, ce, x, broken),
        "torchattacks APGD, ce": theirs(lambda seed: torchattacks.APGD(model, seed=seed, **numbers), x, labels),
        "APGD, dlr": ours(apgd, ratio, x, broken),
        "torchattacks APGD, dlr": theirs(
            lambda seed: torchattacks.APGD(model, seed=seed, loss="dlr", **numbers), x, labels
        ),
        "APGD, margin": ours(apgd, gap, x, broken),
    }


def score_searches(model: nn.Module, threat: ThreatModel, x: Tensor, labels: Tensor, queries: int) -> dict[str, Run]:
    """Square at two first areas, ours and theirs."""
    norm, eps = type(threat).__name__, float(threat.eps)
    broken = lambda v: model(v).argmax(1) != labels
    found = {}
    for area in (0.05, 0.8):
        numbers = {"norm": norm, "eps": eps, "n_queries": queries, "p_init": area}
        attack = Square(threat, queries=queries, area=area)
        found[f"Square, area {area}"] = ours(attack, margin(model, labels), x, broken)
        found[f"torchattacks Square, area {area}"] = theirs(
            lambda seed, numbers=numbers: torchattacks.Square(model, seed=seed, **numbers),  # type: ignore[misc]
            x,
            labels,
        )
    return found


def text_of(threat: ThreatModel) -> str:
    """Name and radius of a threat model."""
    return f"{type(threat).__name__} {float(threat.eps):.3g}"


def rows(args: argparse.Namespace) -> list[tuple[str, ...]]:
    """(model, threat, budget, attack, accuracies) for everything."""
    found: list[tuple[str, ...]] = []
    for adversarial in (False, True):
        model, (x, labels) = trained(adversarial=adversarial), images_and_labels(args.images, 7)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        name = "adversarial" if adversarial else "clean"
        accuracy = lambda v, model=model, labels=labels: 100 * float((model(v).argmax(1) == labels).float().mean())
        found.append((name, "none", "", "no attack", f"{accuracy(x):.1f}"))
        scale = 1.0 if adversarial else 0.8
        for threat in (Linf(12 / 255 * scale), L2(0.6 * scale)):
            runs: dict[tuple[str, str, str], Run] = {}
            for steps in args.steps:
                named = contestants(model, threat, x, labels, steps)
                runs |= {(text_of(threat), f"{steps} steps", attack): run for attack, run in named.items()}
            wider = type(threat)(2 * float(threat.eps))  # scores alone need more room, or nothing happens
            searches = score_searches(model, wider, x, labels, args.queries)
            runs |= {(text_of(wider), f"{args.queries} queries", attack): run for attack, run in searches.items()}
            for key, run in runs.items():
                left = [accuracy(run(seed)) for seed in range(args.seeds)]
                text = f"{statistics.mean(left):.1f} ({min(left):.1f} to {max(left):.1f})"
                found.append((name, *key, text))
                print(*found[-1], sep=" | ", flush=True)
    return found


def main() -> None:
    """Read the command line, run everything, write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/apgd_strength.md"))
    parser.add_argument("--images", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 40])
    parser.add_argument("--queries", type=int, default=300)
    args = parser.parse_args()
    began = time.time()
    table = rows(args)
    head = ("model", "threat", "budget", "attack", "accuracy left, % (range over seeds)")
    lines = [f"| {' | '.join(row)} |" for row in (head, ("---",) * 5, *table)]
    text = "\n".join(
        [
            "# Strength of the searches",
            "",
            "Accuracy left after each attack; lower is stronger.  Written by `benchmarks/apgd_strength.py`, which says",
            f"what is compared.  One image of the set is worth {100 / args.images:.1f} points.",
            "",
            *lines,
            "",
            f"{args.images} images, {args.seeds} seeds, hsat {hsat.__version__}, torch {torch.__version__}, "
            f"Python {platform.python_version()}, {time.time() - began:.0f} s.",
            "",
        ]
    )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = args.out.with_suffix(".tmp")
    unfinished.write_text(text)
    os.replace(unfinished, args.out)
    print(f"written to {args.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
