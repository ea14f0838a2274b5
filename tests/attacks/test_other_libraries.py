"""Attacks of torchattacks, foolbox and ART as attacks of hsat: on stand-ins, and on the libraries if installed."""

from __future__ import annotations

import copy
import importlib
import random
import re
import subprocess
import sys
import warnings
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
import stand_ins
import torch
from stand_ins import EPS, Evasion, Foolbox, Torchattack
from torch import nn

from hsat.attacks import (
    L2,
    PGD,
    AttackEnsemble,
    Linf,
    classification,
    dlr,
    feature_drift,
    from_art,
    from_foolbox,
    from_torchattacks,
    margin,
)
from hsat.classifiers import KNNClassifier, NearestCentroid
from hsat.eval import RunOptions, Scoring, diagnose, evaluate_transfer, evaluate_whitebox
from hsat.testing import LAWS, check_attack, check_feasible
from hsat.testing.snapshot import Snapshot

BALL = Linf(EPS)
OWN_LAWS = {
    "with ids, batch size and order do not matter",
    "the objective sees the whole batch, in its dtype",
    "start is obeyed",
    "success stops images",
}
STAND_INS = {
    "torchattacks": lambda model: from_torchattacks(Torchattack(model)),
    "torchattacks by a function": lambda model: from_torchattacks(Torchattack),
    "foolbox": lambda model: from_foolbox(Foolbox(), BALL),
    "art": lambda model: from_art(
        Evasion(stand_ins.Classifier(model, None, (3, 8, 8), 3, clip_values=(0.0, 1.0), device_type="cpu"))
    ),
    "art by a function": lambda model: from_art(Evasion),
}


@pytest.fixture(autouse=True)
def stands(request, monkeypatch):
    """Stand-ins for foolbox and ART, but for the tests of the libraries themselves."""
    if "library" not in request.fixturenames:
        stand_ins.install(monkeypatch)


@pytest.fixture
def model():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.0), nn.Flatten(), nn.Linear(216, 3)
        return nn.Sequential(*layers).eval()


@pytest.fixture
def x():
    return torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def objective(model, x):
    return margin(model, model(x).argmax(1))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(params=STAND_INS)
def attack(request, model):
    return STAND_INS[request.param](model)


def test_the_laws_that_make_sense_hold(attack):
    assert set(check_attack(attack)) == set(LAWS) - OWN_LAWS


def test_the_same_seed_and_ids_give_the_same_bytes(attack, x, objective):
    ids = torch.arange(5)
    one, two = (attack.run(x, objective, generator=seeded(), ids=ids) for _ in range(2))
    assert torch.equal(one.x_adv, two.x_adv) and torch.equal(one.value, two.value)
    assert (one.value > one.start_value).all() and (one.zero_gradient == 0).all()
    check_feasible(one.x_adv, x, BALL)
    others = dict(generator=seeded(1), ids=ids), dict(generator=seeded(), ids=ids + 1), dict(generator=seeded())
    assert all(not torch.equal(attack(x, objective, **other), one.x_adv) for other in others)
    assert (one.forwards, one.backwards) == (3 + ("foolbox" in attack.library or "art" in attack.library), 1)


def test_global_generators_and_the_model_stay_as_they_are(attack, x, model, objective):
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    model[3].train()
    before = Snapshot(model, {"x": x})
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    attack(x, objective, generator=seeded(), ids=torch.arange(5))
    attack(x, objective, generator=seeded())
    assert before.changed_values() == before.changed_random_states() == before.changed_settings() == []
    assert torch.equal(states[0], torch.get_rng_state()) and random.getstate() == states[2]
    assert np.array_equal(states[1][1], np.random.get_state()[1])


