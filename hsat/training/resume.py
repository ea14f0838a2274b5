"""Checkpoints of a run in progress: written whole or not at all, and resumed bit for bit."""

from __future__ import annotations

import os
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hsat.models.state_dicts import list_entries
from hsat.training.checkpoint_file import read_checkpoint, write_checkpoint
from hsat.training.gradients import non_finite_state

FORMAT = "hsat training 1"
LISTED = 8


class Stateful(Protocol):
    """An optimiser, a learning-rate schedule, a gradient scaler: whatever keeps its state in a dict."""

    def state_dict(self) -> dict[str, Any]:
        """The state."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any:
        """Take the state back."""


class TrainingState(NamedTuple):
    """Where a run stands: what `save_checkpoint` was given beside the objects with a state of their own."""

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

    It holds the states of model (DistributedDataParallel unwrapped), optimizer, scheduler and generators, the random
    states of python, numpy, torch and CUDA, and epoch, step, config and extra: tensors and plain values only, so that
    reading it runs no code.  numpy values become tensors or numbers, paths become strings.

    The file appears under its name when it is complete and on the disk: a process killed at any moment, or a full disk,
    leaves the previous checkpoint as it was, and at most a file named `.<name>.partial` beside it, which the next save
    overwrites.  With several ranks all of them call this, as each has random states of its own; rank 0 writes.

    A state that is not finite is not written, for it would take the place of the last one that a run can go on from:
    FloatingPointError, on all ranks, names the entries of model and optimizer that hold NaN or infinity.  (A constant
    mask of -inf belongs into a buffer with persistent=False.)
    Raises TypeError naming the entry that is neither a tensor nor a plain value.
    """
    path = Path(path)
    parts = {"optimizer": optimizer, "scheduler": scheduler}
    ranks = _of_all_ranks(
        {
            "random": _random_states(generators or {}),
            "not finite": non_finite_state(_unwrapped(model), optimizer),
        }
    )
    for rank, values in enumerate(ranks):
        if entries := values["not finite"]:
            raise FloatingPointError(
                f"{path} was not written{' and is as it was before' if path.exists() else ''}, for the state"
                f"{f' of rank {rank}' if len(ranks) > 1 else ''} is not finite in {list_entries(entries)}"
            )
    content = {
        "format": FORMAT,
        "model": _unwrapped(model).state_dict(),
        **{name: part.state_dict() for name, part in parts.items() if part is not None},
        "random": [values["random"] for values in ranks],
        "epoch": epoch,
        "step": step,
        "config": config,
        "extra": extra or {},
    }
    if not _several_ranks() or dist.get_rank() == 0:
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
    Values go to the devices where the objects live.  restore_random=False leaves all random states and generators as
    they are (for another number of ranks, say).  For the weights alone use `hsat.models.load_checkpoint`.

    Only tensors and plain values are read (weights_only); nothing in the file can run code.
    Raises FileNotFoundError; ValueError for a file that is empty, an HTML page, a Git LFS pointer, truncated, damaged
    or no training checkpoint, and, before anything is changed, for keys or shapes that differ, listing them.
    """
    path, model = Path(path), _unwrapped(model)
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
    mine = _of_this_rank(path, content["random"]) if restore_random else None
    if mine is not None:
        _check_names(path, "generators", set(mine["generators"]), set(generators or {}))
    for name, part in parts.items():
        try:
            part.load_state_dict(content[name])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"the {name} of {path} does not fit the one given: {error}") from error
    model.load_state_dict(content["model"])
    if mine is not None:
        _restore_random(mine, generators or {})
    return TrainingState(content["epoch"], content["step"], content["config"], content["extra"])


def _check_content(path: Path, content: Mapping[str, Any]) -> None:
    """Raise ValueError naming the entries that are missing or of another kind than `save_checkpoint` writes."""
    kinds = {"model": dict, "random": list, "epoch": int, "step": int, "config": dict, "extra": dict}
    if lost := sorted(kinds.keys() - content.keys()):
        raise ValueError(f"{path} is a damaged training checkpoint: it lacks {_listed(lost)}")
    wrong = [name for name, kind in kinds.items() if type(content[name]) is not kind]
    wrong += [name for name in ("epoch", "step") if name not in wrong and content[name] < 0]
    if "random" not in wrong:
        wanted = {"python", "numpy", "torch", "cuda", "generators"}
        if not all(isinstance(each, dict) and wanted <= each.keys() for each in content["random"]):
            wrong.append("random")
    if "model" not in wrong and not all(isinstance(key, str) for key in content["model"]):
        wrong.append("model")
    if wrong:
        raise ValueError(f"{path} is a damaged training checkpoint: {_listed(wrong)} cannot be used")


def _unwrapped(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, DistributedDataParallel) else model


def _several_ranks() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


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
    random.setstate(_tuples(states["python"]))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if states["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"])
    for key, generator in generators.items():
        generator.set_state(states["generators"][key])


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value


def _of_all_ranks(states: dict[str, Any]) -> list[Any]:
    if not _several_ranks():
        return [states]
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, states)
    return every


def _of_this_rank(path: Path, states: list[dict[str, Any]]) -> dict[str, Any]:
    ranks, rank = (dist.get_world_size(), dist.get_rank()) if _several_ranks() else (1, 0)
    if len(states) != ranks:
        raise ValueError(
            f"{path} holds the random states of {len(states)} ranks, and this run has {ranks}; resume with"
            f" {len(states)}, or give restore_random=False and go on with fresh draws"
        )
    return states[rank]


def _check_names(path: Path, kind: str, held: set[str], given: set[str]) -> None:
    if held != given:
        raise ValueError(
            f"{path} holds the {kind} {_listed(sorted(held))}, but {_listed(sorted(given))} were given;"
            " resuming needs the same ones"
        )


def _check_model(path: Path, held: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    missing = [key for key in wanted if key not in held]
    unknown = [key for key in held if key not in wanted]
    differ = [
        f"{key} {_form(held[key])} for {_form(wanted[key])}"
        for key in wanted
        if key in held and _form(held[key]) != _form(wanted[key])
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


def _form(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    return type(value).__name__


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more if names else "none"
