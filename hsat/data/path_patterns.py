"""Regular expressions that are searched in paths: they come to an end, whoever wrote them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Sequence

_LONGEST = 1000  # characters of an expression
_SECONDS = 60.0
_PLAIN_REPEATS, _PLAIN_LENGTH = 3, 300  # of an expression and of paths that are searched without a second process
_CHILD = (
    "import json, re, sys\n"
    "text, paths = json.load(sys.stdin)\n"
    "pattern = re.compile(text)\n"
    "found = [pattern.search(path) for path in paths]\n"
    "json.dump([one and (one[1] if pattern.groups else one[0]) for one in found], sys.stdout)\n"
)


def search_paths(name: str, pattern: str, paths: Sequence[str], *, seconds: float = _SECONDS) -> list[str | None]:
    """What an expression finds in each path: its first group, or the whole match where it has none.

    Python's expressions can take a time that doubles with each letter of a path.  One without repetitions of groups and
    with at most three repetitions and choices cannot, and is searched here; any other is searched by a second process,
    which is ended when its time is over.

    Args:
        name: Of the option, for messages.
        pattern: The regular expression, of at most 1000 characters.
        paths: Relative paths.
        seconds: Time for all paths together.

    Returns:
        A text per path, None where nothing is found.

    Raises:
        ValueError: It is no regular expression, or takes longer.
    """
    if len(pattern) > _LONGEST:
        raise ValueError(f"{name} has {len(pattern)} characters; a regular expression has at most {_LONGEST}")
    try:
        compiled = re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{name}={pattern!r} is no regular expression: {error}") from error
    late = ValueError(
        f"{name}={pattern!r} takes more than {seconds:g} seconds on {len(paths)} paths; write it without repetitions"
        " inside each other, such as (a+)+, and with [^/]+ in place of .*"
    )
    if not _is_plain(pattern, paths):
        try:
            answer = subprocess.run(
                [sys.executable, "-I", "-S", "-c", _CHILD],
                input=json.dumps([pattern, list(paths)]).encode(),
                capture_output=True,
                check=True,
                timeout=seconds,
            )
        except subprocess.TimeoutExpired:
            raise late from None
        except (subprocess.CalledProcessError, OSError) as error:
            raise ValueError(f"{name}={pattern!r} could not be searched in {len(paths)} paths: {error}") from error
        return list(json.loads(answer.stdout))
    found: list[str | None] = []
    end = time.monotonic() + seconds
    for path in paths:
        match = compiled.search(path)
        found.append(match and (match[1] if compiled.groups else match[0]))
        if time.monotonic() > end:
            raise late
    return found


def _is_plain(pattern: str, paths: Sequence[str]) -> bool:
    """Whether a search takes at most the fourth power of a short path's length; signs in brackets are counted too."""
    repeats = len(re.findall(r"[*+?{|]", pattern))
    return (
        repeats <= _PLAIN_REPEATS
        and not re.search(r"\)[*+?{]", pattern)
        and max(map(len, paths), default=0) <= _PLAIN_LENGTH
    )
