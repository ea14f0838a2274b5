"""What the ensemble leaves, next to AutoAttack, adversarial-library's Auto-PGD and ART's feature adversaries.

    hsat demo --steps 240 --query_patches 224
    pip install --no-deps --target peers -r benchmarks/requirements.txt
    OMP_NUM_THREADS=1 PYTHONPATH=peers python benchmarks/ensemble_strength.py --demo runs/demo

Every attack gets the same images, the same module from images to logits and the same ball; all results are projected
by hsat's threat model and judged by the module again.  A patch that somebody else breaks and hsat's ensemble does not
is a loss of the ensemble, and printed.  Time is CPU time of one thread; passes are images that went through the
backbone.  AutoAttack is `standard` with all wrong classes as targets and 1,000 queries.  Where a package is not
installed its rows say so; adversarial-library also needs requests, ART needs six.  Finished parts are kept in --runs
and not repeated.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import logging
import os
import platform
import re
import sys
import time
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import hsat
from hsat.attacks import L2, MIFGSM, PGD, AttackEnsemble, Linf, feature_drift, margin
from hsat.attacks.threat import eps_text
from hsat.classifiers import DecisionModel, KNNClassifier, LinearProbe, NearestCentroid
from hsat.data import PatchDataset, patch_loader, read_opensrh, write_synthetic_cohort
from hsat.embedding import embed
from hsat.models import frozen, load_encoder
from hsat.recipes import read_recipe
from hsat.types import EmbeddingTable, ThreatModel

ROOT = Path(__file__).resolve().parents[1]
NOT_RUN = "not run"
OURS, AUTO = "hsat, AttackEnsemble.standard", "AutoAttack (standard)"


@dataclass
class Problem:
    """One module, images, labels and ball, and what was noted about an attack on them."""

    model: DecisionModel
    x: Tensor
    y: Tensor
    threat: ThreatModel
    guides: Tensor
    seed: int
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def eps(self) -> float:
        """The radius as a number."""
        return float(self.threat.eps)

    @property
    def norm(self) -> str:
        """Linf or L2."""
        return type(self.threat).__name__

    @property
    def wrong_classes(self) -> int:
        """How many classes can be aimed at."""
        return len(self.model.fitted.class_names) - 1


def ours(problem: Problem) -> Tensor:
    """The ensemble as it is without any option."""
    ensemble = AttackEnsemble.standard(problem.threat)
    ids, generator = torch.arange(len(problem.x)), torch.Generator().manual_seed(problem.seed)
    result = ensemble.run(problem.x, margin(problem.model, problem.y), generator=generator, ids=ids)
    assert result.members is not None
    problem.notes["members"] = {member.name: [member.seen, member.newly_broken] for member in result.members}
    return result.x_adv


def drift(kind: type[PGD] | type[MIFGSM]) -> Callable[[Problem], Tensor]:
    """An attack of the paper, which does not look at the decision."""

    def attack(problem: Problem) -> Tensor:
        single = kind(problem.threat, step_size=problem.eps / 4, steps=10, random_start=True)
        ids, generator = torch.arange(len(problem.x)), torch.Generator().manual_seed(problem.seed)
        return single(problem.x, feature_drift(problem.model.embed, problem.x), generator=generator, ids=ids)

    return attack


class _Lines(logging.Handler):
    """Keeps what a library logs."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def auto_attack(problem: Problem) -> Tensor:
    """AutoAttack, and what each of its members left."""
    from pyautoattack import AutoAttack

    attack = AutoAttack(problem.model, norm=problem.norm, eps=problem.eps, seed=problem.seed, device="cpu")
    attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = problem.wrong_classes
    attack.square.n_queries = 1000
    lines, logger = _Lines(), attack.logger
    logger.addHandler(lines)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    try:
        x_adv: Tensor = attack.run_standard_evaluation(problem.x, problem.y, batch_size=len(problem.x))[0]
    finally:
        logger.removeHandler(lines)
    left = [re.match(r"robust accuracy after ([A-Z-]+): ([\d.]+)%", line) for line in lines.lines]
    problem.notes["left after"] = {each[1]: float(each[2]) for each in left if each}
    return x_adv