def test_other_objectives_and_starts_are_refused(attack, x, model, objective):
    for other in (feature_drift(model, x), lambda v: v.sum((1, 2, 3))):
        with pytest.raises(ValueError, match=r'attacks a model of logits.*target="decision"'):
            attack(x, other, generator=seeded())
    for decision in (dlr(model, objective.labels), classification(model, objective.labels)):
        same = attack(x, decision, generator=seeded(), ids=torch.arange(5))
        assert torch.equal(same, attack(x, objective, generator=seeded(), ids=torch.arange(5)))
    with pytest.raises(ValueError, match="cannot take a start"):
        attack(x, objective, start=x)
    with torch.inference_mode(), pytest.raises(RuntimeError, match="no_grad"):
        attack(x, objective)


def test_it_is_frozen_and_says_all_that_decides_it(attack):
    with pytest.raises(FrozenInstanceError):
        attack.threat = Linf(0.1)
    assert (
        attack == replace(attack)
        and hash(attack) == hash(replace(attack))
        and attack != replace(attack, threat=L2(1.0))
    )
    text = repr(attack)
    assert text.startswith(f"from_{attack.library}(") and "Linf(eps=8/255, low=0.0, high=1.0)" in text
    assert "version=" in text and not re.search(r"0x[0-9a-f]{6}|object at|cpu", text)
    assert attack.random_start is True and attack.name.split(".")[0] == attack.library


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_it_runs_where_the_images_are(attack, x, model):
    model, x = model.cuda(), x.cuda()
    state, ids = torch.cuda.get_rng_state(), torch.arange(5)
    one, two = (attack.run(x, margin(model, model(x).argmax(1)), generator=seeded(), ids=ids) for _ in range(2))
    check_feasible(one.x_adv, x, BALL)
    assert one.x_adv.is_cuda and one.outside.is_cuda and torch.equal(one.x_adv, two.x_adv)
    assert torch.equal(state, torch.cuda.get_rng_state()) and (one.value > one.start_value).all()


def test_what_the_user_changes_afterwards_has_no_effect(model, x, objective):
    theirs = Torchattack(model)
    attack, first = from_torchattacks(theirs), []
    for eps in (EPS, 0.3):
        theirs.eps = eps
        first.append(attack(x, objective, generator=seeded(), ids=torch.arange(5)))
    assert torch.equal(*first) and theirs.model is model and "eps=8/255" in repr(attack)


# ----------------------------------------------------------------------------------------------------- feasibility


def test_images_outside_are_counted_put_back_and_judged_there(model, x, objective):
    attack = from_torchattacks(Torchattack(model, eps=2 * EPS), threat=BALL)
    result = attack.run(x, objective, generator=seeded(), success=objective.success)
    check_feasible(result.x_adv, x, BALL)
    torch.testing.assert_close(result.outside, torch.full((5,), EPS).double(), atol=1e-6, rtol=0)
    assert torch.equal(result.value, objective(result.x_adv)) and torch.equal(result.success, result.value > 0)
    assert from_torchattacks(Torchattack(model)).run(x, objective).outside.max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_images_of_every_precision(dtype, x, model, objective):
    attack, x = from_torchattacks(Torchattack(model)), x.to(dtype)
    inner = margin(lambda v: model(v.float()).to(v.dtype), objective.labels)
    result = attack.run(x, inner, generator=seeded())
    check_feasible(result.x_adv, x, BALL)
    assert not torch.equal(result.x_adv, x)


def test_nan_is_replaced_by_the_clean_image(model, x, objective):
    def spoil(images):
        images[1, 0, 0, 0], images[3] = torch.nan, torch.inf
        return images

    result = from_torchattacks(Torchattack(model, result=spoil)).run(x, objective, generator=seeded())
    assert torch.equal(result.x_adv[[1, 3]], x[[1, 3]]) and not torch.equal(result.x_adv[0], x[0])
    assert result.outside.isinf().tolist() == [False, True, False, True, False]


def test_images_of_another_shape_are_an_error(model, x, objective):
    attack = from_torchattacks(Torchattack(model, result=lambda images: images[:2]))
    with pytest.raises(ValueError, match=r"torchattacks.Torchattack gave images of shape \(2, 3, 8, 8\)"):
        attack(x, objective)


def test_no_images_at_all(attack, x, model):
    result = attack.run(x[:0], margin(model, torch.zeros(0, dtype=torch.int64)), generator=seeded())
    assert result.x_adv.shape == (0, 3, 8, 8) and result.outside.shape == (0,)


