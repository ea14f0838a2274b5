"""The command hsat itself: its overview, its version, mistyped commands, and the help of every command."""

from __future__ import annotations

import importlib
import re

import pytest

import hsat
from hsat.cli.main import COMMANDS, main
from hsat.cli.options import Settings, option_names

OWN = {  # options that only this command has, and one of another that it must not have
    "train": ("train.lr", "attacks"),
    "evaluate": ("untrained", "train.lr"),
    "transfer": ("surrogates", "untrained"),
    "certify": ("sigma", "eps"),
    "budget": ("fractions", "sigma"),
    "universal": ("fit_on", "resume"),
    "export": ("split", "query_patches"),
    "report": ("title", "seed"),
    "reproduce": ("table", "seed"),
    "compare": ("metrics", "resume"),
    "check": ("exclude", "seed"),
    "demo": ("targets", "data.root"),
}


def settings_of(command):
    module = importlib.import_module(f"hsat.cli.{command}")
    return getattr(module, command.capitalize())


def help_of(command, capsys):
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(f"hsat.cli.{command}").main(["--help"])
    assert stop.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["help"], []])
def test_the_overview_lists_every_command(words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == (0 if words else 2)
    shown = capsys.readouterr().out
    assert all(re.search(rf"^  {name} +{re.escape(text)}$", shown, re.MULTILINE) for name, text in COMMANDS.items())
    assert "hsat demo" in shown and max(map(len, shown.splitlines())) <= 120


@pytest.mark.parametrize("word", ["--version", "-V"])
def test_the_version_is_that_of_the_package(word, capsys):
    main([word])
    assert capsys.readouterr().out == f"hsat {hsat.__version__}\n"


@pytest.mark.parametrize(
    ("word", "hint"),
    [("trian", "did you mean hsat train?"), ("evalute", "did you mean hsat evaluate?"), ("xyz", "demo")],
)
def test_a_mistyped_command_is_answered_with_the_nearest(word, hint, stops):
    message = stops(main, [word, "--seed", "1"])
    assert f"hsat has no command {word!r}" in message and hint in message and "\n" not in message


def test_the_package_runs_as_a_module(launch, tmp_path):
    process = launch("--version", cwd=tmp_path)
    assert process.communicate()[0] == f"hsat {hsat.__version__}\n" and process.returncode == 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", COMMANDS)
def test_help_lists_the_options_of_the_command_and_no_others(command, capsys):
    shown, settings = help_of(command, capsys), settings_of(command)
    assert issubclass(settings, Settings)
    assert shown.startswith(f"usage: hsat {command} [--option VALUE ...]\n")
    listed = re.findall(r"^  --([\w.]+)", shown, re.MULTILINE)
    assert sorted(listed) == sorted(option_names(settings))
    mine, foreign = OWN[command]
    assert mine in listed and foreign not in listed


@pytest.mark.parametrize("command", COMMANDS)
def test_help_ends_with_examples_that_parse(command, capsys):
    shown = help_of(command, capsys)
    examples = shown.partition("\nexamples:\n")[2].replace("\\\n", " ").splitlines()
    assert examples and all(line.startswith("  ") for line in examples)
    assert any(line.startswith(f"  hsat {command}") for line in examples)
    known = {*option_names(settings_of(command)), "nproc_per_node"}
    words = {word.lstrip("-").partition("=")[0] for line in examples for word in line.split() if word.startswith("--")}
    assert words <= known


@pytest.mark.parametrize("command", COMMANDS)
def test_defaults_are_shown_as_a_person_writes_them(command, capsys):
    shown = " ".join(help_of(command, capsys).split())
    for default in re.findall(r"\(default: (.*?)\)", shown):
        assert not re.search(r"[\[\]'{}]|None|Posix|\d\.\d{4}", default), default
    assert "None" not in shown and "True" not in shown and "False" not in shown


def test_some_defaults(capsys):
    shown = {command: " ".join(help_of(command, capsys).split()) for command in ("train", "evaluate", "budget")}
    assert "radius of the l_inf ball (default: 8/255)" in shown["train"]
    assert "size of a step (default: 2/255)" in shown["train"]
    assert "(default: 4/255,8/255)" in shown["evaluate"] and "(default: pgd,mifgsm)" in shown["evaluate"]
    assert "--k list[int] neighbours; several with commas between; if not given, 200 for OpenSRH" in shown["evaluate"]
    assert "(default: 0.05,0.1,0.25,0.5,1)" in shown["budget"] and "(default: runs/budget-TIME)" in shown["budget"]
