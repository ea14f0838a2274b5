"""Everything that is wrong with a cohort's files, found in one pass: unreadable, equal, alike, odd in size, blank."""

from __future__ import annotations

import csv
import io
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from hsat.data.readers import BadPatch, read_patch
from hsat.data.records import PatchRecord
from hsat.data.separators import find_separator
from hsat.files import atomic_path, digest_file
from hsat.untrusted import as_cell, of_cell, open_regular, shown

Problem = Literal["unreadable", "contradicting", "duplicate", "near duplicate", "size", "blank"]
EXCLUDED: tuple[Problem, ...] = ("unreadable", "contradicting", "duplicate")
"""What an exclusion list leaves out unless it is told otherwise; the rest is for eyes to judge."""
PROBLEMS: tuple[Problem, ...] = (*EXCLUDED, "near duplicate", "size", "blank")
_MOST_BYTES = 256 << 20  # of a list of exclusions
_BLANK = 1.5 / 255  # standard deviation of each channel
_NEAR_BITS = 3  # of 64 that may differ
_NEAR_PIXELS = 4 / 255  # mean difference of 8 x 8 thumbnails
_BUCKET = 4096  # patches that are compared with each other at most, of those with one quarter of the hash in common


class FileProblem(NamedTuple):
    """One thing that is wrong with one file.

    Attributes:
        path: Relative to the root.
        problem: One of `PROBLEMS`.
        detail: In words.
    """

    path: str
    problem: Problem
    detail: str


@dataclass(frozen=True)
class FileCheck:
    """The result of `Cohort.check_files`.

    Attributes:
        files: How many were looked at.
        problems: Everything found, in cohort order for each kind.
        sizes: How many files have each size (height, width).
    """

    files: int
    problems: tuple[FileProblem, ...]
    sizes: Mapping[tuple[int, int], int]

    def __str__(self) -> str:
        counts = Counter(problem.problem for problem in self.problems)
        shown = [f"{counts[name]} {name}" for name in PROBLEMS if counts[name]]
        return f"{self.files} files: {', '.join(shown) or 'nothing is wrong'}"

    def paths(self, kinds: Sequence[Problem] = EXCLUDED) -> tuple[str, ...]:
        """The files that have one of these problems, once each.

        Args:
            kinds: Of `PROBLEMS`.

        Returns:
            Relative paths, to give to `Cohort.without`.

        Raises:
            ValueError: For an unknown problem.
        """
        if unknown := [kind for kind in kinds if kind not in PROBLEMS]:
            raise ValueError(f"unknown problem {unknown[0]!r}; there are {', '.join(PROBLEMS)}")
        return tuple(dict.fromkeys(problem.path for problem in self.problems if problem.problem in kinds))

    def write(self, path: str | os.PathLike[str], *, exclude: Sequence[Problem] = EXCLUDED) -> Path:
        """Write all problems as a CSV file with the columns path, problem, detail and exclude (yes or no).

        `read_exclusions` and `--data.exclude` leave out the rows that say yes; edit them as you see fit.  What a
        spreadsheet would take for a formula begins with an apostrophe.

        Args:
            path: The file; it appears whole or not at all.
            exclude: Problems whose rows say yes.

        Returns:
            The path.
        """
        left_out = set(self.paths(exclude))
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(("path", "problem", "detail", "exclude"))
        for one in self.problems:
            said = "yes" if one.problem in exclude and one.path in left_out else "no"
            writer.writerow((as_cell(one.path), one.problem, as_cell(one.detail), said))
        with atomic_path(Path(path)) as working:
            working.write_text(text.getvalue(), encoding="utf-8")
        return Path(path)


def read_exclusions(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """Paths to leave out: rows of a `FileCheck.write` file that say yes, or the lines of a plain text file.

    Columns may be separated by commas, semicolons or tabs, as spreadsheets write them.

    Args:
        path: The file, of at most 256 MiB.

    Returns:
        Relative paths, once each.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no regular file, no UTF-8 text or damaged, or a row says neither yes nor no.
    """
    name = os.fspath(path)
    try:
        with open_regular(path, kind="list of exclusions") as file:
            content = file.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise ValueError(f"the list of exclusions {name} has more than {_MOST_BYTES >> 20} MiB")
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"the list of exclusions {name} is no UTF-8 text: {error}") from error
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=find_separator(text.partition("\n")[0]))
    try:
        rows = [(reader.line_num, row) for row in reader if any(row)]
    except csv.Error as error:
        raise ValueError(f"the list of exclusions {name}, line {reader.line_num}: {error}") from error
    header = [cell.strip() for cell in rows[0][1]] if rows else []
    if "path" not in header:
        return tuple(dict.fromkeys(line.strip() for line in text.splitlines() if line.strip()))
    place, said, names = header.index("path"), header.index("exclude") if "exclude" in header else None, []
    for number, row in rows[1:]:
        answer = "yes" if said is None else (row[said] if said < len(row) else "").strip().lower()
        if answer not in ("yes", "no"):
            raise ValueError(f"{name}, row {number}: exclude is {shown(answer)}; write yes or no")
        if answer == "yes" and (place >= len(row) or not row[place].strip()):
            raise ValueError(f"{name}, row {number}: no path, and exclude is yes; write the path of a patch")
        names += [of_cell(row[place])] if answer == "yes" else []
    return tuple(dict.fromkeys(names))


class _Look(NamedTuple):
    """What one reading of a file gives; without an image all but `error` and `digest` say nothing."""

    error: str = ""
    digest: str = ""
    size: tuple[int, int] = (0, 0)
    blank: bool = False
    bits: int = 0
    thumbnail: np.ndarray | None = None


