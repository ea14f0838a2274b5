"""The counter of reads itself: each kind is counted, in whatever code it stands, and nothing else is."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from host_reads import HostReads
from torch import nn

from hsat.attacks import PGD, Linf
from hsat.attacks.threat import require_range

VALUES = torch.tensor([1.0, 2.0, 0.0])
ONE, THREE, MASK, COUNTS = torch.tensor(1.0), torch.tensor(3), VALUES > 0, torch.tensor([0, 1, 2])
SQUARE = torch.eye(2)

READS = {
    "if": lambda: 1 if ONE else 0,
    "not": lambda: not ONE,
    "float": lambda: float(ONE),
    "int": lambda: int(THREE),
    "complex": lambda: complex(ONE),
    "range": lambda: range(THREE),
    "list index": lambda: "abcd"[THREE],
    "item": ONE.item,
    "tolist": VALUES.tolist,
    "cpu": VALUES.cpu,
    "numpy": VALUES.numpy,
    "numpy, by force": lambda: VALUES.numpy(force=True),
    "np.asarray": lambda: np.asarray(VALUES),
    "np.linalg.norm": lambda: np.linalg.norm(VALUES),
    "text": lambda: f"{ONE}",
    "text, with digits": lambda: f"{ONE:.2f}",
    "repr": lambda: repr(VALUES),
    "in": lambda: 2.0 in VALUES,
    "to('cpu')": lambda: VALUES.to("cpu"),
    "to(device='cpu')": lambda: VALUES.to(device="cpu"),
    "to(torch.device('cpu'))": lambda: VALUES.to(torch.device("cpu"), torch.float64),
    "as_tensor on the CPU": lambda: torch.as_tensor(VALUES, device="cpu"),
    "nonzero": VALUES.nonzero,
    "nonzero, as a tuple": lambda: torch.nonzero(VALUES, as_tuple=True),
    "argwhere": lambda: torch.argwhere(VALUES),
    "where, one argument": lambda: torch.where(MASK),
    "masked_select": lambda: VALUES.masked_select(MASK),
    "mask": lambda: VALUES[MASK],
    "mask and a place": lambda: torch.ones(3, 2)[MASK, 0],
    "assignment by a mask": lambda: VALUES.clone().__setitem__(MASK, 1.0),
    "index_put by a mask": lambda: VALUES.index_put((MASK,), ONE),
    "a place in a tensor": lambda: VALUES[COUNTS.sum() - 1],
    "slice up to a tensor": lambda: VALUES[:THREE],
    "equal": lambda: torch.equal(VALUES, VALUES),
    "equal, as a method": lambda: VALUES.equal(VALUES),
    "allclose": lambda: torch.allclose(VALUES, VALUES),
    "is_nonzero": lambda: torch.is_nonzero(ONE),
    "unique": lambda: torch.unique(VALUES),
    "unique, as a method": lambda: VALUES.unique(return_inverse=True),
    "unique_consecutive": lambda: torch.unique_consecutive(VALUES),
    "bincount": lambda: torch.bincount(COUNTS, minlength=3),
    "multinomial": lambda: torch.multinomial(VALUES, 1),
    "one_hot": lambda: nn.functional.one_hot(COUNTS),
    "repeat_interleave": lambda: torch.repeat_interleave(COUNTS),
    "repeat_interleave, counts for each": lambda: torch.repeat_interleave(VALUES, COUNTS),
    "repeat_interleave, as a method": lambda: VALUES.repeat_interleave(repeats=COUNTS),
    "tensor of tensors": lambda: torch.tensor([ONE, 2.0]),
    "new_tensor of tensors": lambda: VALUES.new_tensor([[ONE, ONE]]),
    "arange": lambda: torch.arange(THREE),
    "zeros": lambda: torch.zeros(2, THREE),
    "full": lambda: torch.full((2,), ONE),
    "new_full": lambda: VALUES.new_full((2,), ONE),
    "view": lambda: VALUES.view(THREE),
    "expand": lambda: ONE.expand(THREE),
    "inverse": lambda: torch.linalg.inv(SQUARE),
    "max of a list": lambda: max([ONE, ONE + 1]),
    "assert_close": lambda: torch.testing.assert_close(VALUES, VALUES),
}
NO_READS = {
    "shape": lambda: (VALUES.shape, len(VALUES), VALUES.ndim, VALUES.numel(), VALUES.stride()),
    "arithmetic": lambda: (VALUES * 2 + ONE).clamp(max=ONE).sum(),
    "comparison": lambda: (VALUES == ONE).all() & ~MASK.any(),
    "dtype": lambda: VALUES.to(torch.float64).float(),
    "device of another": lambda: VALUES.to(ONE.device, non_blocking=True),
    "like another": lambda: VALUES.to(ONE),
    "where, three arguments": lambda: torch.where(MASK, VALUES, 0.0),
    "places": lambda: (VALUES[COUNTS], VALUES[1:], VALUES[None, ..., 0], VALUES[[0, 1]]),
    "assignment by places": lambda: VALUES.clone().__setitem__(COUNTS, 1.0),
    "masked_fill": lambda: VALUES.masked_fill(MASK, 0.0),
    "numbers": lambda: (torch.tensor([1, 2]), torch.arange(3), VALUES.new_full((2,), 3.0), torch.as_tensor(VALUES)),
    "shapes": lambda: (VALUES.view(1, 3), VALUES.expand(2, -1), VALUES.repeat(2)),
    "repeat_interleave, once for all": lambda: VALUES.repeat_interleave(2),
    "repeat_interleave, known size": lambda: torch.repeat_interleave(VALUES, COUNTS, output_size=3),
    "one_hot, known classes": lambda: (nn.functional.one_hot(COUNTS, 3), nn.functional.one_hot(COUNTS, num_classes=3)),
    "for": lambda: [part + 1 for part in VALUES],
    "sorting": lambda: (VALUES.sort(), VALUES.topk(2), VALUES.argmax(), VALUES.aminmax()),
    "networks": lambda: nn.functional.cross_entropy(nn.Linear(3, 2)(VALUES[None]), torch.tensor([1])),
    "devices": lambda: torch.zeros(2, device=torch.device("cpu")),
}


@pytest.mark.parametrize("kind", READS)
def test_each_kind_of_read_is_counted_once(kind):
    with HostReads() as reads:
        READS[kind]()
    assert len(reads) == 1, reads
    assert reads[0].where == "outside hsat"


@pytest.mark.parametrize("kind", NO_READS)
def test_what_needs_no_value_is_not_counted(kind):
    with HostReads() as reads:
        NO_READS[kind]()
    assert not reads, reads


def test_nothing_is_counted_outside_the_block():
    with HostReads() as reads:
        pass
    float(ONE)
    assert not reads
    with reads:
        float(ONE)
    assert [read.what for read in reads] == ["__float__"]


class Reading(torch.autograd.Function):
    """Twice its input; reads in both passes."""

    @staticmethod
    def forward(ctx, x):
        x.sum().item()
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad if grad.isfinite().all() else grad


class Failing(torch.autograd.Function):
    """Raises in its backward pass."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise FloatingPointError(f"{float(grad.sum())}")


