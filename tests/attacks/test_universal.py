"""Universal perturbations: the known optimum, the laws of a fixed perturbation, files, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from hsat.attacks import L2, FittedUniversal, Linf, RandomNoise, UniversalPerturbation, classification, feature_drift
from hsat.testing import DTYPES, LAWS, check_attack, check_feasible
from hsat.types import HierarchicalBatch

ASKS_NOBODY = (
    "the objective grows for every image",
    "the objective's error arrives",
    "non-finite gradients are refused",
    "start is obeyed",
    "success stops images",
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def loader(seed=0, sizes=(4, 4, 3), *, low=0.3, high=0.7, shape=(3, 5, 4)):
    batches, first = [], 0
    for size in sizes:
        images = low + (high - low) * torch.rand(size, *shape, generator=generator(seed + first))
        index = torch.arange(first, first + size)
        batches.append(HierarchicalBatch(images, index, index, index, index % 2))
        first += size
    return batches


def linear(w):
    return lambda images, batch: lambda v: (v * w).sum((1, 2, 3))


@pytest.mark.parametrize("batches", [(4, 4, 3), (11,), (1,) * 11])
def test_a_linear_objective_has_its_corner(batches):
    w = torch.randn(1, 3, 5, 4, generator=generator(1))
    settings = UniversalPerturbation(threat=Linf(0.125), step_size=0.0625, epochs=5)
    fitted = settings.fit(loader(sizes=batches), lambda v: v.flatten(1), objective=linear(w), generator=generator())
    assert torch.equal(fitted.delta, 0.125 * w.sign())
    x = loader(seed=9)[0].images
    torch.testing.assert_close(fitted(x, lambda v: v.sum()), x + 0.125 * w.sign())
    seen = torch.cat([batch.images for batch in loader(sizes=batches)])
    reached = ((seen + 0.125 * w.sign()) * w).sum((1, 2, 3)).mean()
    assert fitted.history[-1] == pytest.approx(float(reached), rel=1e-5), "the mean over images, not over batches"


def test_the_l2_optimum_of_a_linear_objective():
    w = torch.randn(1, 3, 5, 4, generator=generator(1))
    settings = UniversalPerturbation(threat=L2(0.25), step_size=0.25, epochs=40)
    fitted = settings.fit(loader(), lambda v: v.flatten(1), objective=linear(w), generator=generator())
    torch.testing.assert_close(fitted.delta, 0.25 * w / w.norm(), atol=1e-4, rtol=0)


def test_per_channel_eps_and_the_box():
    """Where an image cannot move further its gradient is cut; delta still keeps to the ball of each channel."""
    eps = torch.tensor([0.0, 0.0625, 0.125]).view(1, 3, 1, 1)
    settings = UniversalPerturbation(threat=Linf(eps), step_size=0.0625, epochs=4)
    fitted = settings.fit(loader(), lambda v: v, objective=linear(torch.ones(1, 3, 5, 4)), generator=generator())
    assert torch.equal(fitted.delta, eps.expand(1, 3, 5, 4))
    x = torch.full((2, 3, 5, 4), 0.95)
    assert torch.equal(fitted(x, lambda v: v.sum()), torch.clamp(x + eps, max=1))


def encoder(seed=0):
    torch.manual_seed(seed)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 6, 3), torch.nn.Tanh(), torch.nn.Flatten(), torch.nn.Linear(36, 8))
    return net.requires_grad_(False)


def test_drift_is_found_without_labels_and_beats_noise_on_other_images_and_a_related_encoder():
    with torch.random.fork_rng():
        net, other = encoder(0), encoder(1)
    for mine, theirs in zip(other.parameters(), net.parameters(), strict=True):
        mine.mul_(0.3).add_(theirs)  # unrelated random networks share no weakness
    batches = [HierarchicalBatch(b.images, b.patch, b.slide, b.patient) for b in loader(sizes=(8, 8))]
    settings = UniversalPerturbation(threat=Linf(0.1), step_size=0.02, epochs=10)
    before = torch.get_rng_state()
    fitted = settings.fit(batches, net, generator=generator(), note="toy")
    assert torch.equal(torch.get_rng_state(), before)
    assert fitted.history[-1] > 2 * fitted.history[0] and len(fitted.history) == 10
    x = loader(seed=77)[0].images
    for encode in (net, other):
        drift = feature_drift(encode, x)
        noisy = RandomNoise(Linf(0.1))(x, drift, generator=generator(3))
        assert drift(fitted(x, drift)).mean() > 1.5 * drift(noisy).mean()
    again = settings.fit(batches, net, generator=generator())
    assert torch.equal(again.delta, fitted.delta)
    assert not torch.equal(settings.fit(batches, net, generator=generator(1)).delta, fitted.delta)


def test_another_objective_may_use_the_labels():
    with torch.random.fork_rng():
        net = encoder()
    settings = UniversalPerturbation(threat=Linf(0.1), step_size=0.02, epochs=5)
    fitted = settings.fit(loader(), net, objective=lambda _, b: classification(net, b.label), generator=generator())
    assert fitted.history[-1] > fitted.history[0]


@pytest.fixture
def fitted():
    delta = 0.2 * torch.randn(1, 3, 5, 4, generator=generator(4))
    return FittedUniversal(threat=Linf(8 / 255), delta=delta, settings="by hand", history=(0.1, 0.2), note="toy")


def test_a_fitted_perturbation_keeps_the_contract(fitted):
    assert check_attack(fitted) == tuple(law for law in LAWS if law not in ASKS_NOBODY)
    l2 = FittedUniversal(threat=L2(0.3), delta=fitted.delta)
    assert check_attack(l2) == check_attack(fitted)
    for dtype in DTYPES:
        x = torch.rand(2, 3, 5, 4, generator=generator()).to(dtype)
        check_feasible(l2(x, lambda v: v.sum()), x, L2(0.3))


def test_run_says_what_it_did(fitted):
    x = loader()[0].images
    result = fitted.run(x, lambda v: v.mean((1, 2, 3)), success=lambda v: v.mean((1, 2, 3)) > 0.5)
    torch.testing.assert_close(result.start_value, x.mean((1, 2, 3)))
    torch.testing.assert_close(result.value, result.x_adv.mean((1, 2, 3)))
    assert torch.equal(result.success, result.value > 0.5)
    assert (result.forwards, result.backwards, fitted.random_start) == (2, 0, False)
    short = fitted.run(x, torch.sum, score=False)
    assert torch.equal(short.x_adv, result.x_adv) and short.forwards == 0


@pytest.mark.parametrize("threat", [Linf(8 / 255), L2(0.5), Linf(torch.tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1))])
def test_files_give_back_the_same_attack(fitted, threat, tmp_path):
    wanted = FittedUniversal(threat=threat, delta=fitted.delta, settings="s", history=(0.5,), note="n")
    found = FittedUniversal.load(wanted.save(tmp_path / "deep" / "u.safetensors"))
    assert repr(found) == repr(wanted) and torch.equal(found.delta, wanted.delta)
    assert (found.threat, found.history) == (threat, (0.5,))
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["u.safetensors"]


def test_other_files_are_refused(fitted, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"u\.safetensors"):
        FittedUniversal.load(tmp_path / "u.safetensors")
    (tmp_path / "junk").write_bytes(b"junk")
    save_file({"w": torch.ones(2)}, tmp_path / "other")
    save_file({"w": torch.ones(2)}, tmp_path / "hollow", {"format": "hsat universal perturbation 1", "about": "{}"})
    broken = {"threat": "Linf", "eps": 9.0, "low": 0.0, "high": 1.0, "settings": "", "history": [], "note": ""}
    about = {"format": "hsat universal perturbation 1", "about": json.dumps(broken)}
    save_file({"delta": torch.ones(1, 1, 1, 1)}, tmp_path / "large", about)
    for name in ("junk", "other", "hollow", "large"):
        with pytest.raises(ValueError, match=name):
            FittedUniversal.load(tmp_path / name)


def test_images_of_another_size_name_both_sizes(fitted):
    with pytest.raises(ValueError, match=r"3, 5, 4.*\(2, 3, 6, 4\)"):
        fitted(torch.rand(2, 3, 6, 4), lambda v: v.sum())
    settings = UniversalPerturbation(threat=Linf(0.1), step_size=0.1, epochs=1)
    mixed = [*loader(sizes=(2,)), *loader(sizes=(2,), shape=(3, 6, 4))]
    with pytest.raises(ValueError, match=r"\(3, 5, 4\).*\(3, 6, 4\)"):
        settings.fit(mixed, lambda v: v.mean((2, 3)), generator=generator())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"threat": 0.1}, "Linf or L2"),
        ({"threat": Linf(torch.tensor([0.1, 0.2]))}, "one eps for all"),
        ({"step_size": 0.0}, "step_size"),
        ({"epochs": 0}, "epochs"),
        ({"distance": "cos"}, "cosine"),
    ],
)
def test_settings_are_checked(options, words):
    with pytest.raises((ValueError, TypeError), match=words):
        UniversalPerturbation(**({"threat": Linf(0.1), "step_size": 0.1, "epochs": 1} | options))


def test_loaders_are_checked():
    settings = UniversalPerturbation(threat=Linf(0.1), step_size=0.1, epochs=2)
    encode = lambda v: v.mean((2, 3))
    with pytest.raises(ValueError, match="nothing to fit"):
        settings.fit([], encode)
    with pytest.raises(ValueError, match="second time"):
        settings.fit(iter(loader()), encode, generator=generator())
    with pytest.raises(ValueError, match="Divide 8-bit"):
        settings.fit([b.replace(images=b.images * 255) for b in loader()], encode, generator=generator())
    with pytest.raises(FloatingPointError, match="not finite"):
        settings.fit(loader(), encode, objective=lambda *_: lambda v: (v * torch.inf).sum(), generator=generator())
    with pytest.raises(ValueError, match="finite"):
        FittedUniversal(threat=Linf(0.1), delta=torch.full((1, 3, 2, 2), torch.nan))
    assert (
        repr(settings)
        == "UniversalPerturbation(threat=Linf(eps=0.1, low=0.0, high=1.0), step_size=0.1, epochs=2, distance='cosine')"
    )