def adv_lib_apgd(problem: Problem, *, targeted: bool = False) -> Tensor:
    """Auto-PGD of adversarial-library on the logit ratio, as AutoAttack configures it."""
    sys.modules.setdefault("visdom", types.ModuleType("visdom"))  # for live plots; it no longer builds everywhere
    from adv_lib.attacks.auto_pgd import apgd, apgd_targeted

    torch.manual_seed(problem.seed)
    norm = float("inf") if problem.norm == "Linf" else 2
    if targeted:
        x_adv: Tensor = apgd_targeted(
            problem.model, problem.x, problem.y, problem.eps, norm, n_iter=100, num_targets=problem.wrong_classes
        )
        return x_adv
    plain: Tensor = apgd(problem.model, problem.x, problem.y, problem.eps, norm, n_iter=100, loss_function="dlr")
    return plain


def art_features(problem: Problem) -> Tensor:
    """ART's feature adversaries, 100 steps of eps / 4 towards the nearest training patch of another class."""
    if problem.norm != "Linf":
        raise NotImplementedError("Linf only")
    from art.attacks.evasion import FeatureAdversariesPyTorch
    from art.estimators.classification import PyTorchClassifier

    class Features(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return problem.model.embed(images)

    class Decision(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            return problem.model.classify(z)

    classifier = PyTorchClassifier(
        nn.Sequential(Features(), Decision()).eval(),
        loss=nn.CrossEntropyLoss(),
        input_shape=tuple(problem.x.shape[1:]),
        nb_classes=problem.wrong_classes + 1,
        clip_values=(0.0, 1.0),
        device_type="cpu",
    )
    attack = FeatureAdversariesPyTorch(
        classifier,
        delta=problem.eps,
        step_size=problem.eps / 4,
        max_iter=100,
        layer=0,
        batch_size=len(problem.x),
        verbose=False,
    )
    return torch.from_numpy(attack.generate(problem.x.numpy(), problem.guides.numpy()))


ATTACKS: dict[str, tuple[str, Callable[[Problem], Tensor]]] = {
    OURS: ("hsat", ours),
    AUTO: ("pyautoattack", auto_attack),
    "adversarial-library, APGD on the logit ratio": ("adv_lib", adv_lib_apgd),
    "adversarial-library, targeted APGD": ("adv_lib", lambda problem: adv_lib_apgd(problem, targeted=True)),
    "ART, feature adversaries": ("art", art_features),
    "the paper's PGD on the features": ("hsat", drift(PGD)),
    "the paper's MI-FGSM on the features": ("hsat", drift(MIFGSM)),
}
"""By name: the package that must be there, and the attack."""


@contextlib.contextmanager
def counted_passes(backbone: nn.Module) -> Iterator[dict[str, int]]:
    """Counts images that go through a module, and those of passes that were made for a gradient."""
    count = {"forwards": 0, "backwards": 0}

    def note(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        count["forwards"] += len(inputs[0])
        count["backwards"] += len(inputs[0]) * (torch.is_grad_enabled() and inputs[0].requires_grad)

    handle = backbone.register_forward_pre_hook(note)
    try:
        yield count
    finally:
        handle.remove()


def measure(problem: Problem, backbone: nn.Module, attack: Callable[[Problem], Tensor]) -> dict[str, Any]:
    """One attack, judged after projection."""
    problem.notes.clear()
    with counted_passes(backbone) as passes, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        begin = time.process_time()
        x_adv = attack(problem).detach().to(problem.x.dtype)
        seconds = time.process_time() - begin
    inside = problem.threat.project(x_adv, problem.x)
    outside = int((inside != x_adv).flatten(1).any(1).sum())
    with torch.no_grad():
        robust = problem.model(inside).argmax(1) == problem.y
    result = {"robust": robust.tolist(), "seconds": seconds, "outside the ball": outside, **passes}
    return result | {"notes": dict(problem.notes)}


def measured(problem: Problem, backbone: nn.Module, name: str, file: Path, *, finished: bool) -> dict[str, Any]:
    """The same, kept in a file; finished: only what is there already."""
    package, attack = ATTACKS[name]
    if file.exists():
        kept: dict[str, Any] = json.loads(file.read_text())
        return kept
    if finished:
        return {"missing": NOT_RUN}
    if importlib.util.find_spec(package) is None:
        return {"missing": f"{package} is not installed"}
    try:
        result = measure(problem, backbone, attack)
    except NotImplementedError as reason:
        return {"missing": str(reason)}
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".tmp")
    unfinished.write_text(json.dumps(result) + "\n")
    os.replace(unfinished, file)
    return result


def guide_images(bank: EmbeddingTable, images: Tensor, z: Tensor, y: Tensor) -> Tensor:
    """For each embedding the training image that is nearest to it and of another class."""
    unit = torch.nn.functional.normalize(z.double(), dim=1)
    similarity = unit @ torch.from_numpy(np.asarray(bank.z, dtype=np.float64)).T
    other = torch.from_numpy(bank.label)[None] != y[:, None]
    return images[torch.where(other, similarity, -2.0).argmax(1)]


def read_images(loader: Any) -> tuple[Tensor, Tensor]:
    """All images and labels of a loader."""
    batches = list(loader)
    return torch.cat([batch.images for batch in batches]), torch.cat([batch.label for batch in batches])


def problems(options: argparse.Namespace) -> Iterator[tuple[str, str, Problem, nn.Module]]:
    """(encoder, decision, problem, backbone) for everything that is asked for."""
    size = read_recipe("demo")["data"]["image_size"]
    cohort = read_opensrh(write_synthetic_cohort(options.runs / "cohort", seed=options.seed))
    train, val = (
        patch_loader(PatchDataset(cohort, split, image_size=size), batch_size=64) for split in ("train", "val")
    )
    images, labels = read_images(val)
    bank_images, _ = read_images(train)
    rows = torch.arange(0, len(images), max(1, len(images) // options.patches))[: options.patches]
    x, y = images[rows], labels[rows].long()
    settings = {"knn": KNNClassifier(k=options.k), "linear": LinearProbe(), "centroid": NearestCentroid()}
    for name in options.encoders:
        encoder = load_encoder(options.demo / name / "final.safetensors")
        with frozen(encoder):
            bank = embed(encoder, train, layer="features")
            with torch.no_grad():
                guides = guide_images(bank, bank_images, encoder.features(x), y)
            for decision in options.decisions:
                model = DecisionModel(encoder, settings[decision].fit(bank)).eval()
                for threat, n in [(Linf(level / 255), len(x)) for level in options.levels] + [
                    (L2(eps), min(options.l2_patches, len(x))) for eps in options.l2
                ]:
                    yield (
                        name,
                        decision,
                        Problem(model, x[:n], y[:n], threat, guides[:n], options.seed),
                        encoder.backbone,
                    )


def compare(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each encoder, decision, ball and attack."""
    rows = []
    for encoder, decision, problem, backbone in problems(options):
        with torch.no_grad():
            clean = (problem.model(problem.x).argmax(1) == problem.y).float().mean().item()
        ball = f"{problem.norm} {eps_text(problem.eps)}"
        about = {"decision": decision, "encoder": encoder, "ball": ball, "patches": len(problem.x), "clean": clean}
        folder = options.runs / f"{encoder}-{decision}-{ball.replace('/', '_').replace(' ', '-')}-{len(problem.x)}"
        results = {}
        for name in options.attacks:
            file = folder / f"{re.sub('[^A-Za-z]+', '_', name)}.json"
            results[name] = measured(problem, backbone, name, file, finished=options.finished)
        for name, result in results.items():
            row = about | {"attack": name} | {key: value for key, value in result.items() if key != "robust"}
            if "robust" in result:
                row |= {"left": sum(result["robust"])}
                if "robust" in results.get(OURS, {}):
                    pairs = list(zip(result["robust"], results[OURS]["robust"], strict=True))
                    row |= {"it breaks and hsat does not": sum(mine and not its for its, mine in pairs)}
                    row |= {"hsat breaks and it does not": sum(its and not mine for its, mine in pairs)}
                if "seconds" in results.get(AUTO, {}):
                    row |= {"share of AutoAttack's time": result["seconds"] / results[AUTO]["seconds"]}
            rows.append(row)
            print(*(row.get(key, "") for key in ("encoder", "decision", "ball", "attack", "left")), flush=True)
    return rows


def table(rows: list[dict[str, Any]]) -> list[str]:
    """The rows of one decision in Markdown."""
    head = ("encoder", "ball", "attack", "left, %", "it breaks, hsat does not", "hsat breaks, it does not", "CPU s")
    head = (*head, "of AutoAttack's", "forwards", "backwards", "left the ball")
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    for row in rows:
        if row.get("missing") == NOT_RUN:
            continue  # the line above all tables counts them
        cells = [row["encoder"], row["ball"], row["attack"]]
        if "missing" in row:
            cells += [row["missing"], *[""] * 7]
        else:
            share = row.get("share of AutoAttack's time")
            cells += [f"{100 * row['left'] / row['patches']:.1f}"]
            cells += [str(row.get(key, "")) for key in ("it breaks and hsat does not", "hsat breaks and it does not")]
            cells += [f"{row['seconds']:.1f}", "" if share is None else f"{share:.2f}"]
            cells += [str(row[key]) for key in ("forwards", "backwards", "outside the ball")]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def losses(rows: list[dict[str, Any]]) -> str:
    """How often the ensemble lost, in one sentence."""
    lost = sum(row.get("it breaks and hsat does not", 0) for row in rows)
    judged = [row for row in rows if "left" in row and row["attack"] != OURS]
    absent = {(row["attack"], row["missing"]): 0 for row in rows if "missing" in row}
    missing = [
        f"{name} ({reason}, {sum((r['attack'], r.get('missing')) == (name, reason) for r in rows)} times)"
        for name, reason in absent
    ]
    text = f"Patches that another attack breaks and hsat's ensemble does not: {lost}, in {len(judged)} comparisons."
    return text + "".join(f"  Not compared: {each}." for each in missing)


def document(rows: list[dict[str, Any]], about: dict[str, Any]) -> str:
    """The page."""
    lines = [
        "# The ensemble next to other libraries' attacks",
        "",
        "Patch accuracy that each attack leaves on the demo's encoders, judged after projection by the same module.",
        "Written by `benchmarks/ensemble_strength.py`, which says what is compared.  `left the ball`: results that the",
        "threat model had to move, if only by a rounding.  Accuracies on tissue will differ.",
        "",
        losses(rows),
        "",
    ]
    for decision in dict.fromkeys(row["decision"] for row in rows):
        chosen = [row for row in rows if row["decision"] == decision]
        clean = {f"{row['encoder']} {100 * row['clean']:.1f} %" for row in chosen if row["ball"].startswith("Linf")}
        lines += [f"## {decision}", "", f"Clean: {', '.join(sorted(clean))}.", "", *table(chosen), ""]
    return "\n".join([*lines, "; ".join(f"{key} {value}" for key, value in about.items()), ""])


def main() -> None:
    """Measure what is missing, write, and say how often the ensemble lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=Path("runs/demo"))
    parser.add_argument("--runs", type=Path, default=Path("runs/ensemble_strength"))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/ensemble_strength.md")
    parser.add_argument("--encoders", nargs="+", default=["hidisc", "hsat"])
    parser.add_argument("--decisions", nargs="+", default=["knn", "linear", "centroid"])
    parser.add_argument("--attacks", nargs="+", default=list(ATTACKS), choices=list(ATTACKS))
    parser.add_argument("--levels", nargs="*", type=int, default=[4, 8], help="Linf radii, in 255ths")
    parser.add_argument("--l2", nargs="*", type=float, default=[0.5], help="L2 radii")
    parser.add_argument("--patches", type=int, default=112)
    parser.add_argument("--l2_patches", type=int, default=40)
    parser.add_argument("--k", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--finished", action="store_true", help="write what --runs holds and run nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = compare(options)
    about = {"machine": f"{platform.machine()}, {os.cpu_count()} cores, one thread used", "seed": options.seed}
    about |= {"load at the end (runnable processes)": f"{os.getloadavg()[2]:.0f}"}  # others slow CPU time, too
    about |= {"k": options.k, "Python": platform.python_version(), "hsat": hsat.__version__}
    about |= package_versions()
    text = document(rows, about)
    options.out.write_text(text)
    options.out.with_suffix(".json").write_text(json.dumps({"about": about, "results": rows}, indent=1) + "\n")
    sys.stdout.write(losses(rows) + "\n")


def package_versions() -> dict[str, str]:
    """Of what is installed of the packages that are compared, and of what computes."""
    found = {}
    for name in ("torch", "numpy", "pyautoattack", "adv-lib", "adversarial-robustness-toolbox"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


if __name__ == "__main__":
    main()
