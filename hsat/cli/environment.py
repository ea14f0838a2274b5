"""What the environment says about the processes of a run: those of torchrun, or of a launcher that connects none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

# (rank, counts of which the first one set decides, command) of launchers that start processes and connect none
LAUNCHERS = (
    ("SLURM_PROCID", ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"), "srun"),
    ("OMPI_COMM_WORLD_RANK", ("OMPI_COMM_WORLD_SIZE",), "mpirun"),
)
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


class Place(NamedTuple):
    """Where a process stands in a run: number `rank` of `size`, number `local` of its machine (None: not said).

    address, port: where rank 0 keeps the store in which the processes meet.
    """

    rank: int
    size: int
    local: int | None
    address: str
    port: int


def place_of(environment: Mapping[str, str]) -> Place | None:
    """The place that torchrun's variables give this process.

    Args:
        environment: Variables by name.

    Returns:
        The place; None for a process by itself.

    Raises:
        ValueError: Where the variables are incomplete or make no sense (RANK=0 WORLD_SIZE=2 without MASTER_ADDR, RANK=5
            of WORLD_SIZE=2), and where srun or mpirun started several processes without them: each would run by itself,
            and all would write into one folder.  It says what to type.
    """
    given = {name: environment[name] for name in RANK_VARIABLES if environment.get(name)}
    if not given and "TORCHELASTIC_RUN_ID" not in environment:
        _refuse_unconnected(environment)
        return None
    shown = ", ".join(f"{name}={value}" for name, value in given.items()) or "TORCHELASTIC_RUN_ID"
    _require(environment, ("RANK", "WORLD_SIZE"), shown, given)
    rank, size = (_number(environment, name, given) for name in ("RANK", "WORLD_SIZE"))
    if not 0 <= rank < size:
        raise ValueError(f"RANK={rank} is no rank of WORLD_SIZE={size}: ranks are 0 to {size - 1}; {_advice(given)}")
    if size == 1 and "TORCHELASTIC_RUN_ID" not in environment:
        return None
    _require(environment, ("MASTER_ADDR", "MASTER_PORT"), shown, given)
    port = _number(environment, "MASTER_PORT", given)
    if not 0 < port < 1 << 16:
        raise ValueError(f"MASTER_PORT={port} is no port: ports are 1 to 65535; {_advice(given)}")
    local = _number(environment, "LOCAL_RANK", given) if "LOCAL_RANK" in given else None
    if local is not None and local < 0:
        raise ValueError(f"LOCAL_RANK={local} is below 0; {_advice(given)}")
    return Place(rank, size, local, environment["MASTER_ADDR"], port)


def _require(environment: Mapping[str, str], names: tuple[str, ...], shown: str, given: Mapping[str, str]) -> None:
    if missing := [name for name in names if not environment.get(name)]:
        raise ValueError(f"the environment has {shown} but no {' and no '.join(missing)}; {_advice(given)}")


def _number(environment: Mapping[str, str], name: str, given: Mapping[str, str]) -> int:
    try:
        return int(environment[name])
    except ValueError:
        raise ValueError(f"{name} in the environment is {environment[name]!r}, no integer; {_advice(given)}") from None


def _advice(given: Mapping[str, str]) -> str:
    variables = " ".join(given) or "TORCHELASTIC_RUN_ID"
    return (
        "start all processes by torchrun --nproc_per_node=N SCRIPT ..., which sets these variables, or, for one process"
        f" by itself, type unset {variables}"
    )


def _refuse_unconnected(environment: Mapping[str, str]) -> None:
    for rank, counts, command in LAUNCHERS:
        name = next((name for name in counts if environment.get(name, "").isdecimal()), None)
        if not environment.get(rank, "").isdecimal() or name is None or int(environment[name]) < 2:
            continue
        # a batch script, which runs once, has the count of the whole job and process number 0
        if name == "SLURM_NTASKS" and environment[rank] == "0":
            continue
        count = environment[name]
        raise ValueError(
            f"{command} started {count} processes ({name}={count}, {rank}={environment[rank]}) that do not know of one"
            f" another: each would run by itself and write into the same folder. For one run of {count} processes let"
            f" {command} start torchrun once per machine: {command} ... torchrun --nproc_per_node=N SCRIPT ...; for one"
            f" process, {command} -n 1; for separate runs with an --out each, type unset {rank} before the command"
        )
