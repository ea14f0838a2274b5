"""What must hold on a GPU: `python -m pytest -m gpu`.  Without one the same tests run on the CPU where that is cheap.

The reference is always the CPU.  What makes the host wait is counted here as torch sees it; reads are also counted
without a GPU, in tests/training/test_device_reads.py, on the same cases.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from device_cases import COPIES, FREELY, MORE, Place, cases
from torch import Tensor, nn

from hsat.attacks import (
    APGD,
    BIM,
    DIFGSM,
    FFGSM,
    FGSM,
    L2,
    MIFGSM,
    NIFGSM,
    PGD,
    TIFGSM,
    VMIFGSM,
    Linf,
    Masked,
    Square,
    feature_drift,
    hierarchical,
)
from hsat.attacks.loop import AscentConfig, AttackState, follow_gradients
from hsat.classifiers import KNNClassifier, LinearProbe, NearestCentroid
from hsat.data import augment_batch, build_transform
from hsat.embedding import embed
from hsat.eval import Provenance, Scoring, evaluate_whitebox
from hsat.losses import HiDiscLoss, supcon_loss
from hsat.models import frozen, wrap_encoder
from hsat.training import adversarial_step, check_gradients, largest_gradient, load_training_state, save_checkpoint
from hsat.types import HierarchicalBatch

LOSS = HiDiscLoss()
STEPS = {"step_size": 2 / 255, "steps": 3}
BALL, BALL_L2 = Linf(8 / 255), L2(0.5)
MASKED = Masked(BALL, torch.arange(64).view(8, 8) % 3 > 0)
ATTACKS = [
    PGD(BALL, **STEPS),
    PGD(BALL, **STEPS, restarts=2),
    PGD(Linf(torch.linspace(0.01, 0.05, 16)), **STEPS),
    PGD(BALL_L2, step_size=0.2, steps=3),
    PGD(MASKED, **STEPS),
    FGSM(BALL),
    FFGSM(BALL),
    BIM(BALL, **STEPS),
    MIFGSM(BALL, **STEPS),
    NIFGSM(BALL, **STEPS, scales=2),
    DIFGSM(BALL, **STEPS),
    TIFGSM(BALL, **STEPS, size=3),
    VMIFGSM(BALL, **STEPS, samples=2),
    APGD(BALL, steps=4),
    Square(BALL, queries=8),
]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> Iterator[torch.device]:
    """Both devices, in full float32: a GPU rounds convolutions to ten bits unless it is told not to."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield torch.device(request.param)
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def seeded(seed=0, device="cpu"):
    return torch.Generator(device).manual_seed(seed)


def network(device="cpu", dtype=torch.float32):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 5)]
    return nn.Sequential(*layers).to(device, dtype)


def encoder_on(device):
    torch.manual_seed(0)
    return wrap_encoder(network(), mean=0.5, std=0.25, head=nn.Linear(5, 4)).to(device)


def batch_on(device="cpu", dtype=torch.float32, *, seed=1, first=0):
    images = torch.rand(2, 2, 2, 2, 3, 8, 8, generator=seeded(seed), dtype=torch.float64)
    grid = HierarchicalBatch.from_grid(images.to(dtype), torch.arange(2))
    ids = (level + first for level in (grid.patch, grid.slide, grid.patient))
    return HierarchicalBatch(grid.images, *ids, grid.label).to(device)


def leaves_the_ball(threat, x_adv, x):
    """Largest excess over eps in float64, and over the pixel range; neither may be above zero."""
    if isinstance(threat, Masked):
        allowed = threat.mask.to(x.device)
        assert torch.equal(x_adv.masked_fill(allowed, 0), x.masked_fill(allowed, 0))
        threat = threat.threat
    gap, eps = x_adv.double() - x.double(), threat.eps
    eps = eps.double().to(x.device) if isinstance(eps, torch.Tensor) else eps
    size = gap.flatten(1).norm(dim=1) if isinstance(threat, L2) else gap.abs().flatten(1).amax(1)
    return float((size - eps).max()), float(torch.maximum(x_adv.max() - 1, -x_adv.min()))


