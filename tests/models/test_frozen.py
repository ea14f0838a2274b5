from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hsat.models import frozen


def small_model() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    )


def state_of(model: nn.Module) -> tuple[list[bool], list[bool], list[bytes]]:
    values = [t.detach().numpy().tobytes() for t in model.state_dict().values()]
    return [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()], values


@settings(max_examples=60, deadline=None)
@given(
    training=st.lists(st.booleans(), min_size=7, max_size=7),
    grads=st.lists(st.booleans(), min_size=8, max_size=8),
    fails=st.booleans(),
)
def test_every_flag_comes_back_one_by_one(training, grads, fails):
    model = small_model()
    for part, flag in zip(model.modules(), training, strict=True):
        part.training = flag
    for parameter, flag in zip(model.parameters(), grads, strict=True):
        parameter.requires_grad_(flag)
    before = state_of(model)
    try:
        with frozen(model):
            assert not any(m.training for m in model.modules())
            assert not any(p.requires_grad for p in model.parameters())
            model(torch.rand(2, 3, 8, 8))
            if fails:
                raise KeyError("inside")
    except KeyError:
        assert fails
    assert state_of(model) == before


def test_blocks_nest():
    model = small_model().train()
    inner = model[1]
    inner.eval()
    before = state_of(model)
    with frozen(model):
        with frozen(model, inner), frozen(inner):
            pass
        assert not any(m.training for m in model.modules())
        assert not any(p.requires_grad for p in model.parameters())
    assert state_of(model) == before


def test_shared_parts_are_restored_when_listed_twice():
    model = small_model().train()
    before = state_of(model)
    with frozen(model, model[0], model):
        assert not model[0].weight.requires_grad
    assert state_of(model) == before


def test_gradients_reach_the_images_but_no_parameter():
    model = small_model().train()
    x = torch.rand(2, 3, 8, 8, requires_grad=True)
    with frozen(model):
        model(x).sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0
    assert all(p.grad is None for p in model.parameters())


def test_existing_gradients_are_left_alone():
    model = small_model()
    for p in model.parameters():
        p.grad = torch.full_like(p, 3.0)
    with frozen(model):
        pass
    assert all((p.grad == 3).all() for p in model.parameters())


def test_train_overrides_are_not_called():
    class Merging(nn.Linear):
        merged = 0

        def train(self, mode: bool = True) -> Merging:
            type(self).merged += 1
            return super().train(mode)

    model = Merging(2, 2)
    with frozen(model):
        assert not model.training
    assert model.training and Merging.merged == 0


def test_nothing_changes_when_one_argument_is_no_module():
    model = small_model().train()
    with pytest.raises(TypeError, match="pass the modules it calls"), frozen(model, lambda x: x):  # type: ignore[arg-type]
        pass
    assert all(m.training for m in model.modules())


def test_a_method_is_refused_with_its_owner_named():
    model = small_model()
    with pytest.raises(TypeError, match="method of a Sequential"), frozen(model.forward):  # type: ignore[arg-type]
        pass


def test_anything_else_is_refused():
    with pytest.raises(TypeError, match=r"got str$"), frozen("resnet50"):  # type: ignore[arg-type]
        pass
