"""Several folders on the command line: as plain words, or behind one option."""

from __future__ import annotations

from pathlib import Path


def gathered(argv: list[str], option: str) -> list[str]:
    """The words before the first option and all those behind `--option` as one `--option a,b,c`; the rest as it was.

    An option of one word is followed by that word only, so that `--k 20 DIR` leaves DIR where it is.  Commas separate
    folders here as in a configuration file; a folder whose own name holds one ends the program.
    """
    found: list[str] = []
    rest: list[str] = []
    taking = True
    for word in argv:
        name, equals, value = word.partition("=")
        if word.startswith("-"):
            taking = name == f"--{option}"
            if not taking:
                rest.append(word)
            elif equals:
                found.append(value)
        else:
            (found if taking else rest).append(word)
    for word in found:
        if "," in word and Path(word).exists():
            raise SystemExit(f"error: commas separate folders, so {word!r} cannot be named here; rename it")
    return [*rest, *([f"--{option}", ",".join(found)] if found else [])]
