"""Numbers of small evaluations and trainings, committed in numbers.json: no change may move them by more than a patch.

    python tests/regression/committed_numbers.py            # compare, and say where they are left
    python tests/regression/committed_numbers.py --write    # write numbers.json anew, after a change that means to

Run it with the hsat of this checkout (PYTHONPATH, or `pip install -e .`).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

FILE = Path(__file__).parent / "numbers.json"
COMMAND = "python tests/regression/committed_numbers.py --write"
LOSS_TOLERANCE = 0.02
"""Relative.  With other instructions on one machine (ATEN_CPU_CAPABILITY=default) losses move by 1e-9, of augmented
images by 1e-7; other releases of torchvision and Pillow may round augmented images otherwise, by up to a grey level."""


def deviations(stored: Mapping[str, Any], measured: Mapping[str, Any]) -> list[str]:
    """What is missing, new, or too far away: accuracies by more than one row of their level, losses by 2 %."""
    lines: list[str] = []
    for kind in ("accuracies", "losses"):
        lines += [f"{key}: stored, not measured" for key in stored[kind] if key not in measured[kind]]
        lines += [f"{key}: measured, not stored" for key in measured[kind] if key not in stored[kind]]
    for key, (value, rows) in stored["accuracies"].items():
        now, rows_now = measured["accuracies"].get(key, (value, rows))
        if rows_now != rows:
            lines.append(f"{key}: of {rows} rows -> of {rows_now}")
        elif not abs(now - value) <= 1 / rows + 1e-6:
            lines.append(f"{key}: {value:.4f} -> {now:.4f}, more than one of {rows}")
    for key, losses in stored["losses"].items():
        now = measured["losses"].get(key, losses)
        if len(now) != len(losses):
            lines.append(f"{key}: {len(losses)} losses -> {len(now)}")
        far = [
            i for i, (a, b) in enumerate(zip(losses, now, strict=False)) if not abs(b - a) <= LOSS_TOLERANCE * abs(a)
        ]
        lines += [f"{key}, loss {i}: {losses[i]:.6f} -> {now[i]:.6f}" for i in far[:1]]
    return lines


def stored_numbers(file: Path = FILE) -> dict[str, Any]:
    """What is committed."""
    return dict(json.loads(file.read_text()))


def measured_numbers() -> dict[str, Any]:
    """The same, of the hsat that is imported."""
    from small_runs import measure

    accuracies, losses, _ = measure()
    return {"accuracies": {key: list(pair) for key, pair in accuracies.items()}, "losses": losses}


def main(argv: Sequence[str]) -> int:
    """Compare or write; 1 where numbers are left."""
    parser = argparse.ArgumentParser(description="Compare the committed numbers with those of this checkout.")
    parser.add_argument("--write", action="store_true", help="write numbers.json anew")
    options = parser.parse_args(argv)
    measured = measured_numbers()
    if options.write:
        FILE.write_text(_one_line_each({"command": COMMAND, **measured}))
        print(f"wrote {len(measured['accuracies'])} accuracies and {len(measured['losses'])} trainings to {FILE}")
        return 0
    lines = deviations(stored_numbers(), measured)
    print("\n".join(lines) or "all numbers are where they were")
    return 1 if lines else 0


def _one_line_each(numbers: Mapping[str, Any]) -> str:
    """JSON with a line per number or training, so that a diff shows what moved."""
    parts = [f'"command": {json.dumps(numbers["command"])}']
    for kind in ("accuracies", "losses"):
        lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in numbers[kind].items()]
        parts.append(f'"{kind}": {{\n' + ",\n".join(lines) + "\n}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