@pytest.mark.parametrize("make", [feature_drift, None], ids=["drift", "hierarchical"])
@pytest.mark.parametrize("attack", ATTACKS, ids=repr)
def test_attacks_in_float64_are_those_of_the_cpu(attack, make, device):
    found = []
    for place in (torch.device("cpu"), device):
        model, batch = network(place, torch.float64), batch_on(place, torch.float64)
        with frozen(model):
            objective = make(model, batch.images) if make else hierarchical(model, LOSS, batch)
            x_adv = attack(batch.images, objective, generator=seeded())
        excess, outside = leaves_the_ball(attack.threat, x_adv, batch.images)
        assert excess <= 0 and outside <= 0
        assert x_adv.device.type == place.type and not torch.equal(x_adv, batch.images)
        found.append(x_adv.cpu())
    # a gradient of 1e-17 may have another sign there: a few pixels may differ, by steps and not by rounding
    assert ((found[0] - found[1]).abs() <= 1e-7).double().mean() > 0.998


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("threat", [BALL, BALL_L2, MASKED], ids=["linf", "l2", "masked"])
def test_images_of_few_bits_stay_in_their_ball(threat, dtype, device):
    batch, model = batch_on(device, dtype), network(device)
    with frozen(model):
        x_adv = PGD(threat, step_size=0.05, steps=3)(
            batch.images, lambda v: model(v.float()).square().sum(1), generator=seeded()
        )
    assert x_adv.dtype == dtype
    excess, outside = leaves_the_ball(threat, x_adv, batch.images)
    assert excess <= 0 and outside <= 0


@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-12), (torch.float32, 2e-5)], ids=str)
def test_losses_and_their_gradients_are_those_of_the_cpu(dtype, close, device):
    z = torch.randn(16, 5, generator=seeded(), dtype=torch.float64).to(dtype)
    found = []
    for place in (torch.device("cpu"), device):
        leaf, batch = z.detach().to(place).requires_grad_(), batch_on(place)
        terms = LOSS(leaf, batch)
        plain = supcon_loss(leaf, batch.patient)
        found.append([*terms, plain, *torch.autograd.grad(terms.total + plain, leaf)])
    for here, there in zip(*found, strict=True):
        torch.testing.assert_close(there.cpu(), here, rtol=close, atol=close)


