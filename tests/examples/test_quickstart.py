"""quickstart.py runs from top to bottom."""

from __future__ import annotations

import re
from pathlib import Path

import hsat.data

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart.py"


def test_quickstart_has_help_without_running_and_is_short(tmp_path, launch):
    process = launch(QUICKSTART, "--help", cwd=tmp_path)
    shown = process.communicate()[0]
    assert process.returncode == 0 and "your model" in shown
    assert not list(tmp_path.iterdir())
    assert len(QUICKSTART.read_text().splitlines()) < 60


def test_quickstart_trains_and_measures(root, monkeypatch, capsys):
    monkeypatch.setattr(hsat.data, "write_synthetic_cohort", lambda path: root)
    monkeypatch.setattr("sys.argv", ["quickstart.py"])
    script = QUICKSTART.read_text()
    assert "STEPS = 40\n" in script
    exec(compile(script.replace("STEPS = 40\n", "STEPS = 20\n"), str(QUICKSTART), "exec"), {"__name__": "__main__"})
    shown = capsys.readouterr().out
    losses = [float(found) for found in re.findall(r"adversarial loss ([\d.]+)", shown)]
    assert len(losses) == 2 and losses[-1] < losses[0]
    clean, attacked = (float(found) for found in re.findall(r"patch accuracy ([\d.]+)", shown))
    assert clean > 0.5 and attacked <= clean
