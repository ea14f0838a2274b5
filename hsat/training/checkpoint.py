"""Checkpoints of a run in progress: written whole or not at all, read without running code, resumed bit for bit."""

from __future__ import annotations

import glob
import os
import pickle
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple
from zipfile import ZipFile, is_zipfile

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from hsat.distributed import gather_objects, world_rank, world_size
from hsat.files import atomic_path
from hsat.models.state_dicts import list_entries
from hsat.tensor_files import UNREADABLE, check_archive, reason_of, refuse_text, refused_object
from hsat.training.gradients import Stateful, non_finite_state
from hsat.training.step import unwrap_parallel
from hsat.training.stored_state import (
    check_model_values,
    check_schedule_state,
    checked_optimizer_state,
    checked_random_states,
)
from hsat.untrusted import open_regular

FORMAT = "hsat training 1"
LISTED = 8


class RandomStateMismatch(ValueError):
    """A checkpoint holds the random states of another number of ranks than this run has."""


class TrainingState(NamedTuple):
    """Where a run stands: what `save_checkpoint` was given beside the objects with a state of their own.

    Attributes:
        epoch: The epoch to go on with.
        step: Number of steps that are done.
        config: The settings of the run.
        extra: What else was saved.
    """

    epoch: int
    step: int
    config: dict[str, Any]
    extra: dict[str, Any]