@pytest.mark.parametrize("precision", ["32", "bf16", "16"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_steps_in_every_precision_keep_losses_and_perturbations_in_float32(precision, layout, device):
    dtype = {"bf16": torch.bfloat16, "16": torch.float16}.get(precision, torch.bfloat16)
    autocast = partial(torch.autocast, device.type, dtype, enabled=precision != "32")
    model, batch = network(device).train().to(memory_format=layout), batch_on(device)
    batch = batch.replace(images=batch.images.to(memory_format=layout))
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "16", init_scale=2.0**8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    reference = adversarial_step(network(), LOSS, None, batch_on()).loss.detach()
    before = model[0].weight.detach().clone()
    attack = PGD(BALL, **STEPS)
    result = adversarial_step(model, LOSS, attack, batch, clean_weight=0.5, autocast=autocast, generator=seeded())
    for terms in (result.clean, result.adversarial):
        assert {term.dtype for term in terms} == {torch.float32}
    assert result.loss.dtype == result.x_adv.dtype == torch.float32
    clean, adversarial = (float(terms.total.detach()) for terms in (result.clean, result.adversarial))
    assert clean == pytest.approx(float(reference), rel=1e-4 if precision == "32" else 0.05)
    assert adversarial > clean
    assert max(leaves_the_ball(BALL, result.x_adv, batch.images)) <= 0
    scaler.scale(result.loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert bool(model[0].weight.isfinite().all()) and not torch.equal(model[0].weight, before)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_bad_gradient_is_found_in_every_parameter(value, device):
    model, batch = network(device).train(), batch_on(device)
    adversarial_step(model, LOSS, None, batch).loss.backward()
    assert check_gradients(model) == max(float(parameter.grad.abs().max()) for parameter in model.parameters())
    for name, parameter in model.named_parameters():
        kept = parameter.grad.clone()
        parameter.grad.view(-1)[-1] = value
        with pytest.raises(FloatingPointError, match=f"in 1 of 6 parameters: {name} "):
            check_gradients(model)
        parameter.grad.copy_(kept)


@contextmanager
def counted_waits() -> Iterator[list[Any]]:
    """Every operation inside the block that makes the host wait for the GPU, as torch sees it; `clear` forgets."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield caught
        finally:
            torch.cuda.set_sync_debug_mode("default")
    caught[:] = [f"{w.filename}:{w.lineno}" for w in caught if "synchronizing CUDA operation" in str(w.message)]


@pytest.mark.gpu
@pytest.mark.parametrize("home", ["cpu", "cuda"])
def test_a_step_waits_for_the_gpu_once(home):
    """The attack's own check of its flags; not the copy of the batch, the losses, backward, the largest gradient or the
    optimiser.
    """
    model, on_cpu = network("cuda").train(), batch_on().pin_memory()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def step():
        batch = on_cpu.to("cuda", non_blocking=True)
        result = adversarial_step(model, LOSS, PGD(BALL, **STEPS), batch, generator=seeded(device=home))
        optimizer.zero_grad(set_to_none=True)
        result.loss.backward()
        largest_gradient(model)
        optimizer.step()

    step()  # libraries are set up at their first call
    torch.cuda.synchronize()
    with counted_waits() as waits:
        step()
    assert len(waits) == 1, waits
    with counted_waits() as waits:
        float(torch.ones((), device="cuda"))
    assert len(waits) == 1, "the counter itself"


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name in cases() if name not in FREELY])
def test_cases_wait_for_the_gpu_no_more_than_is_written_down(name):
    """Reads and copies that block.  What `MORE` and `COPIES` allow is the most; the rest waits once, a loss never."""
    place = torch.device("cuda")
    cases()[name](Place(place))  # libraries are set up at their first call
    torch.cuda.synchronize()
    with counted_waits() as waits:
        cases()[name](Place(place, forget=waits.clear))
    allowed = MORE.get(name, (0 if name == "loss" else 1, ""))[0] + COPIES.get(name, (0, ""))[0]
    assert len(waits) <= allowed, waits


def numbers_in(value: Any) -> list[Tensor]:
    """All tensors of a case's result, in order."""
    if isinstance(value, Tensor):
        return [value]
    return [t for part in (value.values() if isinstance(value, dict) else value) for t in numbers_in(part)]


@pytest.mark.parametrize(
    ("name", "device"),
    [("loss", "cpu"), ("step", "cpu"), *(pytest.param(name, "cuda", marks=pytest.mark.gpu) for name in cases())],
    indirect=["device"],
)
def test_cases_give_the_cpus_numbers_on_the_whole(name, device):
    """Nothing mixes devices.  Single pixels may take another step: a gradient near zero has another sign there."""
    here, there = (numbers_in(cases()[name](Place(place))) for place in (torch.device("cpu"), device))
    assert here
    for wanted, got in zip(here, there, strict=True):
        assert got.shape == wanted.shape and got.dtype == wanted.dtype
        gap, largest = (got.cpu().double() - wanted.double()).abs(), max(1.0, float(wanted.abs().max()))
        assert bool(got.isfinite().all())
        assert float(gap.median()) <= (1e-3 if gap.numel() > 100 else 2e-2) * largest


@pytest.mark.parametrize("threat", [BALL, BALL_L2], ids=["linf", "l2"])
@pytest.mark.parametrize("decay", [None, 1.0], ids=["pgd", "mifgsm"])
def test_the_gradient_loop_can_be_captured_and_replayed(threat, decay, device):
    """All steps of an attack as one CUDA graph: replayed on other images it gives what the attack gives."""
    model = network(device).eval().requires_grad_(False)
    batch, other = batch_on(device), batch_on(device, seed=2)
    step_size = 0.1 if isinstance(threat, L2) else 2 / 255
    attack = PGD(threat, step_size=step_size, steps=3)
    if decay is not None:
        attack = MIFGSM(threat, step_size=step_size, steps=3, decay=decay)
    config = AscentConfig(threat=threat, step_size=step_size, steps=3, decay=decay)
    objective = hierarchical(model, LOSS, batch)
    images, start = batch.images.clone(), batch.images.clone()

    def loop():
        state = AttackState(images, objective, config, generator=None, ids=None, success=None)
        y, _ = follow_gradients(state, state.project(start), None, 0)
        return state.project(y)

    replay = loop if device.type == "cpu" else captured(loop)
    for source in (batch.images, other.images):
        images.copy_(source)
        start.copy_(source + 0.02 * torch.randn(source.shape, generator=seeded(3)).to(device))
        x_adv = replay().clone()
        torch.testing.assert_close(x_adv, attack(source, objective, start=start), rtol=0, atol=1e-6)
        assert not torch.equal(x_adv, source)


def captured(function):
    """The function as a CUDA graph, after the warm-up on a stream of its own that capturing needs."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = function()

    def replay():
        graph.replay()
        return out

    return replay


def test_embeddings_and_the_vote_are_those_of_the_cpu(device):
    names = {"class_names": ("a", "b")}
    bank, queries = [batch_on(first=100)], [batch_on(seed=2)]
    found = []
    for place in ("cpu", device):
        encoder = encoder_on(place)
        tables = [embed(encoder, loader, **names) for loader in (bank, queries)]
        attacked = embed(encoder, queries, attack=PGD(BALL, **STEPS), **names)
        vote = KNNClassifier(k=3).fit(tables[0]).predict_proba(tables[1].z)
        found.append([torch.from_numpy(rows) for rows in (tables[0].z, tables[1].z, attacked.z, vote)])
        assert next(encoder.parameters()).device.type == torch.device(place).type
    for here, there in zip(*found, strict=True):
        torch.testing.assert_close(there, here, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("settings", [LinearProbe(C=0.5), NearestCentroid()], ids=["probe", "centroid"])
def test_classifiers_without_neighbours_decide_as_on_the_cpu(device, settings):
    bank = embed(encoder_on("cpu"), [batch_on(first=100)], class_names=("a", "b"))
    fitted = settings.fit(bank)
    moved, z = fitted.to(device), torch.from_numpy(bank.z)
    assert moved.device.type == torch.device(device).type and fitted.device.type == "cpu"
    torch.testing.assert_close(moved.logits(z.to(device)).cpu(), fitted.logits(z), rtol=1e-5, atol=1e-5)
    assert (moved.predict(bank) == fitted.predict(bank)).all()
    x = z.to(device).requires_grad_()
    assert torch.autograd.grad(moved.logits(x).sum(), x)[0].device.type == moved.device.type


def test_whitebox_evaluation_is_that_of_the_cpu(device):
    attacks = {"PGD-8": PGD(BALL, **STEPS), "l2": PGD(BALL_L2, step_size=0.2, steps=3)}
    found = [
        evaluate_whitebox(
            encoder_on(place),
            [batch_on(first=100)],
            [batch_on(seed=2)],
            attacks,
            classifier=KNNClassifier(k=3),
            target="features",
            scoring=Scoring(bootstrap=0),
            provenance=Provenance(class_names=("a", "b")),
        )
        for place in ("cpu", device)
    ]
    for name, table in found[0].tables.items():
        torch.testing.assert_close(
            torch.from_numpy(found[1].tables[name].z), torch.from_numpy(table.z), rtol=1e-3, atol=1e-3
        )
    for here, there in zip(found[0].records, found[1].records, strict=True):
        assert (here.attack_name, here.metric, here.level) == (there.attack_name, there.metric, there.level)
        # a vote may be so close that rounding turns it: one of 16 images, or of a few slides and patients
        assert here.value == pytest.approx(there.value, abs=0.07 if here.level == "patch" else 0.5)


def test_a_checkpoint_of_the_device_goes_on_on_the_cpu(device, tmp_path):
    def new(place):
        model = network(place).train()
        return model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

    def step(model, optimizer, place):
        result = adversarial_step(model, LOSS, PGD(BALL, **STEPS), batch_on(place), generator=seeded())
        optimizer.zero_grad()
        result.loss.backward()
        optimizer.step()
        return float(result.loss.detach())

    model, optimizer = new(device)
    step(model, optimizer, device)
    save_checkpoint(tmp_path / "last.pt", model=model, optimizer=optimizer, epoch=0, step=1, config={})
    other, other_optimizer = new("cpu")
    state = load_training_state(tmp_path / "last.pt", model=other, optimizer=other_optimizer)
    assert state.step == 1
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value.cpu()), name
    assert step(other, other_optimizer, "cpu") == pytest.approx(step(model, optimizer, device), rel=1e-3)
    back, back_optimizer = new(device)
    load_training_state(tmp_path / "last.pt", model=back, optimizer=back_optimizer)
    assert next(back.parameters()).device.type == device.type
    step(back, back_optimizer, device)
    for here, there in zip(back.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["static", "v0", "v1"])
def test_views_made_on_the_device_are_those_of_the_cpu(name, device):
    """With the CPU's draws; edges of turned images may fall to another pixel."""
    patches = batch_on().images[:4]
    pipeline, seeds = build_transform(name, image_size=8, strength=0.9), list(range(8))
    source = [0, 0, 1, 1, 2, 2, 3, 3]
    here = augment_batch(list(patches), pipeline, seeds, source=source)
    there = augment_batch(list(patches.to(device)), pipeline, seeds, source=source, replay_noise=True)
    assert there.device.type == device.type
    assert ((here - there.cpu()).abs() < 1e-4).double().mean() > 0.98
    own = augment_batch(list(patches.to(device)), pipeline, seeds, source=source, replay_noise=False)
    again = augment_batch(list(patches.to(device)), pipeline, seeds, source=source, replay_noise=False)
    assert torch.equal(own, again) and 0 <= float(own.min()) and float(own.max()) <= 1
