"""The entry point of `hsat`: one word chooses the command, the other words are its options."""

from __future__ import annotations

import difflib
import importlib
import logging
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from types import FrameType

import hsat

COMMANDS = {
    "train": "train an encoder with HSAT or HiDisc",
    "evaluate": "attack encoders and measure accuracy at patch, slide and patient level",
    "transfer": "attack some encoders and show the images to others",
    "certify": "certify the smoothed kNN vote",
    "budget": "count how few patches change the decision about a patient or slide",
    "universal": "fit one perturbation for all images and measure it",
    "export": "write attacked patches as files and measure the files",
    "report": "write one HTML page about run folders",
    "reproduce": "set our numbers beside those of the paper's tables",
    "compare": "measure what each convention of the published evaluation changes",
    "check": "list all bad files of a cohort: unreadable, equal, alike, odd in size, blank",
    "demo": "train and attack three encoders on a synthetic cohort",
}

RESUMABLE = ("train", "evaluate", "transfer", "certify", "budget", "export")


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command; what the user can mend ends the program with one message and status 1.

    Args:
        argv: The words after `hsat`; those of the process if none are given.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(overview())
        raise SystemExit(0 if words else 2)
    if words[0] in ("-V", "--version"):
        print(f"hsat {hsat.__version__}")
        return
    name, *options = words
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean hsat {near[0]}?" if near else f"commands are {', '.join(COMMANDS)}"
        raise SystemExit(f"error: hsat has no command {name!r}; {hint}")
    log_to_stderr()
    signal.signal(signal.SIGTERM, end_at_once)
    try:
        importlib.import_module(f"hsat.cli.{name}").main(options)
    except KeyboardInterrupt:
        raise SystemExit(interrupted(name, options, signal.SIGINT)) from None
    except TerminatedError:
        raise SystemExit(interrupted(name, options, signal.SIGTERM)) from None


class TerminatedError(BaseException):
    """SIGTERM came outside of a training step."""


def end_at_once(number: int, frame: FrameType | None) -> None:
    """Handle SIGTERM as Ctrl-C is handled: files are closed, partial ones removed."""
    raise TerminatedError


def interrupted(name: str, options: Sequence[str], number: int) -> int:
    """Print, once among several ranks, that a command was interrupted and how to go on.

    Args:
        name: The command.
        options: Its words.
        number: The signal.

    Returns:
        The exit status, 128 + number.
    """
    if os.environ.get("RANK", "0") == "0":
        from hsat.cli.ranks import command_to_resume

        hint = f"; to go on: {command_to_resume(name, options)}" if name in RESUMABLE else ""
        print(f"interrupted{hint}", file=sys.stderr)
    return 128 + number


def overview() -> str:
    """The help of `hsat` itself."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            "usage: hsat COMMAND [--option VALUE ...]",
            "",
            "Make histopathology encoders robust, and measure honestly how robust they are.",
            "",
            *lines,
            "",
            "hsat COMMAND --help lists the options of a command.  Examples:",
            "",
            "  hsat demo",
            "  hsat train --recipe hsat --out runs/hsat",
            "  hsat evaluate --checkpoint runs/hsat/best.safetensors --data.root /data/patches --data.layout folders",
        ]
    )


def log_to_stderr() -> None:
    """What the library logs, and warnings, go to standard error, a line each."""
    logger = logging.getLogger("hsat")
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
    warnings.simplefilter("default", UserWarning)
