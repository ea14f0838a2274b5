"""An encoder and a classifier as one model, for our attacks and for those of other libraries."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from hsat.attacks import PGD, Linf, dlr, margin
from hsat.classifiers import DecisionModel, Head, KNNClassifier, NearestCentroid, fit_shards
from hsat.testing import check_feasible

EPS = 0.1


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.head = nn.Linear(48, 6), nn.Linear(6, 3)
        for parameter in self.parameters():
            parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))

    def features(self, images):
        return self.linear(images.flatten(1) - 0.5).tanh()

    def forward(self, images):
        return self.head(self.features(images))


def images_of(n, seed):
    tint = 0.1 * torch.randn(3, 3, 4, 4, generator=torch.Generator().manual_seed(4))
    noise = 0.03 * torch.randn(n, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return (0.5 + tint[torch.arange(n) % 3] + noise).clamp(0, 1), torch.arange(n) % 3


@pytest.fixture
def problem(table):
    """An encoder, its bank of clean features, and images with labels that kNN gets right."""
    encoder = Encoder().eval()
    seen, label = images_of(90, 5)
    bank = table(encoder.features(seen).detach().numpy(), label)
    x, y = images_of(12, 6)
    return encoder, bank, x, y


def fitted_classifiers(encoder, bank):
    rng = np.random.default_rng(0)
    half = [
        type(bank)(bank.z[a:b], bank.label[a:b], *[np.arange(b - a)] * 3, bank.class_names)
        for a, b in ((0, 50), (50, 90))
    ]
    approximate = KNNClassifier(k=10, index="IVF2,Flat").fit(bank)
    head = nn.Linear(6, 3)
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(np.stack([bank.z[bank.label == c].mean(0) for c in range(3)])))
        head.bias.copy_(torch.from_numpy(0.01 * rng.standard_normal(3)))
    return {
        "kNN": KNNClassifier(k=10).fit(bank),
        "approximate kNN": approximate,
        "sharded kNN": fit_shards(KNNClassifier(k=10), half),
        "centroid": NearestCentroid().fit(bank),
        "head": Head(head, bank.class_names),
    }


@pytest.fixture(params=["kNN", "approximate kNN", "sharded kNN", "centroid", "head"])
def model(request, problem):
    encoder, bank, _, _ = problem
    return DecisionModel(encoder, fitted_classifiers(encoder, bank)[request.param])


def test_logits_scores_and_embeddings_are_those_of_the_parts(problem, model):
    encoder, _, x, y = problem
    z = encoder.features(x)
    assert torch.equal(model.embed(x), z) and torch.equal(model(x), model.fitted.logits(z))
    assert torch.equal(model.scores(x), model.fitted.scores(z))
    torch.testing.assert_close(model.scores(x).sum(1), torch.ones(12, dtype=torch.float64))
    assert torch.equal(model(x).argmax(1), y) and model(x).argmax(1).tolist() == model.fitted.predict(z).tolist()
    assert not model.training and not any(name.startswith("bank") for name in model.state_dict())


@pytest.mark.parametrize("objective", [margin, dlr])
def test_our_attacks_climb_its_decision(problem, model, objective):
    _, _, x, y = problem
    result = PGD(Linf(EPS), step_size=0.02, steps=12).run(
        x, objective(model, y), generator=torch.Generator().manual_seed(0)
    )
    check_feasible(result.x_adv, x, Linf(EPS))
    wrong = model(result.x_adv).argmax(1) != y
    assert wrong.float().mean() > 0.8 and torch.equal(result.value > 0, wrong)


def test_torchattacks_attacks_it(problem, model):
    torchattacks = pytest.importorskip("torchattacks", reason='needs the peer: pip install "hsat[crosscheck]"')
    _, _, x, y = problem
    attack = torchattacks.PGD(model, eps=EPS, alpha=0.02, steps=12)
    x_adv = attack(x, y)
    assert attack.device == torch.device("cpu") and not model.training
    assert (x_adv - x).abs().max() <= EPS + 1e-6
    assert (model(x_adv).argmax(1) != y).float().mean() > 0.8


def test_foolbox_attacks_it(problem, model):
    foolbox = pytest.importorskip("foolbox", reason="needs the peer: pip install foolbox")
    _, _, x, y = problem
    attack = foolbox.attacks.LinfPGD(abs_stepsize=0.02, steps=12)
    _, x_adv, success = attack(foolbox.PyTorchModel(model, bounds=(0, 1)), x, y, epsilons=EPS)
    assert torch.equal(success, model(x_adv).argmax(1) != y) and success.float().mean() > 0.8


def test_the_adversarial_robustness_toolbox_attacks_it(problem, model):
    estimators = pytest.importorskip(
        "art.estimators.classification", reason="needs the peer: pip install adversarial-robustness-toolbox"
    )
    attacks = pytest.importorskip("art.attacks.evasion")
    _, _, x, y = problem
    classifier = estimators.PyTorchClassifier(
        model, loss=nn.CrossEntropyLoss(), input_shape=(3, 4, 4), nb_classes=3, clip_values=(0, 1), device_type="cpu"
    )
    attack = attacks.ProjectedGradientDescentPyTorch(classifier, eps=EPS, eps_step=0.02, max_iter=12, verbose=False)
    x_adv = attack.generate(x.numpy(), y.numpy())
    assert (classifier.predict(x_adv).argmax(1) != y.numpy()).mean() > 0.8


def test_the_bank_is_held_once_and_in_no_state(problem):
    encoder, bank, x, _ = problem
    model = DecisionModel(encoder, KNNClassifier(k=10).fit(bank))
    buffers = dict(model.named_buffers())
    assert buffers["bank_rows"].data_ptr() == bank.z.ctypes.data
    assert list(model.state_dict()) == list(Encoder().state_dict(prefix="encoder."))
    model.load_state_dict(model.state_dict())
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), model(x))
    assert dict(twin.named_buffers())["bank_rows"].data_ptr() == bank.z.ctypes.data


@pytest.mark.parametrize("convert", [nn.Module.half, nn.Module.double, nn.Module.bfloat16])
def test_conversions_reach_the_encoder_and_not_the_bank(problem, convert):
    encoder, bank, x, _ = problem
    knn = KNNClassifier(k=10).fit(bank)
    model = convert(DecisionModel(encoder, knn))
    x = x.to(next(model.parameters()).dtype)
    assert torch.equal(model(x), knn.logits(encoder.features(x)))
    assert dict(model.named_buffers())["bank_rows"].data_ptr() == bank.z.ctypes.data
    assert torch.equal(model.float()(x.float()), knn.logits(encoder.features(x.float())))


def test_layers(problem, table):
    encoder, bank, x, y = problem
    knn = KNNClassifier(k=10).fit(bank)
    layers = DecisionModel(encoder, knn).layers()
    assert list(layers) == ["features", "embedding"]
    assert torch.equal(layers["features"](x), encoder.features(x)) and torch.equal(layers["embedding"](x), encoder(x))
    projected = KNNClassifier(k=3).fit(table(encoder(x).detach().numpy(), y))
    assert torch.equal(DecisionModel(encoder, projected, layer="embedding").embed(x), encoder(x))
    function = DecisionModel(encoder.features, knn)  # a plain function has no parameters and one layer
    assert list(function.layers()) == ["features"] and list(function.parameters()) == []
    assert torch.equal(function(x), DecisionModel(encoder, knn)(x)) and not function.training
    with pytest.raises(ValueError, match="unknown layer 'logits'"):
        DecisionModel(encoder, knn, layer="logits")


def test_modes_follow_the_encoder_and_the_head(problem):
    encoder, bank, _, _ = problem
    model = DecisionModel(encoder, Head(nn.Linear(6, 3), bank.class_names))
    assert not model.training and len(list(model.parameters())) == 6
    assert model.train().fitted.training and not model.eval().fitted.training
    assert DecisionModel(Encoder().train(), KNNClassifier(k=3).fit(bank)).training


def test_one_class_still_has_a_margin(table, problem):
    encoder, bank, x, _ = problem
    model = DecisionModel(encoder, KNNClassifier(k=3).fit(table(bank.z)))
    assert model(x).shape == model.scores(x).shape == (12, 2)
    torch.testing.assert_close(model.scores(x), torch.tensor([[1.0, 0.0]]).double().expand(12, 2))
    value = margin(model, torch.zeros(12, dtype=torch.int64))(x)
    assert (value < 0).all() and len(value.unique()) > 1, "attacks see where they are"
    cold = DecisionModel(encoder, KNNClassifier(k=3, temperature=1e-6).fit(table(-bank.z)))
    assert (cold(x).argmax(1) == 0).all()


def test_a_classifier_of_the_user_serves(problem):
    encoder, _, x, _ = problem

    class First:
        class_names, reads = ("a", "b"), "raw"

        def logits(self, z):
            return torch.stack((z[:, 0], -z[:, 0]), 1)

        def scores(self, z):
            return self.logits(z).softmax(1)

        def predict_proba(self, z):
            return self.scores(torch.as_tensor(z)).numpy()

        def to(self, device):
            return self

    model = DecisionModel(encoder, First())
    assert torch.equal(model(x)[:, 0], encoder.features(x)[:, 0])
