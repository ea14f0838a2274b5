"""What one HSAT step and one white-box evaluation cost: hsat against the published recipe, side by side in one process.

The step is the whole one: inner attack of 5 steps, forward and backward on the adversarial images, AdamW.  The recipe
runs backward into every parameter at each inner step.  The evaluation is three attacks (PGD, BIM, MI-FGSM, 10 steps) at
4/255 and 8/255 with a bank of 4 images per query; the recipe embeds the bank for every attack and the clean queries at
every step.  hsat is measured in float32 (default layout, channels_last) and in bfloat16 autocast with channels_last.

Variants take turns and ratios are taken within a turn, so that a machine whose speed drifts does not decide; the median
over turns counts.  Numbers below the aim are printed as they are.  On a machine that others use as well, one thread and
its CPU time (--clock cpu) say more than the clock on the wall.

    OMP_NUM_THREADS=2 python benchmarks/step_cost.py --out benchmarks/results/step_cost.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from attack_cost import (
    EPS,
    STEP,
    compare,
    processor,
    published_evaluation_attack,
    published_training_attack,
    separate_hidisc,
)
from torch import Tensor, nn

import hsat
from hsat.attacks import PGD, Linf
from hsat.classifiers import KNNClassifier
from hsat.eval import Provenance, RunOptions, Scoring, evaluate_whitebox, paper_attacks
from hsat.losses import HiDiscLoss
from hsat.models import build_encoder, fold_batchnorm
from hsat.training import adversarial_step
from hsat.types import HierarchicalBatch

QUERIES, PER_QUERY, CLASSES = 16, 4, 4
RECIPE = "published recipe, float32"
AIMS = {  # title: (network, images, side, aim in float32, aim in bfloat16)
    "HSAT step, resnet18, 16 x 3x64x64": ("resnet18", 16, 64, 1.6, 3.0),
    "HSAT step, resnet18, 64 x 3x64x64": ("resnet18", 64, 64, 1.6, 3.0),
    "HSAT step, resnet50, 16 x 3x96x96": ("resnet50", 16, 96, 1.6, 3.0),
    "HSAT step, resnet50, 64 x 3x96x96": ("resnet50", 64, 96, 1.6, 3.0),
    "white-box evaluation, resnet18, 16 x 3x64x64, bank of 64": ("resnet18", QUERIES, 64, 1.5, 3.0),
    "white-box evaluation, resnet50, 16 x 3x96x96, bank of 64": ("resnet50", QUERIES, 96, 1.5, 3.0),
}
FOLDED = "hsat, bfloat16, channels_last, folded BatchNorm"  # in evaluations only
OURS = {  # name: (memory layout, bfloat16 autocast)
    "hsat, float32": (torch.contiguous_format, False),
    "hsat, float32, channels_last": (torch.channels_last, False),
    "hsat, bfloat16, channels_last": (torch.channels_last, True),
}


def images(n: int, side: int, *, seed: int) -> Tensor:
    """(n, 3, side, side) uniform noise in [0, 1]."""
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(seed))


def step_variants(name: str, number: int, side: int) -> dict[str, Callable[[], object]]:
    """One training step each, of patients with 2 slides, patches and views; every variant trains its own encoder."""
    x, shape = images(number, side, seed=0), (number // 8, 2, 2, 2)
    loss = HiDiscLoss()

    def new(layout: torch.memory_format, **how: bool) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = build_encoder(name, seed=0).to(memory_format=layout)
        return model, torch.optim.AdamW(model.parameters(), lr=1e-4, **how)

    model, optimizer = new(torch.contiguous_format)  # as the recipe makes it: not fused

    def recipe() -> object:
        model.eval()
        adv = published_training_attack(model, x, shape, 5)
        model.train()
        optimizer.zero_grad()
        separate_hidisc(model(adv), shape).backward()
        optimizer.step()
        return adv

    found: dict[str, Callable[[], object]] = {RECIPE: recipe}
    for title, (layout, half) in OURS.items():
        own, own_optimizer = new(layout, fused=True)
        batch = HierarchicalBatch.from_grid(x.unflatten(0, shape))
        batch = batch.replace(images=x.contiguous(memory_format=layout))

        def ours(model=own, optimizer=own_optimizer, batch=batch, half=half) -> object:
            result = adversarial_step(
                model.train(),
                loss,
                PGD(Linf(EPS), step_size=STEP, steps=5),
                batch,
                autocast=partial(torch.autocast, "cpu", torch.bfloat16, enabled=half),
                generator=torch.Generator().manual_seed(1),
            )
            optimizer.zero_grad(set_to_none=True)
            result.loss.backward()
            optimizer.step()
            return result.x_adv

        found[title] = ours
    return found


def published_mifgsm(model: Callable[[Tensor], Tensor], x: Tensor, steps: int, eps: float) -> Tensor:
    """MI-FGSM on the cosine drift with the clean batch embedded anew at each step."""
    adv, momentum = (x + torch.rand_like(x) * 2 * eps - eps).clamp(0, 1), torch.zeros_like(x)
    for _ in range(steps):
        adv.requires_grad_()
        with torch.no_grad():
            clean = model(x)
        (grad,) = torch.autograd.grad(-F.cosine_similarity(model(adv), clean).sum(), adv)
        momentum = momentum + grad / grad.abs().mean((1, 2, 3), keepdim=True)
        adv = adv.detach() + STEP * momentum.sign()
        adv = (x + (adv - x).clamp(-eps, eps)).clamp(0, 1).detach()
    return adv


def neighbours_vote(z: Tensor, bank: Tensor, labels: Tensor, k: int) -> Tensor:
    """The published vote: exp(similarity / 0.07) of the k nearest, summed per class."""
    weight, index = (F.normalize(z, dim=1) @ F.normalize(bank, dim=1).T).topk(k, dim=1)
    votes = torch.zeros(len(z), CLASSES)
    return votes.scatter_add(1, labels[index], (weight / 0.07).exp()).argmax(1)


def evaluation_variants(name: str, queries: int, side: int) -> dict[str, Callable[[], object]]:
    """One complete white-box evaluation each; the embedding that is attacked is the projected one."""
    x, bank = images(queries, side, seed=0), images(queries * PER_QUERY, side, seed=1)
    label, bank_label = torch.arange(len(x)) % CLASSES, torch.arange(len(bank)) % CLASSES
    encoder = build_encoder(name, seed=0).eval()

    def recipe() -> object:
        answers = []
        for eps in (4 / 255, 8 / 255):
            for kind in ("pgd", "bim", "mifgsm"):
                with torch.no_grad():
                    rows = torch.cat([encoder.features(part) for part in bank.split(QUERIES)])
                adv = (
                    published_mifgsm(encoder, x, 10, eps)
                    if kind == "mifgsm"
                    else published_evaluation_attack(encoder, x, 10, eps)
                )
                with torch.no_grad():
                    answers.append(neighbours_vote(encoder.features(adv), rows, bank_label, k=20))
        return answers

    found: dict[str, Callable[[], object]] = {RECIPE: recipe}
    for title, (layout, half) in (OURS | {FOLDED: (torch.channels_last, True)}).items():
        own = build_encoder(name, seed=0).eval().to(memory_format=layout)
        laid = [part.contiguous(memory_format=layout) for part in bank.split(QUERIES)]
        banks = [batch_of(part, bank_label[i * QUERIES : (i + 1) * QUERIES], i + 1) for i, part in enumerate(laid)]
        queries = [batch_of(x.contiguous(memory_format=layout), label, 0)]

        def ours(encoder=own, banks=banks, queries=queries, half=half, folded=title == FOLDED) -> object:
            if folded:  # the folding counts as part of the evaluation
                encoder = fold_batchnorm(encoder).to(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                return evaluate_whitebox(
                    encoder,
                    banks,
                    queries,
                    paper_attacks((4 / 255, 8 / 255)),
                    classifier=KNNClassifier(k=20),
                    target="embedding",
                    scoring=Scoring(bootstrap=0),
                    run=RunOptions(noise=False),
                    provenance=Provenance(class_names=tuple("abcd")),
                ).records

        found[title] = ours
    return found


def batch_of(x: Tensor, label: Tensor, number: int) -> HierarchicalBatch:
    """Images with ids of their own: each image is a patch, slide and patient."""
    ids = torch.arange(len(x)) + number * len(x)
    return HierarchicalBatch(x, ids, ids, ids, label)


def about() -> dict[str, object]:
    """Machine and versions, with the load at the beginning: a busy machine widens the spread."""
    return {
        "hsat": hsat.__version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "processor": processor(),
        "bfloat16 instructions": "avx512_bf16" in Path("/proc/cpuinfo").read_text()
        if Path("/proc/cpuinfo").exists()
        else None,
        "python": platform.python_version(),
        "load average at the beginning": os.getloadavg(),
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--only", default="", help="measure the rows whose title holds this, keep the others of --out")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: time of the process alone")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    results: dict[str, object] = {}
    if options.only and options.out and options.out.exists():
        results = json.loads(options.out.read_text())["results"]
    described = about()
    for title, (name, number, side, *aims) in AIMS.items():
        if options.only not in title:
            continue
        long = not title.startswith("HSAT")  # hundreds of passes each: no warm-up needed, and it would cost as much
        variants = (evaluation_variants if long else step_variants)(name, number, side)
        clock = time.process_time if options.clock == "cpu" else time.perf_counter
        found = compare(variants, options.turns, clock=clock, warm=not long)
        results[title] = found | {"aims": {}, "clock": options.clock, "load average": os.getloadavg()}
        judged = [*zip(list(OURS)[1:], aims, strict=True), *([(FOLDED, aims[1])] if long else [])]
        for variant, aim in judged:
            ratio = found["times faster"][variant]
            reached = ratio["median"] >= aim
            results[title]["aims"][variant] = {"aim": aim, "reached": reached}
            sys.stdout.write(
                f"{title}, {variant}: {ratio['median']:.2f}x [{ratio['min']:.2f}, {ratio['max']:.2f}]"
                f" (aim {aim}x, {'reached' if reached else 'NOT reached'})\n"
            )
        sys.stdout.flush()
        if options.out:
            options.out.write_text(json.dumps({"about": described, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
