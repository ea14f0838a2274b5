"""YAML files of options: what is read, and what is refused by name before it is built."""

from __future__ import annotations

import os

import pytest

from hsat.cli.yaml_files import read_yaml

LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9))


@pytest.fixture
def refusal(tmp_path):
    def refusal(content):
        path = tmp_path / "own.yaml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(SystemExit) as stop:
            read_yaml(path)
        assert str(stop.value).startswith("error: ") and str(path) in str(stop.value)
        return str(stop.value)

    return refusal


def test_mappings(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text("attack: {eps: 8/255, steps: 3}\nseed: 0\n")
    assert read_yaml(path) == {"attack": {"eps": "8/255", "steps": 3}, "seed": 0}
    path.write_text("")
    assert read_yaml(path) == {}
    path.write_text("1: {title: x}\n")
    assert read_yaml(path, numbered=True) == {1: {"title": "x"}}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (LAUGHS + "seed: *a8", "line 2 has the alias *a0; write what it stands for"),
        ("a: &a [*a]", "line 1 has the alias *a"),
        ("seed: 2001-99-99", "month must be in 1..12"),
        ("seed: " + "1" * 5000, "4300"),
        ("[" * 3000, "line 1 has more than 20 lists and mappings inside each other"),
        ("data: {1: 2}", "line 1: a key must be a text, got '1', which YAML takes for int"),
        ("yes: 2", "got 'yes', which YAML takes for bool"),
        ("? [1]\n: 2", "a key must be a text, got a list or a mapping"),
        ("seed: 1\ndata: {root: a}\nseed: 2", "line 3: the key 'seed' comes twice"),
        ("data: [{root: a, root: b}]", "line 1: the key 'root' comes twice"),
        ("[1]", "must hold a mapping of options, not a list"),
        ("a: !!python/object/apply:os.system [id]", "could not determine a constructor"),
        ("a: \x00", "special characters are not allowed"),
        (b"\xff\xfea", "can't decode"),
        ("#" * (1 << 18) + "#", "more than 256 KiB"),
    ],
)  # fmt: skip
def test_what_is_refused(content, said, refusal):
    assert said in refusal(content)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SystemExit, match="named pipe"):
        read_yaml(tmp_path / "pipe")
