"""The table of the evaluations and of what each of them can do: one pass and one store serve them all.

|            | goes on after kill -9 | two ranks | cached embeddings | decision as target | ensemble or foreign attack |
| ---------- | --------------------- | --------- | ----------------- | ------------------ | -------------------------- |
| whitebox   | yes                   | yes       | yes               | yes                | yes                        |
| transfer   | yes                   | yes       | yes               | yes                | yes                        |
| budget     | yes                   | yes       | yes               | yes                | yes                        |
| export     | yes                   | yes       | yes               | yes                | yes                        |
| linear     | yes                   | yes       | yes               | yes                | yes                        |
| classifier | yes                   | yes       | yes               | always             | yes                        |
| slides     | yes                   | yes       | yes               | yes                | an ensemble only           |
| certify    | yes                   | yes       | yes               | no attack: its check takes all of them          |

The first of them measures natural shifts beside its attack.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from hsat.attacks import Linf, from_torchattacks

SHARED = '''
import dataclasses, json, os, signal, sys, warnings
from pathlib import Path
import torch
from torch import nn
from hsat.attacks import L2, PGD, AttackEnsemble, Linf, NaturalShift
from hsat.data import PatchDataset, patch_loader, read_folders, slide_loader
from hsat.classifiers import MIL, GatedAttention, KNNClassifier, LinearProbe
from hsat.eval import *

EPS = 4 / 255
GRADIENT = PGD(Linf(EPS), step_size=2 / 255, steps=2)
ENSEMBLE = AttackEnsemble(Linf(EPS), steps=2, decision_steps=2, restarts=1, queries=2)
SHIFTS = {name: NaturalShift.standard()[name] for name in ("stain 2", "jpeg 3", "brightness 1")}
COMMON = dict(classifier=KNNClassifier(k=3), provenance=Provenance(model="m"))
ATTACKING = ("whitebox", "transfer", "budget", "export", "linear", "classifier", "slides")
NAMES = (*ATTACKING, "certify")
TARGETS = {"features": "representation", "decision": "decision"}  # what slides call them


class Network(nn.Module):
    """Counts the images that it sees, and kills its process after some of them."""

    def __init__(self, dies_after=None):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.Linear(16, 6)
        self.images, self.dies_after = 0, dies_after

    def features(self, x):
        self.images += len(x)
        if self.dies_after is not None and self.images > self.dies_after:
            os.kill(os.getpid(), signal.SIGKILL)
        return nn.functional.adaptive_avg_pool2d(self.norm(self.conv(x)).tanh(), 2).flatten(1)

    def forward(self, x):
        return self.head(self.features(x))


def cohort_in(root):
    return read_folders(root).with_split(val_fraction=0.5, seed=0)


def evaluate(name, root, out, network, *, target="features", attack=GRADIENT, run=RunOptions()):
    """The records of an evaluation, and what else it gives, as texts; an export is written to `out`."""
    cohort = cohort_in(root)
    bank, queries = (patch_loader(PatchDataset(cohort, split), batch_size=3) for split in ("train", "val"))
    options = dict(COMMON, target=target, run=run)
    scoring = Scoring(bootstrap=10)
    if name == "whitebox":
        attacks = {"attack": attack, **SHIFTS}
        result = evaluate_whitebox(network, bank, queries, attacks, scoring=scoring, **options)
    elif name == "linear":  # attacked, and a kNN beside it
        options["classifier"] = [LinearProbe(), KNNClassifier(k=3)]
        result = evaluate_whitebox(network, bank, queries, {"attack": attack}, scoring=scoring, **options)
    elif name == "classifier":
        torch.manual_seed(1)
        model = nn.Sequential(network, nn.Linear(6, 2))
        result = evaluate_classifier(model, queries, {"attack": attack}, scoring=scoring, run=run)
    elif name == "slides":
        torch.manual_seed(2)
        classifier = MIL(GatedAttention(16, 2, hidden=4), cohort.class_names)
        slides = slide_loader(PatchDataset(cohort, "val"), batch_size=3)
        options = dict(target=TARGETS[target], scoring=scoring, run=run, provenance=COMMON["provenance"])
        options |= dict(fractions=(0.5, 1.0))
        result = evaluate_slides(network, slides, classifier, {"attack": attack}, **options)
    elif name == "budget":
        result = evaluate_budget(network, bank, queries, attack, scoring=scoring, **options)
    elif name == "export":
        result = save_adversarial(out, network, bank, cohort, attack, options=ExportOptions(batch_size=3), **options)
    elif name == "transfer":
        torch.manual_seed(1)
        encoders = {"a": network, "b": nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 5))}
        options["provenance"] = {}
        result = evaluate_transfer(encoders, bank, queries, {"attack": attack}, scoring=scoring, **options)
    else:
        smoothing = Smoothing(sigma=0.05, selection=2, samples=6, alpha=0.2)
        result = certify(network, bank, queries, smoothing, scoring=scoring, run=run, **COMMON)
    said = [json.dumps(dataclasses.asdict(record), sort_keys=True) for record in result.records]
    if name == "export":
        said += [path.name + path.read_bytes().hex() for path in sorted(Path(out).rglob("*.png"))]
    return said
'''
KILLED = (
    SHARED
    + """
