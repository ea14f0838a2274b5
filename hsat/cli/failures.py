"""Failures that come from outside of a command, in one line with the cause and the cure."""

from __future__ import annotations

import ast
import errno
import re
import shlex

from hsat.data import BadPatch
from hsat.distributed import RankFailedError

FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_LAYOUTS = {"read_opensrh": "opensrh", "read_folders": "folders", "read_class_folders": "classes", "read_csv": "csv"}
_CALL = re.compile(r"(?:call )?(?:hsat\.)?(?P<call>(?:read_opensrh|read_folders|read_class_folders|read_csv)\()")
_ARGUMENT = re.compile(
    r"\b(?P<name>manifest|columns|path_template|patient|slide|split_folders|mixed|on_empty|kind|allow_links)="
    r"(?P<value>'[^']*'|True|\{[^}]*\})"
)
_PHRASES = (
    (r", after \.with_split\(\)", " and --data.splits draw"),
    (
        r"read without them \(keep_splits=False\) and draw patients anew with \.with_split\(\)",
        "draw patients anew with --data.splits draw",
    ),
    (r" and give the Cohort that it returns", ""),
    (r"\. Give the Cohort that a reader of hsat\.data returns in place of the folder", ""),
    (r"(?:hsat\.data\.)?rename_splits\(cohort, \{'(\w+)': '([^']*)'\}\)", r"--data.splits \1=\2"),
    (r"pass input_size=(\d+)(?: \(to wrap_encoder or build_encoder\))?", r"give --model.input_size \1"),
    (r"pass image_size=\.\.\. to the dataset or evaluation", "give --data.image_size SIZE"),
    (r"build_encoder\(\.\.\., image_size=\.\.\.\)", "--model.image_size SIZE"),
)
"""What the library says of Python, and what is typed."""
_LONGEST = 3000  # characters of a message that is rewritten: names from somebody's table may stand in it
_MOST_ENDS = 20  # brackets that may close a call
_NO_CODE = (SyntaxError, ValueError, RecursionError, MemoryError)
_LOST = ("connection closed by peer", "connection reset by peer", "broken pipe")


def explain_failure(error: BaseException, *, workers: int = 0, resumable: bool = True) -> str | None:
    """The sentence for what the user can mend; None for other errors, whose traceback is wanted.

    Args:
        error: What ended the command.
        workers: Value of --data.workers.
        resumable: Whether the command has --resume.
    """
    again = "; the same command with --resume goes on" if resumable else ""
    if is_disk_full(error):
        return f"no space is left to write ({_root(error)}); free some, or choose an --out on another disk{again}"
    if is_dead_worker(error):
        return (
            f"a process that reads patches has died ({_first_line(error)}), as when memory runs out; lower"
            f" --data.workers (now {workers}; 0 reads in the command itself){again}"
        )
    if isinstance(error, RankFailedError) or is_lost_rank(error):
        reason = error if isinstance(error, RankFailedError) else "another process of this run has stopped"
        return f"{reason}{again}"
    if isinstance(error, BadPatch):
        return f"{as_typed(str(error))}; hsat check DATA lists all bad files"
    if isinstance(error, FloatingPointError | OSError | ValueError):
        return as_typed(str(error))
    return None


def as_typed(message: str) -> str:
    """A message of the library with the options of the command line in place of Python's calls and arguments.

    Args:
        message: What went wrong, and what to call.  One of more than 3000 characters stays as it is.

    Returns:
        What went wrong, and what to type.

    Example:
        >>> as_typed("remove them, or pass on_empty='skip'")
        'remove them, or pass --data.on_empty skip'
    """
    if len(message) > _LONGEST:
        return message
    for pattern, text in _PHRASES:
        message = re.sub(pattern, text, message)
    message = _replace_calls(message)
    message = re.sub(r"(?:call )?read_\w+((?: with [^()]*?)?) \(layout='(\w+)'\)", r"give --data.layout \2\1", message)
    message = re.sub(r"without split_folders\b", "without --data.split_folders", message)
    return _ARGUMENT.sub(lambda found: _as_option(found["name"], _value(found["value"])), message)


def _replace_calls(message: str) -> str:
    """read_csv(root, 't.csv', columns={...}) as the options that read the same."""
    while found := _CALL.search(message):
        end = next((end for end in _closing(message, found.end()) if _parsed(message[found.start("call") : end])), None)
        if end is None:
            break
        call = _parsed(message[found.start("call") : end])
        assert call is not None and isinstance(call.func, ast.Name)
        words = [f"give --data.layout {_LAYOUTS[call.func.id]}"]
        words += [_as_option("manifest", ast.literal_eval(one)) for one in call.args[1:]]
        words += [_as_option(one.arg, ast.literal_eval(one.value)) for one in call.keywords if one.arg]
        message = message[: found.start()] + " ".join(words) + message[end:]
    return message


def _closing(message: str, start: int) -> list[int]:
    return [at + 1 for at in range(start, len(message)) if message[at] == ")"][:_MOST_ENDS]


def _parsed(text: str) -> ast.Call | None:
    """The call that a text is, of which every argument is a constant; else None."""
    try:
        call = ast.parse(text, mode="eval").body
        if not isinstance(call, ast.Call):
            return None
        for one in [*call.args, *(keyword.value for keyword in call.keywords)]:
            ast.literal_eval(one)
    except _NO_CODE:
        return None
    return call


def _value(text: str) -> object:
    if text == "{...}":
        return "class=COLUMN,patient=COLUMN"
    try:
        return ast.literal_eval(text)
    except _NO_CODE:
        return text


def _as_option(name: str, value: object) -> str:
    if isinstance(value, dict):
        value = ",".join(f"{key}={one}" for key, one in value.items())
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return f"--data.{name} {shlex.quote(text)}"


def is_disk_full(error: BaseException) -> bool:
    """Whether a disk, a quota or a limit on the size of files was reached.

    torch and safetensors raise errors of their own then: torch beside the system's, safetensors with its number in the
    text.
    """
    return any(_number(one) in FULL for one in _chain(error))


def is_dead_worker(error: BaseException) -> bool:
    """Whether a process of a DataLoader was killed; torch raises a plain RuntimeError then."""
    return isinstance(error, RuntimeError) and "DataLoader worker (pid" in str(error)


def is_lost_rank(error: BaseException) -> bool:
    """Whether another rank has gone; gloo raises a plain RuntimeError then."""
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _LOST)


def _chain(error: BaseException | None) -> list[BaseException]:
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain


def _number(error: BaseException) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None


def _root(error: BaseException) -> str:
    return _first_line(next(one for one in _chain(error) if _number(one) in FULL))


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(". ")