def test_foolbox_gets_the_eps_of_each_image(x, objective):
    eps = torch.tensor([0.0, 0.01, 0.01, 0.05, 0.1])
    result = from_foolbox(Foolbox(random_start=False), Linf(eps)).run(x, objective, generator=seeded())
    moved = (result.x_adv - x).abs().amax((1, 2, 3))
    torch.testing.assert_close(moved, eps, atol=1e-6, rtol=0)
    assert result.outside.max() < 1e-6
    with pytest.raises(ValueError, match="one eps per image"):
        from_foolbox(Foolbox(), Linf(torch.full((1, 3, 1, 1), 0.1)))(x, objective)


def test_models_without_finite_values_or_gradients(x, objective):
    attack = from_torchattacks(Torchattack, threat=BALL)
    broken = margin(lambda v: torch.full((len(v), 3), torch.nan), objective.labels)
    with pytest.raises((FloatingPointError, ValueError), match="not finite"):
        attack(x, broken)
    steep = margin(
        lambda v: (v.flatten(1)[:, :3] - v.flatten(1)[:, :3].detach()).abs().sqrt() + v.flatten(1)[:, :3],
        objective.labels,
    )
    with pytest.raises(FloatingPointError, match=r"not finite at images \[0, 1, 2, 3, 4\]"):
        attack(x, steep)
    with pytest.raises(RuntimeError, match="no gradient"):
        attack(x, margin(lambda v: v.detach().flatten(1)[:, :3], objective.labels))


def test_a_zero_gradient_is_counted(x, model, objective):
    flat = margin(lambda v: model(v) * (v.mean((1, 2, 3), keepdim=False) > 0.5)[:, None], objective.labels)
    half = x.mean((1, 2, 3)) > 0.5
    result = from_torchattacks(Torchattack(model, random_start=False)).run(x, flat)
    assert (result.zero_gradient > 0).tolist() == (~half).tolist() and half.any() and not half.all()


# ------------------------------------------------------------------------------------------- what is wrapped, and how


class NoEps(Torchattack):
    def __init__(self, model):
        super().__init__(model)
        del self.eps


def test_the_threat_model_is_that_of_the_attack(model):
    assert from_torchattacks(Torchattack(model, eps=0.5, norm="L2")).threat == L2(0.5)
    assert from_art(lambda classifier: Evasion(classifier, norm=2, eps=1.5)).threat == L2(1.5)
    assert from_art(lambda classifier: Evasion(classifier, norm="inf", eps=0.25)).threat == Linf(0.25)
    assert from_torchattacks(Torchattack(model), threat=L2(0.1)).threat == L2(0.1)
    for make in (
        lambda: from_torchattacks(NoEps(model)),
        lambda: from_art(lambda classifier: Evasion(classifier, norm=1)),
    ):
        with pytest.raises(ValueError, match=r"does not say which ball.*threat=hsat.Linf\(8/255\)"):
            make()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda m: from_torchattacks(3), TypeError, "needs an attack of torchattacks, or a function"),
        (lambda m: from_torchattacks(lambda model: 3), TypeError, "needs an attack of torchattacks"),
        (lambda m: from_foolbox(Foolbox, BALL), TypeError, r"such as foolbox.attacks.LinfPGD\(\)"),
        (lambda m: from_foolbox(Foolbox(), 8 / 255), TypeError, "threat must be a threat model"),
        (lambda m: from_foolbox(Foolbox(), L2(1.0)), ValueError, "Foolbox measures eps in Linf"),
        (lambda m: from_art("pgd"), TypeError, "needs an evasion attack of ART"),
        (lambda m: from_art(lambda classifier: 3), TypeError, "needs an evasion attack of ART"),
        (lambda m: from_art(lambda classifier: Evasion(classifier, targeted=True)), ValueError, "aims at the labels"),
    ],
)
def test_what_cannot_be_wrapped_is_refused(make, error, message, model):
    with pytest.raises(error, match=message):
        make(model)