warnings.simplefilter("error")
torch.set_num_threads(1)
root, out, limits = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
for name in NAMES:
    child = os.fork()  # before anything of torch has run here
    if not child:
        run = RunOptions(resume_dir=out / name / "state")
        evaluate(name, root, out / name / "files", Network(limits[name]), run=run)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL, name
"""
)
RANK = (
    SHARED
    + """
import torch.distributed as dist
warnings.simplefilter("error")
rank, store, root, out = int(sys.argv[1]), sys.argv[2], sys.argv[3], Path(sys.argv[4])
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
answers = {}
for name in NAMES:
    network = Network()
    answers[name] = evaluate(name, root, out / "files", network), network.images
(out / f"answers{rank}.json").write_text(json.dumps(answers))
dist.destroy_process_group()
"""
)
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


@pytest.fixture(scope="module")
def shared():
    names: dict = {}
    exec(SHARED, names)
    return SimpleNamespace(**names)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Two classes of noise of another brightness: 4 patients, 4 patches each, in two splits."""
    folder, rng = tmp_path_factory.mktemp("cohort"), np.random.default_rng(0)
    for number in range(4):
        for patch in range(4):
            path = folder / ("adenoma", "normal")[number % 2] / f"p{number}" / f"s{patch // 2}" / f"{patch}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 200, (12, 12, 3)) + 12 * (number % 2)
            Image.fromarray(pixels.astype(np.uint8)).save(path)
    return folder


@pytest.fixture(scope="module")
def whole(shared, root, tmp_path_factory):
    """Each evaluation by one process that nobody interrupts: what it says, and how many images it encoded."""
    answers = {}
    for name in shared.NAMES:
        network = shared.Network()
        said = shared.evaluate(name, root, tmp_path_factory.mktemp(name) / "files", network)
        answers[name] = said, network.images
    return answers


EVALUATIONS = ("whitebox", "transfer", "budget", "export", "linear", "classifier", "slides", "certify")


