"""The documents: their Python runs and does what it says, their commands are accepted, their links lead somewhere."""

from __future__ import annotations

import contextlib
import importlib
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch

import hsat
from hsat import robustness
from hsat.attacks import L2, PGD, Linf, RandomNoise, feature_drift
from hsat.cli.main import COMMANDS
from hsat.cli.options import Settings, collect_words
from hsat.fingerprints import fingerprint_weights
from hsat.testing import LAWS, check_feasible
from hsat.types import EmbeddingTable

ROOT = Path(__file__).resolve().parents[1]
README, GUIDE = ROOT / "README.md", ROOT / "docs" / "guide.md"
DOCUMENTS = (README, ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md")))
ROOMS = "types stains attacks losses data models training classifiers embedding eval report".split()
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(path: Path, language: str) -> list[tuple[int, str]]:
    """(line number, text) of the fenced blocks in a language."""
    text = path.read_text()
    found = [(text.count("\n", 0, m.start(2)), m.group(2)) for m in FENCE.finditer(text) if m.group(1) == language]
    assert found, f"{path.name} has no block of {language}"
    return found


def execute(path: Path, folder: Path) -> dict[str, Any]:
    """The names that the Python blocks of a document define, run in order in an empty folder."""
    names: dict[str, Any] = {"__name__": path.stem}
    with contextlib.chdir(folder), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for line, code in blocks(path, "python"):  # with its line, so that errors point into the document
            exec(compile("\n" * line + code, str(path), "exec", dont_inherit=True), names)
    return names


@pytest.fixture(scope="module")
def guide(tmp_path_factory):
    folder = tmp_path_factory.mktemp("guide")
    return execute(GUIDE, folder) | {"folder": folder}


@pytest.fixture(scope="module")
def readme(tmp_path_factory):
    """The README, as a reader with a folder of patches runs it; nothing is downloaded, and one step stands for all."""
    folder, real = tmp_path_factory.mktemp("readme"), timm.create_model
    hsat.write_synthetic_cohort(folder / "patches", patients_per_class=2, patches=2, size=32)
    short = {f"ensemble-{n}": PGD(Linf(n / 255), step_size=n / 255, steps=1) for n in (2, 4, 8)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timm, "create_model", lambda name, pretrained, **how: real("resnet10t", **how))
        patch.setattr(robustness, "standard_attacks", lambda eps, labelled: short)
        return execute(README, folder) | {"folder": folder}


def beats_noise(x_adv, x, encode, threat):
    """An attack on the features has to move them further than noise of the same size does."""
    check_feasible(x_adv, x, threat)
    drift = feature_drift(encode, x)
    noisy = RandomNoise(threat)(x, drift, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return bool((drift(x_adv) > drift(noisy)).all())


def test_the_readme_takes_six_lines_and_ten_lines():
    (_, front), (_, loop) = blocks(README, "python")
    front, loop = ([line for line in code.splitlines() if line.strip()] for code in (front, loop))
    assert len(front) <= 6 and len(loop) <= 10 and max(map(len, (*front, *loop))) <= 120


def test_the_readme_evaluates_a_folder(readme):
    lines = readme["result"].summary().splitlines()
    assert 5 <= len(lines) <= 10 and lines[0].startswith("model ") and lines[-1].startswith("chance")
    assert (readme["folder"] / "runs" / "first" / "report.html").is_file()


def test_the_readme_trains_and_attacks(readme):
    images, threat = readme["batch"].images, Linf(8 / 255)
    check_feasible(readme["step"].x_adv, images, threat)
    assert torch.isfinite(readme["step"].loss)
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in readme["encoder"].parameters())
    assert any(bool(p.grad.any()) for p in readme["encoder"].parameters())
    with hsat.frozen(readme["encoder"]):
        assert beats_noise(readme["x_adv"], images, readme["encoder"].features, threat)
    assert readme["encoder"].training, "the block left the encoder in another mode"


def test_guide_attacks(guide):
    x = guide["x"]
    assert guide["attack"] == PGD(Linf(8 / 255), step_size=2 / 255, steps=10)
    assert beats_noise(guide["x_adv"], x, guide["net"], Linf(8 / 255))
    for name in ("on_classes", "on_anything", "on_a_loss"):
        check_feasible(guide[name], x, L2(0.5))
        assert not torch.equal(guide[name], x)
    result = guide["result"]
    assert torch.equal(result.x_adv[0], x[0]), "the image with eps 0 moved"
    assert not result.success[0]
    assert result.success[-1], "the image with the largest eps withstood"
    assert (result.value >= result.start_value).all(), "an image that succeeds at its start stays there"
    assert (result.value > result.start_value)[1:].any()
    fooled = guide["net"](result.x_adv).argmax(1) != guide["labels"]
    assert torch.equal(result.success, fooled)


def test_guide_losses(guide):
    terms, ablation = guide["terms"], guide["ablation"]
    torch.testing.assert_close(terms.total, terms.patch + terms.slide + 2 * terms.patient)
    torch.testing.assert_close(guide["slide_only"], terms.slide)
    assert (ablation.patch, ablation.slide, ablation.patient) == (1.0, 1.0, 0.0)


def test_guide_data(guide):
    cohort, batch = guide["cohort"], guide["batch"]
    for other in (guide["from_folders"], guide["from_table"]):
        assert len(other) == len(cohort) == 2 * 3 * 2 * 3
        assert other.class_names == cohort.class_names
        assert set(other.patient_names) == set(cohort.patient_names)
        assert other.kind == "rgb"
    split = guide["from_folders"]
    assert not set(split.patient[split.rows("train")]) & set(split.patient[split.rows("val")])
    assert len(batch) == 2 * 2 * 2 * 2
    assert 0 <= batch.images.min() < batch.images.max() <= 1
    assert len(guide["bank_loader"].dataset) + len(guide["query_loader"].dataset) == len(cohort)


def test_guide_models(guide):
    assert guide["features"].shape == (16, 16)
    assert guide["embeddings"].shape == (16, 8)
    torch.testing.assert_close(guide["embeddings"].norm(dim=1), torch.ones(16))
    assert guide["report"].loaded == len(guide["encoder"].state_dict())
    assert fingerprint_weights(guide["again"]) == fingerprint_weights(guide["timm_encoder"])
    with hsat.frozen(guide["timm_encoder"]):
        assert beats_noise(guide["on_timm"], guide["x"], guide["timm_encoder"].features, Linf(4 / 255))


def test_guide_training(guide):
    assert guide["schedule"].last_epoch == guide["steps"] == 2 * guide["sampler"].batches_per_epoch > 0
    check_feasible(guide["step"].x_adv, guide["batch"].images, Linf(8 / 255))
    assert torch.isfinite(guide["step"].loss)
    assert guide["step"].clean is None
    now = [p.detach().clone() for p in guide["encoder"].parameters()]
    before = hsat.models.load_checkpoint(guide["encoder"], guide["folder"] / "small.safetensors")
    changed = [not torch.equal(a, b) for a, b in zip(now, guide["encoder"].parameters(), strict=True)]
    with torch.no_grad():
        for parameter, value in zip(guide["encoder"].parameters(), now, strict=True):
            parameter.copy_(value)
    assert before.metadata["note"].startswith("of wrap_encoder")
    assert all(changed), "training did not move every parameter"
    assert guide["trainer"].done == 2
    assert (guide["folder"] / guide["trained_file"]).is_file()


def test_guide_evaluation(guide):
    np.testing.assert_allclose(guide["scores"].sum(1), 1)
    assert len(guide["by_slide"]) == len(np.unique(guide["attacked"].slide))
    assert np.array_equal(guide["clean"].patch, guide["attacked"].patch)
    assert not np.array_equal(guide["clean"].z, guide["attacked"].z)
    loaded = EmbeddingTable.load(guide["folder"] / "attacked_table")
    assert np.array_equal(loaded.z, guide["attacked"].z)
    names = ["clean", "noise-4", "noise-8", "PGD-4", "MIFGSM-4", "PGD-8", "MIFGSM-8"]
    assert list(guide["whitebox"].tables) == names
    assert all(f" {name} |" in guide["table"] for name in names)
    assert hsat.eval.read_records(guide["folder"] / "records.jsonl") == guide["whitebox"].records


def test_guide_own_attack(guide):
    assert guide["laws"] == tuple(LAWS)
    assert len(guide["polished"]) == len(guide["clean"])


def test_guide_reproducibility(guide):
    whole, parts = guide["whole"], guide["parts"]
    assert torch.equal(whole, guide["perturbed"](guide["x"], guide["image_ids"]))
    check_feasible(whole, guide["x"], Linf(8 / 255))
    assert (whole != parts).float().mean() < 0.02, "more than what rounding in the network explains"
    other = guide["perturbed"](guide["x"], guide["image_ids"] + 1)
    assert (whole != other).float().mean() > 0.05, "the ids did not matter"


def test_the_page_of_data(tmp_path, capsys):
    names = execute(ROOT / "docs" / "data.md", tmp_path)
    assert names["same"] == names["cohort"] and len(names["cohort"]) == 12
    assert "12 files: 8 contradicting, 3 duplicate" in str(names["check"])
    assert (tmp_path / "files.csv").is_file()
    result, shown = names["result"], capsys.readouterr().out
    assert {record.level for record in result.records} == {"patch", "slide", "patient"}
    assert all(record.chance < record.value for record in result.records if record.metric == "accuracy")
    assert not any(record.flags for record in result.records)
    assert str(result) in shown and "| patient | accuracy |" in shown


def test_the_guide_names_everything_public():
    words = set(re.findall(r"\w+", GUIDE.read_text()))
    assert set(hsat.__all__) <= words
    for room in ROOMS:
        missing = set(importlib.import_module(f"hsat.{room}").__all__) - words
        assert not missing, f"docs/guide.md does not mention {sorted(missing)} of hsat.{room}"


def test_the_names_in_the_guides_list_exist():
    rows = re.findall(r"^\| `(hsat\.\w+)` \| (.*) \|$", GUIDE.read_text(), re.MULTILINE)
    assert [room.removeprefix("hsat.") for room, _ in rows] == [*ROOMS, "testing"]
    for room, cells in rows:
        for name in re.findall(r"`(\w+)`", cells):
            assert hasattr(importlib.import_module(room), name), f"{room} has no {name}"


def slug(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def broken_links(path: Path, text: str) -> list[str]:
    """Relative links of a document that lead to no file, or to no heading of a Markdown file."""
    text = FENCE.sub("", re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL))
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name) if name else path
        linked = target.read_text() if target.suffix == ".md" and target.is_file() else ""
        headings = re.findall(r"^#+ (.*)$", linked, re.MULTILINE)
        if not target.exists() or (anchor and anchor not in map(slug, headings)):
            broken.append(link)
    return broken


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    assert not broken_links(path, path.read_text())


