"""The GPU benchmark on the CPU: it runs, counts what it says it counts, and says what it cannot know."""

from __future__ import annotations

import importlib.util
import json
import statistics
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow
BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
TINY = "--device cpu --side 32 --patients 2 --backbone test_byobnet --turns 2 --calls 1".split()


@pytest.fixture(scope="module")
def bench():
    before = sys.path.copy()
    tf32 = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    sys.path.insert(0, str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("gpu_step", BENCHMARKS / "gpu_step.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = tf32
        sys.path[:] = before
        del sys.modules[spec.name]


@pytest.fixture(scope="module")
def written(bench, tmp_path_factory):
    out = tmp_path_factory.mktemp("results") / "new" / "step.json"
    bench.main([*TINY, "--peak", "float32=0.5", "bfloat16=2", "--out", str(out)])
    assert [path.name for path in sorted(out.parent.iterdir())] == ["step.json", "step.md"]
    return json.loads(out.read_text()), out.with_suffix(".md").read_text()


def test_every_variant_but_the_compiled_is_measured_and_the_numbers_fit_together(bench, written):
    content, text = written
    results = content["results"]
    assert list(results) == [name for name, variant in bench.VARIANTS.items() if not variant.compiled]
    assert not content["fell out"] and content["about"]["images"] == 16
    for name, row in results.items():
        seconds = row["seconds per step"]
        assert seconds["turns"] == 2 and 0 < seconds["min"] <= seconds["median"] <= seconds["max"]
        assert row["images per second"] == pytest.approx(16 / seconds["median"])
        rate = row["operations per step"] / seconds["median"] / 1e12
        assert row["TFLOP/s"] == pytest.approx(rate)
        peak = {"float32": 0.5, "bfloat16": 2.0}.get(row["number format"])
        assert row["fraction of peak"] == (None if peak is None else pytest.approx(rate / peak))
        assert row["peak memory in bytes"] is None, "there is no such counter on a CPU"
        assert f"| {name} |" in text
    recipe = results[bench.RECIPE]
    assert recipe[f"times faster than {bench.RECIPE}"]["median"] == 1
    assert "was not measured" in text


def test_the_recipe_computes_more_and_precision_changes_no_count(bench, written):
    count = {name: row["operations per step"] for name, row in written[0]["results"].items()}
    assert count[bench.RECIPE] == count[bench.RECIPE_TF32]
    ours = {number for name, number in count.items() if name.startswith("hsat")}
    assert len(ours) == 1
    # 6 passes of forward, gradient of images and gradient of weights, against 5 passes without the last: 18 to 13,
    # but that the outer pass asks for no gradient of images
    assert 1.2 < count[bench.RECIPE] / ours.pop() < 1.5


def test_operations_are_counted_as_by_hand(bench):
    conv, x = torch.nn.Conv2d(3, 5, 3, bias=False), torch.rand(2, 3, 8, 8)
    forward = 2 * 2 * 5 * 6 * 6 * 3 * 9
    assert bench.operations(lambda: conv(x)) == forward
    assert bench.operations(lambda: conv(x).sum().backward()) == 2 * forward
    assert bench.operations(lambda: conv(x.clone().requires_grad_()).sum().backward()) == 3 * forward

    def for_images():
        leaf = x.clone().requires_grad_()
        torch.autograd.grad(torch.nn.functional.conv2d(leaf, conv.weight.detach()).sum(), leaf)

    assert bench.operations(for_images) == 2 * forward


def test_a_step_of_ours_is_that_of_the_recipe_but_for_the_noise(bench):
    """Both losses of the same untrained encoder, at images attacked from other starts, are close."""
    x = torch.rand(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    losses = []
    for variant in (bench.Variant(published=True), bench.Variant()):
        torch.manual_seed(0)
        step = bench.step_of(variant, x, (2, 2, 2, 2), backbone="test_byobnet")
        losses.append([float(step()) for _ in range(2)])
    assert losses[1][0] == pytest.approx(losses[0][0], rel=0.05)
    assert losses[0][0] != losses[0][1] and losses[1][0] != losses[1][1], "the optimiser moved"


@pytest.mark.parametrize(
    ("name", "bfloat16"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA A100-SXM4-40GB", 312.0),
        ("NVIDIA A10", 125.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA L40", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("Something else", None),
    ],
)
def test_peaks_are_looked_up_by_the_whole_name_of_the_chip(bench, monkeypatch, name, bfloat16):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert bench.peaks_of(torch.device("cuda"), []).get("bfloat16") == bfloat16
    assert bench.peaks_of(torch.device("cuda"), ["bfloat16=7"])["bfloat16"] == 7


def test_a_variant_that_does_not_fit_falls_out_and_the_others_go_on(bench):
    def too_much():
        raise torch.OutOfMemoryError("no room\nmore text")

    seconds, _, fallen = bench.measure(
        {bench.RECIPE: lambda: None, bench.BEST: too_much}, turns=3, calls=1, device=torch.device("cpu")
    )
    assert len(seconds[bench.RECIPE]) == 3 and fallen == {bench.BEST: "no room"}
    results = bench.summary(seconds, {bench.RECIPE: None}, {bench.RECIPE: 1}, images=1, peaks={})
    assert list(results) == [bench.RECIPE] and "no room" in bench.table(results, fallen)


def test_the_verdict_says_what_the_numbers_say(bench):
    for median, word in ((4.2, "4.20 times, reached"), (3.1, "3.10 times, NOT reached")):
        row = {f"times faster than {bench.RECIPE}": {"median": median}}
        assert word in bench.verdict({bench.BEST: row})


def test_spread_is_over_turns_and_ratios_within_them(bench):
    seconds = {bench.RECIPE: [4.0, 8.0, 6.0], bench.BEST: [1.0, 2.0, 3.0]}
    results = bench.summary(seconds, dict.fromkeys(seconds), dict.fromkeys(seconds, 1), images=8, peaks={})
    ratio = results[bench.BEST][f"times faster than {bench.RECIPE}"]
    assert (ratio["median"], ratio["min"], ratio["max"]) == (statistics.median([4, 4, 2]), 2, 4)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([*TINY, "--peak", "fp8=3"], "takes float32="),
        ([*TINY, "--peak", "tf32=many"], "needs a number"),
        ([*TINY, "--only", "jax"], "no variant is named like"),
    ],
)
def test_what_cannot_be_measured_is_refused(bench, argv, words):
    with pytest.raises(SystemExit, match=words):
        bench.main(argv)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_it_says_so(bench):
    with pytest.raises(SystemExit, match="torch sees no GPU"):
        bench.main([])