@pytest.fixture(scope="module")
def killed(shared, root, whole, tmp_path_factory):
    """A folder with what each evaluation leaves that was killed at three quarters of its images."""
    out = tmp_path_factory.mktemp("killed")
    (out / "killed.py").write_text(KILLED)
    limits = json.dumps({name: images * 3 // 4 for name, (_, images) in whole.items()})
    words = [sys.executable, out / "killed.py", str(root), str(out), limits]
    done = subprocess.run(words, stderr=subprocess.PIPE, env=ENVIRONMENT, timeout=300, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return out


@pytest.mark.parametrize("name", EVALUATIONS)
def test_it_goes_on_after_kill_9(name, shared, root, whole, killed):
    """The second call computes the missing batches only, and says the same."""
    said, images = whole[name]
    batches = list((killed / name / "state").glob("*batch-*"))
    assert batches and not (killed / name / "files").exists()
    network, run = shared.Network(), shared.RunOptions(resume_dir=killed / name / "state")
    assert shared.evaluate(name, root, killed / name / "files", network, run=run) == said
    assert 0 < network.images < 0.8 * images
    assert len(list((killed / name / "state").glob("*batch-*"))) > len(batches)
    assert not list((killed / name).rglob("*.partial"))


@pytest.fixture(scope="module")
def ranks(root, tmp_path_factory):
    """What two processes over gloo say, each."""
    out = tmp_path_factory.mktemp("ranks")
    (out / "rank.py").write_text(RANK)
    running = [
        subprocess.Popen(
            [sys.executable, out / "rank.py", str(rank), f"file://{out}/store", str(root), str(out)],
            stderr=subprocess.PIPE,
            env=ENVIRONMENT,
        )
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=300)[1].decode() for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], errors
    return [json.loads((out / f"answers{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", EVALUATIONS)
def test_two_ranks_say_what_one_process_says(name, whole, ranks):
    """Records bit for bit, and the files of an export, which both ranks write; each encodes its share."""
    said, images = whole[name]
    assert [answers[name][0] for answers in ranks] == [said, said]
    seen = [answers[name][1] for answers in ranks]
    assert max(seen) < 0.8 * images and sum(seen) == images


@pytest.mark.parametrize("name", EVALUATIONS)
def test_clean_embeddings_are_cached(name, shared, root, whole, tmp_path):
    """Of bank and queries; certification counts votes on noisy images, and so finds its bank only; slides need none."""
    said, images = whole[name]
    seen = []
    for number in range(2):
        network, run = shared.Network(), shared.RunOptions(cache_dir=tmp_path / "cache")
        assert shared.evaluate(name, root, tmp_path / f"files{number}", network, run=run) == said
        seen.append(network.images)
    assert seen[0] <= images - 8 * (name == "transfer"), "a transfer reads the queries of a surrogate twice"
    has_bank = name not in ("certify", "classifier", "slides")  # certification counts votes on noisy queries
    assert images - seen[1] >= (16 if has_bank else 8)


@pytest.mark.parametrize("name", EVALUATIONS)
def test_the_decision_may_be_the_target(name, shared, root, tmp_path):
    if name == "certify":  # nothing is attacked; the attack that checks certificates is on the decision by default
        assert check(shared, root).tested > 0 and check(shared, root, target="features").tested > 0
        return
    said = shared.evaluate(name, root, tmp_path / "files", shared.Network(), target="decision")
    records = [json.loads(line) for line in said if line.startswith("{")]
    assert {record["target"] for record in records} == {"decision"}
    if name == "classifier":  # there is nothing else to attack
        return
    drift = shared.evaluate(name, root, tmp_path / "drift", shared.Network(), target="features")
    assert values(records) != values([json.loads(line) for line in drift if line.startswith("{")])


class OfAnotherLibrary:
    """An attack as torchattacks has them, that leaves the ball and draws from torch's global generator."""

    def __init__(self, model, eps=8 / 255):
        self.model, self.eps, self.normalization_used = model, eps, None

    def set_model(self, model):
        self.model = model

    def set_device(self, device):
        pass

    def __call__(self, images, labels):
        start = (images + self.eps * (2 * torch.rand_like(images) - 1)).requires_grad_()
        torch.nn.functional.cross_entropy(self.model(start), labels).backward()
        return (images + self.eps * start.grad.sign()).clamp(0, 1)


@pytest.mark.parametrize("name", EVALUATIONS)
def test_the_attack_may_be_another_librarys(name, shared, root, tmp_path):
    """The same bytes twice; it left the ball of half the size, and says so."""
    if name == "certify":
        theirs = from_torchattacks(OfAnotherLibrary, threat=shared.L2(0.1))
        assert not check(shared, root, attack=theirs).violated
        return
    theirs = from_torchattacks(OfAnotherLibrary, threat=Linf(shared.EPS))
    if name == "slides":  # one decision for many images is no model of images
        with pytest.raises(ValueError, match="attack 'attack' failed on slide"):
            shared.evaluate(name, root, tmp_path / "files", shared.Network(), attack=theirs)
        return
    said, again = (
        shared.evaluate(name, root, tmp_path / folder, shared.Network(), target="decision", attack=theirs)
        for folder in ("first", "second")
    )
    assert said == again
    records = [json.loads(line) for line in said if line.startswith("{")]
    attacked = [record for record in records if record["attack"] == repr(theirs)]
    assert attacked and all(record["backwards"] == 1 for record in attacked)
    flags = {flag for record in attacked for flag in record["flags"] if "left the threat model" in flag}
    assert flags and all("by up to 0.0157 at a pixel" in flag for flag in flags)


@pytest.mark.parametrize("name", EVALUATIONS)
def test_the_attack_may_be_an_ensemble(name, shared, root, tmp_path):
    if name == "certify":  # nothing is attacked; an ensemble in L2 may check the certificates
        ensemble = shared.AttackEnsemble(shared.L2(0.1), steps=2, decision_steps=2, restarts=1, queries=2)
        assert not check(shared, root, attack=ensemble).violated
        return
    said = shared.evaluate(name, root, tmp_path / "files", shared.Network(), attack=shared.ENSEMBLE)
    records = [json.loads(line) for line in said if line.startswith("{")]
    attacked = [record for record in records if record["attack"].startswith("AttackEnsemble")]
    assert attacked and all(record["backwards"] > 0 for record in attacked)
    if name != "slides":  # where all members climb one number
        assert all("Square" in record["settings"]["members"] for record in attacked)


def check(shared, root, **options):
    cohort = shared.cohort_in(root)
    bank, queries = (shared.patch_loader(shared.PatchDataset(cohort, part), batch_size=4) for part in ("train", "val"))
    smoothing = shared.Smoothing(sigma=0.05, selection=5, samples=40, alpha=0.2)
    network = shared.Network()
    certified = shared.certify(network, bank, queries, smoothing, classifier=shared.KNNClassifier(k=3))
    chosen = shared.CheckOptions(steps=2, copies=2, samples=40, limit=3)
    return shared.check_certificates(network, certified, queries, options=chosen, **options)


def values(records):
    return [(record["attack_name"], record["level"], record["metric"], record["value"]) for record in records]