BACKWARDS = {
    "grad": torch.autograd.grad,
    "grad, by name": lambda y, x: torch.autograd.grad(outputs=[y], inputs=[x]),
    "backward": lambda y, x: y.backward(),
    "autograd.backward": lambda y, x: torch.autograd.backward([y]),
}


@pytest.mark.parametrize("backward", BACKWARDS)
def test_reads_in_both_passes_of_a_function_are_seen(backward):
    x = torch.ones(3, requires_grad=True)
    with HostReads() as reads:
        y = Reading.apply(Reading.apply(x * 1)).sum()
        assert [read.what for read in reads] == ["item", "item"]
        BACKWARDS[backward](y, x)
        float(y.detach())
    assert [read.what for read in reads] == ["item", "item", "__bool__", "__bool__", "__float__"]
    BACKWARDS[backward](Reading.apply(x).sum(), x)
    assert len(reads) == 5, "no hook is left"


@pytest.mark.parametrize("backward", BACKWARDS)
def test_a_backward_pass_that_raises_leaves_the_counter_as_it_was(backward):
    x = torch.ones(3, requires_grad=True)
    with HostReads() as reads:
        with pytest.raises(FloatingPointError):
            BACKWARDS[backward](Failing.apply(x).sum(), x)
        float(ONE)
    float(ONE)
    assert [read.what for read in reads] == ["__float__"] * 2


class ReadingLayer(nn.Linear):
    """Reads in its forward pass."""

    def forward(self, x):
        return super().forward(x) if bool(x.isfinite().all()) else x


class ReadingOptimizer(torch.optim.SGD):
    """Reads in its step."""

    @torch.no_grad()
    def step(self, closure=None):
        self.norm = self.param_groups[0]["params"][0].norm().item()
        return super().step(closure)


def test_reads_in_layers_and_optimisers_are_seen():
    model = nn.Sequential(ReadingLayer(3, 3), nn.Tanh(), ReadingLayer(3, 1))
    optimizer = ReadingOptimizer(model.parameters(), lr=0.1)
    with HostReads() as reads:
        model(VALUES[None]).sum().backward()
        assert [read.what for read in reads] == ["__bool__", "__bool__"]
        optimizer.step()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        assert [read.what for read in reads] == ["__bool__", "__bool__", "item"]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
    assert len(reads) == 4


def test_the_innermost_line_of_the_package_is_named():
    with HostReads() as reads:
        require_range(torch.rand(2, 3, 4, 4), 0.0, 1.0)
    read = reads[-1]
    line = read.lines[0]
    assert (line.file, line.function, line.text) == ("attacks/threat.py", "require_range", "if bool(refused):")
    assert f"attacks/threat.py:{line.number}" in repr(read)
    assert [line.function for line in reads[0].lines] == ["round_inside", "clamp_to_range", "require_range"]


@pytest.mark.parametrize(
    "reading",
    [lambda v: v.sum((1, 2, 3)) * float(v.detach().mean()), lambda v: Reading.apply(v.square()).sum((1, 2, 3))],
    ids=["in the objective", "in its backward pass"],
)
def test_a_read_at_each_step_of_an_attack_is_seen(reading):
    """What an attack may read is counted elsewhere; here, that a read more at each step does not stay hidden."""
    x, attack = torch.rand(2, 3, 4, 4), PGD(Linf(0.1), step_size=0.05, steps=3)
    counts = []
    for objective in (lambda v: v.square().sum((1, 2, 3)), reading):
        with HostReads() as reads:
            attack(x, objective, generator=torch.Generator().manual_seed(0))
        counts.append(len(reads))
    assert counts[1] >= counts[0] + attack.steps
