"""HSAT+: the loss on the features, and free training that is watched for catastrophic overfitting."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from hsat.attacks import PGD, Linf
from hsat.data import read_opensrh
from hsat.models import build_encoder, load_encoder, wrap_encoder
from hsat.training import InnerAttackConfig, TrainConfig, Trainer
from hsat.training.inner_attack import FreeReplays, InnerAttack
from hsat.types import HierarchicalBatch

SHORT = {"steps": 3, "batch_patients": 2, "save_every": 3, "views": {"image_size": 32, "augmentation": "none"}}
EPS = 8 / 255


def weights_of(folder):
    return load_encoder(folder / "final.safetensors").state_dict()


def smooth_encoder():
    """A map whose gradient tells the truth at any distance: steps of eps end where PGD ends."""
    torch.manual_seed(0)
    return wrap_encoder(nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 8)), norm="none")


@pytest.fixture
def fit(root, one_thread, tmp_path):
    """fit(name, config, network=..., **encoder): the folder of a finished run of a tiny encoder."""

    def run(name, config, network=None, **encoder):
        options = {"embedding_dim": 16, **encoder}
        network = network or build_encoder("test_byobnet", seed=0, **options)
        Trainer(network, read_opensrh(root), config, out=tmp_path / name).fit()
        return tmp_path / name

    return run


def test_the_recipe_is_what_the_study_chose():
    config = TrainConfig.hsat_plus(steps=7)
    assert (config.attack.name, config.attack.replays, config.attack.eps) == ("free", 4, EPS)
    assert (config.layer, config.temperature, config.steps) == ("features", 0.6, 7)
    assert config.attack.check_every == 50, "free training is watched"


@pytest.mark.parametrize("given", [{"eps": "4/255"}, InnerAttackConfig(name="free", eps="4/255")])
def test_a_change_of_the_attack_does_not_make_it_pgd(given):
    attack = TrainConfig.hsat_plus(attack=given).attack
    assert (attack.name, attack.eps) == ("free", 4 / 255)
    assert TrainConfig.hsat_plus(temperature=0.3, layer="embedding").temperature == 0.3


def test_the_papers_recipes_read_the_embedding():
    assert TrainConfig.hsat().layer == TrainConfig.hidisc().layer == "embedding"


def test_a_loss_on_the_features_trains_as_if_there_were_no_head(fit):
    """The backbone's weights are those of an encoder without head, byte for byte, and the head stays as it began."""
    config = TrainConfig.hsat_plus(**SHORT)
    with_head = weights_of(fit("head", config))
    without = weights_of(fit("none", config, head=None, embedding_dim=None))
    first = build_encoder("test_byobnet", embedding_dim=16, seed=0).state_dict()
    assert [name for name in with_head if name not in without] == [name for name in first if name.startswith("head.")]
    for name, value in with_head.items():
        assert torch.equal(value, first[name] if name.startswith("head.") else without[name]), name
    on_embedding = weights_of(fit("embedding", TrainConfig.hsat_plus(**SHORT, layer="embedding")))
    assert any(not torch.equal(on_embedding[name], without[name]) for name in without)


def test_the_loss_of_the_first_step_is_that_of_the_unit_features(fit, rows_of):
    """PGD attacks the features too: the run with a head has the numbers of the run without."""
    config = TrainConfig(**SHORT, layer="features", attack={"steps": 2})
    rows = [rows_of(fit("head", config)), rows_of(fit("none", config, head=None, embedding_dim=None))]
    assert [row["loss"] for row in rows[0]] == [row["loss"] for row in rows[1]]


def test_a_check_that_finds_nothing_changes_no_byte_of_a_free_training(fit, rows_of):
    unwatched, watched = (
        fit(name, TrainConfig.hsat_plus(**SHORT | {"batch_patients": 6}, attack={"check_every": every}))
        for name, every in (("unwatched", 0), ("watched", 2))
    )
    assert (unwatched / "final.safetensors").read_bytes() == (watched / "final.safetensors").read_bytes()
    shares = [float(row["free_share"]) for row in rows_of(watched)]
    assert shares[0] == shares[1] != shares[2], "checks at steps 0 and 2"
    assert min(shares) > 0.5 and "free_share" not in rows_of(unwatched)[0]


def test_free_training_that_finds_nothing_goes_on_with_pgd(fit, rows_of, caplog):
    """One replay is noise and no attack at all, which a check must see: the run is that of PGD, byte for byte."""
    caplog.set_level(logging.WARNING, logger="hsat")
    free = {"name": "free", "replays": 1}
    failing, pgd, unwatched = (
        fit(name, TrainConfig(**SHORT, attack=attack), network=smooth_encoder())
        for name, attack in (("failing", free), ("pgd", {"name": "pgd"}), ("unwatched", free | {"check_every": 0}))
    )
    assert all(float(row["free_share"]) < 0.5 for row in rows_of(failing))
    assert (failing / "final.safetensors").read_bytes() == (pgd / "final.safetensors").read_bytes()
    assert (failing / "final.safetensors").read_bytes() != (unwatched / "final.safetensors").read_bytes()
    (said,) = [record.getMessage() for record in caplog.records if "free training finds" in record.getMessage()]
    assert said.startswith("step 0: ") and said.endswith("catastrophic overfitting: PGD until that recovers")


class Rippled(nn.Module):
    """A slope under ripples whose gradient hides it: what a network looks like that has overfitted to large steps."""

    def __init__(self, height: float) -> None:
        super().__init__()
        self.height = nn.Parameter(torch.tensor(height, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        slope = torch.linspace(-1, 1, x[0].numel(), dtype=torch.float64)
        return ((x + self.height * torch.sin(x * 255 * 3.1)).flatten(1) @ slope)[:, None]


def total(z: Tensor, batch: HierarchicalBatch) -> Tensor:
    return z.sum()


def test_the_guard_replaces_replays_until_they_find_as_much_as_pgd_again(caplog):
    """Steps of eps see the slope of a smooth loss and not that under ripples; PGD with small steps sees both."""
    caplog.set_level(logging.WARNING, logger="hsat")
    pgd = PGD(Linf(EPS), step_size=0.5 / 255, steps=40)
    x = (0.3 + 0.4 * torch.rand(8, 3, 5, 5, generator=torch.Generator().manual_seed(0))).double()
    ids = torch.arange(8)
    batch, model = HierarchicalBatch(x, ids, ids, ids), Rippled(0.0).train()
    inner = InnerAttack(InnerAttackConfig(name="free", check_every=10, check_share=0.8), model, total)
    chosen = []
    for step, height in ((0, 0.0), (10, 0.05), (15, 0.0), (20, 0.0)):
        with torch.no_grad():
            model.height.fill_(height)
        attack, start = inner.choose(pgd, (batch,), step, generator=torch.Generator().manual_seed(step))
        assert start is None
        chosen.append(attack)
    assert [attack is pgd for attack in chosen] == [False, True, True, False], "no check between 10 and 20"
    assert isinstance(chosen[0], FreeReplays) and chosen[3] == FreeReplays(pgd.threat, 4)
    first, second = [record.getMessage() for record in caplog.records]
    assert first.startswith("step 10: free training finds ") and second.endswith("free again")
    assert inner.logged()["free_share"] > 0.8


def test_the_python_of_the_page_runs(capsys):
    page = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)
    names: dict[str, object] = {}
    exec(compile(code, "docs/recipes.md", "exec", dont_inherit=True), names)
    assert capsys.readouterr().out == "free 4 0.6 features\n"
    assert names["encoder"].head is None