def test_broken_links_are_seen():
    text = "[a](nowhere.png) [b](LICENSE) [c](docs/guide.md#3-data) [d](docs/guide.md#no) <!-- [e](gone) -->"
    assert broken_links(README, text) == ["nowhere.png", "docs/guide.md#no"]


def typed_lines() -> list[tuple[str, str]]:
    """(document, line) of every line of shell in the documents, continued lines joined."""
    lines = []
    for path in DOCUMENTS:
        text = path.read_text()
        shell = [match.group(2) for match in FENCE.finditer(text) if match.group(1) == "sh"]
        shell += re.findall(r"(?:^    .*\n)+", FENCE.sub("", text), re.MULTILINE)  # indented blocks
        joined = "\n".join(shell).replace("\\\n", " ")
        lines += [(path.name, line.strip()) for line in joined.splitlines()]
    return lines


def commands() -> list[list[str]]:
    """The words after `hsat` of every command of the documents, with torchrun or without."""
    found = []
    for _, line in typed_lines():
        words = shlex.split(line, comments=True) if re.match(r"(hsat|torchrun) ", line) else []
        if words:
            found.append(words[words.index("hsat") + 1 :])
    return found


def accept(words: list[str]) -> Settings:
    """The options of a command; SystemExit where one does not exist or has no such value."""
    name, *argv = words
    command = importlib.import_module(f"hsat.cli.{name}")
    if name == "train":
        return command.load_settings(argv)
    kinds = [each for each in vars(command).values() if isinstance(each, type) and issubclass(each, Settings)]
    (kind,) = [each for each in kinds if each.__module__ == command.__name__]
    positional = {"runs": "runs"} | ({"data": "data.root"} if name == "check" else {})
    collected = [option for field, option in positional.items() if field in kind.model_fields]
    return kind.load(collect_words(argv, collected[0]) if collected else argv)


