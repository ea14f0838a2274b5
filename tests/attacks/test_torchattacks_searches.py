"""The searches next to torchattacks: the same images where the definitions coincide, and at least its strength."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hsat.attacks import APGD, DIFGSM, L2, NIFGSM, PGD, TIFGSM, VMIFGSM, Linf, Square, classification, dlr, margin
from hsat.attacks.square import bump

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torchattacks = pytest.importorskip("torchattacks", reason='needs the peer: pip install "hsat[crosscheck]"')

SIDE, CLASSES, EPS = 10, 5, 1 / 32
NUMBERS = {"eps": EPS, "alpha": 1 / 128, "steps": 6}
OURS = {"step_size": 1 / 128, "steps": 6}


def images_and_labels(n: int, seed: int):
    patterns = torch.randn(CLASSES, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(99))
    patterns = 0.25 * F.avg_pool2d(patterns, 3, 1, 1)
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES, (n,), generator=generator)
    noise = 0.15 * torch.randn(n, 3, SIDE, SIDE, generator=generator)
    return (0.5 + patterns[labels] + noise).clamp(0, 1), labels


@pytest.fixture(scope="module")
def trained():
    """A small network that learned the patterns, and images of its own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = nn.Conv2d(3, 12, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(12 * 16, 24), nn.ReLU()
        model = nn.Sequential(*layers, nn.Linear(24, CLASSES))
    x, labels = images_and_labels(800, 1)
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    for rows in torch.arange(800).split(50) * 3:
        optimiser.zero_grad()
        F.cross_entropy(model(x[rows]), labels[rows]).backward()
        optimiser.step()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model.eval(), *images_and_labels(80, 7)


def accuracy(model, x, labels) -> float:
    return 100 * float((model(x).argmax(1) == labels).float().mean())


MORE = {"decay": 1.0, **NUMBERS}


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (NIFGSM(Linf(EPS), **OURS), lambda m: torchattacks.NIFGSM(m, **NUMBERS)),
        (NIFGSM(Linf(EPS), scales=5, **OURS), lambda m: torchattacks.SINIFGSM(m, m=5, **NUMBERS)),
        # a side of 10 pixels can only shrink to 9, and then lies in the upper left corner: nothing is left to chance
        (DIFGSM(Linf(EPS), probability=1.0, **OURS), lambda m: torchattacks.DIFGSM(m, diversity_prob=1.0, **MORE)),
        (
            TIFGSM(Linf(EPS), size=5, **OURS),
            lambda m: torchattacks.TIFGSM(m, len_kernel=5, diversity_prob=0.0, **MORE),
        ),
        (TIFGSM(Linf(EPS), probability=1.0, **OURS), lambda m: torchattacks.TIFGSM(m, diversity_prob=1.0, **MORE)),
    ],
    ids=["NI", "SI-NI", "DI", "TI", "TI-DIM"],
)
def test_same_adversarial_images(trained, ours, theirs):
    model, x, labels = trained
    x = 0.3 + 0.4 * x[:20]  # away from 0 and 1, where the peer looks at points outside the pixel range
    model, x, labels = double(model), x.double(), labels[:20]
    peer = theirs(model)
    if hasattr(peer, "stacked_kernel"):
        peer.stacked_kernel = peer.stacked_kernel.double()
    expected = peer(x, labels)
    got = ours(x, classification(model, labels))
    assert (expected - x).abs().max() > 0.9 * EPS
    assert float(((got - expected).abs() > 1e-6).double().mean()) < 0.002


def double(model):
    """A copy in float64."""
    return copy.deepcopy(model).double()


def test_same_images_with_variance_tuning(trained, monkeypatch):
    model, x, labels = trained
    model, x, labels = double(model), 0.3 + 0.4 * x[:20].double(), labels[:20]
    monkeypatch.setattr(torch, "randn_like", torch.empty_like)  # the peer draws normal noise first, for nothing
    torch.manual_seed(3)
    expected = torchattacks.VMIFGSM(model, N=4, beta=1.5, **NUMBERS)(x, labels)
    torch.manual_seed(3)
    got = VMIFGSM(Linf(EPS), samples=4, **OURS)(x, classification(model, labels))
    assert float(((got - expected).abs() > 1e-6).double().mean()) < 0.002