def test_attacks_that_aim_at_labels_or_want_other_images_are_refused(model):
    aimed, normalised = Torchattack(model), Torchattack(model)
    aimed.attack_mode, normalised.normalization_used = "targeted(label)", {"mean": 0}
    with pytest.raises(ValueError, match="aims at the labels it is given"):
        from_torchattacks(aimed)
    with pytest.raises(ValueError, match="expects normalised images"):
        from_torchattacks(normalised)


def test_attacks_of_art_that_hold_attacks_are_made_by_a_function(model):
    class Several(Evasion):
        attack_params = (*Evasion.attack_params, "attacks")

        def __init__(self, estimator, attacks=None):
            super().__init__(estimator)
            self.attacks = [Evasion(estimator)] if attacks is None else attacks

    def classifier():
        return stand_ins.Classifier(model, None, (3, 8, 8), 3, clip_values=(0.0, 1.0), device_type="cpu")

    with pytest.raises(ValueError, match="give a function: from_art"):
        from_art(Several(classifier()))
    assert from_art(Several).threat == BALL

    class Forgetful(Evasion):
        def __init__(self, estimator, **options):
            super().__init__(estimator, eps=0.1)

    forgetful = Forgetful(classifier())
    forgetful.eps = 0.2
    with pytest.raises(ValueError, match="cannot be made anew"):
        from_art(forgetful)


@pytest.mark.parametrize(("library", "package"), [("foolbox", "foolbox"), ("art", "adversarial-robustness-toolbox")])
def test_a_missing_library_says_what_to_type(library, package, monkeypatch, x, objective):
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.delitem(sys.modules, "art.estimators.classification", raising=False)
    with pytest.raises(ModuleNotFoundError, match=f"pip install {package}$"):
        if library == "art":
            from_art(Evasion)
        else:
            from_foolbox(Foolbox(), BALL)(x, objective)