@pytest.mark.parametrize("words", commands(), ids=lambda words: " ".join(words)[:80])
def test_the_commands_of_the_documents_are_accepted(words):
    assert words[0] in COMMANDS
    settings = accept(words)
    for option in ("out", "data.root", "checkpoint", "recipe", "preset"):
        if f"--{option}" in words:
            value = settings
            for part in option.split("."):
                value = getattr(value, part)
            typed = words[words.index(f"--{option}") + 1]
            assert (",".join(value) if isinstance(value, list) else str(value)) == typed
    if "runs" in type(settings).model_fields:
        assert settings.runs == [word for word in words if "runs/" in word and "report.html" not in word]


def test_every_command_is_shown_in_a_document_and_named_in_the_readme():
    shown = {words[0] for words in commands()}
    assert shown >= set(COMMANDS) - {"demo"}
    rows = re.findall(r"^\| `hsat (\w+)` \|", README.read_text(), re.MULTILINE)
    assert sorted(rows) == sorted(COMMANDS)


def test_an_option_that_does_not_exist_would_be_seen():
    with pytest.raises(SystemExit):
        accept(["evaluate", "--compat", "paper"])
    with pytest.raises(SystemExit):
        accept(["train", "--recipe", "experiment-15"])


def test_the_programs_of_the_documents_exist():
    programs = {word for _, line in typed_lines() for word in re.findall(r"^python (\w+/\w+\.py)", line)}
    assert programs
    assert not [program for program in programs if not (ROOT / program).is_file()]


def test_the_resume_option_of_the_readme_is_accepted():
    (option,) = re.findall(r"`(--resume[^`]*)`", README.read_text())
    assert accept(["train", *option.split()]).resume is True


def test_the_make_targets_of_the_readme_exist():
    wanted = set(re.findall(r"^make (\w+)", "\n".join(code for _, code in blocks(README, "sh")), re.MULTILINE))
    there = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"demo", "test"} <= wanted <= there


def test_the_changelog_knows_this_version():
    assert f"## [{hsat.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
