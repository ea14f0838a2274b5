"""Natural shifts in an evaluation: conditions beside the attacks, without flags, eps or gradients."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import pytest
import torch

from hsat.attacks import PGD, Linf, NaturalShift
from hsat.attacks.natural_shift import STANDARD_AMOUNTS
from hsat.classifiers import KNNClassifier
from hsat.data import PatchDataset, patch_loader, read_opensrh
from hsat.eval import RunOptions, Scoring, evaluate_whitebox

ATTACKS = {"PGD-8": PGD(Linf(8 / 255), step_size=2 / 255, steps=2)}
PAGE = Path(__file__).resolve().parents[2] / "docs" / "natural_shift.md"
FAST = {"scoring": Scoring(bootstrap=10)}


def test_records_of_a_shift(toy_encoder, toy_batches):
    bank, queries = toy_batches(seed=1, sizes=(30, 30), first_id=1000), toy_batches(seed=2, sizes=(20, 16))
    attacks = {**ATTACKS, **NaturalShift.standard()}
    result = evaluate_whitebox(
        toy_encoder,
        bank,
        queries,
        attacks,
        classifier=[KNNClassifier(k=15), KNNClassifier(k=5)],
        run=RunOptions(diagnose=4),
        **FAST,
    )
    assert list(result.tables) == ["clean", "noise-8", *attacks]
    shifted = [record for record in result.records if record.attack.startswith("NaturalShift(")]
    assert {record.attack_name for record in shifted} == set(NaturalShift.standard())
    assert {(record.eps, record.eps_value, record.flags, record.backwards) for record in shifted} == {
        ("0", 0.0, (), 0.0)
    }
    assert {record.forwards for record in shifted} == {0.0}, "the pass that embeds is nobody's"
    assert not any("diagnosis" in record.settings for record in shifted)
    (about,) = {str(record.settings["natural_shift"]) for record in shifted if record.attack_name == "jpeg 3"}
    assert about == "{'kind': 'jpeg', 'strength': 'strong', 'text': 'JPEG of quality 15'}"
    values = {r.attack_name: r.value for r in shifted if (r.level, r.metric, r.k) == ("patch", "accuracy", 15)}
    assert values["blur 1"] >= 0.9, "the toy encoder reads the mean colour, which a blur hardly moves"
    assert values["stain 3"] < values["blur 1"]


def test_batches_do_not_matter(toy_encoder, toy_batches):
    bank = toy_batches(seed=1, sizes=(30, 30), first_id=1000)
    answers = []
    for sizes in ((36,), (20, 16)):
        queries = toy_batches(seed=2, sizes=(36,)) if len(sizes) == 1 else None
        if queries is None:
            whole = toy_batches(seed=2, sizes=(36,))[0]
            queries = toy_batches(seed=2, sizes=())
            queries += [
                type(whole)(*(getattr(whole, name)[rows] for name in NAMES)) for rows in (slice(0, 20), slice(20, 36))
            ]
        result = evaluate_whitebox(
            toy_encoder, bank, queries, NaturalShift.standard(), classifier=KNNClassifier(k=15), **FAST
        )
        answers.append([(record.attack_name, record.level, record.metric, record.value) for record in result.records])
    assert answers[0] == answers[1]


NAMES = ("images", "patch", "slide", "patient", "label")


def test_the_stain_of_srh_patches_is_refused(toy_encoder, root):
    cohort = read_opensrh(root)
    bank, queries = (
        patch_loader(PatchDataset(cohort, split, image_size=16), batch_size=8) for split in ("train", "val")
    )
    with pytest.raises(ValueError, match=r"stain 2: SRH patches are not stained.*stained=False"):
        evaluate_whitebox(toy_encoder, bank, queries, {"stain 2": NaturalShift("stain", 0.1)}, **FAST)
    shifts = NaturalShift.standard(stained=False)
    result = evaluate_whitebox(toy_encoder, bank, queries, shifts, classifier=KNNClassifier(k=3), **FAST)
    assert len(result.tables) == 13


def test_the_page_runs_and_its_table_is_that_of_the_code(tmp_path, capsys):
    text = PAGE.read_text()
    names: dict = {"__name__": "natural_shift"}
    with contextlib.chdir(tmp_path), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for code in re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            exec(compile(code, str(PAGE), "exec", dont_inherit=True), names)
    assert set(names["result"].tables) == {
        "clean",
        "noise-8",
        "PGD-8",
        "blur 0.5",
        *NaturalShift.standard(stained=False),
    }
    assert "**Natural shift, patch level" in capsys.readouterr().out
    rows = dict(re.findall(r"^\| `(\w+)` \| ([\d., ]+) \|", text, re.MULTILINE))
    assert {kind: tuple(map(float, amounts.split(","))) for kind, amounts in rows.items()} == STANDARD_AMOUNTS