def test_hsat_imports_none_of_them():
    code = (
        "import hsat.attacks, hsat.eval, sys; print({'torchattacks', 'foolbox', 'art', 'eagerpy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# ----------------------------------------------------------------------------------------------------- evaluations


@pytest.fixture(scope="module")
def bank(toy_batches):
    return toy_batches(seed=1, sizes=(30, 30, 30), first_id=1000)


@pytest.fixture(scope="module")
def queries(toy_batches):
    return toy_batches(seed=2, sizes=(20, 16))


OPTIONS = dict(classifier=KNNClassifier(k=15), scoring=Scoring(bootstrap=20))


def accuracy(result, name):
    (record,) = (r for r in result.records if (r.attack_name, r.level, r.metric) == (name, "patch", "accuracy"))
    return record


def test_it_is_measured_beside_ours(toy_encoder, bank, queries, attack, tmp_path):
    attacks = {"theirs": attack, "PGD-8": PGD(BALL, step_size=2 / 255, steps=4)}
    run = RunOptions(resume_dir=tmp_path / "state", diagnose=4)
    before = Snapshot(toy_encoder, {})
    result = evaluate_whitebox(toy_encoder, bank, queries, attacks, **OPTIONS, run=run)
    assert list(result.tables) == ["clean", "noise-8", *attacks]
    theirs = accuracy(result, "theirs")
    assert theirs.value < accuracy(result, "clean").value - 0.3
    assert theirs.attack == repr(attack) and theirs.eps == "8/255" and theirs.target == "decision"
    assert theirs.forwards >= theirs.backwards == 1 and theirs.settings["random_start"] is True
    assert not any("left the threat model" in flag for flag in theirs.flags)
    stored = sorted((tmp_path / "state").glob("*batch-*"))
    stored[0].unlink()
    again = evaluate_whitebox(toy_encoder, bank, queries, attacks, **OPTIONS, run=run)
    assert again.records == result.records, "a lost batch is made again, with the same bytes"
    assert before.changed_values() == before.changed_random_states() == []


def test_violations_stand_in_the_record(toy_encoder, bank, queries):
    def spoil(images):
        images[0] = torch.nan
        return images

    wide = from_torchattacks(Torchattack(toy_encoder, eps=2 * EPS, result=spoil), threat=BALL)
    fits = from_torchattacks(Torchattack(toy_encoder))
    result = evaluate_whitebox(toy_encoder, bank, queries, {"wide": wide, "fits": fits}, **OPTIONS)
    record, n = accuracy(result, "wide"), len(result.tables["clean"])
    (left,) = (flag for flag in record.flags if "left the threat model" in flag)
    assert left.startswith(f"{n - 2} of {n} images left the threat model by up to 0.0314 at a pixel")
    assert any(flag.startswith(f"2 of {n} images came back with NaN") for flag in record.flags)
    assert record.settings["outside_share"] == (n - 2) / n and record.settings["not_finite_share"] == 2 / n
    assert record.settings["farthest_outside"] == pytest.approx(EPS, abs=1e-6)
    fine = accuracy(result, "fits")
    assert not any("left the threat model" in flag for flag in fine.flags)
    assert fine.settings.get("outside_share", 0.0) == 0.0


def test_a_drift_has_no_logits(toy_encoder, bank, queries):
    with pytest.raises(ValueError, match='target="decision"'):
        evaluate_whitebox(
            toy_encoder, bank, queries, {"t": from_torchattacks(Torchattack)}, **OPTIONS, target="features"
        )


def test_it_counts_as_a_member_of_an_ensemble_and_transfers(toy_encoder, bank, queries):
    theirs = from_torchattacks(Torchattack)
    ensemble = AttackEnsemble(BALL, steps=2, decision_steps=2, restarts=1, queries=2)
    result = evaluate_whitebox(toy_encoder, bank, queries, {"theirs": theirs, "e": ensemble}, **OPTIONS)
    assert "theirs" in {member.name for member in result.outcomes["e"].members}
    other = copy.deepcopy(toy_encoder)
    encoders = {"a": toy_encoder, "b": other}
    moved = evaluate_transfer(encoders, bank, queries, {"theirs": theirs}, **OPTIONS, target="decision")
    assert {record.attack for record in moved.records if record.attack} == {repr(theirs)}
    said = diagnose(toy_encoder, bank, queries, theirs, classifier=NearestCentroid(), run=RunOptions(diagnose=4))
    assert said.measures["images"] == 4


# --------------------------------------------------------------------------------------------- the libraries themselves


def import_quietly(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(name)


def _torchattacks(name, **options):
    return lambda model: from_torchattacks(getattr(import_quietly("torchattacks"), name)(model, **options))


def _foolbox(name, threat, **options):
    return lambda model: from_foolbox(getattr(import_quietly("foolbox.attacks"), name)(**options), threat)


def _art(name, threat=None, **options):
    return lambda model: from_art(
        lambda classifier: getattr(import_quietly("art.attacks.evasion"), name)(classifier, **options), threat=threat
    )


def _art_made(name, **options):
    def make(model):
        classification = import_quietly("art.estimators.classification")
        classifier = classification.PyTorchClassifier(
            model, nn.CrossEntropyLoss(), (3, 8, 8), 3, clip_values=(0, 1), device_type="cpu"
        )
        return from_art(getattr(import_quietly("art.attacks.evasion"), name)(classifier, **options))

    return make


KEEP_ALL_LAWS = {
    "torchattacks PGD": _torchattacks("PGD", eps=EPS, steps=3),
    "torchattacks MIFGSM": _torchattacks("MIFGSM", eps=EPS, steps=3),
    "torchattacks PGDL2": _torchattacks("PGDL2", eps=0.5, steps=3),
    "foolbox LinfPGD": _foolbox("LinfPGD", BALL, steps=3, abs_stepsize=EPS),
    "foolbox L2PGD": _foolbox("L2PGD", L2(0.5), steps=3, abs_stepsize=0.3),
    "art FastGradientMethod": _art("FastGradientMethod", eps=EPS),
    "art ProjectedGradientDescent": _art_made(
        "ProjectedGradientDescent", eps=EPS, max_iter=3, num_random_init=1, verbose=False
    ),
}
OTHERS = {  # which stop at the decision, give back clean images where they fail, or leave the ball
    "torchattacks AutoAttack": _torchattacks("AutoAttack", eps=EPS, version="rand", n_classes=3, seed=0),
    "torchattacks APGD": _torchattacks("APGD", eps=EPS, steps=5),
    "torchattacks DeepFool": lambda model: from_torchattacks(
        import_quietly("torchattacks").DeepFool(model), threat=L2(0.5)
    ),
    "torchattacks MultiAttack": lambda model: from_torchattacks(
        import_quietly("torchattacks").MultiAttack(
            [import_quietly("torchattacks").FGSM(model, eps=EPS), import_quietly("torchattacks").PGD(model, eps=EPS)]
        ),
        threat=BALL,
    ),
    "foolbox L2DeepFoolAttack": _foolbox("L2DeepFoolAttack", L2(0.5)),
    "foolbox L2CarliniWagnerAttack": _foolbox("L2CarliniWagnerAttack", L2(0.5), steps=5, binary_search_steps=2),
    "art AutoProjectedGradientDescent": _art(
        "AutoProjectedGradientDescent", eps=EPS, max_iter=4, nb_random_init=1, loss_type="cross_entropy", verbose=False
    ),
    "art CarliniL2Method": _art("CarliniL2Method", L2(0.5), max_iter=5, initial_const=1.0, verbose=False),
    "art SquareAttack": _art("SquareAttack", eps=EPS, max_iter=10, verbose=False),
}


@pytest.fixture(params=KEEP_ALL_LAWS | OTHERS)
def library(request, model):
    name = request.param.partition(" ")[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip(name, reason="needs the peer: docs/other_libraries.md says what to install")
    return (KEEP_ALL_LAWS | OTHERS)[request.param](model), request.param


def test_attacks_of_the_libraries(library, model, x, objective):
    attack, name = library
    if name in KEEP_ALL_LAWS:
        assert set(check_attack(attack)) == set(LAWS) - OWN_LAWS
    before = Snapshot(model, {"x": x})
    ids = torch.arange(5)
    one, two = (attack.run(x, objective, generator=seeded(), ids=ids) for _ in range(2))
    assert torch.equal(one.x_adv, two.x_adv) and (one.x_adv != x).any()
    check_feasible(one.x_adv, x, attack.threat)
    assert before.changed_values() == before.changed_random_states() == before.changed_settings() == []
    assert torch.equal(one.value, objective(one.x_adv)) and (one.forwards > 2)
    assert not re.search(r"0x[0-9a-f]{6}|object at", repr(attack)) and re.search(r"version='\d+\.\d+", repr(attack))


@pytest.mark.parametrize("library", ["torchattacks MIFGSM", "foolbox L2DeepFoolAttack"], indirect=True)
def test_the_library_sees_what_it_would_see_without_hsat(library, model, x, objective):
    """Without a random start the images are those of the library's own call, put into the ball."""
    attack, name = library
    calls = {
        "torchattacks MIFGSM": lambda: import_quietly("torchattacks").MIFGSM(model, eps=EPS, steps=3)(
            x, objective.labels
        ),
        "foolbox L2DeepFoolAttack": lambda: import_quietly("foolbox").attacks.L2DeepFoolAttack()(
            import_quietly("foolbox").PyTorchModel(model, bounds=(0, 1), device="cpu"),
            x,
            objective.labels,
            epsilons=0.5,
        )[1],
    }
    expected = attack.threat.project(calls[name](), x)
    torch.testing.assert_close(attack(x, objective, generator=seeded()), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("library", ["torchattacks PGD", "foolbox LinfPGD", "art FastGradientMethod"], indirect=True)
def test_a_decision_of_embeddings_is_attacked(library, toy_encoder, bank, queries):
    attack, _ = library
    result = evaluate_whitebox(toy_encoder, bank, queries, {"theirs": attack}, **OPTIONS)
    record = accuracy(result, "theirs")
    assert record.value < accuracy(result, "clean").value - 0.3
    assert not any("left the threat model" in flag for flag in record.flags)
