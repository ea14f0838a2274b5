"""--threads: what is measured when, what is kept, and what is recorded."""

from __future__ import annotations

import json

import pytest
import torch

from hsat.cli import threads as module
from hsat.cli.threads import computing_threads, name_threads, settle_threads
from hsat.eval import read_records
from hsat.models import build_encoder


@pytest.fixture(scope="module")
def encoder():
    return build_encoder("test_byobnet", mean=0.5, std=0.25)


@pytest.fixture
def two_threads():
    """Torch's own number is two."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def settle(encoder, state, *, threads="auto", environment=None, device="cpu"):
    return settle_threads(
        threads, encoder, image_size=32, device=torch.device(device), state=state, environment=environment or {}
    )


def test_the_block_sets_the_number_back():
    before = torch.get_num_threads()
    with pytest.raises(RuntimeError, match="inside"), computing_threads(before + 1):
        assert torch.get_num_threads() == before + 1
        raise RuntimeError("inside")
    assert torch.get_num_threads() == before
    with computing_threads("auto"):
        assert torch.get_num_threads() == before


@pytest.mark.parametrize("faster", [True, False])
def test_the_faster_one_is_taken_said_and_kept(faster, encoder, two_threads, tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(module, "one_is_faster", lambda *args: asked.append(args) or faster)
    for _ in range(2):  # the second time it is read
        torch.set_num_threads(2)
        assert settle(encoder, tmp_path) == (1 if faster else None)
        assert torch.get_num_threads() == (1 if faster else 2)
        assert ("computing with 1 thread(s), not 2" in capsys.readouterr().err) == faster
    assert len(asked) == 1
    assert json.loads((tmp_path / "threads.json").read_text()) == {"threads": 1 if faster else 2}


def test_what_the_user_says_is_never_overruled(encoder, two_threads, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "one_is_faster", lambda *args: pytest.fail("nothing is to be measured"))
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        assert settle(encoder, tmp_path, environment={name: "2"}) is None
    assert settle(encoder, tmp_path, threads=2) == 2
    assert settle(encoder, tmp_path, device="cuda") is None
    torch.set_num_threads(1)
    assert settle(encoder, tmp_path) is None
    assert not list(tmp_path.iterdir())


def test_the_measurement_disturbs_nothing(encoder, two_threads):
    encoder.train()
    state, weights = torch.get_rng_state(), [p.clone() for p in encoder.state_dict().values()]
    assert module.one_is_faster(encoder, 32, 2) in (True, False)
    assert torch.equal(torch.get_rng_state(), state) and torch.get_num_threads() == 2 and encoder.training
    assert all(torch.equal(a, b) for a, b in zip(weights, encoder.state_dict().values(), strict=True))
    assert all(p.grad is None for p in encoder.parameters())


def test_records_name_a_number_that_was_chosen(made_records):
    records = made_records("m", 0.9)
    assert name_threads(records, None) == tuple(records)
    assert {record.settings["computed"]["threads"] for record in name_threads(records, 3)} == {3}


def test_the_command_records_it_and_sets_it_back(trained, root, tmp_path):
    from hsat.cli.evaluate import main

    before = torch.get_num_threads()
    quick = "--data.image_size 32 --steps 1 --bootstrap 0 --gallery 0 --diagnose 0 --k 5 --eps 8/255 --quiet".split()
    argv = ["--checkpoint", str(trained / "final.safetensors"), "--data.root", str(root), *quick, "--attacks", "pgd"]
    main([*argv, "--natural_shift", "false", "--threads", "1", "--out", str(tmp_path / "out")])
    records = read_records(tmp_path / "out" / "records.jsonl")
    assert {record.settings["computed"]["threads"] for record in records} == {1}
    assert json.loads((tmp_path / "out" / "run.json").read_text())["versions"]["threads"] == "1"
    assert torch.get_num_threads() == before


def test_a_wrong_number_is_refused(stops, tmp_path):
    from hsat.cli.evaluate import main

    assert "threads" in stops(main, ["--checkpoint", "a", "--threads", "0", "--out", str(tmp_path)])