@pytest.mark.parametrize("loss", ["ce", "dlr"])
def test_same_trajectory_of_apgd(trained, loss):
    """With 100 steps the checkpoints agree.  The peer halves at equality too: rho a hair above 0.75 does the same."""
    model, x, labels = trained
    model, x, labels = double(model), x[:30].double(), labels[:30]
    torch.manual_seed(5)
    peer = torchattacks.APGD(model, eps=EPS, steps=100, loss=loss)
    best, _, value, _ = peer.attack_single_run(x, labels)
    torch.manual_seed(5)
    t = 2 * torch.rand(x.shape) - 1
    start = x + EPS * t / t.flatten(1).abs().amax(1)[:, None, None, None]
    objective = (classification if loss == "ce" else dlr)(model, labels)
    result = APGD(Linf(EPS), steps=100, rho=0.7501).run(x, objective, start=start)
    same = ((result.x_adv - best).abs().flatten(1).amax(1) < 1e-6) & ((result.value - value).abs() < 1e-6)
    assert float(same.double().mean()) >= 0.9, f"{int(same.sum())} of 30 images agree"
    assert float(result.value.mean()) >= float(value.mean()) - 1e-3


@pytest.mark.parametrize("threat", [Linf(EPS), L2(0.5)], ids=repr)
@pytest.mark.parametrize("loss", ["ce", "dlr"])
def test_apgd_is_at_least_as_strong(trained, threat, loss):
    model, x, labels = trained
    objective = (classification if loss == "ce" else dlr)(model, labels)
    found = {"ours": [], "theirs": [], "pgd": []}
    for seed in range(2):
        seeded, broken = torch.Generator().manual_seed(seed), lambda v: model(v).argmax(1) != labels
        ours = APGD(threat, steps=12)(x, objective, generator=seeded, success=broken)
        numbers = {"norm": type(threat).__name__, "eps": threat.eps, "steps": 12, "loss": loss, "seed": seed}
        theirs = torchattacks.APGD(model, **numbers)(x, labels)
        plain = PGD(threat, step_size=threat.eps / 4, steps=12)(x, objective, generator=seeded, success=broken)
        for name, images in (("ours", ours), ("theirs", theirs), ("pgd", plain)):
            found[name].append(accuracy(model, images, labels))
    assert accuracy(model, x, labels) > max(found["ours"]) + 10, "the attack should be strong"
    assert min(found["ours"]) > 5, "the attack should leave something to compare"
    assert sum(found["ours"]) <= sum(found["theirs"]) + 2 * 1.0, found
    assert sum(found["ours"]) <= sum(found["pgd"]) + 2 * 1.0, found


def test_the_targeted_ratio_agrees(trained):
    model, x, labels = trained
    target = (labels + 1) % CLASSES
    expected = torchattacks.APGDT(model, n_classes=CLASSES).dlr_loss_targeted(model(x), labels, target)
    torch.testing.assert_close(dlr(model, labels, target=target)(x), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        dlr(model, labels)(x), torchattacks.APGD(model).dlr_loss(model(x), labels), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(("threat", "area"), [(Linf(2 * EPS), 0.8), (L2(1.2), 0.3)], ids=["Linf", "L2"])
def test_square_is_about_as_strong(trained, threat, area):
    """Ours draws squares per image and the peer per batch, so the peer's luck is shared: means over seeds."""
    model, x, labels = trained
    x, labels = x[:40], labels[:40]
    broken, gap = lambda v: model(v).argmax(1) != labels, margin(model, labels)
    numbers = {"norm": type(threat).__name__, "eps": threat.eps, "n_queries": 50, "p_init": area}
    left, peer = [], []
    for seed in range(4):
        seeded = torch.Generator().manual_seed(seed)
        found = Square(threat, queries=50, area=area)(x, gap, generator=seeded, success=broken)
        left.append(accuracy(model, found, labels))
        peer.append(accuracy(model, torchattacks.Square(model, seed=seed, **numbers)(x, labels), labels))
    assert sum(left) / 4 < accuracy(model, x, labels) - 5
    assert sum(left) <= sum(peer) + 4 * 6, (left, peer)


@pytest.mark.parametrize("side", [3, 5, 7])
def test_the_bump_agrees(side):
    peer = torchattacks.Square(nn.Flatten())
    drawn = peer.eta(side).double()
    mine = bump(side)
    assert torch.allclose(drawn, mine, atol=1e-6) or torch.allclose(drawn, mine.T, atol=1e-6)