def save_checkpoint(
    path: str | os.PathLike[str],
    *,
    model: nn.Module,
    optimizer: Stateful | None = None,
    scheduler: Stateful | None = None,
    epoch: int,
    step: int,
    config: Mapping[str, Any],
    generators: Mapping[str, torch.Generator] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Write a checkpoint from which `load_training_state` resumes the run; returns its path.

    The file holds the states of model (DistributedDataParallel unwrapped), optimizer, scheduler and generators, the
    random states of python, numpy, torch and CUDA, and epoch, step, config and extra: tensors and plain values only, so
    that reading it runs no code.  numpy values become tensors or numbers, paths become strings.

    The file appears under its name when it is complete and on the disk: a process killed at any moment, or a full disk,
    leaves the previous checkpoint as it was, and at most a file named `.<name>-*.partial` beside it, which the next
    save removes.  With several ranks all of them call this, as each has random states of its own; rank 0 writes.

    Args:
        path: The file.
        model: The network.
        optimizer: Its optimiser.
        scheduler: The schedule of the learning rate.
        epoch: The epoch to go on with.
        step: The number of steps that are done.
        config: The settings of the run.
        generators: Generators whose states belong to the run, by name.
        extra: What else belongs to it.

    Returns:
        The path.

    Raises:
        FloatingPointError: On all ranks, naming the entries of model and optimizer that hold NaN or infinity: such a
            state is not written, for it would take the place of the last one that a run can go on from.  (A constant
            mask of -inf belongs into a buffer with persistent=False.)
        TypeError: Naming the entry that is neither a tensor nor a plain value.
    """
    path = Path(path)
    parts = {"optimizer": optimizer, "scheduler": scheduler}
    by_rank = gather_objects((_random_states(generators or {}), non_finite_state(unwrap_parallel(model), optimizer)))
    for rank, (_, entries) in enumerate(by_rank):
        if entries:
            raise FloatingPointError(
                f"{path} was not written{' and is as it was before' if path.exists() else ''}, for the state"
                f"{f' of rank {rank}' if len(by_rank) > 1 else ''} is not finite in {list_entries(entries)}"
            )
    content = {
        "format": FORMAT,
        "model": unwrap_parallel(model).state_dict(),
        **{name: part.state_dict() for name, part in parts.items() if part is not None},
        "random": [states for states, _ in by_rank],
        "epoch": epoch,
        "step": step,
        "config": config,
        "extra": extra or {},
    }
    if world_rank() == 0:
        write_checkpoint(path, content)
    return path


def load_training_state(
    path: str | os.PathLike[str],
    *,
    model: nn.Module,
    optimizer: Stateful | None = None,
    scheduler: Stateful | None = None,
    generators: Mapping[str, torch.Generator] | None = None,
    restore_random: bool = True,
) -> TrainingState:
    """Put a run back to where `save_checkpoint` was called; returns epoch, step, config and extra.

    Everything in the file is put back into the objects given, which must be the ones that were saved: the same keys,
    shapes and dtypes in the model, an optimizer, scheduler or generator for each one in the file and none beside.
    Values go to the devices where the objects live.  For the weights alone use `hsat.models.load_checkpoint`.
    Only tensors and plain values are read (weights_only); nothing in the file can run code.

    Args:
        path: The file.
        model: The network; DistributedDataParallel is unwrapped.
        optimizer: Its optimiser.
        scheduler: The schedule of the learning rate.
        generators: Generators by the names under which they were saved.
        restore_random: Whether to restore random states and generators; without it they are left as they are.

    Returns:
        Epoch, step, config and extra.

    Raises:
        FileNotFoundError: If there is no file.
        RandomStateMismatch: Before anything is changed, if the file is of another number of ranks.
        ValueError: For a file that is empty, an HTML page, a Git LFS pointer, truncated, damaged or no training
            checkpoint, and, before anything is changed, for keys, shapes, dtypes or options that differ, for NaN and
            infinity, and for states that a scheduler or a generator cannot take in, naming them.
    """
    path, model = Path(path), unwrap_parallel(model)
    content = read_checkpoint(path)
    if content.get("format") != FORMAT:
        raise ValueError(
            f"{path} is no training checkpoint of this version ({FORMAT!r});"
            f" it holds {_listed(sorted(map(str, content)))}. hsat.models.load_checkpoint reads weights alone"
        )
    _check_content(path, content)
    parts = {name: part for name, part in (("optimizer", optimizer), ("scheduler", scheduler)) if part is not None}
    _check_names(path, "states", {"optimizer", "scheduler"} & content.keys(), set(parts))
    _check_model(path, content["model"], model.state_dict())
    states = _states_of_rank(path, content["random"]) if restore_random else None
    if states is not None:
        _check_names(path, "generators", set(states["generators"]), set(generators or {}))
    try:
        check_model_values(content["model"])
        states = None if states is None else checked_random_states(states, generators or {})
    except ValueError as error:
        raise ValueError(f"{path} is a damaged training checkpoint: {error}") from error
    for name, part in parts.items():
        with _naming(path, name):
            content[name] = _checked_part(content[name], part)
    for name, part in parts.items():
        with _naming(path, name):
            part.load_state_dict(content[name])
    model.load_state_dict(content["model"])
    if states is not None:
        _restore_random(states, generators or {})
    return TrainingState(content["epoch"], content["step"], content["config"], content["extra"])


@contextmanager
def _naming(path: Path, name: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"the {name} of {path} does not fit the one given: {error}") from error


def _checked_part(stored: Any, part: Stateful) -> Any:
    """What `part.load_state_dict` can be given; ValueError for what does not fit it."""
    if isinstance(part, torch.optim.Optimizer):
        return checked_optimizer_state(stored, part)
    if isinstance(part, LRScheduler):
        check_schedule_state(stored, part.state_dict(), part)
    return stored


def _check_content(path: Path, content: Mapping[str, Any]) -> None:
    """Raise ValueError naming the entries that are missing or of another kind than `save_checkpoint` writes."""
    kinds = {"model": dict, "random": list, "epoch": int, "step": int, "config": dict, "extra": dict}
    if lost := sorted(kinds.keys() - content.keys()):
        raise ValueError(f"{path} is a damaged training checkpoint: it lacks {_listed(lost)}")
    wrong = [name for name, kind in kinds.items() if type(content[name]) is not kind]
    wrong += [name for name in ("epoch", "step") if name not in wrong and content[name] < 0]
    if "random" not in wrong:
        names = {"python", "numpy", "torch", "cuda", "generators"}
        if not all(isinstance(states, dict) and names <= states.keys() for states in content["random"]):
            wrong.append("random")
        elif not all(isinstance(states["generators"], dict) for states in content["random"]):
            wrong.append("generators")
    if "model" not in wrong and not all(isinstance(key, str) for key in content["model"]):
        wrong.append("model")
    if wrong:
        raise ValueError(f"{path} is a damaged training checkpoint: {_listed(wrong)} cannot be used")


def _random_states(generators: Mapping[str, torch.Generator]) -> dict[str, Any]:
    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "generators": {key: generator.get_state() for key, generator in generators.items()},
    }


def _restore_random(states: Mapping[str, Any], generators: Mapping[str, torch.Generator]) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if states["cuda"]:
        torch.cuda.set_rng_state_all(states["cuda"])
    for key, generator in generators.items():
        generator.set_state(states["generators"][key])


def _states_of_rank(path: Path, states: list[dict[str, Any]]) -> dict[str, Any]:
    if len(states) != world_size():
        raise RandomStateMismatch(
            f"{path} holds the random states of {len(states)} ranks, and this run has {world_size()}; resume with"
            f" {len(states)}, or give restore_random=False and go on with fresh draws"
        )
    return states[world_rank()]


def _check_names(path: Path, kind: str, stored: set[str], given: set[str]) -> None:
    if stored != given:
        raise ValueError(
            f"{path} holds the {kind} {_listed(sorted(stored))}, but {_listed(sorted(given))} were given;"
            " resuming needs the same ones"
        )


def _check_model(path: Path, stored: Mapping[str, object], target: Mapping[str, Tensor]) -> None:
    missing = [key for key in target if key not in stored]
    unknown = [key for key in stored if key not in target]
    differ = [
        f"{key} {_form(stored[key])} for {_form(target[key])}"
        for key in target
        if key in stored and _form(stored[key]) != _form(target[key])
    ]
    faults = [
        f"{text}: {_listed(keys)}"
        for text, keys in (
            (f"{len(missing)} entries are missing", missing),
            (f"{len(unknown)} entries have no place", unknown),
            (f"{len(differ)} shapes or dtypes differ", differ),
        )
        if keys
    ]
    if faults:
        raise ValueError(f"the model in {path} does not fit the one given; " + "; ".join(faults))


def _form(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    return type(value).__name__


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more if names else "none"


def write_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Replace `path` by a file of `content`, which appears whole or not at all, also after a loss of power.

    Raises TypeError, before anything is written, naming the entry that is neither a tensor nor a plain value.
    """
    values = _to_plain(content, "")
    for leftover in path.parent.glob(f".{glob.escape(path.name)}-*.partial"):  # of a process that was killed
        leftover.unlink(missing_ok=True)
    with atomic_path(path) as working, working.open("wb") as file:
        torch.save(values, file)
    _sync_folder(path.parent)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The dict in a file that torch.save wrote, on the CPU.

    The checksums in the file are compared with its contents, which torch itself does not do.

    Args:
        path: The file.

    Returns:
        Its contents.

    Raises:
        ValueError: For another or a damaged file, saying what it is instead.
    """
    with open_regular(path, kind="checkpoint") as file:
        size = os.fstat(file.fileno()).st_size
        refuse_text(path, size, file.read(256), kind="checkpoint")
        content = _load_archive(path, file, size)
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, and a checkpoint is a dict")
    return content


def _load_archive(path: Path, file: IO[bytes], size: int) -> Any:
    try:
        check_archive(file, size)
        _compare_checksums(file)
        file.seek(0)
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        name = refused_object(error)
        shown = f": {name}" if name else ""
        raise ValueError(f"{path} holds more than tensors and plain values, or is damaged{shown}") from error
    except UNREADABLE as error:
        raise ValueError(f"{path} ({size} bytes) is truncated, damaged or no checkpoint: {reason_of(error)}") from error


def _compare_checksums(file: IO[bytes]) -> None:
    """Raise BadZipFile or ValueError where a file of today's format was damaged; older formats have no checksums."""
    if is_zipfile(file):
        with ZipFile(file) as archive:
            if (damaged := archive.testzip()) is not None:
                raise ValueError(f"the checksum of {damaged} in it is another")


def _to_plain(value: Any, where: str) -> Any:
    """The value as tensors and plain python, or TypeError naming where something else was found."""
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str | int):
                raise TypeError(f"{where or 'the checkpoint'} has the key {key!r}; keys must be strings or integers")
        return {key: _to_plain(item, f"{where}.{key}" if where else str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [_to_plain(item, f"{where}[{place}]") for place, item in enumerate(value)]
        return tuple(items) if isinstance(value, tuple) else items
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        value = torch.from_numpy(value.copy())
    elif isinstance(value, np.generic):
        value = value.item()
    elif isinstance(value, os.PathLike):
        value = os.fspath(value)
    if value is None or isinstance(value, Tensor) or type(value) in {bool, int, float, str, bytes}:
        return value
    raise TypeError(
        f"{where} is a {type(value).__name__}; a checkpoint holds tensors and plain values only, so that reading it"
        " runs no code. Save what it is made of"
    )


def _sync_folder(folder: Path) -> None:
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # not possible everywhere; the file itself is on the disk
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