def check_patches(
    records: Sequence[PatchRecord],
    locate: Callable[[int], Path],
    *,
    kind: Literal["srh", "rgb"],
    workers: int | None = None,
    progress: Callable[[int], object] = lambda _: None,
) -> FileCheck:
    """Read every file once and list what is wrong; see `Cohort.check_files`.

    Args:
        records: The rows of a cohort.
        locate: The path of each.
        kind: What the files hold.
        workers: Threads; None takes one per processor.
        progress: Is called with 1 after each file.

    Returns:
        All problems.
    """

    def look(row: int) -> _Look:
        try:
            return _look(locate(row), kind)
        except (BadPatch, ValueError, OSError) as error:
            return _Look(error=getattr(error, "reason", "") or str(error))
        finally:
            progress(1)

    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        looks = list(pool.map(look, range(len(records))))
    sizes = Counter(one.size for one in looks if not one.error)
    problems = [
        FileProblem(row.path, "unreadable", one.error) for row, one in zip(records, looks, strict=True) if one.error
    ]
    problems += _equal_files(records, looks)
    problems += _alike_files(records, looks)
    usual = sizes.most_common(1)[0][0] if sizes else (0, 0)
    for row, one in zip(records, looks, strict=True):
        if not one.error and one.size != usual:
            problems.append(
                FileProblem(row.path, "size", f"{one.size[0]} x {one.size[1]}, most are {usual[0]} x {usual[1]}")
            )
        if one.blank:
            problems.append(FileProblem(row.path, "blank", "all pixels are of nearly one colour"))
    return FileCheck(len(records), tuple(problems), dict(sizes.most_common()))


def _look(path: Path, kind: Literal["srh", "rgb"]) -> _Look:
    image = read_patch(path, kind=kind)
    gray = image.mean(0, keepdim=True)[None]
    steps = F.interpolate(gray, (8, 9), mode="area")[0, 0]
    signs = (steps[:, 1:] > steps[:, :-1]).flatten()
    bits = int.from_bytes(np.packbits(signs.numpy()).tobytes(), "big")
    thumbnail = F.interpolate(image[None], (8, 8), mode="area")[0]
    return _Look(
        digest=digest_file(path),
        size=(image.shape[1], image.shape[2]),
        blank=_is_blank(image),
        bits=bits,
        thumbnail=(thumbnail * 255).round().byte().numpy(),
    )


def _is_blank(image: Tensor) -> bool:
    return bool((image.flatten(1).std(dim=1, correction=0) < _BLANK).all())


def _equal_files(records: Sequence[PatchRecord], looks: Sequence[_Look]) -> Iterator[FileProblem]:
    """Copies of an earlier file; all of them where their classes contradict each other."""
    copies: dict[str, list[int]] = {}
    for i, one in enumerate(looks):
        if one.digest:
            copies.setdefault(one.digest, []).append(i)
    for rows in copies.values():
        first = records[rows[0]]
        if len(rows) == 1:
            continue
        if len({records[i].class_name for i in rows}) > 1:
            for i in rows:
                other = next(j for j in rows if records[j].class_name != records[i].class_name)
                detail = f"the same file as {records[other].path}, of class {records[other].class_name!r}"
                yield FileProblem(records[i].path, "contradicting", detail)
            continue
        for i in rows[1:]:
            where = [f" in split {first.split!r}"] if records[i].split != first.split else []
            where += [f" of patient {first.patient!r}"] if records[i].patient != first.patient else []
            yield FileProblem(records[i].path, "duplicate", f"the same file as {first.path}{' and'.join(where)}")


def _alike_files(records: Sequence[PatchRecord], looks: Sequence[_Look]) -> Iterator[FileProblem]:
    """Files that look like one of another split (of another patient, where there are no splits), and are not equal."""
    chosen = [i for i, one in enumerate(looks) if not one.error and not one.blank]
    if not chosen:
        return
    bits = np.array([looks[i].bits for i in chosen], dtype=np.uint64)
    small = np.stack([np.asarray(looks[i].thumbnail) for i in chosen]).reshape(len(chosen), -1).astype(np.float32) / 255
    by_split = len({record.split for record in records}) > 1
    group = np.unique([record.split if by_split else record.patient for record in records], return_inverse=True)[1][
        chosen
    ]
    seen: set[int] = set()
    for quarter in range(4):  # hashes that differ in three bits have one quarter in common
        key = (bits >> np.uint64(16 * quarter)) & np.uint64(0xFFFF)
        order = np.argsort(key, kind="stable")
        for bucket in np.split(order, np.flatnonzero(np.diff(key[order])) + 1):
            rows = bucket[:_BUCKET]
            for place, row in enumerate(rows[1:], start=1):
                before = rows[:place]
                near = np.bitwise_count(bits[before] ^ bits[row]) <= _NEAR_BITS
                near &= group[before] != group[row]
                near[near] = np.abs(small[before[near]] - small[row]).mean(1) <= _NEAR_PIXELS
                others = [j for j in before[near] if looks[chosen[j]].digest != looks[chosen[row]].digest]
                if others and int(row) not in seen:
                    seen.add(int(row))
                    other = records[chosen[others[0]]]
                    where = f"split {other.split!r}" if by_split else f"patient {other.patient!r}"
                    yield FileProblem(
                        records[chosen[row]].path, "near duplicate", f"looks like {other.path} of {where}"
                    )
